"""Record: received bytes with coordinates, and what identifies a message.

Identity is computed over the received bytes, before anything is decoded, so a
message that cannot be decoded today is still the same message tomorrow.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal, get_args

import msgspec

from kappa_log.errors import ConfigError, DecodeError
from kappa_log.events import Header

DedupeMode = Literal["payload", "offset", "key+payload"]
"""What makes a later record a duplicate; besides these, ``header:NAME``."""

_NULL = b"\xff\xff\xff\xff"

# Copying a hash that took nothing in yet is half as dear as making one.
_CHECKSUM = blake2b(digest_size=16)


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record as received. None differs from empty in key and value."""

    offset: int
    value: bytes | None
    key: bytes | None = None
    headers: tuple[Header, ...] = ()
    timestamp: int | None = None
    """Milliseconds since 1970 as the producer or broker gave them."""


class Lane(msgspec.Struct, frozen=True, order=True):
    """Where offsets are counted: one partition of a topic of a source, for a group.

    The source's name tells incarnations apart: ``file:NAME`` for a file,
    ``kafka:CLUSTER/TOPIC_ID`` for a topic, so a recreated topic is a new lane.
    """

    source: str
    topic: str
    group_id: str
    partition: int = 0


def field(value: bytes | None) -> bytes:
    """Return a value length-prefixed, so that joined fields cannot be confused."""
    if value is None:
        return _NULL
    return len(value).to_bytes(4, "little") + value


def text_field(value: str | None) -> bytes:
    """Return a text length-prefixed as UTF-8."""
    if value is None:
        return _NULL
    data = value.encode()
    return len(data).to_bytes(4, "little") + data


def checksum(value: bytes | None) -> str | None:
    """Return BLAKE2b-128 of a received value in hex; None for a tombstone."""
    if value is None:
        return None
    digest = _CHECKSUM.copy()
    digest.update(value)
    return digest.hexdigest()


def check_dedupe(mode: str) -> str:
    """Return the dedupe mode if there is such a one.

    Raises:
        ConfigError: There is not; the message lists those there are.
    """
    if mode in get_args(DedupeMode) or (mode.startswith("header:") and mode[7:]):
        return mode
    msg = (
        f"dedupe {mode!r} is not known; use payload, offset, key+payload or header:NAME"
    )
    raise ConfigError(msg)


class Identity:
    """Computes message ids of one lane's topic and group under one dedupe mode."""

    def __init__(self, mode: str, lane: Lane) -> None:
        """Prepare the part of the hash that all records of the lane share."""
        self.mode = check_dedupe(mode)
        self.header = mode[7:] if mode.startswith("header:") else None
        self._lane = lane
        self._base = blake2b(
            text_field(mode) + text_field(lane.topic) + text_field(lane.group_id),
            digest_size=16,
        )

    def of(self, record: Record) -> bytes:
        """Return the 16 bytes that identify a record.

        Raises:
            DecodeError: The mode wants a header that the record lacks.
        """
        value = record.value
        if value is None or self.mode == "offset":
            return self.of_coordinates(record.offset)
        digest = self._base.copy()
        if self.header is not None:
            digest.update(self._header_value(record))
        elif self.mode == "payload":
            digest.update(value)
        else:
            digest.update(field(record.key) + value)
        return digest.digest()

    def of_coordinates(self, offset: int) -> bytes:
        """Return the identity of the one record at an offset of the lane."""
        lane = self._lane
        where = (
            text_field("offset")
            + text_field(lane.topic)
            + text_field(lane.group_id)
            + text_field(lane.source)
            + lane.partition.to_bytes(8, "little", signed=True)
            + offset.to_bytes(8, "little", signed=True)
        )
        return blake2b(where, digest_size=16).digest()

    def _header_value(self, record: Record) -> bytes:
        found = [value for name, value in record.headers if name == self.header]
        if not found or found[-1] is None:
            msg = (
                f"the record has no header {self.header!r}, which dedupe "
                f"'{self.mode}' identifies messages by"
            )
            raise DecodeError(msg)
        return found[-1]


def encode_headers(headers: tuple[Header, ...]) -> bytes | None:
    """Return headers as MessagePack, order and repeats kept; None if there are none."""
    return msgspec.msgpack.encode(headers) if headers else None


def decode_headers(stored: bytes | None) -> list[Header]:
    """Return the headers that `encode_headers` stored."""
    if stored is None:
        return []
    return msgspec.msgpack.decode(stored, type=list[Header])
