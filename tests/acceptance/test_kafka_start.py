"""start: where a listener begins, decided once and kept; later parts at their start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kappa_log.errors import UsageError
from support.topics import QUICK, Shop

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker


@pytest.fixture
def shop(kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on a new topic of two partitions."""
    with Shop(kafka_broker, kafka_broker.new_topic(2), sqlite_url, tmp_path) as found:
        yield found


def orders(*numbers: int, partition: int = 0) -> list[tuple[Any, ...]]:
    """Return orders of these numbers."""
    return [(json.dumps({"id": n}).encode(), None, partition) for n in numbers]


STARTS = [
    ("earliest", "012", "345"),
    ("latest", "", ""),
    (0, "012", "345"),
    (2, "2", "5"),
    (3, "", ""),
    ({0: 1}, "12", "345"),
    ({0: "latest", 1: 2}, "", "5"),
    ({7: 100}, "012", "345"),
]


@pytest.mark.parametrize(("start", "zero", "one"), STARTS)
def test_the_first_run_begins_where_it_is_told(
    shop: Shop, kafka_broker: RealBroker, start: object, zero: str, one: str
) -> None:
    """SEED L1: and a later one, with another start, goes on where that one ended."""
    kafka_broker.produce(shop.topic, orders(0, 1, 2) + orders(3, 4, 5, partition=1))
    shop.configure({"start": start})
    shop.consume()
    first = sorted(filter(None, shop.ids()))
    kafka_broker.produce(shop.topic, orders(6) + orders(7, partition=1))
    shop.configure({"start": "latest"})
    report = shop.consume()

    assert first == sorted(zero + one)
    assert report.counts.acked == 2
    assert {(lane.partition, lane.next_offset) for lane in report.lanes} == {
        (0, 4),
        (1, 4),
    }
    assert shop.app.verify().ok


