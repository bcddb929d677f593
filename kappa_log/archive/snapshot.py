"""Snapshot: the ledger and the rows of live builds, as of one moment, as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pyarrow as pa
import sqlalchemy as sa

from kappa_log.archive import layout
from kappa_log.archive.fields import field_of
from kappa_log.archive.manifest import File, Rows, Source
from kappa_log.archive.store import Sink, Store
from kappa_log.archive.writing import PAGE, write_pages
from kappa_log.events import to_micros
from kappa_log.storage import builds, log, transfer
from kappa_log.storage.builds import POSITION_COLUMN, Build
from kappa_log.storage.database import Database
from kappa_log.storage.schema import Instant, Tables
from kappa_log.storage.transfer import Columns


class Snapshot(msgspec.Struct, frozen=True):
    """The log at one moment, beside its events."""

    head: log.Head
    erasure_epoch: int
    sources: list[Source]
    ledger: dict[str, File]
    projections: list[Rows]
    bytes_written: int

    @property
    def names(self) -> dict[int, str]:
        """source_id → name."""
        return {source.id: source.name for source in self.sources}


class SnapshotWriter:
    """Writes what is as of one moment; a file that is there already is left alone.

    Args:
        database: The log.
        store: Where to.
        known: Path → file, of the files that are there.
    """

    def __init__(
        self, database: Database, store: Store, known: dict[str, File]
    ) -> None:
        self._database = database
        self._store = store
        self._known = known
        self._written = 0

    def write(self, connection: sa.Connection, step: Callable[[str], None]) -> Snapshot:
        """Write the ledger and the rows of all live builds.

        Args:
            connection: Transaction with one snapshot.
            step: Called with what comes next.
        """
        database = self._database
        ledger = {}
        for name, table in ledger_tables(database.tables).items():
            step(name)
            ledger[name] = self._ledger(connection, name, table)
        rows = []
        for build in builds.of(connection, database):
            if build.role == "live":
                step(build.projection)
                rows.append(self._rows(connection, build))
        return Snapshot(
            head=log.head(connection, database),
            erasure_epoch=transfer.erasure_epoch(connection, database),
            sources=_sources(connection, database.tables.sources),
            ledger=ledger,
            projections=sorted(rows, key=lambda found: found.projection),
            bytes_written=self._written,
        )

    def _ledger(self, connection: sa.Connection, name: str, table: sa.Table) -> File:
        pages = transfer.table_rows(connection, self._database, table, PAGE)
        with self._store.writing() as sink:
            rows = write_pages(sink, ledger_schema(table), pages)
            file = sink.done(layout.ledger_path(name, sink.sha256), rows)
            self._leave_known(sink, file.path)
        return file

    def _rows(self, connection: sa.Connection, build: Build) -> Rows:
        kinds = [c.kind for c in (*build.layout.keys, *build.layout.fields)]
        pages = transfer.build_rows(connection, self._database, build, PAGE)
        path = layout.rows_path(build.projection, build.number, build.cursor)
        with self._store.writing() as sink:
            plain = (self._plain(kinds, page) for page in pages)
            rows = write_pages(sink, rows_schema(build), plain)
            known = self._known.get(path)
            if known is not None and known.sha256 != sink.sha256:
                # A log that was set up anew counts its builds from 1 again. Never in
                # place: until the new manifest is there, the old file counts.
                path = path.replace(".parquet", f"-{sink.sha256[:8]}.parquet")
            file = sink.done(path, rows)
            self._leave_known(sink, path)
        return Rows(
            **msgspec.structs.asdict(file),
            projection=build.projection,
            version=build.version,
            build=build.number,
            position=build.cursor,
            mixed=build.mixed is not None,
        )

    def _leave_known(self, sink: Sink, path: str) -> None:
        known = self._known.get(path)
        if known is not None and known.sha256 == sink.sha256:
            sink.path = None
        else:
            self._written += sink.bytes

    def _plain(self, kinds: Sequence[str], page: Columns) -> Columns:
        """Return the columns of a build as Parquet holds them."""
        converts = _FROM_SQLITE if self._database.is_sqlite else _FROM_POSTGRESQL
        found: Columns = []
        for kind, values in zip([*kinds, "int"], page, strict=True):
            convert = converts.get(kind)
            found.append(
                values
                if convert is None
                else [None if value is None else convert(value) for value in values]
            )
        return found


def _iso_date(text: str) -> Any:
    from datetime import date

    return date.fromisoformat(text)


_FROM_SQLITE: dict[str, Callable[[Any], Any]] = {"bool": bool, "date": _iso_date}
_FROM_POSTGRESQL: dict[str, Callable[[Any], Any]] = {"decimal": str}


def ledger_tables(tables: Tables) -> dict[str, sa.Table]:
    """Return the tables that are kept whole, by their names in the archive."""
    return {name: getattr(tables, name) for name in layout.LEDGER}


def ledger_schema(table: sa.Table) -> pa.Schema:
    """Return the Arrow columns of a table: the table's own, under the same names."""
    return pa.schema(
        pa.field(column.name, _arrow(column.type), nullable=bool(column.nullable))
        for column in table.c
    )


def rows_schema(build: Build) -> pa.Schema:
    """Return the Arrow columns of a build: key, fields, last position folded in."""
    columns = (*build.layout.keys, *build.layout.fields)
    return pa.schema(
        [
            *(field_of(c.name, c.kind, nullable=c.nullable) for c in columns),
            field_of(POSITION_COLUMN, "int", nullable=False),
        ]
    )


def _arrow(column_type: sa.types.TypeEngine[Any]) -> pa.DataType:
    for kind, arrow in (
        (Instant, layout.TIME),
        (sa.BigInteger, pa.int64()),
        (sa.LargeBinary, pa.binary()),
        (sa.Text, pa.string()),
    ):
        if isinstance(column_type, kind):
            return arrow
    msg = f"no Arrow type for {column_type!r}"
    raise TypeError(msg)


def _sources(connection: sa.Connection, table: sa.Table) -> list[Source]:
    rows = connection.execute(sa.select(table).order_by(table.c.id))
    return [
        Source(id=row.id, name=row.name, created_at=to_micros(row.created_at))
        for row in rows
    ]
