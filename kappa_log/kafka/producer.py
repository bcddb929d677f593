"""Producer: records into topics, acknowledged by the cluster or told as failed.

`Outbox` hands records to librdkafka, whose queue is bounded: when it is full, handing
over waits until the cluster took some. `Producer` is what people use; each record has a
future, and a thread of its own sees to it that futures come true. Nothing is given up
in silence: what is still on its way when a producer, or Python, ends is waited for.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message

from kappa_log.codec import made
from kappa_log.config import Config, did_you_mean, load_config
from kappa_log.errors import DecodeError, DeliveryFailed, SourceError, UsageError
from kappa_log.kafka import client
from kappa_log.telemetry import tracing

ACK_SECONDS = 60.0
"""How long the cluster may take to acknowledge the last records."""

EXIT_SECONDS = 10.0
"""The same, at the end of a process that did not close its producer."""

COUNT_SECONDS = 10.0
"""How long the number of a topic's partitions is believed."""

_POLL_SECONDS = 0.1
_LOGGER = logging.getLogger("kappa_log.producer")

OnDelivery = Callable[[KafkaError | None, Message], None]
Headers = Mapping[str, str | bytes | None] | Sequence[tuple[str, str | bytes | None]]


class Delivery(msgspec.Struct, frozen=True):
    """Where the cluster put a record."""

    topic: str
    partition: int
    offset: int
    timestamp: int | None
    """Milliseconds since 1970, as the topic keeps it."""


class Outbox:
    """Hands records to the client, and waits for their acknowledgement.

    Args:
        config: Where the cluster is; ``[producer]`` goes over ``[kafka]``.
        transactional_id: Of the transactions, if there are any.
    """

    def __init__(self, config: Config, transactional_id: str | None = None) -> None:
        self.client = client.producer(config, self._note, transactional_id)
        self.last_error: KafkaError | None = None
        """What the client told last in the background."""

    def send(self, topic: str, on_delivery: OnDelivery, **record: Any) -> None:
        """Hand a record over; while the queue is full, wait.

        Args:
            topic: Where to.
            on_delivery: Called from within a poll, once, with what became of it.
            record: value, key, partition, headers, timestamp, as the client has them.

        Raises:
            DeliveryFailed: The client refuses it.
            UsageError: It belongs into a transaction, and none is open.
        """
        while True:
            try:
                self.client.produce(topic, on_delivery=on_delivery, **record)
            except BufferError:
                self.poll(_POLL_SECONDS)
            except KafkaException as error:
                raise _refused(topic, error.args[0]) from error
            else:
                return

    def poll(self, seconds: float) -> None:
        """Let deliveries be told; return when some were, or after so long."""
        try:
            self.client.poll(seconds)
        except KafkaException as error:
            # A fatal error is raised here, once; each record is told of it, too.
            self._note(error.args[0])

    def flush(self, seconds: float) -> str | None:
        """Wait until all is acknowledged; return what is wrong if it takes longer."""
        try:
            left = self.client.flush(seconds)
        except KafkaException as error:
            self._note(error.args[0])
            left = self.client.flush(seconds)
        if not left:
            return None
        told = "" if self.last_error is None else f" ({self.last_error.str()})"
        return f"{left:,} records were not acknowledged within {seconds:.0f} s{told}"

    def _note(self, error: KafkaError) -> None:
        self.last_error = error


