"""Proof: the chain of the log, recomputed over columns of events.

The same hashes as `verify` takes from rows. An archive whose chain comes to the heads
in its manifest, and whose last head is the log's, holds the log's events and nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def extend(self, page: Lists) -> None:
        """Move on over the events that follow.

        Raises:
            VerificationError: They do not follow: a position is missing or twice.
        """
        head, expected, lanes = self.head, self.position, self._lanes
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
        self.head, self.position = head, expected

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
