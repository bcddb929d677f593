"""The brokers that tests run on do what tests take for granted."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from support.kafka_process import guard, hold, wait_for
from support.mock_broker import Api, MockBroker

if TYPE_CHECKING:
    from pathlib import Path

    from support.kafka_broker import OwnBroker, RealBroker

# --- the real one ------------------------------------------------------------


def test_records_are_read_where_they_were_acknowledged(
    kafka_broker: RealBroker,
) -> None:
    """Keys, partitions and places are those that the producer was told."""
    topic = kafka_broker.new_topic(2)

    places = kafka_broker.produce(
        topic, [(b"a", b"k", 1), (b"b", None, 0), (None, b"k", 1)]
    )

    assert places == [(1, 0), (0, 0), (1, 1)]
    assert kafka_broker.read(topic) == [
        (0, 0, b"b", None),
        (1, 0, b"a", b"k"),
        (1, 1, None, b"k"),
    ]
    assert kafka_broker.watermarks(topic) == {0: (0, 1), 1: (0, 2)}


def test_an_aborted_transaction_leaves_a_hole(kafka_broker: RealBroker) -> None:
    """Its records and both markers use up offsets that no consumer sees."""
    topic = kafka_broker.new_topic()
    transactional = kafka_broker.transactional()

    committed = transactional.send(topic, [(b"1",), (b"2",)])
    transactional.commit()
    aborted = transactional.send(topic, [(b"3",)])
    transactional.abort()
    committed += transactional.send(topic, [(b"4",)])
    transactional.commit()

    assert [offset for _, offset in committed] == [0, 1, 5]
    assert aborted == [(0, 3)]
    assert [each[:2] for each in kafka_broker.read(topic)] == committed
    everything = kafka_broker.read(topic, isolation_level="read_uncommitted")
    assert [each.value for each in everything] == [b"1", b"2", b"3", b"4"]
    assert kafka_broker.watermarks(topic) == {0: (0, 7)}


def test_an_open_transaction_hides_what_follows(kafka_broker: RealBroker) -> None:
    """Its own records, and others behind them, until it ends."""
    topic = kafka_broker.new_topic()
    transactional = kafka_broker.transactional()

    transactional.send(topic, [(b"open",)])
    kafka_broker.produce(topic, [(b"behind",)])

    assert kafka_broker.read(topic) == []
    assert kafka_broker.watermarks(topic) == {0: (0, 2)}
    transactional.commit()
    assert [each.value for each in kafka_broker.read(topic)] == [b"open", b"behind"]


def test_deleted_records_move_the_low_watermark(kafka_broker: RealBroker) -> None:
    """As retention does, without waiting for it."""
    topic = kafka_broker.new_topic()
    kafka_broker.produce(topic, [(b"%d" % number,) for number in range(5)])

    kafka_broker.delete_records(topic, 0, before=3)

    assert kafka_broker.watermarks(topic) == {0: (3, 5)}
    assert [each.value for each in kafka_broker.read(topic)] == [b"3", b"4"]


def test_a_recreated_topic_is_another_one(kafka_broker: RealBroker) -> None:
    """It has the name, and neither the identity nor the records."""
    topic = kafka_broker.new_topic()
    kafka_broker.produce(topic, [(b"old",)])
    before = kafka_broker.topic_id(topic)

    kafka_broker.delete_topic(topic)
    kafka_broker.create_topic(topic)

    assert kafka_broker.topic_id(topic) != before
    assert kafka_broker.watermarks(topic) == {0: (0, 0)}


def test_a_topic_can_be_given_partitions(kafka_broker: RealBroker) -> None:
    """They can be written to at once."""
    topic = kafka_broker.new_topic()

    kafka_broker.add_partitions(topic, 3)

    assert kafka_broker.produce(topic, [(b"x", None, 2)]) == [(2, 0)]
    assert set(kafka_broker.watermarks(topic)) == {0, 1, 2}


def test_a_killed_broker_comes_back_with_its_data(own_kafka_broker: OwnBroker) -> None:
    """Same address, same topics, same records; in between nothing is acknowledged."""
    topic = own_kafka_broker.new_topic()
    own_kafka_broker.produce(topic, [(b"kept",)])

    own_kafka_broker.kill()
    with pytest.raises(KafkaException):
        own_kafka_broker.produce(topic, [(b"lost",)], message_timeout_ms=500)
    own_kafka_broker.restart()

    assert [each.value for each in own_kafka_broker.read(topic)] == [b"kept"]


def test_a_paused_broker_answers_later(own_kafka_broker: OwnBroker) -> None:
    """What was asked during the pause is done after it."""
    topic = own_kafka_broker.new_topic()
    producer = own_kafka_broker.producer()
    producer.list_topics(topic, timeout=10)

    own_kafka_broker.pause()
    producer.produce(topic, b"patient")
    assert producer.flush(1) == 1
    own_kafka_broker.resume()

    assert producer.flush(30) == 0
    assert [each.value for each in own_kafka_broker.read(topic)] == [b"patient"]


def test_a_broker_ends_with_its_last_user(tmp_path: Path) -> None:
    """Not before, and whoever comes later is told that it is too late."""
    folder = tmp_path / "broker"
    folder.mkdir()
    (folder / "users").touch()
    with subprocess.Popen(["sleep", "60"]) as broker:
        (folder / "pid").write_text(f"{broker.pid}\n")
        one = hold(folder)
        guard(folder)
        other = hold(folder)
        assert one is not None
        assert other is not None

        one.close()
        time.sleep(0.3)
        assert broker.poll() is None
        other.close()

        assert broker.wait(10) == -signal.SIGKILL
    wait_for(lambda: not folder.exists(), "the end of the folder")
    assert hold(folder) is None


# --- the mock ----------------------------------------------------------------


def produced(
    broker: MockBroker, topic: str, *values: bytes, **conf: Any
) -> list[int | KafkaError]:
    """Produce to partition 0; return offsets, or errors."""
    conf = {name.replace("_", "."): value for name, value in conf.items()}
    conf |= {"bootstrap.servers": broker.bootstrap, "log_level": 0}
    conf |= {"retry.backoff.ms": 10, "reconnect.backoff.ms": 10}
    found: list[int | KafkaError] = []

    def delivered(error: KafkaError | None, message: Message) -> None:
        answer = message.offset() if error is None else error
        assert answer is not None
        found.append(answer)

    producer = Producer(conf)
    for value in values:
        producer.produce(topic, value, partition=0, on_delivery=delivered)
    assert producer.flush(10) == 0
    return found


def consumer_of(broker: MockBroker) -> Consumer:
    """Return a consumer of a group."""
    return Consumer(
        {"bootstrap.servers": broker.bootstrap, "group.id": "g", "log_level": 0}
        | {"auto.offset.reset": "error", "enable.auto.commit": False}
    )


def test_a_mock_keeps_what_is_produced(mock_broker: MockBroker) -> None:
    """A topic has the partitions that it was given, and records come back."""
    mock_broker.create_topic("t", 3)

    assert produced(mock_broker, "t", b"a", b"b") == [0, 1]

    with closing(consumer_of(mock_broker)) as consumer:
        assert len(consumer.list_topics("t", 10).topics["t"].partitions) == 3
        consumer.assign([TopicPartition("t", 0, 1)])
        message = consumer.poll(10)
        assert message is not None
        assert (message.offset(), message.value()) == (1, b"b")


def test_a_mock_answers_a_commit_with_the_error_it_was_told(
    mock_broker: MockBroker,
) -> None:
    """Once: the next commit is well again."""
    mock_broker.create_topic("t")
    mock_broker.fail(Api.OFFSET_COMMIT, KafkaError.ILLEGAL_GENERATION)
    wanted = [TopicPartition("t", 0, 1)]

    with closing(consumer_of(mock_broker)) as consumer:
        with pytest.raises(KafkaException) as found:
            consumer.commit(offsets=wanted, asynchronous=False)
        consumer.commit(offsets=wanted, asynchronous=False)
        assert consumer.committed(wanted, 10)[0].offset == 1

    assert found.value.args[0].code() == KafkaError.ILLEGAL_GENERATION


def test_a_mock_forgets_errors(mock_broker: MockBroker) -> None:
    """An error that was taken back is never answered."""
    mock_broker.create_topic("t")
    mock_broker.fail(Api.OFFSET_COMMIT, KafkaError.ILLEGAL_GENERATION)

    mock_broker.forgive(Api.OFFSET_COMMIT)

    with closing(consumer_of(mock_broker)) as consumer:
        consumer.commit(offsets=[TopicPartition("t", 0, 1)], asynchronous=False)


def test_a_mock_hangs_up_and_is_asked_again(mock_broker: MockBroker) -> None:
    """A lost connection costs the producer a second request, and no record."""
    mock_broker.create_topic("t")
    mock_broker.fail(Api.PRODUCE, KafkaError._TRANSPORT)  # noqa: SLF001 # its name

    assert produced(mock_broker, "t", b"a") == [0]

    assert mock_broker.requests(Api.PRODUCE) == 2


def test_a_mock_that_is_down_takes_nothing(mock_broker: MockBroker) -> None:
    """Until it is up again, with what it had before."""
    mock_broker.create_topic("t")
    assert produced(mock_broker, "t", b"a") == [0]

    mock_broker.down()
    (error,) = produced(mock_broker, "t", b"b", message_timeout_ms=300)
    mock_broker.up()

    assert isinstance(error, KafkaError)
    assert error.code() == KafkaError._MSG_TIMED_OUT  # noqa: SLF001 # its name
    assert produced(mock_broker, "t", b"c") == [1]


@pytest.mark.parametrize("way", ["one request", "every request"])
def test_a_mock_answers_late(mock_broker: MockBroker, way: str) -> None:
    """One request, or all of them."""
    mock_broker.create_topic("t")
    if way == "one request":
        mock_broker.delay(Api.PRODUCE, 400)
    else:
        mock_broker.slow_down(200)

    start = time.monotonic()
    assert produced(mock_broker, "t", b"a") == [0]

    assert 0.39 <= time.monotonic() - start < 5


def test_a_mock_answers_late_with_an_error(mock_broker: MockBroker) -> None:
    """One that the producer passes on: most it takes for passing, and asks again."""
    mock_broker.create_topic("t")
    mock_broker.delay(Api.PRODUCE, 100, KafkaError.TOPIC_AUTHORIZATION_FAILED)

    (error,) = produced(mock_broker, "t", b"a")

    assert isinstance(error, KafkaError)
    assert error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED


def test_a_mock_deletes_records_and_topics(mock_broker: MockBroker) -> None:
    """A reader of what is gone is told so."""
    mock_broker.create_topic("t")
    produced(mock_broker, "t", b"a", b"b", b"c")

    mock_broker.delete_records("t", 0, before=2)

    with closing(consumer_of(mock_broker)) as consumer:
        assert consumer.get_watermark_offsets(TopicPartition("t", 0), 10) == (2, 3)
        consumer.assign([TopicPartition("t", 0, 0)])
        assert code_of(consumer.poll(10)) == KafkaError._AUTO_OFFSET_RESET  # noqa: SLF001
    mock_broker.delete_topic("t")
    mock_broker.create_topic("t")
    assert produced(mock_broker, "t", b"d") == [0]


def code_of(message: Message | None) -> int | None:
    """Return the error that a poll gave."""
    error = None if message is None else message.error()
    return None if error is None else error.code()


def test_a_mock_cluster_moves_its_leaders() -> None:
    """A partition's producer follows; with none it waits."""
    with MockBroker(brokers=2) as cluster:
        cluster.create_topic("t")
        for offset, leader in enumerate([1, 2]):
            cluster.move_leader("t", 0, leader)
            assert produced(cluster, "t", b"a") == [offset]
        cluster.move_leader("t", 0, -1)
        (error,) = produced(cluster, "t", b"a", message_timeout_ms=300)
        assert isinstance(error, KafkaError)
