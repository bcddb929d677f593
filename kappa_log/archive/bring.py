"""Bring: an archive into an empty log, as it was: positions, chain, ledger and all.

All in one transaction. Each file is hashed before it is parsed and the chain goes
along with the events that are inserted, so at the commit the new log's head is proved
to be the archive's; whatever is wrong, and a kill, leave the log as empty as before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa
import sqlalchemy as sa

from kappa_log.archive import proof
from kappa_log.archive.manifest import File, Segment
from kappa_log.archive.reader import Archive
from kappa_log.archive.scan import SLICE, batches, scan
from kappa_log.archive.snapshot import ledger_schema, ledger_tables
from kappa_log.chain import Chain, Lists
from kappa_log.errors import VerificationError
from kappa_log.events import Position, from_micros
from kappa_log.storage import log, transfer
from kappa_log.storage.bulk import time_shift
from kappa_log.storage.database import Database
from kappa_log.storage.transfer import ARCHIVED
from kappa_log.verify import OnStep


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an import brought in."""

    url: str
    position: Position
    head: str
    """Head of the chain in hex: the archive's, and now the log's."""
    sources: int
    checkpoints: int
    duplicates: int
    failures: int
    seconds: float


class Importer:
    """Brings one archive into one empty log.

    Args:
        database: The log.
        archive: Where from.
        step: Called as it goes on.
    """

    def __init__(
        self, database: Database, archive: Archive, step: OnStep = lambda *_: None
    ) -> None:
        self._database = database
        self._archive = archive
        self._manifest = archive.manifest
        self._step = step
        self._shift = time_shift(database)
        names = {source.id: source.name for source in self._manifest.sources}
        self._chain = Chain(names)

    def run(self, connection: sa.Connection) -> ImportReport:
        """Bring all of it in.

        Args:
            connection: Write transaction; an error must roll it back.

        Raises:
            UsageError: The log is not empty.
            ArchiveDamaged: A file is missing or not what was written.
            VerificationError: The events do not hash to the archive's heads.
        """
        started = time.perf_counter()
        database, manifest = self._database, self._manifest
        transfer.require_empty(connection, database)
        tables = ledger_tables(database.tables)
        every = [database.tables.sources, database.tables.events, *tables.values()]
        with transfer.indexes_at_the_end(connection, every):
            self._bring_sources(connection)
            transfer.insert(
                connection, database.tables.events, ARCHIVED, self._events()
            )
            self._check_end()
            for name, table in tables.items():
                self._step(name, 0, 1)
                rows = self._ledger(manifest.ledger[name], ledger_schema(table))
                names = [column.name for column in table.c]
                transfer.insert(connection, table, names, rows)
            self._step("indexes", 0, 1)
        transfer.continue_ids(connection, database, [t for t in every if "id" in t.c])
        log.move_head(
            connection,
            database,
            log.head(connection, database),
            log.Head(manifest.position, self._chain.head, manifest.recorded_at),
        )
        transfer.set_erasure_epoch(connection, database, manifest.erasure_epoch)
        return ImportReport(
            url=self._archive.store.url,
            position=manifest.position,
            head=manifest.head,
            sources=len(manifest.sources),
            checkpoints=manifest.ledger["checkpoints"].rows,
            duplicates=manifest.ledger["duplicates"].rows,
            failures=manifest.ledger["failures"].rows,
            seconds=round(time.perf_counter() - started, 6),
        )

    def _bring_sources(self, connection: sa.Connection) -> None:
        rows = [
            {"id": s.id, "name": s.name, "created_at": from_micros(s.created_at)}
            for s in self._manifest.sources
        ]
        if rows:
            connection.execute(self._database.tables.sources.insert(), rows)

    def _events(self) -> Iterator[Sequence[Any]]:
        """Yield the events as rows, the chain going along."""
        for part in scan(self._archive.store, self._manifest.segments, ARCHIVED):
            for start in range(0, part.table.num_rows, SLICE):
                page = part.table.slice(start, SLICE)
                values = proof.lists(page)
                self._extend(part.segment, values)
                values["payload"] = page.column("payload").to_pylist()
                for name in ("event_time", "recorded_at"):
                    values[name] = self._shifted(values[name])
                yield from zip(*(values[name] for name in ARCHIVED), strict=True)
                self._step("events", self._chain.position, self._manifest.position)
            if part.is_last and self._chain.head.hex() != part.segment.head:
                raise self._not_its_head(part.segment)

    def _extend(self, segment: Segment, values: Lists) -> None:
        try:
            self._chain.extend(values)
        except VerificationError as error:
            raise self._archive.store.damaged(segment.path, str(error)) from None

    def _not_its_head(self, segment: Segment) -> Exception:
        why = "its events do not hash to the manifest's head"
        return self._archive.store.damaged(segment.path, why)

    def _check_end(self) -> None:
        reached = (self._chain.position, self._chain.head.hex())
        if reached != (self._manifest.position, self._manifest.head):
            msg = (
                f"the archive at {self._archive.store.url} ends at position "
                f"{reached[0]:,}, not at the manifest's; nothing was kept"
            )
            raise VerificationError(msg)

    def _shifted(self, values: Sequence[int | None]) -> Sequence[int | None]:
        shift = self._shift
        if not shift:
            return values
        return [None if value is None else value - shift for value in values]

    def _ledger(self, file: File, schema: pa.Schema) -> Iterator[Sequence[Any]]:
        """Yield the rows of a table of the ledger."""
        for batch in batches(self._archive.store, file, schema):
            columns = []
            for field in schema:
                column = batch.column(field.name)
                if pa.types.is_timestamp(field.type):
                    values = column.cast(pa.int64()).to_pylist()
                    columns.append(self._shifted(values))
                else:
                    columns.append(column.to_pylist())
            yield from zip(*columns, strict=True)
