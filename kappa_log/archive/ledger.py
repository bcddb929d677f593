"""Ledger: an archive's tables beside the events, held against them and each other.

They are as of the same head, so each checkpoint's head is the chain's at its last
position, the event there is of its lane and offsets, and what is kept of duplicates
and failures is what the checkpoints count. Tables are read a page at a time: as the
events may be many, so may the checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from kappa_log.accounts import LANE, Accounts, LaneKey, lane_of
from kappa_log.archive import manifest
from kappa_log.archive.layout import LEDGER
from kappa_log.archive.reader import Archive
from kappa_log.archive.scan import batches
from kappa_log.archive.snapshot import ledger_schema, ledger_tables
from kappa_log.errors import ArchiveDamaged
from kappa_log.events import Position
from kappa_log.storage.schema import Tables
from kappa_log.verify import MAX_FINDINGS, Finding

_REMEDY = (
    "If kappa-log verify finds the log's own ledger whole, kappa-log export writes "
    "this file anew; else put it back from a copy"
)


class Checkpoint(NamedTuple):
    """A checkpoint's row, but for when it was written."""

    id: int
    kind: str
    source_id: int
    group_id: str
    topic: str
    partition: int
    from_offset: int
    to_offset: int
    acked: int
    skipped: int
    duplicate: int
    failed: int
    parked: int
    first_position: Position | None
    last_position: Position | None
    head: bytes | None


class LastEvent(NamedTuple):
    """An event that is the last one of a checkpoint, and the chain's head there."""

    source_id: int
    group_id: str
    topic: str
    partition: int
    offset: int
    head: bytes


class Ledger:
    """The ledger of an archive.

    Args:
        archive: Whose it is.
        tell: Called with what is not as it should be.
    """

    def __init__(self, archive: Archive, tell: Callable[[Finding], None]) -> None:
        self._store = archive.store
        self._files = archive.manifest.ledger
        self._end = archive.manifest.position
        self._remedy = archive.manifest.remedy
        self._tell = tell
        self._told: Counter[str] = Counter()
        names = {source.id: source.name for source in archive.manifest.sources}
        self._accounts = Accounts(names, self.found)
        self._unknown: set[int] = set()
        self._names = names
        tables = ledger_tables(Tables("", is_sqlite=True))
        self._schemas = {name: ledger_schema(table) for name, table in tables.items()}
        self.is_readable = False
        """Whether the checkpoints' file is whole."""
        self.checkpoints = 0
        """Checkpoints that were read."""

    def check(self) -> None:
        """Prove the files, and that the ledger accounts for what it should."""
        lacking = [table for table in LEDGER if table not in self._files]
        if lacking:
            message = f"it names no file of {', '.join(lacking)}. {self._remedy}"
            self._tell(Finding(manifest.NAME, None, message))
            return
        self.is_readable = self._proved("checkpoints", self._check_checkpoints)
        # Without them nobody knows what the others should be: then hashes must do.
        known = self.is_readable
        self._proved("offsets", self._check_offsets if known else self._check_hash)
        for table in ("duplicates", "failures"):
            self._proved(table, self._check_kept if known else self._check_hash)
        if self._unknown:
            message = (
                f"it names no source {', '.join(map(str, sorted(self._unknown)))}, of "
                f"which there are rows in the ledger. {self._remedy}"
            )
            self._tell(Finding(manifest.NAME, None, message))

    def marks(self) -> Generator[Checkpoint]:
        """Yield the checkpoints that have events, in order; none if damaged."""
        if self.is_readable:
            for row in self._checkpoints():
                if row.last_position is not None and row.head is not None:
                    yield row

    def disagreements(self, mark: Checkpoint, event: LastEvent) -> Iterator[str]:
        """Yield how a checkpoint and the event at its last position disagree."""
        stored = mark.head or b""
        if stored != event.head:
            yield (
                f"checkpoint {mark.id} has the chain's head as {stored.hex()[:16]}…, "
                f"but the events come to {event.head.hex()[:16]}…"
            )
        is_within = mark.from_offset <= event.offset < mark.to_offset
        if lane_of(mark) != lane_of(event) or not is_within:
            named = self._accounts.named
            yield (
                f"checkpoint {mark.id} accounts for offsets {mark.from_offset} to "
                f"{mark.to_offset - 1} of {named(lane_of(mark))}, but its last event "
                f"is offset {event.offset} of {named(lane_of(event))}"
            )

    def found(self, table: str, position: Position | None, message: str) -> None:
        """Tell what is wrong in a table; after the first few no more."""
        self._told[table] += 1
        if self._told[table] <= MAX_FINDINGS:
            path = self._files[table].path
            self._tell(Finding(path, position, f"{message}. {_REMEDY}"))

    def _proved(self, table: str, check: Callable[[str], None]) -> bool:
        """Check a table; tell whether its file is whole."""
        try:
            check(table)
        except ArchiveDamaged as error:
            self._tell(Finding(error.path, None, error.reason))
            return False
        return True

    def _check_hash(self, table: str) -> None:
        self._store.check(self._files[table])

    def _check_checkpoints(self, _: str) -> None:
        """Prove that checkpoints add up, adjoin and cover each position once."""

        def ranges() -> Iterator[tuple[Position, Position]]:
            for row in self._checkpoints():
                self.checkpoints += 1
                self._note(row.source_id)
                self._accounts.checkpoint(row)
                if row.first_position is not None and row.last_position is not None:
                    yield row.first_position, row.last_position

        self._accounts.ranges(ranges(), self._end)

    def _check_offsets(self, table: str) -> None:
        ends = {}
        for *lane, following, reached in self._rows(
            table, (*LANE, "next_offset", "reached")
        ):
            self._note(lane[0])
            ends[tuple(lane)] = (following, reached)
        self._accounts.offsets(ends)

    def _check_kept(self, table: str) -> None:
        """Prove that duplicates, or failures, are those that the checkpoints count."""
        kept: dict[LaneKey, tuple[int, int]] = {}
        # The schema has both tables' offsets; what repeats is of duplicates alone.
        last = "repeats" if table == "duplicates" else "offset"
        for *lane, offset, repeats in self._rows(table, (*LANE, "offset", last)):
            self._note(lane[0])
            many, highest = kept.get(tuple(lane), (0, -1))
            kept[tuple(lane)] = (many + 1, max(highest, offset))
            if last == "repeats" and not 1 <= repeats <= self._end:
                self.found(
                    table,
                    repeats,
                    f"offset {offset} of {self._accounts.named(tuple(lane))} is said "
                    f"to repeat the event at position {repeats}, which is not there",
                )
        self._accounts.kept(table, kept)

    def _note(self, source: int) -> None:
        if source not in self._names:
            self._unknown.add(source)

    def _checkpoints(self) -> Iterator[Checkpoint]:
        return map(Checkpoint._make, self._rows("checkpoints", Checkpoint._fields))

    def _rows(self, table: str, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        """Yield columns of a table's rows; the file is proved before any of it."""
        schema = self._schemas[table]
        for batch in batches(self._store, self._files[table], schema):
            yield from zip(
                *(batch.column(name).to_pylist() for name in names), strict=True
            )
