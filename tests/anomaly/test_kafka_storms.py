"""Consumers that come and go all the time, while a producer goes on."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.kafka_nest import Worker
from support.kafka_world import (
    CONSUMER,
    DYNAMIC,
    SCALE,
    Settings,
    World,
    Worlds,
    made_records,
)

STORM_SECONDS = 15 * min(max(1, SCALE), 4)

PARTITIONS = 12
SLOTS = 3

RANGE = DYNAMIC | {"partition.assignment.strategy": "range"}

pytestmark = pytest.mark.timeout(300 * max(1, SCALE))


@contextmanager
def producing(world: World, chance: random.Random) -> Iterator[None]:
    """Produce a few records again and again while the block goes on."""
    stop = threading.Event()

    def produce() -> None:
        start = 0
        while not stop.wait(0.05):
            world.produce(made_records(chance, PARTITIONS, 15, start))
            start += 15

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


_FENCED = "Static consumer fenced"
"""What ends a static member when another joins under its name; whoever supervises it
starts it again. It may be fenced with no other there: one that slept for about its
session's timeout joins anew while its old membership is still known (of 70 such sleeps
3 ended so), and a request to join that a killed member had sent may reach the broker
after that of its heir."""


class Storm:
    """Members of a group, of whom one comes, goes or sleeps every now and then."""

    def __init__(
        self, world: World, chance: random.Random, *, are_static: bool
    ) -> None:
        """Begin with all of them."""
        self._world = world
        self._chance = chance
        self._are_static = are_static
        self._slots: list[Worker | None] = [None] * SLOTS
        self._asleep: set[int] = set()
        self._was_killed: set[int] = set()
        self._leaving: list[Worker | None] = [None] * SLOTS
        self._heirs: set[Worker] = set()
        """Members whose namesake before them was killed."""
        self._slept: set[Worker] = set()
        self.starts = 0
        self.results: list[dict[str, Any]] = []
        """Of those that ended in peace."""
        for slot in range(SLOTS):
            self._start(slot)

    def blow(self, seconds: float) -> None:
        """Let members come and go for some time, then let all of them go.

        It lasts until something was read: on a busy machine nobody is in the group for
        long enough at first.
        """
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < seconds or (
            passed < 4 * seconds and not self._world.app.head().position
        ):
            time.sleep(self._chance.uniform(0.2, 0.5))
            self._change(self._chance.randrange(SLOTS))
        for slot, worker in enumerate(self._slots):
            if worker is not None:
                worker.stop()
                worker.wake()
                self._leave(slot, worker)
        for slot in range(SLOTS):
            self._leave(slot, None)

    def _change(self, slot: int) -> None:
        """Let a member come, or let it go, be killed or sleep until it is its turn."""
        worker, luck = self._slots[slot], self._chance.random()
        if worker is None:
            self._start(slot)
        elif slot in self._asleep:
            worker.wake()
            self._asleep.discard(slot)
        elif luck < 0.2:
            worker.signal(signal.SIGSTOP)
            self._asleep.add(slot)
            self._slept.add(worker)
        else:
            self._slots[slot] = None
            if luck < 0.6:
                worker.kill()
                self._was_killed.add(slot)
            else:
                worker.stop()
                self._leave(slot, worker)

    def _start(self, slot: int) -> None:
        if self._are_static:
            # Its namesake must have gone, or would be fenced by Kafka itself.
            self._leave(slot, None)
        names = {"group.instance.id": f"slot-{slot}"} if self._are_static else {}
        worker = self._slots[slot] = self._world.start(kafka=names)
        if self._are_static and slot in self._was_killed:
            self._heirs.add(worker)
        self._was_killed.discard(slot)
        self.starts += 1

    def _leave(self, slot: int, worker: Worker | None) -> None:
        """Let a worker end beside the storm; wait for the one before it."""
        before = self._leaving[slot]
        if before is not None:
            result = before.result()
            if "error" in result:
                result |= {
                    "is_heir": before in self._heirs,
                    "slept": before in self._slept,
                }
            may_be_fenced = before in self._heirs | self._slept
            if not (may_be_fenced and _FENCED in result.get("message", "")):
                self.results.append(result)
        self._leaving[slot] = worker


@pytest.mark.parametrize(
    ("database_url", "kafka", "are_static"),
    [
        pytest.param("postgresql", RANGE, False, id="postgresql-range"),
        pytest.param("postgresql", DYNAMIC, False, id="postgresql-cooperative"),
        pytest.param("postgresql", CONSUMER, False, id="postgresql-consumer"),
        pytest.param("postgresql", DYNAMIC, True, id="postgresql-static"),
        pytest.param("sqlite", DYNAMIC, False, id="sqlite-cooperative"),
        pytest.param("sqlite", CONSUMER, False, id="sqlite-consumer"),
    ],
    indirect=["database_url"],
)
def test_a_storm_of_rebalances_loses_and_doubles_nothing(
    worlds: Worlds, kafka: Settings, are_static: bool
) -> None:
    """Members come, go, sleep and are killed all the time; each record is read once."""
    chance = random.Random(f"{kafka} {are_static}")
    with worlds.new(PARTITIONS, kafka=kafka, batch_size=40) as world:
        with world.following() as reader:
            with producing(world, chance):
                storm = Storm(world, chance, are_static=are_static)
                storm.blow(STORM_SECONDS)
                head = world.app.head().position
            world.finish()
        faults = world.faults(reader.cursor)

    errors = [r for r in storm.results if "error" in r]
    assert not errors, f"{errors}"
    assert faults == []
    assert storm.starts > 5
    assert len(storm.results) > 3
    assert head > 0