def test_latest_is_decided_by_the_first_run_alone(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """What comes between two runs is read, also in a partition that was empty."""
    topic = kafka_broker.new_topic(2)
    kafka_broker.produce(topic, orders(0, 1))
    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        shop.configure({"start": "latest"})
        shop.consume()
        kafka_broker.produce(topic, orders(2) + orders(3, partition=1))

        shop.consume()

        assert sorted(filter(None, shop.ids())) == ["2", "3"]
        assert shop.app.verify().ok


@pytest.mark.parametrize("start", [3, {1: 3}])
def test_a_start_beyond_the_end_is_refused(
    shop: Shop, kafka_broker: RealBroker, start: object
) -> None:
    """It would be a gap, or a wrong number; nothing is kept of it."""
    kafka_broker.produce(shop.topic, orders(0, 1) + orders(2, 3, partition=1))
    shop.configure({"start": start})

    with pytest.raises(
        UsageError, match=rf"start 3 lies beyond the end 2 of {shop.topic} partition"
    ):
        shop.consume()

    assert shop.offsets() == {}
    shop.configure()
    assert shop.consume().counts.acked == 4


def test_partitions_that_are_added_begin_at_their_beginning(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """While it runs and between runs, whatever start says: nobody has read of them."""
    shop.configure({"start": "latest"}, kafka=QUICK)
    with shop.running() as running:
        running.wait_for(lambda: running.told("assigned"), "partitions")
        kafka_broker.add_partitions(shop.topic, 3)
        kafka_broker.produce(shop.topic, orders(1, partition=2))
        running.wait_for(lambda: len(shop.events()) == 1, "the third partition")
    kafka_broker.add_partitions(shop.topic, 4)
    kafka_broker.produce(shop.topic, orders(2, partition=3))

    shop.consume()

    assert [(e.partition, e.offset) for e in shop.events()] == [(2, 0), (3, 0)]
    assert shop.app.verify().ok


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_topics_of_a_pattern_are_read_as_they_appear(
    kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path, protocol: str
) -> None:
    """By Python's regular expressions, whatever librdkafka or the broker knows."""
    stem = kafka_broker.new_topic()
    kafka = {"group.protocol": protocol, "topic.metadata.refresh.interval.ms": 200}
    with Shop(kafka_broker, stem, sqlite_url, tmp_path) as shop:
        shop.configure({"topic": rf"^{stem}-(?!x)\d+$", "start": "latest"}, kafka=kafka)
        with shop.running() as running:
            running.wait_for(lambda: running.told("no topic matches yet"), "a notice")
            for number, name in enumerate(("-1", "-x", "-2a", "-22"), 1):
                kafka_broker.create_topic(stem + name)
                kafka_broker.produce(stem + name, orders(number))
            running.wait_for(lambda: len(shop.events()) == 2, "two topics")
        kafka_broker.create_topic(f"{stem}-3")
        kafka_broker.produce(f"{stem}-3", orders(5))

        report = shop.consume()

        assert {e.topic for e in shop.events()} == {f"{stem}-{n}" for n in (1, 22, 3)}
        assert sorted(filter(None, shop.ids())) == ["1", "4", "5"]
        assert sorted(lane.topic for lane in report.lanes) == [
            f"{stem}-1",
            f"{stem}-22",
            f"{stem}-3",
        ]
        assert len(shop.app.lag()) == 3
        assert shop.app.verify().ok


def test_topics_of_a_pattern_may_go(
    kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path
) -> None:
    """The others are read on, and one that is made anew is read as another one."""
    stem = kafka_broker.new_topic()
    names = [f"{stem}-{letter}" for letter in "ab"]
    for name in names:
        kafka_broker.create_topic(name)
        kafka_broker.produce(name, orders(1))
    with Shop(kafka_broker, stem, sqlite_url, tmp_path) as shop:
        shop.configure({"topic": f"^{stem}-", "dedupe": "offset"}, kafka=QUICK)
        with shop.running() as running:

            def delete(name: str) -> None:
                kafka_broker.delete_topic(name)
                ends = [f"{how} {name} 0" for how in ("lost", "gave up")]
                running.wait_for(lambda: running.told(*ends), f"the end of {name}")

            def read(name: str, number: int) -> None:
                kafka_broker.produce(name, orders(number))
                running.wait_for(lambda: str(number) in shop.ids(), f"event {number}")

            running.wait_for(lambda: len(shop.events()) == 2, "two events")
            delete(names[0])
            read(names[1], 2)
            delete(names[1])
            kafka_broker.create_topic(names[0])
            read(names[0], 3)

        assert shop.ids() == ["1", "1", "2", "3"]
        assert shop.app.verify().ok


def test_a_pattern_without_topics_comes_to_an_end(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """All of nothing is read; who waits for topics leaves --until-end out."""
    assert kafka_broker.bootstrap
    shop.configure({"topic": "^nothing-of-that-name"})

    report = shop.consume()

    assert report.reached_end
    assert report.lanes == []
    assert shop.app.lag() == []


def test_kafkas_own_topics_are_of_no_pattern(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """The offsets of all groups are no events."""
    kafka_broker.produce(shop.topic, orders(1))
    shop.consume()
    shop.configure({"topic": f"^(__.*|{shop.topic})$"})

    report = shop.consume()

    assert {lane.topic for lane in report.lanes} == {shop.topic}


def test_another_dedupe_is_refused_later(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """By it the log would not know its own messages again."""
    topic = kafka_broker.new_topic()
    kafka_broker.produce(topic, orders(1))
    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        shop.consume()
        kafka_broker.produce(topic, orders(2))
        shop.configure({"dedupe": "key+payload"})

        with pytest.raises(
            UsageError,
            match=rf"topic {topic} was read for group {shop.group} with dedupe "
            "'payload', now with 'key.payload'.*another group_id; nothing was changed",
        ):
            shop.consume()

        assert shop.ids() == ["1"]
        shop.configure({"dedupe": "key+payload", "group_id": f"{shop.group}-2"})
        assert shop.consume().counts.acked == 2
        shop.configure()
        assert shop.consume().counts.acked == 1
        assert shop.app.verify().ok
