"""Lanes of a topic: taken in SQL with their offsets, and found again after trouble.

Whoever is assigned a partition takes its lane: one transaction bumps the lane's epoch,
which fences whoever had it, and reads the offset. The offset is then checked against
what the broker still has, so neither a span that was deleted unread nor a topic that
was made anew goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.config import ListenerConfig
from kappa_log.errors import SourceDiverged, SourceGap, UsageError
from kappa_log.ingest import Clock
from kappa_log.kafka.cluster import Cluster, Span, Topic
from kappa_log.records import Lane
from kappa_log.storage import ledger
from kappa_log.storage.database import Database
from kappa_log.storage.ledger import Assignment, Reader

At = tuple[str, int]
"""A topic and the number of one of its partitions."""


class Held(msgspec.Struct, frozen=True):
    """A lane that is ours until somebody else takes it."""

    lane: Lane
    assignment: Assignment

    @property
    def at(self) -> At:
        """Its topic and partition."""
        return self.lane.topic, self.lane.partition

    def moved(self, to_offset: int) -> Held:
        """Return it with another next offset."""
        return Held(self.lane, self.assignment.moved(to_offset))


class Taken(msgspec.Struct, frozen=True):
    """What became of an attempt to take lanes."""

    held: dict[At, Held]
    absent: list[At]
    """Partitions that the cluster does not have just now."""
    gaps: list[str]
    """What was passed over since it was accepted, in words."""


class LaneKeeper:
    """Takes a listener's lanes.

    Args:
        database: The log.
        cluster: Where the topics are.
        listener: Whose lanes.
        clock: The time.
        accept_gap: Pass over offsets that were deleted unread.
    """

    def __init__(
        self,
        database: Database,
        cluster: Cluster,
        listener: ListenerConfig,
        *,
        clock: Clock,
        accept_gap: bool = False,
    ) -> None:
        self._database = database
        self._cluster = cluster
        self._listener = listener
        self._clock = clock
        self._accept_gap = accept_gap
        self._reader = Reader(listener.dedupe, None)
        self._has_begun = False

    def begin(self) -> list[str]:
        """Keep where each partition of the topics is to be begun; return the topics.

        The listener's ``start`` counts if the group never read any of them. Later,
        what is new begins at its beginning: it was added since, and so were all its
        records.

        Raises:
            SourceError: The cluster does not answer, or has no such topic.
            UsageError: The start lies beyond a partition's end.
        """
        topics = self._cluster.topics_of(self._listener)
        spans = self._cluster.spans(_partitions(topics))
        with self._database.write() as connection:
            self._begin(connection, topics, spans)
        self._has_begun = True
        return sorted(topics)

    def take(self, wanted: Iterable[At]) -> Taken:
        """Take the lanes of partitions, each at the offset where SQL says.

        Raises:
            SourceGap: The broker deleted what would be read next.
            SourceDiverged: The broker's partition ends before what was read.
            SourceError: The cluster does not answer.
            StorageError: The database refused; nothing was taken.
        """
        wanted = sorted(wanted)
        topics = self._cluster.topics(sorted({topic for topic, _ in wanted}))
        spans = self._cluster.spans(_partitions(topics))
        held: dict[At, Held] = {}
        with self._database.write() as connection:
            self._begin(connection, topics, spans)
            for at in sorted(set(wanted) & spans.keys()):
                lane = self._lane(topics[at[0]], at[1])
                held[at] = Held(lane, self._assign(connection, lane))
        # Asked again: until we took it, somebody else may have read beyond the end
        # that we knew of.
        spans = self._cluster.spans(held)
        gaps = [self._checked(held, at, span) for at, span in spans.items()]
        absent = [at for at in wanted if at not in spans]
        return Taken(
            {at: held[at] for at in spans}, absent, [gap for gap in gaps if gap]
        )

    def reread(self, held: Iterable[Held]) -> dict[At, Held]:
        """Return those lanes that still are ours, with the offsets that SQL has."""
        found: dict[At, Held] = {}
        with self._database.read() as connection:
            for old in held:
                now = ledger.reread(
                    connection, self._database, old.lane, old.assignment
                )
                if now is not None:
                    found[old.at] = Held(old.lane, now)
        return found

    def moved(self, held: Iterable[Held]) -> list[Held]:
        """Return those that SQL has elsewhere by now, or somebody else has."""
        held = list(held)
        found = self.reread(held)
        return [old for old in held if found.get(old.at) != old]

    def rewind(self, at: At, to_offset: int) -> tuple[int, int]:
        """Go back to an offset that was read before; the ledger says so.

        Returns:
            The next offset before, and now.

        Raises:
            UsageError: The offset was not reached yet, or the topic is not there.
            SourceGap: The broker does not have the offset any more.
        """
        topics = self._cluster.topics([at[0]])
        if at not in _partitions(topics):
            where = f"partition {at[1]} of topic '{at[0]}'"
            msg = f"{self._cluster.label} has no {where}; nothing was changed"
            raise UsageError(msg)
        span = self._cluster.spans([at])[at]
        lane = self._lane(topics[at[0]], at[1])
        with self._database.write() as connection:
            row = ledger.peek(connection, self._database, lane)
            if row is None or to_offset > row.next_offset:
                reached = "not begun" if row is None else f"at offset {row.next_offset}"
                msg = (
                    f"{at[0]} partition {at[1]} is {reached} for group "
                    f"{lane.group_id}: offset {to_offset} cannot be gone back to; "
                    "nothing was changed"
                )
                raise UsageError(msg)
            if to_offset < span.low and not self._accept_gap:
                raise SourceGap(at[0], at[1], to_offset, span.low)
            held = self._assign(connection, lane)
            target = max(to_offset, min(span.low, held.next_offset))
            if target != held.next_offset:
                ledger.move(
                    connection, self._database, lane, held, target, self._clock()
                )
        return held.next_offset, target

    def _lane(self, topic: Topic, partition: int) -> Lane:
        return Lane(topic.source, topic.name, self._listener.group_id, partition)

    def _assign(self, connection: sa.Connection, lane: Lane) -> Assignment:
        return ledger.assign(
            connection, self._database, lane, self._reader, self._clock()
        )

    def _begin(
        self,
        connection: sa.Connection,
        topics: Mapping[str, Topic],
        spans: Mapping[At, Span],
    ) -> None:
        listener = self._listener
        known = ledger.known_lanes(
            connection, self._database, "kafka:", listener.group_id
        )
        was_read = any(listener.covers(lane.topic) for lane in known)
        is_first = not (was_read or self._has_begun)
        for at in sorted(_partitions(topics)):
            lane = self._lane(topics[at[0]], at[1])
            if lane in known or at not in spans:
                continue
            start = _start(listener, at, spans[at]) if is_first else spans[at].low
            ledger.begin(
                connection,
                self._database,
                lane,
                self._reader,
                self._clock(),
                start=start,
            )

    def _checked(self, held: dict[At, Held], at: At, span: Span) -> str | None:
        """Compare an offset with what the broker has; pass over a gap if one may."""
        found = held[at]
        offset = found.assignment.next_offset
        if offset > span.high:
            msg = (
                f"{at[0]} partition {at[1]} ends at offset {span.high}, but was read "
                f"up to {offset}: the cluster lost records that it had acknowledged. "
                "Nothing was changed; what was read is kept. If the topic was "
                "restored, make it anew: another topic id is another source"
            )
            raise SourceDiverged(msg)
        if offset >= span.low:
            return None
        if not self._accept_gap:
            raise SourceGap(at[0], at[1], offset, span.low)
        with self._database.write() as connection:
            moved = ledger.move(
                connection,
                self._database,
                found.lane,
                found.assignment,
                span.low,
                self._clock(),
            )
        held[at] = Held(found.lane, moved)
        return (
            f"{at[0]} partition {at[1]}: offsets {offset} to {span.low - 1} were "
            "deleted unread; passed over, as accepted, and noted in the ledger"
        )


def _partitions(topics: Mapping[str, Topic]) -> list[At]:
    return [(t.name, number) for t in topics.values() for number in t.partitions]


def _start(listener: ListenerConfig, at: At, span: Span) -> int:
    """Return the offset that a listener's ``start`` means for a partition.

    One that was deleted already is not moved: that is a gap, and told as such.
    """
    start: Any = listener.start
    if isinstance(start, dict):
        start = start.get(at[1], "earliest")
    if start == "earliest":
        return span.low
    if start == "latest":
        return span.high
    if start > span.high:
        msg = (
            f"listener {listener.id}: start {start} lies beyond the end {span.high} of "
            f"{at[0]} partition {at[1]}; nothing was changed"
        )
        raise UsageError(msg)
    return int(start)
