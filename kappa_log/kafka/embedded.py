"""Embedded broker: librdkafka's in-process mock, to try things without a server.

It keeps what is produced in memory and ends with its process. It hands out records of
aborted transactions and fences nobody: nothing to prove promises on.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from confluent_kafka import Producer

PARTITIONS = 4
"""Of each topic; librdkafka lets nobody choose another number."""


class EmbeddedBroker:
    """A Kafka broker inside this process; topics come to be when they are used."""

    def __init__(self) -> None:
        """Start it on a free port of the loopback interface."""
        self._host: Producer | None = Producer(
            {
                "test.mock.num.brokers": 1,
                "bootstrap.servers": "localhost",
                "topic.metadata.refresh.interval.ms": -1,
                "log_level": 2,
            }
        )

    @property
    def bootstrap(self) -> str:
        """Its address, for ``bootstrap.servers``."""
        assert self._host is not None, "the broker was closed"
        brokers = self._host.list_topics(timeout=5).brokers.values()
        return ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def close(self) -> None:
        """End it, with all that it keeps."""
        self._host = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self.close()
