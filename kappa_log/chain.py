"""The hash chain over positions: proof that the log is what it was.

``digest(n)`` covers each immutable column of event n; ``h(n) = BLAKE2b(h(n-1) ‖
digest(n))`` covers all events up to n, whatever batches brought them. The payload
and what may name a person enter as two part hashes of their own, so an event whose
contents were erased still verifies from the part hashes that were kept.

Who can rewrite events and heads alike is caught only by a head kept elsewhere.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Container, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from kappa_log.errors import VerificationError
from kappa_log.events import Position
from kappa_log.records import Lane, field, text_field

HEAD_OF_NOTHING = bytes(32)
"""The chain's head at ORIGIN."""

_NOTHING_BUT = field(None) * 3

# Copying a hash that took nothing in yet is half as dear as making one.
_HASH = blake2b(digest_size=32)

_FIXED = struct.Struct("<qqq?q?qq")


def payload_digest(text: bytes | None) -> bytes:
    """Return the part hash of a payload's JSON text in UTF-8."""
    digest = _HASH.copy()
    digest.update(field(text))
    return digest.digest()


def personal_digest(
    raw: bytes | None,
    key: bytes | None,
    headers: bytes | None,
    entity_id: str | None,
) -> bytes:
    """Return the part hash of what may name a person beside the payload."""
    if raw is key is headers is None:
        parts = _NOTHING_BUT + text_field(entity_id)
    else:
        parts = field(raw) + field(key) + field(headers) + text_field(entity_id)
    digest = _HASH.copy()
    digest.update(parts)
    return digest.digest()


class LaneDigest:
    """Digests of the events of one lane; what all of them share is hashed once."""

    def __init__(self, lane: Lane) -> None:
        """Prepare the hash of source, topic and group."""
        self._partition = lane.partition
        self._base = blake2b(
            text_field("kappa_log/v1/event")
            + text_field(lane.source)
            + text_field(lane.topic)
            + text_field(lane.group_id),
            digest_size=32,
        )

    def of(
        self,
        position: Position,
        recorded_at: int,
        *,
        offset: int,
        timestamp: int | None,
        event_time: int | None,
        tail: bytes,
    ) -> bytes:
        """Return the digest of one event.

        Args:
            position: Its place in the log.
            recorded_at: Microseconds since 1970 UTC.
            offset: Its offset in the lane.
            timestamp: Kafka's milliseconds.
            event_time: Microseconds since 1970 UTC.
            tail: What `digest_tail` made of its other columns.
        """
        digest = self._base.copy()
        digest.update(
            _FIXED.pack(
                position,
                self._partition,
                offset,
                timestamp is None,
                timestamp or 0,
                event_time is None,
                event_time or 0,
                recorded_at,
            )
            + tail
        )
        return digest.digest()


def digest_tail(
    event_type: str | None,
    event_version: str | None,
    message_id: bytes,
    checksum: str | None,
    parts: bytes,
) -> bytes:
    """Return the digest's input that is known before the position is.

    Args:
        event_type: As the handler said.
        event_version: As the handler said.
        message_id: 16 bytes.
        checksum: Hex, or None for a tombstone.
        parts: The two part hashes, payload first, 64 bytes.
    """
    return (
        _kind_of_event(event_type, event_version)
        + message_id
        + text_field(checksum)
        + parts
    )


@functools.lru_cache(4096)
def _kind_of_event(event_type: str | None, event_version: str | None) -> bytes:
    return text_field(event_type) + text_field(event_version)


def extend(head: bytes, digest: bytes) -> bytes:
    """Return the head after one more event."""
    both = _HASH.copy()
    both.update(head + digest)
    return both.digest()


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
        head: bytes = HEAD_OF_NOTHING,
    ) -> None:
        self._sources = sources
        self._lanes: dict[Any, LaneDigest] = {}
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

    def _lane(self, lane: tuple[int, str, str, int]) -> LaneDigest:
        source, topic, group, partition = lane
        found = LaneDigest(
            Lane(self._sources.get(source, "?"), topic, group, partition)
        )
        self._lanes[lane] = found
        return found


_LANE = ("source_id", "topic", "group_id", "partition")
_OTHERS = (
    *("position", "offset", "timestamp", "event_time", "recorded_at"),
    *("event_type", "event_version", "message_id", "checksum"),
    *("payload", "raw", "key", "headers", "entity_id"),
    *("payload_digest", "personal_digest"),
)