class Producer:
    """Publishes records; use it in ``with``, or close it.

    Any number of threads may publish, and so may handlers.

    Args:
        config: Where the cluster is; found from the current folder upwards if None.
        transactional_id: For `transaction`, over ``[producer]``'s transactional.id. Of
            two producers with the same, the newer one shuts the older one out.

    Raises:
        ConfigError: No cluster is configured, or a setting is refused.
    """

    def __init__(
        self, config: Config | None = None, *, transactional_id: str | None = None
    ) -> None:
        config = config or load_config()
        self._id = transactional_id or config.producer.get("transactional.id")
        self._partitioner = str(
            (config.kafka | config.producer).get("partitioner", "consistent_random")
        )
        self._outbox = Outbox(config, transactional_id)
        self._ending = threading.Event()
        self._poller: threading.Thread | None = None
        self._lock = threading.Lock()
        self._transaction = threading.Lock()
        self._is_prepared = False
        self._counts: dict[str, tuple[float, int]] = {}
        # At the end of Python, too: what was handed over is not dropped.
        self._at_exit = weakref.finalize(self, _end, self._outbox, self._ending)

    # --- publishing -----------------------------------------------------------

    def publish(self, topic: str, payload: Any, **how: Any) -> Delivery:
        """Publish a record, and return where it is.

        Args:
            topic: Where to.
            payload: Bytes and text as they are, None as a tombstone; JSON is made of
                anything else, whose numbers keep all digits.
            how: ``key``: bytes, text, an int or None; records of a key are in one
                partition, in order. ``partition_key``: chooses the partition in the
                key's stead. ``partition``: its number. ``headers``: names and values;
                those of the active span are added. ``timestamp``: milliseconds since
                1970.

        Raises:
            DeliveryFailed: The cluster did not take it.
            UsageError: What was asked makes no sense; nothing was sent.
        """
        return self.async_publish(topic, payload, **how).result()

    def publish_list(self, messages: Iterable[Mapping[str, Any]]) -> list[Delivery]:
        """Publish records, and return where they are, in their order.

        Args:
            messages: The arguments of `publish`, by name.

        Raises:
            DeliveryFailed: The cluster did not take one; others may be there.
            UsageError: As `async_publish_list`.
        """
        return [future.result() for future in self.async_publish_list(messages)]

    def async_publish_list(
        self, messages: Iterable[Mapping[str, Any]]
    ) -> list[Future[Delivery]]:
        """Hand records over; return their futures.

        Raises:
            UsageError: A message names what `publish` does not take, or lacks what it
                needs; those before it were handed over.
        """
        return [
            self._hand_over(index, message) for index, message in enumerate(messages)
        ]

    def _hand_over(self, index: int, message: Mapping[str, Any]) -> Future[Delivery]:
        """Hand one of a list over; a wrong name is told with its place in the list."""
        try:
            return self.async_publish(**message)
        except TypeError:
            wrong = _wrong_names(message)
            if not wrong:
                raise
            msg = (
                f"message {index} of the list: {wrong}; it was not sent, nor what "
                "follows it"
            )
            raise UsageError(msg) from None

    def async_publish(  # noqa: PLR0913 - what a record has, by its names
        self,
        topic: str,
        payload: Any,
        *,
        key: str | bytes | int | None = None,
        partition_key: str | bytes | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
        timestamp: int | None = None,
    ) -> Future[Delivery]:
        """Hand a record over; return a future of where it is. Options as `publish`.

        While the client's queue is full it waits. In asyncio, ``asyncio.wrap_future``
        makes the future one to await; its callbacks run in the producer's thread.
        """
        if partition_key is not None and partition is not None:
            msg = "partition_key and partition both choose the partition: give one"
            raise UsageError(msg)
        record: dict[str, Any] = {
            "value": _payload(payload),
            "key": _key(key),
            "headers": _traced(_headers(headers)),
        }
        if partition_key is not None and _key(partition_key) != record["key"]:
            partition = self._partition_of(topic, _key(partition_key) or b"")
        if partition is not None:
            record["partition"] = partition
        if timestamp is not None:
            record["timestamp"] = timestamp
        self._require_poller()
        future: Future[Delivery] = Future()
        self._outbox.send(topic, _settling(future, topic), **record)
        return future

    def flush(self, seconds: float = ACK_SECONDS) -> None:
        """Wait until all that was handed over is acknowledged or has failed.

        Raises:
            SourceError: It takes longer; what is left is still tried.
        """
        problem = self._outbox.flush(seconds)
        if problem is not None:
            raise SourceError(problem)

    # --- transactions ---------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Self]:
        """Publish what the block publishes all at once, or not at all if it raises.

        Consumers that read committed records, as kappa_log does, see all or nothing.

        Raises:
            UsageError: There is no transactional.id, or a transaction is open.
            SourceError: The cluster did not commit it; nothing of it is seen.
        """
        if not self._id:
            msg = (
                'there is no transactional id: set "transactional.id" in [producer], '
                "or give transactional_id="
            )
            raise UsageError(msg)
        if not self._transaction.acquire(blocking=False):
            msg = "a transaction of this producer is open: one at a time"
            raise UsageError(msg)
        try:
            self._require_poller()
            self._begin()
            try:
                yield self
            except BaseException:
                self._abort()
                raise
            self._commit()
        finally:
            self._transaction.release()

    def _begin(self) -> None:
        with self._telling("cannot begin"):
            if not self._is_prepared:
                self._outbox.client.init_transactions(ACK_SECONDS)
                self._is_prepared = True
            self._outbox.client.begin_transaction()

    def _commit(self) -> None:
        end = time.monotonic() + ACK_SECONDS
        while True:
            try:
                self._outbox.client.commit_transaction(ACK_SECONDS)
            except KafkaException as error:
                found: KafkaError = error.args[0]
                if found.retriable() and time.monotonic() < end:
                    continue
                if found.txn_requires_abort():
                    self._abort()
                raise self._source_error("is not committed", error) from error
            else:
                return

    def _abort(self) -> None:
        with self._telling("cannot be aborted"):
            self._outbox.client.abort_transaction(ACK_SECONDS)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except KafkaException as error:
            raise self._source_error(what, error) from error

    def _source_error(self, what: str, error: KafkaException) -> SourceError:
        return client.source_error(f"transaction of {self._id} {what}", error)

    # --- the end --------------------------------------------------------------

    def close(self) -> None:
        """Wait until all is acknowledged or has failed, and end; twice is once.

        Raises:
            SourceError: It takes longer than a minute; what is left is lost.
        """
        if self._at_exit.detach() is None:
            return
        try:
            self.flush()
        finally:
            self._ending.set()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    # --- behind them ----------------------------------------------------------

    def _require_poller(self) -> None:
        """Let futures come true without anybody polling."""
        if self._ending.is_set():
            msg = "this producer is closed"
            raise UsageError(msg)
        if self._poller is None:
            with self._lock:
                if self._poller is None:
                    self._poller = threading.Thread(
                        target=_poll,
                        args=(self._outbox, self._ending),
                        name="kappa-log-producer",
                        daemon=True,
                    )
                    self._poller.start()

    def _partition_of(self, topic: str, key: bytes) -> int:
        """Return the partition in which the client would put records of a key."""
        if not self._partitioner.startswith("consistent"):
            msg = (
                f"partition_key is not for partitioner {self._partitioner}: give the "
                "partition itself"
            )
            raise UsageError(msg)
        expires, count = self._counts.get(topic, (0.0, 0))
        if time.monotonic() >= expires:
            try:
                found = self._outbox.client.list_topics(topic, client.SECONDS)
            except KafkaException as error:
                doing = f"asking how many partitions topic {topic} has"
                raise client.source_error(doing, error) from error
            count = len(found.topics[topic].partitions)
            if not count:
                why = found.topics[topic].error
                raise DeliveryFailed(topic, why.str() if why else "it is not there")
            self._counts[topic] = time.monotonic() + COUNT_SECONDS, count
        return zlib.crc32(key) % count


