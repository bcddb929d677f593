"""Failures of a topic's records: tried again in place, parked, drained beside it."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from typing_extensions import override

from kappa_log import decide
from support.history import History, Place, Produced, Row, check
from support.kafka_broker import Record
from support.topics import Shop

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker

BACKOFF = {"backoff": {"min_ms": 5, "max_ms": 20}}


class Patient(Shop):
    """A shop whose listener tries for ever, as is the default."""

    @property
    @override
    def calls(self) -> list[Any]:
        return super().calls if self._module in sys.modules else []

    @override
    def _listener(self) -> dict[str, Any]:
        found = super()._listener()
        del found["max_retries"]
        return found | BACKOFF


@pytest.fixture
def shop(
    kafka_broker: RealBroker,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Patient]:
    """A patient listener on a new topic of four partitions."""
    monkeypatch.syspath_prepend(tmp_path)
    topic = kafka_broker.new_topic(4)
    with Patient(kafka_broker, topic, database_url, tmp_path) as found:
        yield found


def order(number: int, partition: int, do: str = "ack", key: bytes = b"k") -> Record:
    """Return an order; some raise, until the handler is told otherwise."""
    return Record(b'{"id":%d,"do":"%s"}' % (number, do.encode()), key, partition)


def tried(shop: Shop, partition: int) -> list[tuple[int, int]]:
    """Return offset and retry_count of each call about a partition's records."""
    return [(c.offset, c.retry_count) for c in shop.calls if c.partition == partition]


def of_partition(shop: Shop, partition: int) -> list[int]:
    """Return the offsets of a partition's events, by position."""
    return [e.offset for e in shop.events() if e.partition == partition]


def test_a_record_is_tried_in_its_place_while_all_others_flow(
    kafka_broker: RealBroker, shop: Patient
) -> None:
    """Its partition waits for it in order, three others do not; a notice says why.

    SEED P3, P5.
    """
    first = [order(100 * p + n, p) for p in range(4) for n in range(3)]
    kafka_broker.produce(shop.topic, [*first, order(9, 2, "raise"), order(10, 2)])

    with shop.running() as running:
        running.wait_for(lambda: len(tried(shop, 2)) > 8, "some attempts")
        kafka_broker.produce(
            shop.topic, [order(1000 + p, p) for p in range(4)] + [order(11, 2)]
        )
        running.wait_for(
            lambda: all(len(of_partition(shop, p)) == 4 for p in (0, 1, 3)),
            "the others",
        )
        assert of_partition(shop, 2) == [0, 1, 2]
        assert shop.app.failures() == []
        shop.want(**{"raise": "ack"})
        running.wait_for(lambda: len(of_partition(shop, 2)) == 7, "the partition")

    attempts = [count for offset, count in tried(shop, 2) if offset == 3]
    assert attempts == list(range(len(attempts)))
    assert [offset for offset, _ in tried(shop, 2)] == [
        0,
        1,
        2,
        *[3] * len(attempts),
        4,
        5,
        6,
    ]
    assert of_partition(shop, 2) == list(range(7))
    notice = f"{shop.topic} partition 2 waits at offset 3: ValueError: no such order"
    assert running.told(notice) == 1
    assert shop.app.verify().ok


def test_attempts_are_counted_to_their_end(
    kafka_broker: RealBroker, shop: Patient
) -> None:
    """After the last of them the record is a failure, and its partition goes on.

    SEED F3.
    """
    shop.configure({"max_retries": 2})
    kafka_broker.produce(
        shop.topic,
        [order(1, 0), order(2, 0, "raise"), order(3, 0), order(4, 0, key=b"j")],
    )

    report = shop.consume()

    assert tried(shop, 0) == [(0, 0), (1, 0), (1, 1), (1, 2), (3, 0)]
    counts = report.counts
    assert (counts.acked, counts.failed, counts.parked) == (2, 1, 1)
    (waiting, failed) = shop.app.failures()
    assert (failed.offset, failed.attempts, failed.parked) == (1, 3, False)
    assert (waiting.offset, waiting.attempts, waiting.parked) == (2, 0, True)
    shop.want(**{"raise": "ack"})
    assert shop.app.retry_failures().acked == 2
    assert of_partition(shop, 0) == [0, 3, 1, 2]
    assert shop.app.verify().ok


