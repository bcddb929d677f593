"""A consumer that slept while another took its partitions over: fenced by its epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.kafka_world import (
    CONSUMER,
    DYNAMIC,
    SCALE,
    Databases,
    Nest,
    Worker,
    World,
    made_records,
)

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker

TRIALS = max(1, round(3 * SCALE))
"""How often each way on each database."""

PARTITIONS = 3

MEMBERS = [DYNAMIC, DYNAMIC | {"partition.assignment.strategy": "range"}, CONSUMER]

HOUR = 3600

pytestmark = pytest.mark.timeout(300 * max(1, SCALE))


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    """Give a nest to all tests."""
    with Nest() as found:
        yield found


@pytest.fixture
def databases(database_url: str) -> Databases:
    """Give logs on one kind of database."""
    return Databases(database_url)


def world_of(
    broker: RealBroker, nest: Nest, url: str, folder: Path, kafka: dict[str, Any]
) -> World:
    """Return a world with a topic of its own, and some records in it."""
    topic = broker.new_topic(PARTITIONS)
    world = World(broker, nest, url, folder, topic, kafka=kafka, batch_size=20)
    world.produce(made_records(random.Random(topic), PARTITIONS, 150))
    return world


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
    trap = {"point": "K0", "act": "pause", "at": chance.randint(1, 3)}
    task = {"trap": trap | {"seed": chance.random()}, "until_end": alone} | task
    with world.following() as reader:
        sleeper = world.start(**task)
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
    kafka_broker: RealBroker,
    nest: Nest,
    databases: Databases,
    tmp_path: Path,
    alone: bool,
) -> None:
    """Its epoch tells, whatever its clock says, and whether the other is still there."""
    for seed in range(TRIALS):
        chance = random.Random(f"{alone} {seed}")
        kafka = MEMBERS[seed % len(MEMBERS)]
        with (
            databases.fresh() as url,
            world_of(kafka_broker, nest, url, tmp_path, kafka) as world,
        ):
            skew = chance.choice([-HOUR, 0, HOUR])
            sleeper, faults = slept(world, chance, alone=alone, skew=skew)

        assert "error" not in sleeper.result(), f"seed {seed}"
        assert sleeper.result()["fenced"] >= 1, f"seed {seed}"
        assert any("lost" in notice for notice in sleeper.notices), f"seed {seed}"
        assert faults == [], f"seed {seed}"


def test_who_slept_within_its_transaction_writes_nothing(
    kafka_broker: RealBroker, nest: Nest, postgresql_url: str, tmp_path: Path
) -> None:
    """PostgreSQL lets another one write while a transaction has locked nothing yet."""
    databases = Databases(postgresql_url)
    with (
        databases.fresh() as url,
        world_of(kafka_broker, nest, url, tmp_path, DYNAMIC) as world,
    ):
        trap = {"point": "K1", "place": 0, "act": "pause", "at": 2}
        sleeper, faults = slept(world, random.Random(1), alone=True, trap=trap)

    assert sleeper.result()["fenced"] >= 1
    assert faults == []


def test_without_the_fence_a_sleeper_would_be_found_out(
    kafka_broker: RealBroker, nest: Nest, databases: Databases, tmp_path: Path
) -> None:
    """The trials find what they were made to find: offsets moved by who lost them."""
    with (
        databases.fresh() as url,
        world_of(kafka_broker, nest, url, tmp_path, DYNAMIC) as world,
    ):
        sleeper, faults = slept(world, random.Random(1), alone=True, fault="no fence")

    assert faults != [] or "error" in sleeper.result()
