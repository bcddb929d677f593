"""Partitions that go and come back while the client is polled for records."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import TopicPartition
from typing_extensions import override

from kappa_log.kafka import client
from support.kafka_process import ANSWER_SECONDS
from support.kafka_worker import Picky
from support.kafka_world import Made, World, Worlds

BATCH = 25


class Restless(confluent_kafka.Consumer):
    """A client that loses its partitions and gets them back within one poll."""

    is_due = threading.Event()
    """Set: the next poll that finds records does so."""
    may_write = threading.Event()
    """Until this is set the first batch is not decided."""

    @override
    def subscribe(
        self,
        topics: list[str],
        on_assign: Any = None,
        on_revoke: Any = None,
        on_lost: Any = None,
    ) -> None:
        """Keep what to call."""
        self.on_assign, self.on_revoke = on_assign, on_revoke
        super().subscribe(topics, on_assign, on_revoke, on_lost)

    @override
    def consume(self, *given: Any, **named: Any) -> Any:
        """Return records that were fetched before what happens here."""
        found = super().consume(*given, **named)
        if self.is_due.is_set() and any(each.error() is None for each in found):
            self.is_due.clear()
            self.may_write.set()
            parts = [TopicPartition(p.topic, p.partition) for p in self.assignment()]
            self.on_revoke(self, parts)
            self.incremental_unassign(parts)
            self.on_assign(self, parts)
        return found


def records(first: int, last: int) -> list[Made]:
    """Return records to keep, numbered."""
    return [
        (json.dumps({"who": "w1", "number": n, "do": "keep"}).encode(), b"k", 0)
        for n in range(first, last)
    ]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let clients be restless, and tell when the first batch is being decided."""
    found = threading.Event()
    keep = Picky.consume

    def consume(self: Picky, payload: Any, metadata: Any) -> object:
        found.set()
        Restless.may_write.wait(ANSWER_SECONDS)
        return keep(self, payload, metadata)

    Restless.is_due.clear()
    Restless.may_write.clear()
    monkeypatch.setattr(Picky, "consume", consume)
    monkeypatch.setattr(client, "Consumer", Restless)
    return found


@contextmanager
def consuming(world: World) -> Iterator[None]:
    """Consume in a thread of this process while the block goes on."""
    stop = threading.Event()
    thread = threading.Thread(target=lambda: world.app.consume(stop=stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_records_of_before_a_rebalance_are_not_taken_for_those_behind_it(
    worlds: Worlds, begun: threading.Event
) -> None:
    """What was gathered is dropped then, and a later record must not hide that."""
    with worlds.new(1, batch_size=BATCH) as world:
        world.produce(records(0, BATCH))
        with consuming(world):
            assert begun.wait(ANSWER_SECONDS)
            world.produce(records(BATCH, BATCH + 10))
            # They are gathered while the batch before them is still being decided.
            time.sleep(0.5)
            Restless.is_due.set()
            world.produce(records(BATCH + 10, BATCH + 20))
            world.wait_until_read()
        world.finish()

        assert not Restless.is_due.is_set()
        assert world.faults() == []
