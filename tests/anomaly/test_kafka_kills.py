"""Consumers of Kafka, killed at every step of a batch: nothing lost, nothing doubled.

The points are those between any two things that a consumer does: K0 after poll, K1
after BEGIN, K2 after the first row, K3 before the checkpoints, K4 before COMMIT, K5
during it, K6 before Kafka's own commit, K7 between a projection's rows and its cursor,
K9 within a migration. A trial kills one to three consumers of one log, one after the
other, each at its point in one of its first batches; then one ends in peace.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from kappa_log.storage import migrations
from support.kafka_world import (
    CONSUMER,
    DYNAMIC,
    SCALE,
    STATIC,
    World,
    Worlds,
    made_records,
)

TRIALS = round(6 * SCALE)
"""How often each point is tried on each database."""

PARTITIONS = 4
RECORDS = 300

MEMBERS = [
    STATIC,
    STATIC | {"partition.assignment.strategy": "range"},
    DYNAMIC,
    CONSUMER,
]
"""Members of a group whose killed member is missed at once, or after a second."""

pytestmark = pytest.mark.timeout(300 * max(1, SCALE))


class Trials:
    """Worlds over one topic, each with a log of its own."""

    def __init__(self, worlds: Worlds) -> None:
        """Produce what all of them consume."""
        self._worlds = worlds
        self._topic = worlds.broker.new_topic(PARTITIONS)
        self._records = made_records(random.Random(1), PARTITIONS, RECORDS)
        self._places = worlds.broker.produce(self._topic, self._records)

    @contextmanager
    def world(self, seed: int, *, is_empty: bool = False) -> Iterator[World]:
        """Give the world of one trial."""
        kafka = MEMBERS[seed % len(MEMBERS)]
        with self._worlds.new(
            topic=self._topic, kafka=kafka, is_empty=is_empty
        ) as world:
            world.remember(self._records, self._places)
            yield world

    def trial(
        self, seed: int, kills: int, kill: Callable[[World], bool]
    ) -> tuple[int, list[str]]:
        """Kill so many workers at one log; return how many died, and what is wrong."""
        with self.world(seed) as world:
            with world.following() as reader:
                hits = sum(kill(world) for _ in range(kills))
                world.finish()
            return hits, world.faults(reader.cursor)


@pytest.fixture
def trials(worlds: Worlds) -> Trials:
    """Give what trials need on one kind of database."""
    return Trials(worlds)


@pytest.mark.parametrize("point", ["K0", "K1", "K2", "K3", "K4", "K5", "K6"])
def test_killed_consumers_lose_and_double_nothing(trials: Trials, point: str) -> None:
    """Where one died the next goes on, behind the last batch that was committed.

    SEED H15.
    """
    for seed in range(TRIALS):
        chance = random.Random(f"{point} {seed}")

        def kill(world: World, chance: random.Random = chance) -> bool:
            trap = {"point": point, "at": chance.randint(1, 4), "seed": chance.random()}
            return world.start(until_end=True, trap=trap).was_killed()

        hits, faults = trials.trial(seed, chance.randint(1, 3), kill)

        assert hits, f"seed {seed}"
        assert faults == [], f"seed {seed}"


def test_runs_killed_while_they_fold_leave_the_rows_of_one_that_was_not(
    trials: Trials,
) -> None:
    """K7: rows and cursor move together, whether beside the consuming or after it."""
    for seed in range(TRIALS):
        chance = random.Random(f"K7 {seed}")
        work = chance.choice(["run", "project"])

        def kill(
            world: World, chance: random.Random = chance, work: str = work
        ) -> bool:
            if work == "project":
                world.start(until_end=True).result()
            # How many writes a run comes to is up to chance, but for the first.
            at = chance.randint(1, 4) if work == "project" else 1
            trap = {"point": "K7", "at": at, "seed": chance.random()}
            worker = world.start(work, trap=trap)
            ends = world.ends()
            while not worker.has_ended():
                if world.offsets() == ends and world.is_folded():
                    break
                time.sleep(0.02)
            worker.stop()
            return worker.was_killed()

        hits, faults = trials.trial(seed, chance.randint(1, 3), kill)

        assert hits, f"seed {seed}"
        assert faults == [], f"seed {seed}"


def test_a_migration_killed_half_way_leaves_nothing_and_then_succeeds(
    trials: Trials,
) -> None:
    """K9: tables come to be all at once, so the next one may simply begin."""
    statements: list[str] = []
    with trials.world(0, is_empty=True) as world:
        sa.event.listen(
            world.app.database.engine,
            "after_cursor_execute",
            lambda _, __, statement, *___: statements.append(statement),
        )
        world.app.create_database()
    for seed in range(TRIALS):
        chance = random.Random(f"K9 {seed}")
        with trials.world(seed, is_empty=True) as world:
            for _ in range(chance.randint(1, 3)):
                trap = {"point": "K9", "at": chance.randint(1, len(statements))}
                assert world.start("create", trap=trap).was_killed()
                assert world.app.database_state().verdict == "empty", f"seed {seed}"

            assert world.app.create_database()
            assert migrations.drift(world.app.database) == []
            world.finish()
            assert world.faults() == [], f"seed {seed}"


# --- what the trials would find ---------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "point", "place", "told"),
    [
        ("offsets first", "K3", 0, "lost"),
        ("no offsets", "K6", 0, "SourceDiverged"),
        ("cursor first", "K7", 1, "the projection is not the fold of the log"),
    ],
)
def test_an_engine_that_breaks_its_promise_is_found_out(
    trials: Trials, fault: str, point: str, place: int, told: str
) -> None:
    """A trial finds what it was made to find: a fault planted into the workers."""

    def kill(world: World) -> bool:
        if point == "K7":
            world.start(until_end=True).result()
        work = "project" if point == "K7" else "consume"
        trap = {"point": point, "at": 2, "place": place}
        worker = world.start(work, until_end=True, trap=trap, fault=fault)
        return worker.was_killed()

    hits, faults = trials.trial(0, 1, kill)

    assert hits == 1
    assert any(told in found for found in faults), faults