def _poll(outbox: Outbox, ending: threading.Event) -> None:
    # The producer itself is not held: forgotten by all, it ends.
    while not ending.is_set():
        outbox.poll(_POLL_SECONDS)


def _end(outbox: Outbox, ending: threading.Event) -> None:
    problem = outbox.flush(EXIT_SECONDS)
    ending.set()
    if problem is not None:
        _LOGGER.error("a producer was not closed: %s; they are lost", problem)


def _settling(future: Future[Delivery], topic: str) -> OnDelivery:
    def settle(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            future.set_exception(_refused(topic, error))
            return
        kind, timestamp = message.timestamp()
        partition, offset = message.partition(), message.offset()
        future.set_result(
            Delivery(
                topic,
                -1 if partition is None else partition,
                -1 if offset is None else offset,
                timestamp if kind else None,
            )
        )

    # Nobody can cancel what the client has.
    future.set_running_or_notify_cancel()
    return settle


def _refused(topic: str, error: KafkaError) -> DeliveryFailed | UsageError:
    if error.code() == KafkaError._STATE:  # noqa: SLF001 - librdkafka's name
        msg = f"topic {topic}: {error.str()}; publish inside producer.transaction()"
        return UsageError(msg)
    return DeliveryFailed(topic, error.str(), retryable=error.retriable())


_NAMES = (
    *("topic", "payload", "key", "partition_key", "partition", "headers"),
    "timestamp",
)


def _wrong_names(message: object) -> str:
    """Return why these cannot be the arguments of `publish`; empty if they can."""
    if not isinstance(message, Mapping):
        return f"it is {type(message).__name__}, not a dict of what publish takes"
    wrong = [f"{name} is missing" for name in _NAMES[:2] if name not in message]
    wrong += [
        f"{name!r} is not known{did_you_mean(str(name), _NAMES)}"
        for name in message
        if name not in _NAMES
    ]
    return ", ".join(wrong)


def _payload(payload: Any) -> bytes | None:
    if payload is None or isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        return payload.encode()
    try:
        return (made(payload, b"").text or "").encode()
    except DecodeError as error:
        msg = f"payload {payload!r} cannot be published: {error}"
        raise UsageError(msg) from None


def _key(key: str | bytes | int | None) -> bytes | None:
    if key is None or isinstance(key, bytes):
        return key
    return str(key).encode()


def _headers(headers: Headers | None) -> list[tuple[str, bytes | None]]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    return [
        (name, value.encode() if isinstance(value, str) else value)
        for name, value in pairs
    ]


def _traced(
    headers: list[tuple[str, bytes | None]],
) -> list[tuple[str, bytes | None]]:
    """Add which span published the record, unless its headers tell another."""
    if any(name in tracing.HEADERS for name, _ in headers):
        return headers
    return headers + tracing.carried()
