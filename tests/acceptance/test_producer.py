"""Producer: what is published is in its topic, or is told (SEED L10 to L13)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kappa_log import KappaLog, Producer
from kappa_log.config import Config
from kappa_log.errors import ConfigError, DeliveryFailed, SourceError, UsageError
from kappa_log.kafka import client
from kappa_log.telemetry import tracing
from support.kafka_broker import RealBroker
from support.mock_broker import Api, MockBroker
from support.topics import Shop


def config(bootstrap: str, **producer: Any) -> Config:
    """Return a configuration with a cluster; underscores stand for dots."""
    named = {name.replace("_", "."): value for name, value in producer.items()}
    return Config(
        kafka={"bootstrap.servers": bootstrap}, producer={"linger.ms": 0} | named
    )


@pytest.fixture
def producer(mock_broker: MockBroker) -> Iterator[Producer]:
    """A producer into topic ``t`` of four partitions."""
    mock_broker.create_topic("t", 4)
    with Producer(config(mock_broker.bootstrap)) as found:
        yield found


def kept(broker: MockBroker, topic: str = "t", wanted: int = 1) -> list[Any]:
    """Return the records of a topic by partition and offset."""
    reader = client.reader(Config(kafka={"bootstrap.servers": broker.bootstrap}))
    from confluent_kafka import TopicPartition

    parts = reader.list_topics(topic, 5).topics[topic].partitions
    reader.assign([TopicPartition(topic, number, 0) for number in parts])
    found: list[Any] = []
    while len(found) < wanted:
        found += [m for m in reader.consume(1, 5) if m.error() is None]
    reader.close()
    return sorted(found, key=lambda m: (m.partition(), m.offset()))


def test_a_record_is_published_as_it_was_given(
    producer: Producer, mock_broker: MockBroker
) -> None:
    """Key, headers, time; the coordinates are those that the cluster gave."""
    where = producer.publish(
        "t",
        {"id": 2**70},
        key=5,
        partition=2,
        headers={"a": "ä", "b": b"\xff", "c": None},
        timestamp=1_000,
    )
    second = producer.publish("t", None, key="5", partition=2, headers=[("a", "1")])

    assert (where.topic, where.partition, where.offset) == ("t", 2, 0)
    assert (type(where.timestamp), second.offset) == (int, 1)
    first, tombstone = kept(mock_broker, wanted=2)
    assert (first.value(), first.key()) == (b'{"id":1180591620717411303424}', b"5")
    assert first.headers() == [("a", "ä".encode()), ("b", b"\xff"), ("c", None)]
    assert first.timestamp()[1] == 1_000
    assert (tombstone.value(), tombstone.key()) == (None, b"5")


def test_a_partition_key_goes_where_that_key_would(producer: Producer) -> None:
    """SEED L10: related records meet in a partition, each with its own key."""
    for number in range(20):
        by_key = producer.publish("t", "x", key=f"k{number}")
        beside = producer.publish("t", "x", key="other", partition_key=f"k{number}")
        assert beside.partition == by_key.partition


def test_a_list_keeps_its_order_and_says_where_all_are(producer: Producer) -> None:
    """SEED publish_list: one wait for all of them."""
    found = producer.publish_list(
        {"topic": "t", "payload": str(n), "key": "k"} for n in range(50)
    )

    assert [delivery.offset for delivery in found] == list(range(50))
    assert len({delivery.partition for delivery in found}) == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"topic": "t"}, "payload is missing; it was not sent"),
        ({"topc": "t", "payload": 1}, "topic is missing, 'topc' is not known; did you"),
        ({"topic": "t", "payload": 1, "to": 2}, "'to' is not known; there are: topic"),
        ("t", "it is str, not a dict"),
    ],
)
def test_a_wrong_message_of_a_list_is_named_by_its_place(
    producer: Producer, message: Any, words: str
) -> None:
    """An error of a call that nobody sees would name none of a thousand messages."""
    with pytest.raises(UsageError, match=f"message 1 of the list: {words}"):
        producer.publish_list([{"topic": "t", "payload": 0}, message])


def test_a_future_comes_true_without_anybody_polling(producer: Producer) -> None:
    """SEED async_publish; asyncio waits for it too."""
    told = threading.Event()
    future = producer.async_publish("t", "x", partition=1)
    future.add_done_callback(lambda _: told.set())

    async def wait() -> int:
        later = producer.async_publish("t", "y", partition=1)
        return (await asyncio.wrap_future(later)).offset

    assert future.result(10).offset == 0
    assert told.wait(10)
    assert asyncio.run(wait()) == 1
    assert [f.result(10).offset for f in producer.async_publish_list([])] == []


def test_what_the_cluster_refuses_is_told_to_its_publisher(
    producer: Producer, mock_broker: MockBroker
) -> None:
    """With the topic and the reason; the next record is not concerned."""
    mock_broker.fail(Api.PRODUCE, KafkaError.MSG_SIZE_TOO_LARGE)

    with pytest.raises(DeliveryFailed, match=r"not in topic t: .*large") as told:
        producer.publish("t", "x", partition=0)
    with pytest.raises(DeliveryFailed, match="not in topic t: Unable to produce"):
        producer.publish("t", b"x" * 2_000_000)

    assert told.value.topic == "t"
    assert not told.value.retryable
    assert producer.publish("t", "x", partition=0).offset == 0


def test_a_full_queue_waits_until_there_is_room(mock_broker: MockBroker) -> None:
    """Bounded memory: who publishes faster than the cluster takes is slowed down."""
    mock_broker.create_topic("t", 1)
    small = config(mock_broker.bootstrap, queue_buffering_max_messages=10)
    with Producer(small) as producer:
        futures = [producer.async_publish("t", str(n)) for n in range(60)]
        producer.flush()

    assert [future.result(0).offset for future in futures] == list(range(60))


def test_a_process_that_ends_leaves_nothing_behind(mock_broker: MockBroker) -> None:
    """Neither a producer that nobody closed, nor one that was forgotten."""
    mock_broker.create_topic("t", 1)
    code = (
        "from kappa_log import Producer\n"
        "from kappa_log.config import Config\n"
        f"kafka = {{'bootstrap.servers': {mock_broker.bootstrap!r}}}\n"
        "Producer(Config(kafka=kafka)).async_publish('t', 'forgotten')\n"
        "kept = Producer(Config(kafka=kafka))\n"
        "kept.async_publish('t', 'open')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    values = [m.value() for m in kept(mock_broker, wanted=2)]
    assert sorted(values) == [b"forgotten", b"open"]


def test_a_cluster_that_is_away_is_told_and_what_is_left_is_not_hidden() -> None:
    """A flush says how many records nobody acknowledged."""
    with_limits = config("127.0.0.1:9", message_timeout_ms=500)
    producer = Producer(with_limits)
    future = producer.async_publish("t", "x")
    with pytest.raises(SourceError, match="1 records were not acknowledged within 0 s"):
        producer.flush(0.01)

    with pytest.raises(DeliveryFailed, match="timed out"):
        future.result(20)
    producer.close()
    producer.close()
    with pytest.raises(UsageError, match="is closed"):
        producer.publish("t", "x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"payload": object()}, "cannot be published"),
        ({"payload": "x", "partition": 1, "partition_key": "k"}, "give one"),
    ],
)
def test_what_makes_no_sense_is_refused(
    producer: Producer, given: dict[str, Any], message: str
) -> None:
    """Nothing is sent."""
    with pytest.raises(UsageError, match=message):
        producer.publish("t", **given)
    with (
        pytest.raises(UsageError, match="no transactional id"),
        producer.transaction(),
    ):
        pass


def test_settings_of_producers_are_their_own(mock_broker: MockBroker) -> None:
    """[producer] goes over [kafka], and its errors are told at once."""
    other = config(mock_broker.bootstrap, partitioner="murmur2")
    with (
        Producer(other) as producer,
        pytest.raises(UsageError, match="not for partitioner murmur2"),
    ):
        producer.publish("t", "x", partition_key="k")
    with pytest.raises(ConfigError, match=r"No such .*acks\.or"):
        Producer(config(mock_broker.bootstrap, acks_or=1))
    with pytest.raises(ConfigError, match="no Kafka cluster is configured"):
        Producer(Config())


def _aborted(producer: Producer, topic: str) -> None:
    """Publish what nobody is to see."""
    with producer.transaction():
        producer.publish(topic, {"id": 1})
        producer.async_publish(topic, {"id": 2})
        1 / 0  # noqa: B018


def _overtaken(older: Producer, newer: Producer, topic: str) -> None:
    """Let another producer commit while a transaction is open."""
    with older.transaction():
        older.publish(topic, "1")
        with newer.transaction():
            newer.publish(topic, "2")


def test_a_transaction_is_seen_whole_or_not_at_all(
    kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path
) -> None:
    """What an aborted one published becomes no event; the next one is another."""
    topic = kafka_broker.new_topic(2)
    with Shop(kafka_broker, topic, sqlite_url, tmp_path) as shop:
        with shop.app.producer(transactional_id=f"tx-{topic}") as producer:
            with pytest.raises(ZeroDivisionError):
                _aborted(producer, topic)
            with producer.transaction() as same:
                same.publish(topic, {"id": 3}, partition=0)
                same.async_publish(topic, {"id": 4}, partition=1)
                with pytest.raises(UsageError, match="one at a time"):
                    producer.transaction().__enter__()
            with pytest.raises(UsageError, match=r"inside producer.transaction\(\)"):
                producer.publish(topic, {"id": 5})

        shop.consume()

        assert sorted(filter(None, shop.ids())) == ["3", "4"]


def test_a_newer_producer_of_a_transactional_id_shuts_out_the_older(
    kafka_broker: RealBroker,
) -> None:
    """A process that was thought dead cannot commit any more; it is told."""
    topic = kafka_broker.new_topic(1)
    settings = Config(kafka={"bootstrap.servers": kafka_broker.bootstrap})
    older = Producer(settings, transactional_id=f"z-{topic}")
    newer = Producer(settings, transactional_id=f"z-{topic}")
    with pytest.raises(SourceError, match=f"z-{topic}"):
        _overtaken(older, newer, topic)
    older.close()
    newer.close()


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_record_tells_its_readers_which_span_published_it(
    mock_broker: MockBroker,
    sqlite_url: str,
    tmp_path: Path,
    spans: InMemorySpanExporter,
) -> None:
    """Its processing links to that span; a header that was given is not replaced."""
    mock_broker.create_topic("t", 1)
    with Shop(mock_broker, "t", sqlite_url, tmp_path) as shop:
        with shop.app.producer() as producer:
            with trace.get_tracer("shop").start_as_current_span("order") as active:
                producer.publish("t", {"id": 1}, headers={"a": "b"})
                producer.publish("t", {"id": 2}, headers={"traceparent": PARENT})
            producer.publish("t", {"id": 3})
        shop.consume()

    linked = {
        (span.attributes or {})["messaging.kafka.offset"]: [
            link.context.span_id for link in span.links
        ]
        for span in spans.get_finished_spans()
        if span.name == "process t"
    }
    assert linked == {
        0: [active.get_span_context().span_id],
        1: [int(PARENT[36:52], 16)],
        2: [],
    }
    found = [dict(m.headers() or []) for m in kept(mock_broker, wanted=3)]
    assert [sorted(headers) for headers in found] == [
        ["a", "traceparent"],
        ["traceparent"],
        [],
    ]


def test_a_span_that_was_passed_on_is_told_with_its_state(
    producer: Producer, mock_broker: MockBroker
) -> None:
    """No provider is needed to pass on what came from elsewhere."""
    state = {"tracestate": "shop=1", "traceparent": PARENT}
    with trace.use_span(
        trace.get_current_span(TraceContextTextMapPropagator().extract(state))
    ):
        producer.publish("t", "x", partition=0)
        producer.publish("t", "y", partition=0, headers={"tracestate": None})

    first, second = kept(mock_broker, wanted=2)
    assert dict(first.headers()) == {n: v.encode() for n, v in state.items()}
    assert second.headers() == [("tracestate", None)]


def test_who_has_no_opentelemetry_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Publishing does not import it either."""
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")

    assert tracing.carried() == []
    assert "opentelemetry.trace" not in sys.modules


HANDLERS = """
from pathlib import Path

from kappa_log import Handler, Producer, ack
from kappa_log.config import load_config


class Passing(Handler):
    def start(self):
        self.producer = Producer(load_config(Path(__file__).parent))

    def stop(self):
        self.producer.close()

    def consume(self, payload, metadata):
        self.producer.publish("out", payload, headers={"from": metadata.message_id})
        return ack(payload["id"], None)
"""


def test_a_handler_may_publish(
    mock_broker: MockBroker, sqlite_url: str, tmp_path: Path
) -> None:
    """Its message id makes what comes twice, after a kill, recognisable."""
    for topic in ("t", "out"):
        mock_broker.create_topic(topic, 1)
    (tmp_path / "passing_handlers.py").write_text(HANDLERS)
    with Shop(mock_broker, "t", sqlite_url, tmp_path) as shop:
        shop.configure({"handler": "passing_handlers:Passing"})
        with shop.app.producer() as producer:
            producer.publish("t", {"id": 1})
        shop.consume()

        (event,) = shop.events()
        (passed,) = kept(mock_broker, "out")
    assert json.loads(passed.value()) == {"id": 1}
    assert passed.headers() == [("from", event.message_id.encode())]
    assert isinstance(shop.app, KappaLog)
