"""Real purchases through Kafka, by consumers that are killed again and again."""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from support.kafka_nest import Worker
from support.kafka_process import wait_for
from support.kafka_worker import Customer, bought
from support.kafka_world import DYNAMIC, World, Worlds

pytestmark = pytest.mark.usefixtures("uncovered")

PARTITIONS = 4
KILLS = 10

EVENTS = 69_659
CUSTOMERS = 23_570
CDS = 167_881
CENTS = 250_031_563


@pytest.fixture(scope="module")
def lines(cdnow: Path) -> list[str]:
    """Return CDNOW's purchases."""
    with gzip.open(cdnow, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


@pytest.fixture
def world(worlds: Worlds, cdnow: Path) -> Iterator[World]:
    """Give a world with all purchases in its topic, keyed by customer."""
    with worlds.new(
        PARTITIONS,
        kafka=DYNAMIC,
        batch_size=500,
        handler="Buyer",
        projection="customers",
    ) as found:
        found.app.produce(cdnow, topic=found.topic, key="customer_id")
        yield found


def consume_and_kill(world: World, chance: random.Random) -> int:
    """Let two consumers read, and kill one of them every so often.

    Returns:
        How many were killed at work.
    """
    workers = [world.start(), world.start()]
    hits = 0
    try:
        for kill in range(1, KILLS + 1):
            wait_for_head(world, kill * EVENTS // (KILLS + 2))
            victim = chance.randrange(2)
            workers[victim].kill()
            hits += workers[victim].was_killed()
            workers[victim] = world.start()
        world.wait_until_read()
    finally:
        for worker in workers:
            worker.stop()
    assert [w.result() for w in workers if "error" in w.result()] == []
    return hits


def wait_for_head(world: World, position: int) -> None:
    """Wait until the log has reached a position."""
    wait_for(lambda: world.app.head().position >= position, f"position {position}")


def by_customer(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return each customer's purchases in their order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        found[json.loads(line)["customer_id"]].append(line)
    return found


def followed(world: World, follower: Worker) -> list[dict[str, Any]]:
    """Wait until the follower has folded all; return the rows."""
    wait_for(world.is_folded, "the projection to be at the end")
    follower.stop()
    assert "error" not in follower.result()
    return list(world.app.rows("customers"))


def test_cdnow_comes_through_ten_kills_as_it_is(world: World, lines: list[str]) -> None:
    """Each purchase is kept once, a customer's in order, and each row is the file's."""
    follower = world.start("follow")
    hits = consume_and_kill(world, random.Random(1))
    rows = followed(world, follower)

    table = world.app.database.tables.events
    columns = (table.c.partition, table.c.offset, table.c.payload)
    kept = world.select(sa.select(*columns).order_by(table.c.position))
    payloads = [payload for *_, payload in kept]
    there = world.broker.read(world.topic)
    assert hits == KILLS
    assert sorted(map(tuple, kept)) == [
        (read.partition, read.offset, (read.value or b"").decode()) for read in there
    ]
    assert len(payloads) == EVENTS
    assert sorted(payloads) == sorted(lines)
    assert by_customer(payloads) == by_customer(lines)

    states: dict[str, Customer] = {}
    for line in lines:
        purchase = json.loads(line)
        who = purchase["customer_id"]
        states[who] = bought(states.get(who), purchase)
    assert rows == [{"entity_id": who} | asdict(states[who]) for who in sorted(states)]
    assert len(rows) == CUSTOMERS
    assert sum(row["cds"] for row in rows) == CDS
    assert sum(row["cents"] for row in rows) == CENTS

    ledger = world.app.database.tables.checkpoints
    seen = sa.func.sum(
        ledger.c.acked
        + ledger.c.skipped
        + ledger.c.duplicate
        + ledger.c.failed
        + ledger.c.parked
    )
    counted = world.select(
        sa.select(ledger.c.partition, seen).group_by(ledger.c.partition)
    )
    ends = world.broker.watermarks(world.topic)
    assert {number: int(total) for number, total in counted} == {
        number: high - low for number, (low, high) in ends.items()
    }
    assert world.app.verify(names=["customers"]).findings == []
