"""Errors of Kafka's protocol, one by one: they are survived, or end in clear words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from kappa_log.errors import SourceError
from kappa_log.kafka import client, consume
from kappa_log.kafka.cluster import Cluster
from support.kafka_broker import RealBroker
from support.mock_broker import Api, MockBroker
from support.topics import Running, Shop

TRANSPORT = KafkaError._TRANSPORT  # noqa: SLF001 - librdkafka's name: it hangs up

KAFKA = {
    # Where a member joins again, the mock lets it wait a second less than its session;
    # of a session of a second all of it, and is then gone before it would answer.
    "session.timeout.ms": 1500,
    "heartbeat.interval.ms": 200,
    "reconnect.backoff.max.ms": 100,
    "topic.metadata.refresh.interval.ms": 100,
    "fetch.error.backoff.ms": 50,
}


class World:
    """A mock broker with a topic, a producer to it, and a listener of it."""

    def __init__(self, broker: MockBroker, shop: Shop) -> None:
        """Begin with an empty topic of two partitions."""
        self.broker = broker
        self.shop = shop
        self._client = RealBroker(broker.bootstrap)
        self._numbers = count()
        self.sent = 0
        self._provoke_at = 0.0
        broker.create_topic(shop.topic, 2)

    def produce(self, number: int = 10) -> None:
        """Produce some more orders."""
        found = [n for n, _ in zip(self._numbers, range(number), strict=False)]
        records = [(json.dumps({"id": n}).encode(), None, n % 2) for n in found]
        self._client.produce(self.shop.topic, records)
        self.sent += number

    def was_asked(self, api: Api, before: int) -> bool:
        """Tell whether more requests of a kind came than before; else provoke one.

        What provokes it may come while the consumer is at something else.
        """
        was_asked = self.broker.requests(api) > before
        if not was_asked and OFTEN[api] and time.monotonic() > self._provoke_at:
            self.broker.fail(Api.HEARTBEAT, OFTEN[api])
            self._provoke_at = time.monotonic() + 1
        return was_asked

    def all_are_read(self) -> bool:
        """Tell whether there are as many events as records."""
        return self.shop.app.head().position == self.sent

    def read_on(self, running: Running) -> None:
        """Produce some orders, and wait until they are events."""
        self.produce()
        running.wait_for(self.all_are_read, f"{self.sent} events")

    def check(self) -> None:
        """Assert that each record is an event, once and in order."""
        events = self.shop.events()
        for partition in (0, 1):
            offsets = [e.offset for e in events if e.partition == partition]
            assert offsets == list(range(len(offsets)))
        assert len(events) == self.sent
        assert self.shop.app.duplicates() == []
        assert self.shop.app.verify().ok


@pytest.fixture
def world(mock_broker: MockBroker, sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    """A listener on a mock broker."""
    with Shop(mock_broker, "orders", sqlite_url, tmp_path) as shop:
        shop.configure(kafka=KAFKA)
        yield World(mock_broker, shop)


ERRORS = [
    TRANSPORT,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.OFFSET_OUT_OF_RANGE,
    KafkaError.INVALID_MSG,
]

OFTEN: dict[Api, int] = {
    Api.FETCH: 0,
    Api.METADATA: 0,
    Api.HEARTBEAT: 0,
    Api.JOIN_GROUP: KafkaError.REBALANCE_IN_PROGRESS,
    Api.SYNC_GROUP: KafkaError.REBALANCE_IN_PROGRESS,
    Api.LIST_OFFSETS: KafkaError.ILLEGAL_GENERATION,
    Api.FIND_COORDINATOR: KafkaError.NOT_COORDINATOR,
}
"""Requests, and the answer to a heartbeat that makes a consumer send one; 0: none."""


@pytest.mark.parametrize("api", OFTEN, ids=lambda api: api.name)
def test_an_error_that_may_pass_is_survived(world: World, api: Api) -> None:
    """Whichever request it answers while a consumer runs."""
    with world.shop.running() as running:
        world.read_on(running)
        # Each of these takes a rejoin of the group.
        for error in ERRORS[:4] if api is Api.LIST_OFFSETS else ERRORS:
            before = world.broker.requests(api)
            world.broker.fail(api, error)
            running.wait_for(partial(world.was_asked, api, before), f"a {api.name}")
            world.read_on(running)

    world.check()


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_an_offset_that_is_refused_is_asked_for_again(
    world: World, strategy: str
) -> None:
    """A leader that is not up to date may not know it yet; the client gave up on it."""
    world.shop.configure(kafka=KAFKA | {"partition.assignment.strategy": strategy})
    refusals = [KafkaError.OFFSET_OUT_OF_RANGE] * 2
    # At the very start it may come beside the assignment, and is not told then.
    world.broker.fail(Api.FETCH, *refusals)

    with world.shop.running() as running:
        world.read_on(running)
        world.broker.fail(Api.FETCH, *refusals)
        running.wait_for(lambda: running.told("Offset out of range"), "a notice")
        world.read_on(running)

    assert running.told("Offset out of range") == 1
    world.check()


def test_a_commit_of_kafkas_own_offsets_may_fail(world: World) -> None:
    """They are for lag tools alone; a group that says we are gone is joined anew."""
    world.broker.fail(
        Api.OFFSET_COMMIT,
        KafkaError.UNKNOWN_MEMBER_ID,
        TRANSPORT,
        KafkaError.REBALANCE_IN_PROGRESS,
    )

    with world.shop.running() as running:
        world.read_on(running)
        running.wait_for(lambda: running.told("assigned") > 1, "a second assignment")
        world.read_on(running)

    world.check()


@pytest.mark.parametrize(
    "api",
    [Api.FIND_COORDINATOR, Api.JOIN_GROUP, Api.SYNC_GROUP, Api.METADATA],
    ids=lambda api: api.name,
)
def test_a_consumer_begins_in_spite_of_errors(world: World, api: Api) -> None:
    """Clusters that are just starting answer so."""
    world.broker.fail(
        api, TRANSPORT, KafkaError.NOT_COORDINATOR, KafkaError.LEADER_NOT_AVAILABLE
    )

    with world.shop.running() as running:
        world.read_on(running)

    world.check()


@pytest.mark.parametrize(
    "error", [TRANSPORT, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR]
)
def test_topics_are_asked_for_again(world: World, error: int) -> None:
    """Brokers that are just starting refuse that, too, for a moment."""
    cluster = Cluster(world.shop.app.config)
    assert cluster.topic_names() == [world.shop.topic]
    world.broker.fail(Api.METADATA, *[error] * 3)

    assert cluster.topic_names() == [world.shop.topic]


def test_topics_that_may_not_be_seen_are_not_asked_for_again(world: World) -> None:
    """The answer would be the same."""
    cluster = Cluster(world.shop.app.config)
    world.broker.fail(Api.METADATA, *[KafkaError.CLUSTER_AUTHORIZATION_FAILED] * 3)

    with pytest.raises(SourceError, match="Cluster authorization failed"):
        cluster.topic_names()


@pytest.mark.parametrize(
    "error", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE]
)
def test_offsets_are_asked_for_again(world: World, error: int) -> None:
    """A topic that was just made has its leaders in a moment."""
    world.produce()
    world.broker.fail(Api.LIST_OFFSETS, *[error] * 4)

    world.shop.consume()

    world.check()


NEW_LEADER = [
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
]


@pytest.mark.parametrize("error", NEW_LEADER)
def test_no_partition_is_left_out_because_its_leader_is_new(
    world: World, error: int
) -> None:
    """It would be taken for one that is not there."""
    wanted = {(world.shop.topic, 0), (world.shop.topic, 1)}
    world.broker.fail(Api.LIST_OFFSETS, error, error)

    assert Cluster(world.shop.app.config).spans(wanted).keys() == wanted


def test_a_leader_that_stays_away_is_told_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets are asked for again until time is up, and no longer."""
    monkeypatch.setattr(client, "SECONDS", 0.5)
    cluster = Cluster(world.shop.app.config)
    assert world.shop.topic in cluster.topic_names()
    world.broker.fail(Api.LIST_OFFSETS, *NEW_LEADER * 100)

    with pytest.raises(SourceError, match="gives no answer about offsets"):
        cluster.spans([(world.shop.topic, 0)])

    assert world.broker.requests(Api.LIST_OFFSETS) > 1
    world.broker.forgive(Api.LIST_OFFSETS)
    assert cluster.spans([(world.shop.topic, 0)])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KafkaError.INVALID_MSG, "Invalid message"),
        (KafkaError.INVALID_REQUEST, "Invalid request"),
    ],
)
def test_without_offsets_nothing_is_begun(world: World, error: int, said: str) -> None:
    """Where to begin is asked before anything else; a later run asks again."""
    world.produce()
    world.broker.fail(Api.LIST_OFFSETS, error, error)

    with pytest.raises(
        SourceError, match=rf"gives no answer about offsets: Broker: {said}"
    ):
        world.shop.consume()

    assert world.shop.offsets() == {}
    world.broker.forgive(Api.LIST_OFFSETS)
    world.shop.consume()
    world.check()


