"""Databases and brokers that are slow, locked or away: waited for, and nothing lost.

The consumers here would be thrown out of their group after two seconds without a poll.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kappa_log.storage import database as storage
from support.topics import QUICK, Running, Shop, cut_off, held

if TYPE_CHECKING:
    from support.kafka_broker import OwnBroker, RealBroker

LONG = 3.5
"""Seconds of trouble: longer than a consumer may leave its polls out."""

NEW_GROUPS = {
    "group.protocol": "consumer",
    "max.poll.interval.ms": 2000,
    "topic.metadata.refresh.interval.ms": 300,
}
"""As QUICK, where the broker assigns; it says itself how long a session lasts."""


@pytest.fixture
def shop(kafka_broker: RealBroker, database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on a new topic of two partitions, which writes small batches."""
    with Shop(kafka_broker, kafka_broker.new_topic(2), database_url, tmp_path) as found:
        found.configure(kafka=QUICK, ingest={"batch_size": 20})
        yield found


def orders(numbers: range) -> list[tuple[Any, ...]]:
    """Return orders of these numbers, on both partitions."""
    return [(json.dumps({"id": n}).encode(), None, n % 2) for n in numbers]


def meet_trouble(
    shop: Shop,
    broker: RealBroker,
    running: Running,
    trouble: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Produce before, while and after a database makes trouble for long."""
    broker.produce(shop.topic, orders(range(100)))
    running.wait_for(lambda: len(shop.events()) == 100, "a hundred events")
    with trouble(shop.url):
        broker.produce(shop.topic, orders(range(100, 300)))
        time.sleep(LONG)
        broker.produce(shop.topic, orders(range(300, 400)))
    running.wait_for(lambda: shop.app.head().position == 400, "all events")


def everything_is_there_once(shop: Shop, number: int) -> None:
    """Assert that each order became one event, in the order of its partition."""
    ids = [int(event.entity_id or "") for event in shop.events()]
    for partition in (0, 1):
        mine = [n for n in ids if n % 2 == partition]
        assert mine == list(range(partition, number, 2))
    assert shop.app.duplicates() == []
    assert shop.app.verify().ok


# --- the database -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("database_url", "kafka"),
    [("sqlite", QUICK), ("sqlite", NEW_GROUPS), ("postgresql", QUICK)],
    indirect=["database_url"],
    ids=["sqlite-classic", "sqlite-consumer", "postgresql-classic"],
)
def test_a_locked_database_costs_no_rebalance(
    shop: Shop, kafka_broker: RealBroker, kafka: dict[str, Any]
) -> None:
    """Polling goes on while a batch waits, with partitions paused when it must."""
    shop.configure(kafka=kafka, ingest={"batch_size": 20})

    with shop.running() as running:
        meet_trouble(shop, kafka_broker, running, held)

    assert running.told("assigned") == 1, running.notices
    assert running.told("lost", "gave up", "trying again") == 0, running.notices
    everything_is_there_once(shop, 400)


def test_a_batch_that_waited_in_vain_is_tried_again(
    shop: Shop, kafka_broker: RealBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as it takes; it is said once, and when it works again."""
    monkeypatch.setattr(storage, "BUSY_SECONDS", 1)
    shop.close()

    with shop.running() as running:
        meet_trouble(shop, kafka_broker, running, held)

    assert running.told("assigned") == 1, running.notices
    assert running.told("is held by another process") == 1, running.notices
    assert running.told("works again; going on") == 1, running.notices
    everything_is_there_once(shop, 400)


# A connection that is cut while it is made is closed by nobody but Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_server_that_cuts_every_connection_is_waited_for(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Whatever it was in the middle of; nothing is doubled by an unknown outcome."""
    with shop.running() as running:
        meet_trouble(shop, kafka_broker, running, cut_off)

    assert running.told("assigned") == 1, running.notices
    assert running.told("trying again") >= 1, running.notices
    everything_is_there_once(shop, 400)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_partitions_may_come_while_the_database_is_locked(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Their lanes cannot be taken yet; they are when it is free again."""
    with shop.running() as running:
        kafka_broker.produce(shop.topic, orders(range(10)))
        running.wait_for(lambda: len(shop.events()) == 10, "ten events")
        with held(shop.url):
            kafka_broker.add_partitions(shop.topic, 3)
            kafka_broker.produce(shop.topic, [(b'{"id":"new"}', None, 2)])
            kafka_broker.produce(shop.topic, orders(range(10, 20)))
            time.sleep(LONG)
        running.wait_for(lambda: len(shop.events()) == 21, "all events")

    assert sorted(e.offset for e in shop.events()) == sorted(
        [*range(10), *range(10), 0]
    )
    assert shop.app.verify().ok


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_database_that_is_locked_at_the_start_is_waited_for(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """The run begins when it is free."""
    kafka_broker.produce(shop.topic, orders(range(10)))
    shop.app.create_database()

    with ExitStack() as stack:
        stack.enter_context(held(shop.url))
        with shop.running() as running:
            time.sleep(1)
            assert running.told("assigned") == 0
            stack.close()
            running.wait_for(lambda: len(shop.events()) == 10, "all events")

    everything_is_there_once(shop, 10)


# --- the brokers ------------------------------------------------------------------


def test_brokers_that_come_back_are_read_on(
    own_kafka_broker: OwnBroker, sqlite_url: str, tmp_path: Path
) -> None:
    """After they stood still for longer than a session, and after they were killed."""
    topic = own_kafka_broker.new_topic(2)
    with Shop(own_kafka_broker, topic, sqlite_url, tmp_path) as shop:
        shop.configure(kafka=QUICK, ingest={"batch_size": 20})
        with shop.running() as running:

            def produce(numbers: range) -> None:
                own_kafka_broker.produce(topic, orders(numbers))
                count = numbers.stop
                running.wait_for(lambda: len(shop.events()) == count, "the events")

            produce(range(100))
            own_kafka_broker.pause()
            time.sleep(LONG)
            own_kafka_broker.resume()
            produce(range(100, 200))
            own_kafka_broker.kill()
            time.sleep(1)
            own_kafka_broker.restart()
            produce(range(200, 300))

        assert running.told("Connection refused", "Disconnected") >= 1, running.notices
        everything_is_there_once(shop, 300)
