"""What producers, the log and its readers saw, and every way in which that is wrong.

A test records three things while it makes trouble: what the broker acknowledged, the
log's rows at the end, and what each reader was given. `check` compares them. There are
seven faults, after Jepsen's Kafka workload; each one is found as itself alone.

Offsets may have holes, since transactions and compaction leave them: only records that
somebody produced can be missing. Two topics of one name, or two groups of one topic,
need names of their own here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

Payload = bytes | str | None


class Fault(StrEnum):
    """What can be wrong."""

    LOST = "lost"
    """A committed record below the checkpoint is not in the log."""
    DUPLICATE = "duplicate"
    """A record or a message is in the log twice."""
    REORDERED = "reordered"
    """In the log, a record stands behind a later one of its partition."""
    SKIPPED = "skipped"
    """A reader went past a row, and was never given it."""
    INVERTED = "inverted"
    """A reader was given a row that is not behind the one before."""
    ABORTED_READ = "aborted-read"
    """A record of an aborted transaction is in the log."""
    FUTURE_READ = "future-read"
    """A reader, or the log, holds what was not committed, or was never produced."""


class Outcome(StrEnum):
    """What became of a record, as far as its producer knows."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    PENDING = "pending"
    """Not known: its transaction is open, or the answer did not come."""


class Place(NamedTuple):
    """Where a record is."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Produced:
    """A record and its outcome."""

    place: Place | None
    """None if the broker did not say; then it is pending."""
    payload: Payload
    outcome: Outcome = Outcome.COMMITTED


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the log."""

    position: int
    place: Place
    payload: Payload


@dataclass(frozen=True, slots=True)
class Page:
    """What a reader was given at once."""

    head: int
    """The log's last committed position, as the reader was told with the page."""
    seen: tuple[tuple[int, Payload], ...]
    """Positions and payloads, in the order in which they came."""
    reached: int = 0
    """Where the reader stands afterwards, if that is behind all it was given."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A reader that never went back; started anew, it is another one."""

    name: str
    pages: tuple[Page, ...]
    after: int = 0
    """It began behind this position."""
    wants: Callable[[Row], bool] = lambda _: True
    """Whether a row concerns it."""


def by_payload(row: Row) -> Hashable:
    """Tell messages apart by topic and payload; each tombstone is a message."""
    return row.place if row.payload is None else (row.place.topic, row.payload)


def by_place(row: Row) -> Hashable:
    """Take each record for a message, whatever it says."""
    return row.place


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All that was seen."""

    produced: Collection[Produced]
    rows: Collection[Row]
    checkpoints: Mapping[tuple[str, int], int]
    """For topics and partitions, the offset to read next: all below is done."""
    cursors: Collection[Cursor] = ()
    elsewhere: Collection[Place] = frozenset()
    """Records that are not in the log, and rightly so: dropped as duplicates, skipped,
    kept as failures, deleted by the broker before they were read."""
    message: Callable[[Row], Hashable] = by_payload
    """What must not be in the log twice."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, and where."""

    fault: Fault
    where: str
    thing: object = field(compare=False)


def check(history: History) -> list[Finding]:
    """Return everything that is wrong; nothing if all is well."""
    checks = (_lost, _duplicates, _reordered, _aborted, _invented)
    found = [finding for each in checks for finding in each(history)]
    rows = {row.position: row for row in history.rows}
    for cursor in history.cursors:
        found += _skipped(cursor, rows)
        found += _inverted(cursor)
        found += _uncommitted(cursor, rows)
    return found


# --- the log against the producers -------------------------------------------


def _lost(history: History) -> Iterator[Finding]:
    kept = {row.place for row in history.rows} | set(history.elsewhere)
    for produced in history.produced:
        place = produced.place
        if place is None or produced.outcome is not Outcome.COMMITTED:
            continue
        done = history.checkpoints.get((place.topic, place.partition), 0)
        if place.offset < done and place not in kept:
            yield Finding(Fault.LOST, _at(place), produced)


def _duplicates(history: History) -> Iterator[Finding]:
    places = set(history.elsewhere)
    messages: set[Hashable] = set()
    positions: set[int] = set()
    for row in _in_order(history.rows):
        message = history.message(row)
        if row.place in places or message in messages or row.position in positions:
            yield Finding(Fault.DUPLICATE, f"position {row.position}", row)
        places.add(row.place)
        messages.add(message)
        positions.add(row.position)


def _reordered(history: History) -> Iterator[Finding]:
    latest: dict[tuple[str, int], int] = defaultdict(lambda: -1)
    known: set[Place] = set()
    for row in _in_order(history.rows):
        partition = row.place.topic, row.place.partition
        # A record that comes again is a duplicate, wherever it comes.
        if row.place not in known and row.place.offset < latest[partition]:
            yield Finding(Fault.REORDERED, f"position {row.position}", row)
        latest[partition] = max(latest[partition], row.place.offset)
        known.add(row.place)


def _aborted(history: History) -> Iterator[Finding]:
    aborted = {
        produced.place
        for produced in history.produced
        if produced.outcome is Outcome.ABORTED
    }
    for row in history.rows:
        if row.place in aborted:
            yield Finding(Fault.ABORTED_READ, f"position {row.position}", row)


def _invented(history: History) -> Iterator[Finding]:
    placed = {(produced.place, produced.payload) for produced in history.produced}
    for row in history.rows:
        # Of a record without an answer, only the payload is known.
        if not placed & {(row.place, row.payload), (None, row.payload)}:
            yield Finding(Fault.FUTURE_READ, f"position {row.position}", row)


# --- readers against the log -------------------------------------------------


def _skipped(cursor: Cursor, rows: Mapping[int, Row]) -> Iterator[Finding]:
    seen = {position for page in cursor.pages for position, _ in page.seen}
    reached = max([*seen, *(page.reached for page in cursor.pages)], default=0)
    for position, row in rows.items():
        passed = cursor.after < position <= reached
        if passed and position not in seen and cursor.wants(row):
            yield Finding(Fault.SKIPPED, f"{cursor.name}, position {position}", row)


def _inverted(cursor: Cursor) -> Iterator[Finding]:
    seen = [position for page in cursor.pages for position, _ in page.seen]
    for before, position in pairwise([cursor.after, *seen]):
        if position <= before:
            where = f"{cursor.name}, position {position} after {before}"
            yield Finding(Fault.INVERTED, where, position)


def _uncommitted(cursor: Cursor, rows: Mapping[int, Row]) -> Iterator[Finding]:
    """Find what lay beyond the head, and what the log does not hold in the end."""
    for page in cursor.pages:
        for position, payload in page.seen:
            row = rows.get(position)
            if position > page.head or row is None or row.payload != payload:
                where = f"{cursor.name}, position {position} at head {page.head}"
                yield Finding(Fault.FUTURE_READ, where, (payload, row))


def _in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.position)


def _at(place: Place) -> str:
    return f"{place.topic}[{place.partition}]@{place.offset}"