FATAL = [
    (Api.JOIN_GROUP, KafkaError.GROUP_AUTHORIZATION_FAILED, "Group authorization fail"),
    (Api.JOIN_GROUP, KafkaError.INVALID_SESSION_TIMEOUT, "Invalid session timeout"),
    (Api.FETCH, KafkaError.TOPIC_AUTHORIZATION_FAILED, "Topic authorization failed"),
]


@pytest.mark.parametrize(("api", "error", "said"), FATAL)
def test_an_error_that_does_not_pass_ends_it(
    world: World, api: Api, error: int, said: str
) -> None:
    """In words that say what it was; what was committed is kept."""
    world.produce()
    world.broker.fail(api, *[error] * 10)

    with (
        pytest.raises(SourceError, match=said),
        world.shop.running() as running,
    ):
        running.wait_for(lambda: False, "the end")

    world.broker.forgive(api)
    world.shop.consume()
    world.check()


@pytest.mark.parametrize(
    "api",
    [Api.JOIN_GROUP, Api.SYNC_GROUP, Api.HEARTBEAT, Api.OFFSET_COMMIT],
    ids=lambda api: api.name,
)
def test_a_static_member_that_is_fenced_ends(world: World, api: Api) -> None:
    """Another process has its name; in a process of its own, since the client of one
    that was fenced cannot be closed.
    """
    world.shop.configure(kafka=KAFKA | {"group.instance.id": "one"})
    world.shop.app.create_database()
    world.produce()
    world.broker.fail(api, *[KafkaError.FENCED_INSTANCE_ID] * 10)

    with world.shop.started("consume") as command:
        assert command.end(60) == 69
        assert "Static consumer fenced by other" in command.err

    world.broker.forgive(api)
    world.shop.configure(kafka=KAFKA)
    world.shop.consume()
    world.check()


