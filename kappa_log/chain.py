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
from hashlib import blake2b

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
