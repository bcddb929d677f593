"""A consumer that slept while another took its partitions over: fenced by its epoch."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.kafka_nest import Worker
from support.kafka_world import (
    CONSUMER,
    DYNAMIC,
    SCALE,
    World,
    Worlds,
    made_records,
)

TRIALS = max(1, round(3 * SCALE))
"""How often each way on each database."""

PARTITIONS = 3

MEMBERS = [DYNAMIC, DYNAMIC | {"partition.assignment.strategy": "range"}, CONSUMER]

HOUR = 3600

pytestmark = pytest.mark.timeout(300 * max(1, SCALE))


def slept(
    world: World, chance: random.Random, *, alone: bool, **task: Any
) -> tuple[Worker, list[str]]:
    """Let a consumer sleep with a batch in its hands, and another one take over.

    Args:
        world: Where.
        chance: Says when.
        alone: The other one ends before the sleeper wakes; else they share the rest.
        task: More of the sleeper's.

    Returns:
        The sleeper, and all that is wrong in the end.
    """
    at, seed = chance.randint(1, 3), chance.random()
    trap = {"point": "K0", "act": "pause", "at": at, "seed": seed}
    task.setdefault("trap", trap)
    world.produce(made_records(chance, PARTITIONS, 150))
    with world.following() as reader:
        sleeper = world.start(until_end=alone, **task)
        sleeper.wait_until_paused()
        other = world.start(until_end=alone)
        world.wait_until_read()
        if alone:
            assert "error" not in other.result()
        world.produce(made_records(chance, PARTITIONS, 100, start=1000))

        sleeper.hear("assigned")
        sleeper.wake()
        if not alone:
            sleeper.hear("assigned")
            world.produce(made_records(chance, PARTITIONS, 100, start=2000))
            world.wait_until_read()
            sleeper.stop()
            other.stop()
            assert "error" not in other.result()
        sleeper.result()
        world.finish()
    return sleeper, world.faults(reader.cursor)


@pytest.mark.parametrize("alone", [True, False], ids=["gone", "there"])
def test_who_slept_writes_nothing_and_learns_that_it_lost_its_partitions(
    worlds: Worlds, alone: bool
) -> None:
    """Its epoch tells, whatever its clock says, be the other one gone or there."""
    for seed in range(TRIALS):
        chance = random.Random(f"{alone} {seed}")
        kafka = MEMBERS[seed % len(MEMBERS)]
        skew = chance.choice([-HOUR, 0, HOUR])
        with worlds.new(PARTITIONS, kafka=kafka, batch_size=20) as world:
            sleeper, faults = slept(world, chance, alone=alone, skew=skew)

        assert "error" not in sleeper.result(), f"seed {seed}"
        assert sleeper.result()["fenced"] >= 1, f"seed {seed}"
        assert any("lost" in notice for notice in sleeper.notices), f"seed {seed}"
        assert faults == [], f"seed {seed}"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_who_slept_within_its_transaction_writes_nothing(worlds: Worlds) -> None:
    """PostgreSQL lets another one write while a transaction has locked nothing yet."""
    trap = {"point": "K1", "place": 0, "act": "pause", "at": 2}
    with worlds.new(PARTITIONS, kafka=DYNAMIC, batch_size=20) as world:
        sleeper, faults = slept(world, random.Random(1), alone=True, trap=trap)

    assert sleeper.result()["fenced"] >= 1
    assert faults == []


def test_without_the_fence_a_sleeper_would_be_found_out(worlds: Worlds) -> None:
    """The trials find what they were made to find: offsets moved by who lost them."""
    with worlds.new(PARTITIONS, kafka=DYNAMIC, batch_size=20) as world:
        sleeper, faults = slept(world, random.Random(1), alone=True, fault="no fence")

    assert faults != [] or "error" in sleeper.result()
