"""Settings of Kafka's clients: whose they are, and what follows from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from kappa_log.config import Config
from kappa_log.errors import ConfigError
from kappa_log.kafka import client

MEMBERS = {
    "group.instance.id": "one",
    "session.timeout.ms": 6000,
    "heartbeat.interval.ms": 500,
    "partition.assignment.strategy": "range",
    "max.poll.interval.ms": 9000,
    "fetch.min.bytes": 1,
    "queued.min.messages": 10,
    "max.partition.fetch.bytes": 1000,
}
"""Settings that only members of a group have."""


def config(**kafka: Any) -> Config:
    """Return a configuration with these settings, underscores for dots."""
    named = {name.replace("_", "."): value for name, value in kafka.items()}
    return Config(kafka={"bootstrap.servers": "127.0.0.1:9"} | named)


def ignore(_: KafkaError) -> None:
    """Take no notice of brokers that are not there."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"partition_assignment_strategy": "cooperative-sticky"}, True),
        ({"partition_assignment_strategy": "range"}, False),
        ({"partition_assignment_strategy": "range,roundrobin"}, False),
        ({"group_protocol": "consumer"}, True),
    ],
)
def test_partitions_come_one_by_one_or_all_at_once(
    settings: dict[str, Any], expected: bool
) -> None:
    """To tell the client the wrong way would lose an assignment."""
    assert client.is_cooperative(config(**settings)) is expected


def test_topics_are_looked_for_as_often_as_the_client_does() -> None:
    """And never, where it never does."""
    name = "topic_metadata_refresh_interval_ms"

    assert client.refresh_seconds(config()) == 10
    assert client.refresh_seconds(config(**{name: 300})) == 0.3
    assert client.refresh_seconds(config(**{name: "250"})) == 0.25
    assert client.refresh_seconds(config(**{name: -1})) == math.inf


def test_settings_of_members_are_kept_from_other_clients() -> None:
    """They would refuse some of them, and print a warning about each other one."""
    found = Config(kafka={"bootstrap.servers": "127.0.0.1:9"} | MEMBERS)

    client.consumer(found, "group", "^a b/", ignore).close()
    client.reader(found).close()
    client.producer(found, ignore)
    client.admin(found, ignore)


@pytest.mark.parametrize("make", [client.reader, lambda c: client.producer(c, ignore)])
def test_a_setting_that_is_none_is_refused_by_each_client(make: Any) -> None:
    """Whichever command comes first says so."""
    with pytest.raises(
        ConfigError, match=r'by librdkafka: No such .* property: "acks\.or"'
    ):
        make(config(acks_or=1))


def test_errors_of_the_client_say_what_was_done() -> None:
    """Whether they were raised or told, and even where they have no text."""
    error = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)

    assert str(client.source_error("reading", error)).startswith("reading: Broker: T")
    assert str(client.source_error("reading", KafkaException(error))) == str(
        client.source_error("reading", error)
    )
    assert (
        str(client.source_error("reading", TimeoutError())) == "reading: time ran out"
    )
    assert client.is_fatal(error)
    assert not client.is_fatal(KafkaError(KafkaError.NOT_COORDINATOR))