def test_brokers_that_are_down_hold_up_no_end(world: World) -> None:
    """Neither offsets to commit nor a group to leave; nothing is lost by it."""
    with world.shop.running() as running:
        world.read_on(running)
        world.broker.down()
        running.wait_for(lambda: running.told("refused", "Disconnected"), "a notice")
        running.end()

    assert running.reports[0].counts.acked == world.sent
    world.broker.up()
    world.produce()
    world.shop.consume()
    world.check()


def test_brokers_that_were_down_are_read_on(world: World) -> None:
    """By the same consumer, as soon as they are back."""
    with world.shop.running() as running:
        for _ in range(2):
            world.read_on(running)
            world.broker.down()
            running.wait_for(lambda: running.told("refused"), "a notice")
            world.broker.up()
        world.read_on(running)

    world.check()


def test_a_group_that_takes_its_time_is_told_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for a member that died; silence would look like another death."""
    monkeypatch.setattr(consume, "PATIENCE_SECONDS", 0.2)
    world.produce()
    world.broker.delay(Api.JOIN_GROUP, 2000)

    with world.shop.running() as running:
        running.wait_for(lambda: running.told("assigned"), "partitions")
        running.wait_for(world.all_are_read, "all events")

    assert running.told("waits for its group to hand out partitions") == 1


def test_a_member_too_many_is_told_so(world: World) -> None:
    """All partitions have their readers; it takes over when one of these ends."""
    with world.shop.running() as one:
        one.wait_for(lambda: one.told("assigned orders 0, 1"), "partitions")
        with world.shop.running() as two, world.shop.running() as three:
            consumers = (two, three)

            def is_spare(running: Running) -> bool:
                return "assigned nothing; other" in "".join(running.notices[-1:])

            one.wait_for(lambda: any(map(is_spare, consumers)), "a member too many")
            world.read_on(one)

    world.check()


def test_slow_brokers_are_waited_for(world: World) -> None:
    """Each answer comes after a tenth of a second."""
    world.shop.configure()
    world.broker.slow_down(100)
    world.produce()

    assert world.shop.consume().counts.acked == world.sent
    world.check()
