"""Produce: the lines of a file into a topic, to try things and fill test clusters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from confluent_kafka import KafkaError, Message

from kappa_log.codec import decode, decode_json
from kappa_log.config import Config
from kappa_log.errors import DecodeError, SourceError, UsageError
from kappa_log.files import Chunk, LineFile
from kappa_log.handler import key_of, split_path
from kappa_log.kafka import client
from kappa_log.kafka.cluster import Cluster
from kappa_log.kafka.producer import ACK_SECONDS, Outbox

CHUNK = 1_000
"""Lines between two reports of progress."""


class ProduceProgress(msgspec.Struct, frozen=True):
    """How far the producing of a file is."""

    file: str
    bytes_read: int
    bytes_total: int | None
    records: int


class ProduceReport(msgspec.Struct, frozen=True):
    """What was produced."""

    file: str
    topic: str
    records: int
    blank: int
    partitions: dict[int, int]
    """Partition → records acknowledged in it."""
    seconds: float
    held_back: bool
    """Whether a last line without line end was left out, since it is no JSON."""


def produce(
    config: Config,
    file: LineFile,
    topic: str,
    *,
    key: str | None = None,
    partitions: int | None = None,
    on_progress: Callable[[ProduceProgress], None] | None = None,
) -> ProduceReport:
    """Produce a file's lines as records, in order, each acknowledged by the cluster.

    Args:
        config: Where the cluster is.
        file: Lines; blank ones are left out.
        topic: Where to.
        key: Path of the field that becomes the key; without it, records have none.
        partitions: Make the topic with so many if it is not there.
        on_progress: Called now and then.

    Raises:
        UsageError: The topic is not there, or a line has no such field.
        SourceError: The file cannot be read, or the cluster refuses a record.
        Whatever stops it, the message says how much is in the topic.
    """
    started = time.perf_counter()
    path = split_path("--key", key)
    _require_topic(Cluster(config), topic, partitions)
    sink = Sink(config, topic)
    blank = 0
    for chunk in _chunks(file, sink):
        blank += chunk.blank
        for record in chunk.records:
            try:
                sink.send(record.value, _key(record.value, path))
            except (DecodeError, SourceError) as error:
                sink.flush()
                kind = UsageError if isinstance(error, DecodeError) else SourceError
                msg = (
                    f"{file.file}, line {record.offset + 1}: {error}; the "
                    f"{sink.acknowledged:,} lines before it are in the topic"
                )
                raise kind(msg) from None
        if on_progress is not None:
            on_progress(
                ProduceProgress(
                    file.file, file.bytes_read, file.bytes_total, sink.acknowledged
                )
            )
    sink.flush()
    return ProduceReport(
        file=file.file,
        topic=topic,
        records=sink.acknowledged,
        blank=blank,
        partitions=dict(sorted(sink.partitions.items())),
        seconds=time.perf_counter() - started,
        held_back=file.held_back,
    )


def _require_topic(cluster: Cluster, topic: str, partitions: int | None) -> None:
    if topic in cluster.topics([topic]):
        return
    if partitions is None:
        msg = f"{cluster.no_topic(topic)}; make it by --partitions N"
        raise UsageError(msg)
    cluster.make_topic(topic, partitions)


def _chunks(file: LineFile, sink: Sink) -> Iterator[Chunk]:
    """Yield a file's lines, as far as it can be read."""
    try:
        yield from file.chunks(0, None, CHUNK)
    except SourceError as error:
        sink.flush()
        # Unlike ingest, the next run begins anew.
        why, _, _ = str(error).rpartition("; ")
        msg = f"{why}; {sink.acknowledged:,} of its lines are in the topic"
        raise SourceError(msg) from error


def _key(value: bytes | None, path: tuple[str, ...]) -> bytes | None:
    if not path:
        return None
    return key_of(decode(decode_json, value).payload, path)


class Sink:
    """A topic that records go into; what is refused stops all."""

    def __init__(self, config: Config, topic: str) -> None:
        self.acknowledged = 0
        self.partitions: dict[int, int] = {}
        self._topic = topic
        self._refused: KafkaError | None = None
        self._outbox = Outbox(config)

    def send(self, value: bytes | None, key: bytes | None) -> None:
        """Hand a record over; it is acknowledged later."""
        self._check()
        self._outbox.send(self._topic, self._delivered, value=value, key=key)
        self._outbox.poll(0)

    def flush(self) -> None:
        """Wait until all is acknowledged."""
        problem = self._outbox.flush(ACK_SECONDS)
        self._check()
        if problem is not None:
            msg = f"{problem}; {self.acknowledged:,} are in topic {self._topic}"
            raise SourceError(msg)

    def _check(self) -> None:
        if self._refused is not None:
            msg = f"{self.acknowledged:,} records are in topic {self._topic}, then"
            raise client.source_error(msg, self._refused)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._refused = self._refused or error
            return
        partition: Any = message.partition()
        self.acknowledged += 1
        self.partitions[partition] = self.partitions.get(partition, 0) + 1
