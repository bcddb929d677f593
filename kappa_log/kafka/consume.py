"""Consume: a listener's topics into the log, each record once.

Polling and writing go side by side: while one batch is decided and committed, the next
one is gathered, and when that is full too the partitions pause and polling goes on, so
a slow database costs no rebalance. Offsets live in SQL alone. After any rollback or
unknown outcome all gathered records are dropped, the offsets are read again, every
partition that is still ours seeks to its own, and only then are records believed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from confluent_kafka import (
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from kappa_log.config import Config, ListenerConfig
from kappa_log.errors import Fenced, KappaLogError, SourceDiverged
from kappa_log.events import Position
from kappa_log.ingest import Clock, Committed, Portion, ingest_batch, started_handler
from kappa_log.kafka import client
from kappa_log.kafka.cluster import Cluster
from kappa_log.kafka.lanes import At, Held, LaneKeeper
from kappa_log.kafka.writer import Writer
from kappa_log.listeners import Listener
from kappa_log.records import Record
from kappa_log.storage.database import Database
from kappa_log.storage.ledger import Counts

POLL_SECONDS = 0.2
"""How long a poll waits for a first record."""

LINGER_SECONDS = 0.005
"""How long a batch that has begun waits for more."""

PAUSE_AFTER_SECONDS = 1.0
"""How long a full batch waits for the one before it until partitions pause."""

STOP_SECONDS = 3.0
"""How long the end waits for the batch at hand."""

CLOSE_SECONDS = 1.0
"""How long the end waits for the group to be left."""

MAX_FENCED = 20
"""How often in a row a lane may be lost to somebody while Kafka says it is ours."""

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_SAY_AGAIN_SECONDS = 60.0
_EMPTY_SECONDS = 3.0


class ConsumeProgress(msgspec.Struct, frozen=True):
    """How far a listener is."""

    listener: str
    partitions: int
    """How many are assigned to this process."""
    counts: Counts
    last_position: Position | None
    behind: int
    """Records that the brokers have beyond what is written, as last heard of."""


class LaneReport(msgspec.Struct, frozen=True):
    """Where one partition stands."""

    topic: str
    partition: int
    next_offset: int


class ConsumeReport(msgspec.Struct, frozen=True):
    """What one run of a listener did."""

    listener: str
    group_id: str
    counts: Counts
    batches: int
    first_position: Position | None
    last_position: Position | None
    seconds: float
    lanes: list[LaneReport]
    """Partitions that were held at the end."""
    reached_end: bool
    """False if it was told to stop."""


class Watch(msgspec.Struct, frozen=True):
    """Whom a run tells what it does; called from its own thread."""

    on_notice: Callable[[str], None] = lambda _: None
    on_progress: Callable[[ConsumeProgress], None] = lambda _: None


class _Intake(msgspec.Struct):
    """Records of one lane that are gathered for the next batch."""

    position: int
    """Offset after the last record: where the consumer itself stands."""
    records: list[Record] = []
    is_at_end: bool = False


class _Recreated(Exception):
    """A topic was made anew since its lanes were taken."""


class Consumption:
    """One listener's reading, until told to stop or at the end.

    Args:
        database: The log.
        config: The settings.
        section: The listener as it is configured.
        listener: The same, with its handler made.
        clock: The time that events are recorded at.
        watch: Whom to tell.
        until_end: End when every assigned partition is read to its end.
        accept_gap: Pass over offsets that the broker deleted unread.
    """

    def __init__(  # noqa: PLR0913 - each is a part of one run, by its name
        self,
        database: Database,
        config: Config,
        section: ListenerConfig,
        listener: Listener,
        *,
        clock: Clock,
        watch: Watch,
        until_end: bool = False,
        accept_gap: bool = False,
    ) -> None:
        self.section = section
        self._database = database
        self._config = config
        self._listener = listener
        self._clock = clock
        self._watch = watch
        self._until_end = until_end
        self._cluster = Cluster(config)
        self._keeper = LaneKeeper(
            database, self._cluster, section, clock=clock, accept_gap=accept_gap
        )
        self._writer: Writer[Committed] = Writer(f"write {section.id}")
        self._consumer: Consumer | None = None
        self._is_cooperative = client.is_cooperative(config)
        self._assigned: set[At] = set()
        self._held: dict[At, Held] = {}
        self._intakes: dict[At, _Intake] = {}
        self._unsettled: set[At] = set()
        self._written_by: list[Portion] = []
        self._is_paused = False
        self._trouble = Trouble(watch.on_notice)
        self._failure: Exception | None = None
        self._fenced = 0
        self._assigned_at: float | None = None
        self._tally = _Tally()
        self._marks = _GroupOffsets()

    def run(self, stop: threading.Event) -> ConsumeReport:
        """Consume until stopped, or until the end if that was wanted.

        Raises:
            SourceError: The cluster cannot be used, or lost what was to be read.
            SourceDiverged: The topic holds other records than those that were read.
            Fenced: Somebody outside of the group keeps taking the same lanes.
            HandlerError: The handler's start or stop raised.
            StorageError: The database refuses for good; what was committed is kept.
        """
        started = time.monotonic()
        topics = self._keeper.begin()
        if not topics:
            self._watch.on_notice(f"{self.section.id}: no topic matches yet; waiting")
        consumer = client.consumer(
            self._config, self.section.group_id, self.section.topic, self._on_error
        )
        self._consumer = consumer
        is_at_end = False
        with started_handler(self._listener.handler):
            try:
                consumer.subscribe(
                    [self.section.topic],
                    on_assign=self._on_assign,
                    on_revoke=self._on_revoke,
                    on_lost=self._on_lost,
                )
                while not (stop.is_set() or is_at_end):
                    self._turn()
                    is_at_end = self._until_end and self._is_at_end()
                self._finish()
            finally:
                lanes = self._where()
                _close(consumer)
        return self._report(started, lanes, reached_end=is_at_end)

    # --- one turn of the loop -------------------------------------------------

    def _turn(self) -> None:
        """Poll once, take in what came, hand a batch over if the writer is free."""
        if self._failure is not None:
            raise self._failure
        self._settle()
        room = self._config.ingest.batch_size - self._gathered()
        if room > 0:
            self._take_in(self._poll(room))
            if self._writer.is_busy and self._writer.wait(0):
                self._written()
        elif self._writer.wait(PAUSE_AFTER_SECONDS):
            self._written()
        else:
            self._pause()
            self._take_in(self._consume(1, 0.0))
        if not self._writer.is_busy:
            self._hand_over()

    def _poll(self, room: int) -> list[Message]:
        is_idle = not self._writer.is_busy and not self._gathered()
        if self._unsettled:
            wait = _FIRST_WAIT
        else:
            wait = POLL_SECONDS if is_idle else 2 * LINGER_SECONDS
        found = self._consume(1, wait)
        return found + self._consume(room - 1, LINGER_SECONDS) if found else found

    def _consume(self, most: int, seconds: float) -> list[Message]:
        assert self._consumer is not None
        return self._consumer.consume(most, seconds) if most > 0 else []

    def _gathered(self) -> int:
        return sum(len(intake.records) for intake in self._intakes.values())

    def _take_in(self, messages: Iterable[Message]) -> None:
        """Gather records of lanes that are held; all others are dropped."""
        intakes = self._intakes
        for message in messages:
            error = message.error()
            at = (message.topic() or "", message.partition() or 0)
            if error is not None:
                self._on_message_error(at, message, error)
                continue
            intake = intakes.get(at)
            offset = message.offset()
            assert offset is not None
            if intake is None or offset < intake.position:
                continue
            headers: Any = message.headers()
            kind, timestamp = message.timestamp()
            intake.records.append(
                Record(
                    offset,
                    message.value(),
                    message.key(),
                    tuple(headers) if headers else (),
                    timestamp if kind else None,
                )
            )
            intake.position = offset + 1
            intake.is_at_end = False

    def _hand_over(self) -> None:
        """Let what is gathered be written, if there is anything."""
        portions = [
            Portion(
                held.lane,
                held.assignment,
                self._listener,
                intake.records,
                intake.position,
            )
            for at, intake in self._intakes.items()
            if (held := self._held[at]).assignment.next_offset < intake.position
        ]
        if not portions:
            return
        for intake in self._intakes.values():
            intake.records = []
        self._written_by = portions
        self._writer.begin(lambda: self._write(portions))

    def _write(self, portions: Sequence[Portion]) -> Committed:
        """Commit a batch whose topics still are those that its lanes belong to.

        An id that was never given up proves it for all records polled before.
        """
        topics = self._cluster.topics(sorted({p.lane.topic for p in portions}))
        for portion in portions:
            topic = topics.get(portion.lane.topic)
            if topic is None or topic.source != portion.lane.source:
                raise _Recreated(portion.lane.topic)
        return ingest_batch(self._database, portions, self._clock)

    def _written(self) -> None:
        """Look at what came of the batch that was handed over."""
        if not self._writer.is_busy:
            return
        try:
            done = self._writer.outcome()
        except _Recreated as error:
            self._watch.on_notice(f"topic {error} was deleted or made anew")
            self._held.clear()
            self._reset()
        except Fenced as error:
            self._lost_to_another(error)
        except SourceDiverged:
            raise
        except KappaLogError as error:
            if not error.retryable:
                raise
            self._trouble.came(error)
            self._reset()
        else:
            self._fenced = 0
            self._trouble.is_over()
            self._move(done)
        self._resume()

    def _move(self, done: Committed) -> None:
        for portion in self._written_by:
            at = portion.lane.topic, portion.lane.partition
            held = self._held.get(at)
            # A lane may have been lost and taken anew while this was written.
            if held is not None and held.assignment == portion.held:
                self._held[at] = held.moved(portion.to_offset)
                self._marks.reached(at, portion.to_offset)
        self._tally.add(done)
        self._marks.commit(self._consumer)
        self._watch.on_progress(
            ConsumeProgress(
                self.section.id,
                len(self._assigned),
                self._tally.counts,
                self._tally.last_position,
                self._behind(),
            )
        )

    def _behind(self) -> int:
        assert self._consumer is not None
        behind = 0
        for at, held in self._held.items():
            ends = self._consumer.get_watermark_offsets(
                TopicPartition(*at), cached=True
            )
            if ends is not None:
                behind += max(0, ends[1] - held.assignment.next_offset)
        return behind

    # --- after trouble --------------------------------------------------------

    def _reset(self) -> None:
        """Drop what is gathered; nothing is believed until SQL was asked again."""
        self._intakes.clear()
        self._unsettled = set(self._assigned)
        self._pause()

    def _lost_to_another(self, error: Fenced) -> None:
        """Drop all, and give the group's own news time to come before trying again.

        A process that slept may have taken our lane in the belief that it still was
        its own; Kafka says whose it is. Who is assigned a lane takes it again.
        """
        self._fenced += 1
        if self._fenced > MAX_FENCED:
            raise error
        self._trouble.wait(random.uniform(_FIRST_WAIT, 5 * _FIRST_WAIT))  # noqa: S311
        self._reset()

    def _settle(self) -> None:
        """Find out where the lanes stand that are assigned, and seek there."""
        if not self._unsettled or self._trouble.is_waiting or self._writer.is_busy:
            return
        try:
            ours = [self._held[at] for at in self._unsettled if at in self._held]
            self._held |= (found := self._keeper.reread(ours))
            self._take(self._unsettled - found.keys())
        except KappaLogError as error:
            if not error.retryable:
                raise
            self._trouble.came(error)
            return
        self._trouble.is_over()
        for at in sorted(self._unsettled & self._held.keys()):
            self._seek(at)
        if self._unsettled:
            self._trouble.wait(5 * _FIRST_WAIT)

    def _take(self, wanted: set[At]) -> None:
        """Take lanes; those that the cluster does not have just now stay unsettled."""
        for at in wanted:
            self._held.pop(at, None)
        if not wanted:
            return
        taken = self._keeper.take(wanted)
        for gap in taken.gaps:
            self._watch.on_notice(gap)
        self._held |= taken.held

    def _seek(self, at: At) -> None:
        assert self._consumer is not None
        offset = self._held[at].assignment.next_offset
        try:
            self._consumer.seek(TopicPartition(*at, offset))
        except KafkaException:
            # Its fetching has not begun yet, or ended: the next turn knows.
            return
        self._consumer.resume([TopicPartition(*at)])
        self._intakes[at] = _Intake(offset, [])
        self._unsettled.discard(at)

    def _pause(self) -> None:
        assert self._consumer is not None
        if not self._is_paused and self._assigned:
            self._consumer.pause([TopicPartition(*at) for at in self._assigned])
            self._is_paused = True

    def _resume(self) -> None:
        """Let partitions flow again; an unsettled one waits for its seek."""
        assert self._consumer is not None
        settled = self._assigned & self._intakes.keys()
        if self._is_paused and settled:
            self._consumer.resume([TopicPartition(*at) for at in settled])
        self._is_paused = False

    # --- what Kafka tells -----------------------------------------------------

    def _on_assign(self, consumer: Consumer, found: list[TopicPartition]) -> None:
        """Take lanes that are ours now, and begin them where SQL says."""
        new = {(part.topic, part.partition) for part in found}
        self._assigned_at = time.monotonic()
        self._assigned |= new
        try:
            self._take(new)
        except KappaLogError as error:
            if error.retryable:
                self._trouble.came(error)
            else:
                self._failure = error
        parts = [
            TopicPartition(*at, self._held[at].assignment.next_offset)
            if at in self._held
            else TopicPartition(*at, OFFSET_END)
            for at in sorted(new)
        ]
        (consumer.incremental_assign if self._is_cooperative else consumer.assign)(
            parts
        )
        for at in new & self._held.keys():
            self._intakes[at] = _Intake(self._held[at].assignment.next_offset, [])
        if later := new - self._held.keys():
            self._unsettled |= later
            consumer.pause([TopicPartition(*at) for at in later])
        if new:
            self._watch.on_notice(f"{self.section.id}: assigned {_named(new)}")

    def _on_revoke(self, _: Consumer, found: list[TopicPartition]) -> None:
        """Let the batch at hand be committed, then let the lanes go."""
        if self._writer.is_busy and self._writer.wait(STOP_SECONDS):
            try:
                self._written()
            except Exception as error:  # noqa: BLE001 - raised in the next turn
                self._failure = error
        self._marks.commit(self._consumer, now=True)
        self._let_go(found)
        if found:
            self._watch.on_notice(
                f"{self.section.id}: gave up "
                f"{_named((part.topic, part.partition) for part in found)}"
            )

    def _on_lost(self, _: Consumer, found: list[TopicPartition]) -> None:
        """Let lanes go that others may have already."""
        self._let_go(found)
        if found:
            self._watch.on_notice(
                f"{self.section.id}: lost "
                f"{_named((part.topic, part.partition) for part in found)}"
            )

    def _let_go(self, found: Iterable[TopicPartition]) -> None:
        for part in found:
            at = (part.topic, part.partition)
            self._assigned.discard(at)
            self._unsettled.discard(at)
            self._held.pop(at, None)
            self._intakes.pop(at, None)
            self._marks.forget(at)

    def _on_message_error(self, at: At, message: Message, error: KafkaError) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's name
            self._on_end(at, message)
        elif code in _OUT_OF_RANGE:
            # The broker does not have what comes next: taking the lane anew tells why.
            self._held.pop(at, None)
            self._intakes.pop(at, None)
            if at in self._assigned:
                self._unsettled.add(at)
        else:
            self._on_error(error)

    def _on_end(self, at: At, message: Message) -> None:
        """Note a partition's end; holes before it have no records, and are passed."""
        assert self._consumer is not None
        intake, end = self._intakes.get(at), message.offset()
        if intake is None or end is None:
            return
        (stands,) = self._consumer.position([TopicPartition(*at)])
        # An end that was reported before the last seek says nothing about after it.
        if end > intake.position and stands.offset == end:
            intake.position = end
        intake.is_at_end = end <= intake.position

    def _on_error(self, error: KafkaError) -> None:
        found = client.source_error(self._cluster.label, error)
        if client.is_fatal(error):
            self._failure = found
        else:
            self._trouble.say(str(found))

    # --- the end --------------------------------------------------------------

    def _is_at_end(self) -> bool:
        """Tell whether all that is assigned is read and written.

        Who is assigned nothing waits a little: members may be handing over.
        """
        if self._writer.is_busy or self._unsettled or self._gathered():
            return False
        if not self._assigned:
            since = self._assigned_at
            return since is not None and time.monotonic() - since > _EMPTY_SECONDS
        return all(
            at in self._intakes
            and self._intakes[at].is_at_end
            and self._held[at].assignment.next_offset == self._intakes[at].position
            for at in self._assigned
        )

    def _finish(self) -> None:
        """Wait for the batch at hand; what is gathered behind it was never ours."""
        if self._writer.is_busy and self._writer.wait(STOP_SECONDS):
            self._written()
        self._marks.commit(self._consumer, now=True)
        if self._failure is not None:
            raise self._failure

    def _where(self) -> list[LaneReport]:
        return [
            LaneReport(*at, held.assignment.next_offset)
            for at, held in sorted(self._held.items())
        ]

    def _report(
        self, started: float, lanes: list[LaneReport], *, reached_end: bool
    ) -> ConsumeReport:
        tally = self._tally
        return ConsumeReport(
            listener=self.section.id,
            group_id=self.section.group_id,
            counts=tally.counts,
            batches=tally.batches,
            first_position=tally.first_position,
            last_position=tally.last_position,
            seconds=time.monotonic() - started,
            lanes=lanes,
            reached_end=reached_end,
        )


