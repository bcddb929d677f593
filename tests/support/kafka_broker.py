"""A real Kafka broker as tests use it: topics, records, transactions, accidents."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import NewPartitions, NewTopic  # type: ignore[attr-defined]
from filelock import FileLock

from support.kafka_process import (
    ANSWER_SECONDS,
    BrokerProcess,
    Unavailable,
    admin_of,
    hold,
    libraries,
    wait_for,
)

RESTARTABLE = "broker.session.timeout.ms=1000\nbroker.heartbeat.interval.ms=100\n"
"""A killed broker is let in again when it has been missed for so long."""

STARTS = 3
"""Free ports may be taken again before the broker listens on them."""


class Record(NamedTuple):
    """What to produce; a plain tuple that begins like it will do."""

    value: bytes | None
    """None is a tombstone."""
    key: bytes | None = None
    partition: int | None = None
    """None lets the producer choose by the key."""
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp: int = 0
    """Milliseconds since 1970; 0 is now."""


class Read(NamedTuple):
    """A record as a consumer saw it."""

    partition: int
    offset: int
    value: bytes | None
    key: bytes | None


Records = Iterable[tuple[Any, ...]]
Place = tuple[int, int]
"""Partition and offset."""


class RealBroker:
    """A running broker, used without ceremony.

    Settings of topics and clients have underscores for their dots:
    `new_topic(2, cleanup_policy="compact")`.
    """

    def __init__(self, bootstrap: str) -> None:
        """Use the broker at an address."""
        self.bootstrap = bootstrap
        self._admin = admin_of(bootstrap)

    def new_topic(self, partitions: int = 1, **configs: object) -> str:
        """Create a topic under a name that nobody had; return the name."""
        name = f"t-{uuid4().hex[:12]}"
        self.create_topic(name, partitions, **configs)
        return name

    def create_topic(self, name: str, partitions: int = 1, **configs: object) -> None:
        """Create a topic, and wait until clients can use it."""
        new = NewTopic(name, partitions, 1, config=_dotted(configs))
        self._admin.create_topics([new])[name].result(ANSWER_SECONDS)
        self._wait_for_partitions(name, partitions)

    def delete_topic(self, name: str) -> None:
        """Delete a topic, and wait until clients see it no more."""
        self._admin.delete_topics([name])[name].result(ANSWER_SECONDS)
        wait_for(lambda: name not in self._topics(), f"the end of {name}")

    def add_partitions(self, topic: str, total: int) -> None:
        """Give a topic more partitions, and wait until clients can use them."""
        wanted = NewPartitions(topic, total)
        self._admin.create_partitions([wanted])[topic].result(ANSWER_SECONDS)
        self._wait_for_partitions(topic, total)

    def topic_id(self, name: str) -> str:
        """Return a topic's identity, which another one of the same name has not."""
        found = self._admin.describe_topics(TopicCollection([name]))
        return str(found[name].result(ANSWER_SECONDS).topic_id)

    def watermarks(self, topic: str) -> dict[int, Place]:
        """Return each partition's first offset, and the one after its last.

        A consumer's own answer ends before the first open transaction, by default.
        """
        found: dict[int, Place] = {}

        def are_known() -> bool:
            for each in sorted(self._topics()[topic].partitions):
                if each not in found:
                    at = TopicPartition(topic, each)
                    found[each] = consumer.get_watermark_offsets(at, ANSWER_SECONDS)
            return True

        everything = self._consumer(isolation_level="read_uncommitted")
        with closing(everything) as consumer:
            wait_for(lambda: _unless_leaderless(are_known), f"the ends of {topic}")
        return found

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Delete a partition's records below an offset, as retention does."""
        wanted = TopicPartition(topic, partition, before)
        (done,) = self._admin.delete_records([wanted]).values()
        done.result(ANSWER_SECONDS)

    def producer(self, **conf: Any) -> Producer:
        """Return a producer; it waits for all replicas, as is librdkafka's default."""
        own = {
            "bootstrap.servers": self.bootstrap,
            "queue.buffering.max.messages": 1_000_000,
            "log_level": 0,
        }
        return Producer(own | _dotted(conf))

    def produce(self, topic: str, records: Records, **conf: Any) -> list[Place]:
        """Write records; return where each one is, in their order.

        Raises:
            KafkaException: The broker did not acknowledge one of them.
        """
        return _send(self.producer(**conf), topic, records)

    def transactional(self, **conf: Any) -> TransactionalProducer:
        """Return a producer of transactions; a transactional_id fences its namesake."""
        conf = {"transactional_id": f"p-{uuid4().hex[:12]}"} | conf
        return TransactionalProducer(self.producer(**conf))

    def read(self, topic: str, **conf: Any) -> list[Read]:
        """Return a topic's records as a new consumer sees them, by place.

        That is committed ones alone; isolation_level="read_uncommitted" gives all.
        """
        starts = self.watermarks(topic)
        with closing(self._consumer(**conf)) as consumer:
            consumer.assign(
                [TopicPartition(topic, each, low) for each, (low, _) in starts.items()]
            )
            return sorted(_until_the_end(consumer, len(starts)), key=lambda r: r[:2])

    def _consumer(self, **conf: Any) -> Consumer:
        own = {
            "bootstrap.servers": self.bootstrap,
            "group.id": f"g-{uuid4().hex[:12]}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "log_level": 0,
        }
        return Consumer(own | _dotted(conf))

    def _topics(self) -> dict[str, Any]:
        topics: dict[str, Any] = self._admin.list_topics(timeout=ANSWER_SECONDS).topics
        return topics

    def _wait_for_partitions(self, topic: str, total: int) -> None:
        def all_are_led() -> bool:
            found = self._topics().get(topic)
            partitions = [] if found is None else found.partitions.values()
            led = [each for each in partitions if each.leader >= 0]
            return len(led) == total

        wait_for(all_are_led, f"{total} partitions of {topic}")


