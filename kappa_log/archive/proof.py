"""Proof: the chain of the log, recomputed over columns of events.

The same hashes as `verify` takes from rows. An archive whose chain comes to the heads
in its manifest, and whose last head is the log's, holds the log's events and nothing
else.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kappa_log import chain
from kappa_log.archive.layout import EVENTS
from kappa_log.errors import VerificationError
from kappa_log.events import Position
from kappa_log.records import Lane
from kappa_log.storage.transfer import ARCHIVED

assert tuple(EVENTS.names) == ARCHIVED, "a column of the log has no place in segments"

Lists = dict[str, Sequence[Any]]
"""Column → values: times in microseconds since 1970, the payload as bytes."""


class Chain:
    """The chain's head, moved on page by page.

    Args:
        sources: source_id → name.
        position: Where it stands.
        head: The head there.
    """

    def __init__(
        self,
        sources: Mapping[int, str],
        position: Position = 0,
        head: bytes = chain.HEAD_OF_NOTHING,
    ) -> None:
        self._sources = sources
        self._lanes: dict[Any, chain.LaneDigest] = {}
        self.position = position
        self.head = head
        self.erased = 0
        """Events whose contents were erased: hashes hold their places."""

    def extend(
        self, page: Lists, wanted: Container[Position] = ()
    ) -> dict[Position, bytes]:
        """Move on over the events that follow.

        Args:
            page: The events.
            wanted: Positions of which the heads are asked for.

        Returns:
            Position → head, of those wanted that are in the page.

        Raises:
            VerificationError: They do not follow: a position is missing or twice. Or
                one has contents beside a hash that stands for erased ones.
        """
        head, expected, lanes = self.head, self.position, self._lanes
        heads: dict[Position, bytes] = {}
        payload_digest, personal_digest = chain.payload_digest, chain.personal_digest
        digest_tail, extend = chain.digest_tail, chain.extend
        rows = zip(
            zip(*(page[name] for name in _LANE), strict=True),
            *(page[name] for name in _OTHERS),
            strict=True,
        )
        for row in rows:
            lane, position, offset, timestamp, event_time, recorded_at = row[:6]
            event_type, event_version, message_id, checksum = row[6:10]
            payload, raw, key, headers, entity, part, personal_part = row[10:]
            expected += 1
            if position != expected:
                msg = f"position {expected} is missing: {position} stands in its place"
                raise VerificationError(msg)
            if not part is personal_part is None:
                self.erased += 1
                if (part and not payload is raw is None) or (
                    personal_part and not raw is key is headers is None
                ):
                    msg = (
                        f"the event at position {position} is marked as erased but has "
                        "contents, which nothing proves"
                    )
                    raise VerificationError(msg)
            digests = lanes.get(lane) or self._lane(lane)
            parts = (part or payload_digest(payload)) + (
                personal_part or personal_digest(raw, key, headers, entity)
            )
            tail = digest_tail(event_type, event_version, message_id, checksum, parts)
            digest = digests.of(
                position,
                recorded_at,
                offset=offset,
                timestamp=timestamp,
                event_time=event_time,
                tail=tail,
            )
            head = extend(head, digest)
            if expected in wanted:
                heads[expected] = head
        self.head, self.position = head, expected
        return heads

    def _lane(self, lane: tuple[int, str, str, int]) -> chain.LaneDigest:
        source, topic, group, partition = lane
        found = chain.LaneDigest(
            Lane(self._sources.get(source, "?"), topic, group, partition)
        )
        self._lanes[lane] = found
        return found


def lists(table: pa.Table | pa.RecordBatch) -> Lists:
    """Return the log's columns of some events as lists."""
    found: Lists = {}
    for name in ARCHIVED:
        column = table.column(name)
        kind = EVENTS.field(name).type
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.int64())
        elif name == "payload":
            column = column.cast(pa.binary())
        found[name] = column.to_pylist()
    return found


_LANE = ("source_id", "topic", "group_id", "partition")
_OTHERS = (
    *("position", "offset", "timestamp", "event_time", "recorded_at"),
    *("event_type", "event_version", "message_id", "checksum"),
    *("payload", "raw", "key", "headers", "entity_id"),
    *("payload_digest", "personal_digest"),
)