_OUT_OF_RANGE = (
    KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001 - librdkafka's name
    KafkaError.OFFSET_OUT_OF_RANGE,
)


class Trouble:
    """Trouble that may pass: waited out with growing pauses, told, not repeated."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: dict[str, float] = {}
        self._wait = _FIRST_WAIT
        self._until = 0.0
        self._is_on = False

    @property
    def is_waiting(self) -> bool:
        """Tell whether it is too early to try again."""
        return time.monotonic() < self._until

    def came(self, error: KappaLogError) -> None:
        """Note an error; the next try waits longer than the last."""
        self._is_on = True
        self.say(f"{error}; trying again")
        self.wait(random.uniform(self._wait / 2, self._wait))  # noqa: S311
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def wait(self, seconds: float) -> None:
        """Let nothing be tried for a while."""
        self._until = time.monotonic() + seconds

    def is_over(self) -> None:
        """Note that it works again."""
        if self._is_on:
            self._tell("going on")
        self._is_on = False
        self._wait = _FIRST_WAIT
        self._told.clear()

    def say(self, message: str) -> None:
        """Tell what happens, and not the same again for a minute."""
        now = time.monotonic()
        if now - self._told.get(message, -_SAY_AGAIN_SECONDS) >= _SAY_AGAIN_SECONDS:
            self._told[message] = now
            self._tell(message)


class _Tally:
    """What a run has done so far."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.batches = 0
        self.first_position: Position | None = None
        self.last_position: Position | None = None

    def add(self, done: Committed) -> None:
        self.batches += 1
        self.counts.add(done.counts)
        if self.first_position is None:
            self.first_position = done.first_position
        self.last_position = done.last_position or self.last_position


class _GroupOffsets:
    """Kafka's own offsets of the group, for lag tools; we never read them."""

    def __init__(self) -> None:
        self._new: dict[At, int] = {}
        self._last = 0.0

    def reached(self, at: At, offset: int) -> None:
        self._new[at] = offset

    def forget(self, at: At) -> None:
        self._new.pop(at, None)

    def commit(self, consumer: Consumer | None, *, now: bool = False) -> None:
        """Send what is new, about once a second; nobody waits for an answer."""
        if consumer is None or not self._new:
            return
        if not now and time.monotonic() - self._last < 1.0:
            return
        offsets = [TopicPartition(*at, offset) for at, offset in self._new.items()]
        self._new.clear()
        self._last = time.monotonic()
        try:
            consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException:
            return


def _close(consumer: Consumer) -> None:
    """Leave the group; with the brokers away that may take for ever, so not longer."""
    closing = threading.Thread(target=consumer.close, name="close", daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)


def _named(found: Iterable[At]) -> str:
    topics: dict[str, list[int]] = {}
    for topic, partition in sorted(found):
        topics.setdefault(topic, []).append(partition)
    return "; ".join(
        f"{topic} {', '.join(map(str, numbers))}" for topic, numbers in topics.items()
    )