class TransactionalProducer:
    """A producer whose records stand in transactions."""

    def __init__(self, producer: Producer) -> None:
        """Use a producer that has a transactional id."""
        self.producer = producer
        self._open = False
        producer.init_transactions(ANSWER_SECONDS)

    def send(self, topic: str, records: Records) -> list[Place]:
        """Write records in the open transaction, or a new one; return their places."""
        if not self._open:
            self.producer.begin_transaction()
            self._open = True
        return _send(self.producer, topic, records)

    def commit(self) -> None:
        """Commit the open transaction."""
        self.producer.commit_transaction(ANSWER_SECONDS)
        self._open = False

    def abort(self) -> None:
        """Abort the open transaction; its records stay where they are, unseen."""
        self.producer.abort_transaction(ANSWER_SECONDS)
        self._open = False


class OwnBroker(RealBroker):
    """A broker of one test alone, which may be taken away and come back."""

    def __init__(self, process: BrokerProcess) -> None:
        """Use a running process."""
        super().__init__(process.bootstrap)
        self._process = process

    def pause(self) -> None:
        """Let it stand still: connections stay, nothing answers."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after a pause, and wait until it knows its controller again."""
        self._process.signal(signal.SIGCONT)

        def is_itself() -> bool:
            with suppress(KafkaException):
                return bool(self._admin.list_topics(timeout=1).controller_id >= 0)
            return False

        wait_for(is_itself, "the broker to know its controller")

    def kill(self) -> None:
        """Kill it: connections are refused."""
        self._process.kill()

    def restart(self) -> None:
        """Start it again where it was, with the data that it had."""
        self._process.start()


# --- who has one -------------------------------------------------------------


@contextmanager
def shared_broker(shared: Path) -> Iterator[RealBroker]:
    """Give the one broker of a test run, started by the first who asks.

    Args:
        shared: A folder of all processes of this test run, and of no other run.

    Raises:
        Unavailable: No broker can run here.
    """
    state = shared / "kafka.json"
    with FileLock(shared / "kafka.lock"):
        found = json.loads(state.read_text()) if state.exists() else {}
        if "missing" in found:
            # To find out may take minutes, where a network swallows what it is asked.
            raise Unavailable(found["missing"])
        users = hold(Path(found["folder"])) if found else None
        if users is None:
            try:
                process = _start()
            except Unavailable as error:
                state.write_text(json.dumps({"missing": str(error)}))
                raise
            users = process.users
            found = {"folder": str(process.folder), "bootstrap": process.bootstrap}
            state.write_text(json.dumps(found))
    with users:
        yield RealBroker(found["bootstrap"])


@contextmanager
def own_broker() -> Iterator[OwnBroker]:
    """Give a broker that nobody else uses; it is gone afterwards.

    Raises:
        Unavailable: No broker can run here.
    """
    process = _start(RESTARTABLE)
    with process.users:
        try:
            yield OwnBroker(process)
        finally:
            process.kill()


def _start(settings: str = "") -> BrokerProcess:
    libs = libraries()
    for _ in range(STARTS - 1):
        with suppress(Unavailable):
            return BrokerProcess(libs, settings)
    return BrokerProcess(libs, settings)


# --- records -----------------------------------------------------------------


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "."): value for name, value in settings.items()}


def _unless_leaderless(ask: Callable[[], bool]) -> bool:
    """Ask; return False when a partition's leader is new, or gone for a moment.

    A broker that stood still or is very busy is missed by its controller, which takes
    its partitions away and gives them back when it answers again.
    """
    try:
        return ask()
    except KafkaException as error:
        if error.args[0].code() not in _LEADERLESS:
            raise
        return False


_LEADERLESS = (
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
)


def _send(producer: Producer, topic: str, records: Records) -> list[Place]:
    """Produce records, and wait until each is acknowledged."""
    places: dict[int, Place] = {}
    errors: list[KafkaError] = []

    def produce(number: int, record: Record) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                errors.append(error)
            else:
                places[number] = _place(message)

        producer.produce(
            topic,
            record.value,
            record.key,
            -1 if record.partition is None else record.partition,
            on_delivery=delivered,
            timestamp=record.timestamp,
            headers=list(record.headers),
        )
        producer.poll(0)

    for number, record in enumerate(records):
        produce(number, Record(*record))
    left = producer.flush(ANSWER_SECONDS)
    if errors:
        raise KafkaException(errors[0])
    assert left == 0, f"{left} records are not acknowledged"
    return [places[number] for number in range(len(places))]


def _until_the_end(consumer: Consumer, partitions: int) -> Iterator[Read]:
    """Poll until each of so many partitions has come to its end."""
    while partitions:
        message = consumer.poll(ANSWER_SECONDS)
        assert message is not None, "a partition has no end"
        error = message.error()
        if error is None:
            yield Read(*_place(message), message.value(), message.key())
        elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 # its name
            partitions -= 1
        else:
            raise KafkaException(error)


def _place(message: Message) -> Place:
    partition, offset = message.partition(), message.offset()
    assert partition is not None
    assert offset is not None
    return partition, offset