def test_attempts_begin_anew_after_a_restart(
    kafka_broker: RealBroker, shop: Patient
) -> None:
    """Nobody keeps them: a new process may be the repair."""
    kafka_broker.produce(shop.topic, [order(1, 0, "raise")])
    with shop.running() as running:
        running.wait_for(lambda: len(shop.calls) > 3, "some attempts")
    before = len(shop.calls)

    with shop.running() as running:
        running.wait_for(lambda: len(shop.calls) > before + 2, "more attempts")

    assert [c.retry_count for c in shop.calls[before : before + 3]] == [0, 1, 2]


def test_waits_grow_up_to_their_limit(
    kafka_broker: RealBroker, shop: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one is drawn from a span that doubles, and never passes max_ms.

    SEED P11, P12.
    """
    spans: list[tuple[float, float]] = []
    uniform = random.uniform

    def noted(low: float, high: float) -> float:
        spans.append((low, high))
        return uniform(low, high)

    monkeypatch.setattr(random, "uniform", noted)
    shop.configure({"backoff": {"min_ms": 8, "max_ms": 50}})
    kafka_broker.produce(shop.topic, [order(1, 0, "raise")])
    with shop.running() as running:
        running.wait_for(lambda: len(spans) > 5, "some waits")

    assert spans[:6] == [(0, 8), (0, 16), (0, 32), (0, 50), (0, 50), (0, 50)]


def test_a_stop_does_not_wait_for_the_next_attempt(
    kafka_broker: RealBroker, shop: Patient
) -> None:
    """It may be an hour away; what was committed is where the next run begins.

    SEED P6.
    """
    shop.configure({"backoff": {"min_ms": 3_600_000, "max_ms": 3_600_000}})
    kafka_broker.produce(shop.topic, [order(1, 0), order(2, 0, "raise"), order(3, 1)])
    with shop.running() as running:
        running.wait_for(lambda: running.told("waits at offset 1"), "the wait")
        running.wait_for(lambda: len(shop.ids()) == 2, "the others")
        began = time.monotonic()
        running.end()
        took = time.monotonic() - began

    assert took < 5
    assert shop.offsets()[shop.topic, 0] == 1
    assert len(tried(shop, 0)) == 2


def test_a_full_queue_lets_its_records_wait_in_their_topic(
    kafka_broker: RealBroker, shop: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key cannot fill the database; as it is drained, the rest comes, in order."""
    monkeypatch.setattr(decide, "MAX_PARKED", 2)
    shop.configure({"max_retries": 0})
    kafka_broker.produce(
        shop.topic,
        [order(0, 0, "raise"), *(order(n, 0) for n in range(1, 8)), order(9, 1)],
    )

    with shop.running() as running:
        running.wait_for(lambda: running.told("2 records wait behind"), "the wait")
        assert sorted(f.offset for f in shop.app.failures()) == [0, 1, 2]
        assert of_partition(shop, 1) == [0]
        shop.want(**{"raise": "ack"})

        def is_drained() -> bool:
            shop.app.retry_failures()
            return len(of_partition(shop, 0)) == 8

        running.wait_for(is_drained, "all of the key")

    assert of_partition(shop, 0) == list(range(8))
    assert shop.app.verify().ok


class Traffic:
    """Orders of a few customers, produced while the block goes on.

    They come slowly enough for a retry on a busy machine to drain a key faster.
    """

    CUSTOMERS = 6
    WAIT_SECONDS = 0.1

    def __init__(self, broker: RealBroker, topic: str) -> None:
        """Begin."""
        self.sent: list[Produced] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(broker, topic))

    def __enter__(self) -> Self:
        """Return itself, at work."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def _run(self, broker: RealBroker, topic: str) -> None:
        numbers = count()
        while not self._stop.wait(self.WAIT_SECONDS):
            orders = [
                # The first customer's orders are poison until the handler is mended.
                order(n, n % 4, "ack" if n % self.CUSTOMERS else "raise", key_of(n))
                for n in islice(numbers, 12)
            ]
            places = broker.produce(topic, orders)
            self.sent += map(made, [topic] * len(orders), orders, places)


def key_of(number: int) -> bytes:
    """Return the customer of an order."""
    return b"customer %d" % (number % Traffic.CUSTOMERS)


def made(topic: str, record: Record, place: tuple[int, int]) -> Produced:
    """Return a record as the history has it: order is promised to each key."""
    assert record.key is not None
    assert record.value is not None
    name = f"{topic} {record.key.decode()}"
    return Produced(Place(name, *place), record.value.decode())


def test_a_poisoned_customer_is_drained_under_live_traffic(
    kafka_broker: RealBroker, shop: Patient
) -> None:
    """Nobody else waits; mended, all of it comes in the order of its key, once."""
    shop.configure({"max_retries": 0})
    traffic = Traffic(kafka_broker, shop.topic)
    with shop.running() as running:
        with traffic:
            running.wait_for(lambda: shop.app.count_failures() > 20, "poison")
            waiting = {f.key for f in shop.app.failures(limit=1000)}
            others = {e.key for e in shop.events()}
            shop.want(**{"raise": "ack"})
            # The dry run knows, while more of the customer's records come in.
            assert shop.app.retry_failures(dry_run=True).failed == 0
            assert shop.app.retry_failures().failed == 0
            drained = shop.app.head().position
            running.wait_for(lambda: shop.app.head().position > drained, "more orders")
        total = len(traffic.sent)

        def is_done() -> bool:
            shop.app.retry_failures()
            return shop.app.head().position == total

        running.wait_for(is_done, "all of it")

    assert waiting == {key_of(0)}
    assert others == {key_of(n) for n in range(1, Traffic.CUSTOMERS)}
    assert shop.app.failures() == []
    rows = []
    for event in shop.app.events(limit=100_000, oldest_first=True):
        assert event.key is not None
        name = f"{shop.topic} {event.key.decode()}"
        place = Place(name, event.partition, event.offset)
        rows.append(Row(event.position, place, event.payload_text))
    ends = {
        (f"{topic} {key_of(n).decode()}", partition): offset
        for (topic, partition), offset in shop.offsets().items()
        for n in range(Traffic.CUSTOMERS)
    }
    history = History(produced=traffic.sent, rows=rows, checkpoints=ends)
    assert check(history) == []
    assert shop.app.verify().ok


def test_a_rewind_over_failures_keeps_each_once(
    kafka_broker: RealBroker, shop: Patient
) -> None:
    """They are recognised by their coordinates, and what waits behind them too."""
    shop.configure({"max_retries": 0})
    kafka_broker.produce(
        shop.topic,
        [order(0, 0), order(1, 0, "raise"), order(2, 0), order(3, 0, key=b"j")],
    )
    shop.consume()
    before = shop.app.failures()

    shop.app.rewind(shop.topic, 0, 0)
    report = shop.consume()

    assert shop.app.failures() == before
    assert (report.counts.failed, report.counts.parked) == (1, 1)
    assert report.counts.duplicate == 2
    shop.want(**{"raise": "ack"})
    shop.app.retry_failures()
    shop.app.rewind(shop.topic, 0, 0)
    assert shop.consume().counts.duplicate == 4
    assert of_partition(shop, 0) == [0, 3, 1, 2]
    assert shop.app.failures() == []
    assert shop.app.verify().ok
