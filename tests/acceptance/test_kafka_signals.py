"""Signals end a consumer soon, whatever it waits for, and lose nothing.

SEED X4: INT, TERM and QUIT stop in peace.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kappa_log.kafka.consume import STOP_SECONDS
from support.topics import QUICK, Shop, held

if TYPE_CHECKING:
    from support.kafka_broker import OwnBroker, RealBroker


@pytest.fixture
def shop(kafka_broker: RealBroker, database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on a new topic."""
    with Shop(kafka_broker, kafka_broker.new_topic(), database_url, tmp_path) as found:
        found.configure(kafka=QUICK)
        found.app.create_database()
        yield found


def orders(number: int, **more: object) -> list[tuple[bytes]]:
    """Return so many orders."""
    return [(json.dumps({"id": n} | more).encode(),) for n in range(number)]


def everything_is_read_once(shop: Shop, number: int) -> None:
    """Assert that a later run finds all that is left, and nothing twice."""
    shop.consume()

    assert shop.ids() == [str(n) for n in range(number)]
    assert shop.app.head().position == number
    assert shop.app.duplicates() == []
    assert shop.app.verify().ok


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("work", "number", "code"),
    [
        ("consume", signal.SIGINT, 130),
        ("run", signal.SIGTERM, 0),
        ("run", signal.SIGQUIT, 0),
    ],
)
def test_a_signal_ends_an_idle_consumer(
    shop: Shop, kafka_broker: RealBroker, work: str, number: int, code: int
) -> None:
    """It says what it did; Ctrl-C is no success, and how services are stopped is.

    SEED X4.
    """
    kafka_broker.produce(shop.topic, orders(3))

    with shop.started(work, "--json") as command:
        command.wait_for(lambda: len(shop.events()) == 3, "three events")
        assert command.interrupt(number) == code

        report = json.loads(command.out)
    assert report["counts"]["acked"] == 3
    assert report["lanes"] == [{"topic": shop.topic, "partition": 0, "next_offset": 3}]
    assert not report["reached_end"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_signal_ends_a_consumer_under_load(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """SEED P8: the batch at hand is committed or rolled back; the next run reads on."""
    shop.configure(kafka=QUICK, ingest={"batch_size": 50})
    kafka_broker.produce(shop.topic, orders(9_000))

    with shop.started("consume") as command:
        command.wait_for(lambda: shop.app.head().position > 500, "some events")
        assert command.interrupt() == 130

        assert "records in" in command.out
    assert 500 < shop.app.head().position < 9_000
    shop.configure()
    everything_is_read_once(shop, 9_000)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_signal_does_not_wait_for_a_handler_that_sleeps(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Its batch rolls back, and the handler is called again in the next run."""
    kafka_broker.produce(shop.topic, orders(3, do="sleep"))

    with shop.started("consume") as command:
        command.wait_for((shop.folder / "sleeps").exists, "the handler")
        assert command.interrupt(signal.SIGTERM) == 0

        assert "its last batch did not end in time" in command.err
    assert shop.events() == []
    assert shop.offsets() == {(shop.topic, 0): 0}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_second_signal_ends_it_on_the_spot(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Who asks twice does not want to wait."""
    kafka_broker.produce(shop.topic, orders(3, do="sleep"))

    with shop.started("consume") as command:
        command.wait_for((shop.folder / "sleeps").exists, "the handler")
        command.send(signal.SIGINT)
        time.sleep(0.2)
        command.send(signal.SIGTERM)

        # Without the second one it would wait for the handler: longer than that.
        assert command.end(STOP_SECONDS - 0.5) == 130
        assert command.out == ""


def test_a_signal_does_not_wait_for_a_locked_database(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Whoever holds it; what could not be committed comes again."""
    kafka_broker.produce(shop.topic, orders(3))

    with shop.started("consume") as command:
        command.wait_for(lambda: len(shop.events()) == 3, "three events")
        with held(shop.url):
            kafka_broker.produce(shop.topic, orders(5)[3:])
            time.sleep(1)
            assert command.interrupt() == 130
        assert "its last batch did not end in time" in command.err
    everything_is_read_once(shop, 5)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_signal_ends_it_before_it_could_begin(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """The database is locked from the start: no partition is taken yet."""
    kafka_broker.produce(shop.topic, orders(1))

    with held(shop.url), shop.started("consume") as command:
        command.wait_until_open("socket")
        assert command.interrupt(signal.SIGTERM) == 0

        assert "did not end in time" in command.err
    everything_is_read_once(shop, 1)


def test_signals_end_it_while_no_broker_answers(
    own_kafka_broker: OwnBroker, sqlite_url: str, tmp_path: Path
) -> None:
    """Neither a commit of offsets nor leaving the group nor a question holds it up."""
    topic = own_kafka_broker.new_topic()
    own_kafka_broker.produce(topic, orders(3))
    with Shop(own_kafka_broker, topic, sqlite_url, tmp_path) as shop:
        shop.configure(kafka=QUICK)
        shop.app.create_database()
        with shop.started("consume") as command:
            command.wait_for(lambda: len(shop.events()) == 3, "three events")
            own_kafka_broker.pause()
            assert command.interrupt(signal.SIGTERM) == 0
        for work in ("consume", "lag"):
            with shop.started(work) as command:
                command.wait_until_open("socket")
                assert command.interrupt() == 130
        own_kafka_broker.resume()
        everything_is_read_once(shop, 3)
