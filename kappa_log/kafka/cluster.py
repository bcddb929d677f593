"""Cluster: its topics, which incarnation of them, and what they hold.

A topic's id tells a topic from another one that was made later under its name, so
offsets of the one are never taken for offsets of the other.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from confluent_kafka import (
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    NewTopic,
    OffsetSpec,
)

from kappa_log.config import Config, ListenerConfig
from kappa_log.errors import SourceError, UsageError
from kappa_log.kafka import client

ASK_AGAIN_SECONDS = 0.1
"""How long a request waits that was refused for now."""

_MOCK = "mockCluster"
"""How librdkafka's in-process broker calls itself; its topics have no ids."""

_NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"
"""A topic's id as brokers before 2.8 give it."""

_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")
"""What a topic may be called; the client's library dies of some other texts."""


class Topic(msgspec.Struct, frozen=True):
    """One incarnation of a topic."""

    name: str
    source: str
    """Name of the source that it is in the log."""
    partitions: tuple[int, ...]


class Span(msgspec.Struct, frozen=True):
    """Which offsets a partition has: [low, high), without open transactions."""

    low: int
    high: int


class Cluster:
    """What a cluster says of its topics; safe to be asked by several threads."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._last: KafkaError | None = None
        self._admin: AdminClient = client.admin(config, self._failed)

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the Kafka cluster at {self.config.kafka['bootstrap.servers']}"

    @cached_property
    def id(self) -> str:
        """Id of the cluster.

        Raises:
            SourceError: It does not answer.
        """
        return str(self._metadata().cluster_id)

    def topic_names(self) -> list[str]:
        """Return the names of all topics, sorted, but for Kafka's own."""
        return sorted(n for n in self._metadata().topics if not n.startswith("__"))

    def begin_topic_names(self) -> Future[list[str]]:
        """Ask for the names of all topics, and do not wait for them."""
        return _begun(self.topic_names)

    def topics_of(self, listener: ListenerConfig) -> dict[str, Topic]:
        """Return the topics that a listener covers, as they are now.

        Raises:
            SourceError: The cluster does not answer, or has no such topic.
        """
        if listener.is_pattern:
            return self.topics([n for n in self.topic_names() if listener.covers(n)])
        found = self.topics([listener.topic])
        if not found:
            raise SourceError(self.no_topic(listener.topic))
        return found

    def topics(self, names: Sequence[str]) -> dict[str, Topic]:
        """Return name → topic of those that are there."""
        names = [name for name in names if _NAME.fullmatch(name)]
        if not names:
            return {}
        if self.id.startswith(_MOCK):
            return self._without_ids(names)
        found: dict[str, Topic] = {}
        wanted = self._asked.describe_topics(
            TopicCollection(names), request_timeout=client.SECONDS
        )
        for name, future in wanted.items():
            try:
                described = self._result(f"topic {name}", future)
            except KafkaException:
                continue
            found[name] = Topic(
                name,
                self._source(name, str(described.topic_id)),
                tuple(sorted(part.id for part in described.partitions)),
            )
        return found

    def spans(
        self, partitions: Iterable[tuple[str, int]]
    ) -> dict[tuple[str, int], Span]:
        """Return which offsets partitions have; leave out those that are not there."""
        wanted = list(partitions)
        low = self._offsets(wanted, OffsetSpec.earliest())  # type: ignore[no-untyped-call]
        high = self._offsets(wanted, OffsetSpec.latest())  # type: ignore[no-untyped-call]
        return {
            at: Span(low[at], high[at]) for at in wanted if at in low and at in high
        }

    def make_topic(self, name: str, partitions: int) -> None:
        """Make a topic, with the cluster's own defaults.

        Raises:
            UsageError: No topic can have that name, or so many partitions.
            SourceError: The cluster refuses; one that is there is not changed.
        """
        if not _NAME.fullmatch(name):
            msg = f"{name!r} is no name of a topic: 1 to 249 of a-z, A-Z, 0-9, . _ -"
            raise UsageError(msg)
        msg = f"topic {name} cannot be made"
        try:
            future = self._asked.create_topics([NewTopic(name, partitions)])[name]
            future.result(client.SECONDS + 1)
        except ValueError as error:
            msg = f"{msg}: {error}"
            raise UsageError(msg) from None
        except (KafkaException, TimeoutError) as error:
            raise client.source_error(msg, error) from error
        end = time.monotonic() + client.SECONDS
        while name not in self.topics([name]) and time.monotonic() < end:
            time.sleep(0.05)

    def no_topic(self, name: str) -> str:
        """Return what to tell about a topic that is not there."""
        import difflib

        known = self.topic_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{self.label} has no topic '{name}'{hint}"

    def _without_ids(self, names: Sequence[str]) -> dict[str, Topic]:
        known = self._metadata().topics
        return {
            name: Topic(
                name, self._source(name, _NO_ID), tuple(sorted(known[name].partitions))
            )
            for name in names
            if name in known and known[name].error is None
        }

    def _source(self, name: str, topic_id: str) -> str:
        return f"kafka:{self.id}/{name if topic_id == _NO_ID else topic_id}"

    def _offsets(
        self, partitions: Sequence[tuple[str, int]], spec: Any
    ) -> dict[tuple[str, int], int]:
        found: dict[tuple[str, int], int] = {}
        end = time.monotonic() + client.SECONDS
        left = [TopicPartition(topic, number) for topic, number in partitions]
        while left:
            asked = self._asked.list_offsets(
                dict.fromkeys(left, spec),
                isolation_level=IsolationLevel.READ_COMMITTED,
                request_timeout=client.SECONDS,
            )
            left = []
            for at, future in asked.items():
                try:
                    offset = self._result("offsets", future).offset
                    found[at.topic, at.partition] = offset
                except KafkaException:
                    continue
                except SourceError as error:
                    if not _is_led_soon(error) or time.monotonic() >= end:
                        raise
                    left.append(at)
            if left:
                time.sleep(ASK_AGAIN_SECONDS)
        return found

    def _result(self, what: str, future: Any) -> Any:
        """Return what a request came to; what is not there raises KafkaException.

        Raises:
            SourceError: The cluster does not answer, or does not let us ask.
        """
        try:
            return future.result(client.SECONDS + 1)
        except KafkaException as error:
            found = error.args[0]
            if found.code() in _ABSENT:
                raise
            raise self._unanswered(what, error) from error
        except TimeoutError as error:
            raise self._unanswered(what, error) from error

    def _metadata(self) -> Any:
        admin = self._asked
        return self._result("its topics", _begun(lambda: _listed(admin)))

    @property
    def _asked(self) -> AdminClient:
        """The client; what failed before does not tell why it may fail now."""
        self._admin.poll(0)
        self._last = None
        return self._admin

    def _unanswered(self, what: str, error: BaseException) -> SourceError:
        # What failed in the background says more than that time ran out.
        self._admin.poll(0)
        told = self._last if self._last is not None else error
        return client.source_error(f"{self.label} gives no answer about {what}", told)

    def _failed(self, error: KafkaError) -> None:
        # That all brokers are down says less than why the last one is.
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001
            self._last = error


def _is_led_soon(error: SourceError) -> bool:
    """Tell whether a partition was refused only because its leader is new."""
    cause = error.__cause__
    return isinstance(cause, KafkaException) and cause.args[0].code() in _LEADERS


_LEADERS = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
)


def _listed(admin: AdminClient) -> Any:
    """Return a cluster's metadata, asking again where the answer may be another soon.

    Brokers that are just starting hang up, or know no leader yet.
    """
    end = time.monotonic() + client.SECONDS
    while True:
        try:
            return admin.list_topics(timeout=max(0.1, end - time.monotonic()))
        except KafkaException as error:
            found = error.args[0]
            is_final = found.code() in _ABSENT or client.is_fatal(found)
            if is_final or time.monotonic() + ASK_AGAIN_SECONDS >= end:
                raise
        time.sleep(ASK_AGAIN_SECONDS)


T = TypeVar("T")


def _begun(work: Callable[[], T]) -> Future[T]:
    """Do something in a thread: Ctrl-C does not reach into the client's own waits."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            future.set_exception(error)

    threading.Thread(target=run, name="metadata", daemon=True).start()
    return future


_ABSENT = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_EXCEPTION})
