"""Transactions of producers: the log holds what was committed, up to what is open."""

from __future__ import annotations

import random

import pytest

from support.history import Outcome
from support.kafka_world import (
    SCALE,
    STATIC,
    Made,
    World,
    Worlds,
    made_records,
)

TRIALS = max(1, round(3 * SCALE))

PARTITIONS = 3
STEPS = 40

pytestmark = pytest.mark.timeout(300 * max(1, SCALE))


class Transactions:
    """A producer of one transaction after the other; a world learns their outcomes."""

    def __init__(self, world: World) -> None:
        """Begin without an open one."""
        self._world = world
        self._producer = world.broker.transactional()
        self._records: list[Made] = []
        self.places: list[tuple[int, int]] = []
        """Where the records of the open transaction are."""

    def send(self, records: list[Made]) -> None:
        """Produce within the open transaction, or a new one."""
        self.places += self._producer.send(self._world.topic, records)
        self._records += records

    def end(self, outcome: Outcome) -> None:
        """Commit or abort the open transaction."""
        if not self._records:
            return
        if outcome is Outcome.COMMITTED:
            self._producer.commit()
        else:
            self._producer.abort()
        self._world.remember(self._records, self.places, outcome)
        self._records, self.places = [], []


def mixed(world: World, chance: random.Random) -> Transactions:
    """Produce in transactions that overlap, and outside of any; return an open one."""
    first, second = Transactions(world), Transactions(world)
    for step in range(STEPS):
        records = made_records(chance, PARTITIONS, chance.randint(1, 6), step * 10)
        luck = chance.random()
        if luck < 0.2:
            world.produce(records)
        else:
            producer = chance.choice([first, second])
            producer.send(records)
            if luck < 0.7:
                producer.end(chance.choice([Outcome.COMMITTED, Outcome.ABORTED]))
    second.end(Outcome.COMMITTED)
    first.end(Outcome.ABORTED)
    first.send(made_records(chance, PARTITIONS, 20, STEPS * 10))
    world.produce(made_records(chance, PARTITIONS, 20, STEPS * 10 + 20))
    return first


@pytest.mark.parametrize("waits", [False, True], ids=["comes-again", "waits"])
@pytest.mark.parametrize("last", [Outcome.COMMITTED, Outcome.ABORTED])
def test_the_log_is_what_was_committed_and_goes_on_when_the_open_one_ends(
    worlds: Worlds, last: Outcome, waits: bool
) -> None:
    """Aborted records are never seen, and the offsets pass them and all markers."""
    for seed in range(TRIALS):
        chance = random.Random(f"{last} {waits} {seed}")
        with worlds.new(PARTITIONS) as world, world.following() as reader:
            open_one = mixed(world, chance)
            ends = world.ends()
            stable = dict(ends)
            for partition, offset in open_one.places:
                at = world.topic_id, partition
                stable[at] = min(stable[at], offset)

            killed = world.start(until_end=True, trap={"point": "K3", "at": 2})
            assert killed.was_killed()
            worker = world.start(until_end=not waits)
            if waits:
                world.wait_until_read(stable)
            else:
                assert "error" not in worker.result()
            assert world.offsets() == stable
            assert stable != ends

            open_one.end(last)
            if waits:
                world.wait_until_read()
                worker.stop()
                assert "error" not in worker.result()
            world.finish()
            faults = world.faults(reader.cursor)

        assert faults == [], f"seed {seed}"


def test_aborted_records_right_before_an_open_transaction_are_passed(
    worlds: Worlds,
) -> None:
    """No record and no marker tells that they are passed, only the partition's end."""
    with worlds.new(1) as world:
        aborted, open_one = Transactions(world), Transactions(world)
        aborted.send([(b"1", b"k", 0)])
        open_one.send([(b"2", b"k", 0)])
        aborted.end(Outcome.ABORTED)

        assert "error" not in world.start(until_end=True).result()

        assert world.offsets() == {(world.topic_id, 0): 1}
        open_one.end(Outcome.ABORTED)
        world.finish()
        assert world.faults() == []


def test_a_consumer_that_reads_uncommitted_records_is_found_out(
    worlds: Worlds,
) -> None:
    """The trials find what they were made to find: an aborted record in the log."""
    kafka = STATIC | {"isolation.level": "read_uncommitted"}
    with worlds.new(PARTITIONS, kafka=kafka) as world:
        mixed(world, random.Random(1)).end(Outcome.ABORTED)
        world.finish()
        faults = world.faults()

    assert any(fault.startswith("aborted-read") for fault in faults), faults
