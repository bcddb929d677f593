"""Lag: how far the log is behind the topics, in records and in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec
from confluent_kafka import Consumer, TopicPartition

from kappa_log.config import Config, ListenerConfig
from kappa_log.events import to_micros
from kappa_log.kafka import client
from kappa_log.kafka.cluster import Cluster, Span, Topic
from kappa_log.kafka.lanes import At
from kappa_log.records import Lane
from kappa_log.storage import ledger
from kappa_log.storage.database import Database

_NO_TIME = -1
"""A record's timestamp when its producer gave it none."""

LOOK_SECONDS = 5.0
"""How long the oldest unread records are looked for."""


class PartitionLag(msgspec.Struct, frozen=True):
    """How far one partition is behind, for one listener."""

    listener: str
    group_id: str
    topic: str
    partition: int
    next_offset: int | None
    """What is read next, by SQL; None if no run has begun it yet."""
    end_offset: int
    """Where the partition ends, without open transactions."""
    records: int
    """Offsets between the two; compaction and transactions leave some empty."""
    seconds: float | None
    """Age of the oldest unread record; 0 without any, None if it has no time."""


def lag(
    database: Database, config: Config, listener: ListenerConfig, now: datetime
) -> list[PartitionLag]:
    """Return how far each partition of a listener's topics is behind.

    Raises:
        SourceError: The cluster does not answer, or has no such topic.
    """
    cluster = Cluster(config)
    topics = cluster.topics_of(listener)
    spans = cluster.spans((t.name, n) for t in topics.values() for n in t.partitions)
    offsets = dict(_offsets(database, listener, topics))
    unread = {
        at: max(offsets.get(at, span.low), span.low)
        for at, span in spans.items()
        if offsets.get(at, span.low) < span.high
    }
    times = _times(config, unread)
    return [
        _partition(listener, at, spans[at], offsets.get(at), _age(at, times, now))
        for at in sorted(spans)
    ]


def _partition(
    listener: ListenerConfig,
    at: At,
    span: Span,
    offset: int | None,
    seconds: float | None,
) -> PartitionLag:
    records = max(0, span.high - (span.low if offset is None else offset))
    return PartitionLag(
        listener=listener.id,
        group_id=listener.group_id,
        topic=at[0],
        partition=at[1],
        next_offset=offset,
        end_offset=span.high,
        records=records,
        seconds=seconds if records else 0.0,
    )


def _offsets(
    database: Database, listener: ListenerConfig, topics: dict[str, Topic]
) -> Iterator[tuple[At, int]]:
    with database.read() as connection:
        for topic in topics.values():
            for number in topic.partitions:
                lane = Lane(topic.source, topic.name, listener.group_id, number)
                row = ledger.peek(connection, database, lane)
                if row is not None:
                    yield (topic.name, number), row.next_offset


def _times(config: Config, unread: dict[At, int]) -> dict[At, int | None]:
    """Return the timestamp of the first record at or after each offset, in ms."""
    if not unread:
        return {}
    reader = client.reader(config)
    try:
        reader.assign([TopicPartition(*at, offset) for at, offset in unread.items()])
        return dict(_first_of_each(reader, len(unread)))
    finally:
        reader.close()


def _first_of_each(reader: Consumer, wanted: int) -> Iterator[tuple[At, int | None]]:
    found: set[At] = set()
    end = time.monotonic() + LOOK_SECONDS
    while len(found) < wanted and time.monotonic() < end:
        message: Any = reader.poll(0.2)
        if message is None or message.topic() is None:
            continue
        at = message.topic(), message.partition()
        if at in found:
            continue
        found.add(at)
        reader.pause([TopicPartition(*at)])
        if message.error() is None:
            kind, timestamp = message.timestamp()
            yield at, timestamp if kind and timestamp != _NO_TIME else None


def _age(at: At, times: dict[At, int | None], now: datetime) -> float | None:
    timestamp = times.get(at)
    if timestamp is None:
        return None
    return max(0.0, round(to_micros(now) / 1e6 - timestamp / 1e3, 3))
