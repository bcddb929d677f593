"""The brokers that tests run on do what tests take for granted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from confluent_kafka import KafkaException

if TYPE_CHECKING:
    from support.kafka_broker import OwnBroker, RealBroker


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
