"""What was read and what is there part: backups, retention, topics made anew."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from confluent_kafka import Consumer, TopicPartition

from support import untraced
from support.history import Place
from support.kafka_process import ANSWER_SECONDS
from support.kafka_world import SCALE, World, Worlds, made_records

TRIALS = max(1, round(3 * SCALE))

PARTITIONS = 2

pytestmark = pytest.mark.timeout(300 * max(1, SCALE))


@pytest.fixture
def world(worlds: Worlds) -> Iterator[World]:
    """Give a world with some records in its topic."""
    with worlds.new(PARTITIONS, batch_size=10) as found:
        found.produce(made_records(random.Random(1), PARTITIONS, 200))
        yield found


def group_offsets(world: World) -> dict[tuple[str, int], int]:
    """Return what the group has committed in Kafka itself."""
    config = {"bootstrap.servers": world.broker.bootstrap, "group.id": world.group}
    wanted = [TopicPartition(world.topic, number) for number in range(PARTITIONS)]
    with closing(Consumer(config)) as consumer:
        found = consumer.committed(wanted, ANSWER_SECONDS)
    return {(world.topic_id, part.partition): part.offset for part in found}


def contents(world: World) -> list[list[Any]]:
    """Return all that the log holds, and where it stands."""
    tables = world.app.database.tables
    offsets = sa.select(tables.offsets.c.partition, tables.offsets.c.next_offset)
    return [
        world.select(sa.select(tables.events).order_by(tables.events.c.position)),
        world.select(sa.select(tables.checkpoints).order_by(tables.checkpoints.c.id)),
        world.select(offsets.order_by(tables.offsets.c.partition)),
    ]


# --- T20: backups -----------------------------------------------------------------


def test_a_restored_backup_catches_up_though_kafka_believes_all_was_read(
    world: World, worlds: Worlds
) -> None:
    """The offsets that count are in the backup itself, so nothing is passed over."""
    url = world.app.database.label
    for seed in range(TRIALS):
        chance = random.Random(seed)
        world.produce(made_records(chance, PARTITIONS, 400, 1000 * seed + 1000))
        worker = world.start(until_end=True)
        time.sleep(chance.uniform(0.1, 0.6))
        with worlds.databases.fresh() as backup:
            # The worker is in the midst of it; on PostgreSQL it is thrown out.
            worlds.databases.copy(url, backup)
            worker.kill()
            world.produce(made_records(chance, PARTITIONS, 50, 1000 * seed + 1500))
            world.finish()
            believed = group_offsets(world)
            world.app.close()
            worlds.databases.copy(backup, url)

        restored = world.offsets()
        assert any(believed[lane] > restored.get(lane, 0) for lane in believed)
        world.finish()
        assert world.faults() == [], f"seed {seed}, backup at {restored}"


def test_a_consumer_that_believes_kafka_is_found_out(
    world: World, worlds: Worlds
) -> None:
    """The trial finds what it was made to find: what Kafka says was read is lost."""
    url = world.app.database.label
    with worlds.databases.fresh() as backup:
        worker = world.start(until_end=True, trap={"point": "K6", "place": 0, "at": 2})
        assert worker.was_killed()
        worlds.databases.copy(url, backup)
        world.finish()
        world.app.close()
        worlds.databases.copy(backup, url)

    world.finish(fault="kafka offsets")

    assert any(fault.startswith("lost") for fault in world.faults())


# --- T21: retention ---------------------------------------------------------------


def lose(world: World) -> tuple[int, int]:
    """Have the broker delete what is read next, and some more; return what is lost."""
    reached = world.offsets()
    world.produce(made_records(random.Random(1), PARTITIONS, 150, 1000))
    first = reached[world.topic_id, 1]
    until = first + 30
    world.broker.delete_records(world.topic, 1, until)
    world.deleted = {Place(world.topic_id, 1, lost) for lost in range(first, until)}
    return first, until


def told(world: World, lost: tuple[int, int]) -> str:
    """Return how a loss is told."""
    return f"{world.topic} partition 1: offsets {lost[0]} to {lost[1] - 1} were deleted"


def check_gap(world: World, lost: tuple[int, int]) -> None:
    """Check that a gap is accepted if that is wanted, and noted in the ledger."""
    done = world.start(until_end=True, accept_gap=True).result()
    assert "error" not in done
    world.finish()
    table = world.app.database.tables.checkpoints
    gaps = sa.select(table.c.partition, table.c.from_offset, table.c.to_offset)
    assert world.select(gaps.where(table.c.kind == "gap")) == [(1, *lost)]
    assert world.faults() == []


def test_what_retention_deleted_unread_stops_all_and_can_be_accepted(
    world: World,
) -> None:
    """The span is named and nothing is changed, until somebody says to go on."""
    world.finish()
    lost = lose(world)
    before = contents(world)

    refused = world.start(until_end=True).result()

    assert refused["error"] == "SourceGap"
    assert told(world, lost) in refused["message"]
    assert contents(world) == before
    check_gap(world, lost)


def test_the_command_ends_with_69_where_records_were_lost(world: World) -> None:
    """Scripts tell a loss from other ends by the exit code, people by the message."""
    world.finish()
    lost = lose(world)
    before = contents(world)

    done = command(world, "consume", "--until-end")

    assert done.returncode == 69
    assert told(world, lost) in done.stderr
    assert contents(world) == before
    assert command(world, "consume", "--until-end", "--accept-gap").returncode == 3
    world.finish()
    assert world.faults() == []


def test_what_retention_deletes_before_a_running_consumer_stops_it(
    world: World,
) -> None:
    """It is asked for what is gone, so it need not be started anew to notice."""
    world.finish()
    worker = world.start()
    worker.hear("assigned")
    worker.signal(signal.SIGSTOP)
    # A request that is under way is answered before there is anything to answer.
    time.sleep(1)
    lost = lose(world)
    before = contents(world)
    worker.signal(signal.SIGCONT)

    refused = worker.result()

    assert refused["error"] == "SourceGap"
    assert told(world, lost) in refused["message"]
    assert [row.kind for row in contents(world)[1]].count("gap") == 0
    assert contents(world)[0][: len(before[0])] == before[0]
    check_gap(world, lost)


# --- T22: topics made anew --------------------------------------------------------


def test_a_topic_made_anew_between_runs_is_read_whole_and_the_old_events_stay(
    world: World,
) -> None:
    """Another topic id is another source, though it has the old name and offsets."""
    world.finish()
    before = contents(world)
    world.recreate(PARTITIONS)
    # More records than in the old one, or offsets beyond the end would tell.
    world.produce(made_records(random.Random(2), PARTITIONS, 350, 1000))

    world.finish()

    assert contents(world)[0][: len(before[0])] == before[0]
    assert len(world.app.sources()) == 2
    assert world.faults() == []


@pytest.mark.parametrize("sleeps", [False, True], ids=["awake", "asleep"])
def test_a_topic_made_anew_under_a_consumer_is_read_whole(
    world: World, sleeps: bool
) -> None:
    """It notices, even if it never saw the topic away and its offset is there again."""
    worker = world.start()
    world.wait_until_read()
    before = contents(world)
    if sleeps:
        worker.signal(signal.SIGSTOP)
    world.recreate(PARTITIONS)
    world.produce(made_records(random.Random(2), PARTITIONS, 350, 1000))
    worker.signal(signal.SIGCONT)

    world.wait_until_read()

    worker.stop()
    assert "error" not in worker.result()
    world.finish()
    assert contents(world)[0][: len(before[0])] == before[0]
    assert len(world.app.sources()) == 2
    assert world.faults() == []


def test_a_consumer_that_knows_topics_by_name_is_found_out(world: World) -> None:
    """The trial finds what it was made to find: a new topic taken for the old one."""
    assert "error" not in world.start(until_end=True, fault="no topic ids").result()
    world.recreate(PARTITIONS)
    world.produce(made_records(random.Random(2), PARTITIONS, 350, 1000))

    done = world.start(until_end=True, fault="no topic ids").result()

    assert "error" not in done
    assert done["seen"] < 350


def command(world: World, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line over a world."""
    return subprocess.run(
        [sys.executable, "-m", "kappa_log", *words],
        cwd=world.written(),
        env=untraced(),
        capture_output=True,
        text=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )
