"""Consume: a listener's topics into the log, each record once.

Polling and writing go side by side: while one batch is decided and committed, the next
one is gathered, and when that is full too the partitions pause and polling goes on, so
a slow database costs no rebalance. Offsets live in SQL alone. After any rollback or
unknown outcome all gathered records are dropped, the offsets are read again, every
partition that is still ours seeks to its own, and only then are records believed.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from kappa_log.config import Config, ListenerConfig
from kappa_log.decide import Portion, Stopped
from kappa_log.errors import Fenced, KappaLogError, SourceError
from kappa_log.events import Position, to_micros
from kappa_log.ingest import Clock, Committed, ingest_batch, started_handler
from kappa_log.kafka import client
from kappa_log.kafka.cluster import Cluster
from kappa_log.kafka.lanes import At, Held, LaneKeeper
from kappa_log.kafka.partitions import Partitions, at_of
from kappa_log.kafka.subscription import Subscription
from kappa_log.kafka.trouble import FIRST_WAIT, Trouble
from kappa_log.kafka.writer import Writer
from kappa_log.listeners import Listener
from kappa_log.storage.database import Database
from kappa_log.storage.ledger import Counts
from kappa_log.telemetry import notices

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

PATIENCE_SECONDS = 5.0
"""How long the group may take to hand out partitions until that is told."""

EMPTY_SECONDS = 3.0
"""How long nothing must be assigned until that counts as the end."""

LOOK_SECONDS = 5.0
"""How often to look whether somebody went back to earlier offsets."""

MAX_FENCED = 20
"""How often in a row a lane may be lost to somebody while Kafka says it is ours."""


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


class Options(msgspec.Struct, frozen=True):
    """How a run goes."""

    until_end: bool = False
    """End when every assigned partition is read to its end."""
    accept_gap: bool = False
    """Pass over offsets that the broker deleted unread."""


class Watch(msgspec.Struct, frozen=True):
    """Whom a run tells what it does; called from its own thread."""

    on_notice: Callable[[str], None] = lambda _: None
    on_progress: Callable[[ConsumeProgress], None] = lambda _: None


class _Recreated(Exception):
    """A topic was made anew since its lanes were taken."""


class Consumption:
    """One listener's reading, until told to stop or at the end.

    Args:
        database: The log.
        config: The settings.
        listener: Who decides, with its handler made.
        section: The same as it is configured.
        clock: The time that events are recorded at.
        options: How it goes.
        watch: Whom to tell.
        number: Which of the listener's consumers in this process it is, from 1.
        tally: What those before it did, that crashed; it counts on.

    Raises:
        ConfigError: [kafka] is refused by librdkafka.
    """

    _topics: list[str] | None = None
    """What it is to read, once it is prepared."""

    def __init__(  # noqa: PLR0913 - each is a part of one run, by its name
        self,
        database: Database,
        config: Config,
        listener: Listener,
        section: ListenerConfig,
        *,
        clock: Clock,
        options: Options,
        watch: Watch,
        number: int = 1,
        tally: Tally | None = None,
    ) -> None:
        self.id = section.id if number == 1 else f"{section.id}#{number}"
        self.has_begun = False
        """Whether it came to reading: then its settings work, its topic is there."""
        self._section = section
        self._database = database
        self._batch_size = config.ingest.batch_size
        self._listener = listener
        self._clock = clock
        self._options = options
        self._watch = watch
        self._cluster = Cluster(config)
        self._keeper = LaneKeeper(
            database,
            self._cluster,
            section,
            clock=clock,
            accept_gap=options.accept_gap,
        )
        member = section.topic if number == 1 else f"{section.topic}..{number}"
        self._consumer = client.consumer(
            config, section.group_id, member, self._on_error
        )
        self._subscription = Subscription(
            config, self._cluster, section, self._subscribe
        )
        self._partitions = Partitions(
            self._consumer,
            self._keeper,
            is_cooperative=client.is_cooperative(config),
        )
        self._writer: Writer[Committed] = Writer(f"write {section.id}")
        self._in_hand: list[Portion] = []
        self._looker: Writer[list[Held]] = Writer(f"look {section.id}")
        self._look_at = 0.0
        self._trouble = Trouble(self._tell)
        self._has_failed = False
        """Whether the last batch could not be written: then only writing is proof."""
        self._failure: Exception | None = None
        self._fenced = 0
        self._assigned_at: float | None = None
        self._impatient_at = math.inf
        self._is_ending = False
        self._tally = tally or Tally()
        self._marks = _GroupOffsets(self._consumer)

    def prepare(self) -> None:
        """Find the topics and where each partition begins; no handler is started.

        Raises:
            SourceError: The cluster does not answer, or has no such topic.
            UsageError: The start lies beyond a partition's end.
            StorageError: The database refuses.
        """
        self._topics = self._keeper.begin()

    def run(self, stop: threading.Event) -> ConsumeReport:
        """Consume until stopped, or until the end if that was wanted.

        Raises:
            SourceError: The cluster cannot be used, or lost what was to be read.
            SourceDiverged: The topic holds other records than those that were read.
            Fenced: Somebody outside of the group keeps taking the same lanes.
            HandlerError: The handler's start or stop raised.
            StorageError: The database refuses for good; what was committed is kept.
        """
        try:
            if self._topics is None:
                self.prepare()
            topics = self._topics or []
            if not topics:
                self._tell("no topic matches yet")
                self._assigned_at = time.monotonic()
            self._impatient_at = time.monotonic() + PATIENCE_SECONDS
            with self._started_handler():
                is_read = self._read(topics, stop)
        finally:
            lanes = self._where()
            self.close()
            if self.has_begun:
                notices.tell("listener_stopped", self._facts)
        return self.report(lanes, reached_end=is_read)

    @contextlib.contextmanager
    def _started_handler(self) -> Iterator[None]:
        """Start the handler, and stop it in the end; subscribers are told of both."""
        began = time.perf_counter()
        with (
            contextlib.ExitStack() as afterwards,
            started_handler(self._listener.handler),
        ):
            seconds = time.perf_counter() - began
            notices.tell("handler_started", self._facts, seconds=seconds)
            afterwards.callback(notices.tell, "handler_stopped", self._facts)
            yield

    @property
    def _facts(self) -> dict[str, Any]:
        """What subscribers are told of it."""
        return {
            "listener_id": self.id,
            "group_id": self._section.group_id,
            "topic": self._section.topic,
            "handler": self._listener.handler_name,
        }

    def _read(self, topics: list[str], stop: threading.Event) -> bool:
        """Turn until told to stop, or at the end; tell whether it is the end."""
        self.has_begun = True
        notices.tell("listener_started", self._facts)
        is_read = False
        try:
            self._subscription.to(topics)
            while not (stop.is_set() or is_read):
                self._turn()
                is_read = self._options.until_end and self._is_read()
        except BaseException:
            # The handler is not told to stop while it still is at work.
            self._writer.wait(STOP_SECONDS)
            raise
        if not is_read:
            notices.tell("listener_stopping", self._facts)
        self._finish()
        return is_read

    # --- one turn of the loop -------------------------------------------------

    def _turn(self) -> None:
        """Poll once, take in what came, hand a batch over if the writer is free."""
        if self._failure is not None:
            raise self._failure
        if self._assigned_at is None and time.monotonic() > self._impatient_at:
            self._trouble.say(_WAITING)
        self._look_for_topics()
        self._look_at_lanes()
        self._settle()
        room = self._batch_size - self._partitions.gathered
        if room > 0:
            self._poll(room)
            if self._writer.wait(0):
                self._written()
        elif self._writer.wait(PAUSE_AFTER_SECONDS):
            self._written()
        else:
            self._partitions.pause()
            self._take_in(1, 0)
        if not self._writer.is_busy:
            self._hand_over()

    def _poll(self, room: int) -> None:
        """Take in a first record as soon as it is there, and what comes right after."""
        is_idle = not (
            self._writer.is_busy
            or self._partitions.gathered
            or self._partitions.unsettled
        )
        wait = POLL_SECONDS if is_idle else 2 * LINGER_SECONDS
        if self._take_in(1, wait) and room > 1:
            self._take_in(room - 1, LINGER_SECONDS)

    def _take_in(self, most: int, seconds: float) -> bool:
        """Poll once and take in what came; tell whether anything came."""
        standing = self._partitions.standing()
        try:
            found = self._consumer.consume(most, seconds)
        except KafkaException as raised:
            # So the client tells of a fatal error, sometimes.
            self._on_error(raised.args[0])
            return False
        for message in found:
            error = message.error()
            if not self._partitions.believes(message, standing):
                continue
            if error is None:
                self._partitions.take_in(message)
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                self._partitions.note_end(message)
            elif error.code() in _OUT_OF_RANGE:
                # The broker does not have what comes next: taking anew tells why.
                self._partitions.forget(at_of(message))
                self._trouble.say(str(client.source_error(self._cluster.label, error)))
                self._trouble.wait(5 * FIRST_WAIT)
            else:
                self._on_error(error)
        return bool(found)

    def _hand_over(self) -> None:
        """Let what is gathered be written, if there is anything."""
        portions = self._partitions.portions(self._listener)
        if portions:
            self._in_hand = portions
            self._writer.begin(lambda: self._write(portions))

    def _write(self, portions: Sequence[Portion]) -> Committed:
        """Commit a batch whose topics still are those that its lanes belong to.

        An id that is the old one now proves it for all that was polled before: the
        id of a topic that was deleted never comes back.
        """
        topics = self._cluster.topics(sorted({p.lane.topic for p in portions}))
        for portion in portions:
            topic = topics.get(portion.lane.topic)
            if topic is None or topic.source != portion.lane.source:
                raise _Recreated(portion.lane.topic)
        return ingest_batch(self._database, portions, self._clock)

    def _written(self) -> None:
        """Look at what came of the batch in hand, if there is one."""
        if not self._writer.is_busy:
            return
        try:
            done = self._writer.outcome()
        except _Recreated as error:
            self._tell(f"topic {error} was deleted or made anew")
            for at in list(self._partitions.assigned):
                self._partitions.forget(at)
            self._partitions.reset()
        except Fenced as error:
            self._lost_to_another(error)
        except KappaLogError as error:
            if not error.retryable:
                raise
            self._has_failed = True
            self._trouble.came(error)
            self._partitions.reset()
        else:
            self._move(done)
        self._partitions.resume()

    def _move(self, done: Committed) -> None:
        self._fenced = 0
        self._has_failed = False
        self._trouble.is_over()
        for portion in self._in_hand:
            at = portion.lane.topic, portion.lane.partition
            stopped = done.stopped.get(portion.lane)
            end = portion.to_offset if stopped is None else stopped.offset
            if self._partitions.written(portion, end):
                self._marks.reached(at, end)
                if stopped is not None:
                    self._hold_back(at, stopped)
        self._marks.commit()
        self._tally.add(done)
        if notices.is_heard("partition_read"):
            self._tell_lag()
        self._watch.on_progress(
            ConsumeProgress(
                listener=self.id,
                partitions=len(self._partitions.assigned),
                counts=self._tally.counts,
                last_position=self._tally.last_position,
                behind=self._partitions.behind,
            )
        )

    def _tell_lag(self) -> None:
        """Tell subscribers how far the partitions of the batch in hand are read."""
        now = to_micros(self._clock())
        for portion in self._in_hand:
            at = portion.lane.topic, portion.lane.partition
            behind = self._partitions.behind_of(at)
            last = portion.records[-1].timestamp if portion.records else None
            age = None if last is None else max(0.0, now / 1e6 - last / 1e3)
            facts = {
                "listener_id": self.id,
                "topic": at[0],
                "partition": at[1],
                "next_offset": portion.to_offset,
                "behind": behind,
                "seconds": 0.0 if behind == 0 else age,
            }
            notices.tell("partition_read", facts)

    def _hold_back(self, at: At, stopped: Stopped) -> None:
        """Try a record again later; its partition waits, all others go on."""
        self._partitions.hold_back(at, stopped)
        self._trouble.say(
            f"{at[0]} partition {at[1]} waits at offset {stopped.offset}: "
            f"{stopped.why}; it is tried again in its place, in {stopped.wait:.1f} s",
            about=f"{at} {stopped.offset}",
        )

    # --- after trouble --------------------------------------------------------

    def _lost_to_another(self, error: Fenced) -> None:
        """Drop all, and give the group's own news time to come before trying again.

        A process that slept may have taken our lane in the belief that it still was
        its own; Kafka says whose it is. Who is assigned a lane takes it again.
        """
        self._fenced += 1
        if self._fenced > MAX_FENCED:
            raise error
        self._trouble.wait(random.uniform(FIRST_WAIT, 5 * FIRST_WAIT))  # noqa: S311
        self._partitions.reset()

    def _look_at_lanes(self) -> None:
        """See in SQL, beside the polling, whether somebody went back.

        Who writes finds out by being fenced; who has nothing to write would not.
        """
        if self._looker.is_busy and self._looker.wait(0):
            self._look_at = time.monotonic() + LOOK_SECONDS
            try:
                self._partitions.unsettle(self._looker.outcome())
            except KappaLogError as error:
                self._trouble.say(str(error))
        elif not self._looker.is_busy and time.monotonic() >= self._look_at:
            held = self._partitions.held
            self._looker.begin(lambda: self._keeper.moved(held))

    def _settle(self) -> None:
        """Find out where the lanes stand that are assigned, and seek there."""
        is_needed = self._partitions.unsettled and not self._writer.is_busy
        if not is_needed or self._trouble.is_waiting:
            return
        try:
            gaps = self._partitions.settle()
        except KappaLogError as error:
            if not error.retryable:
                raise
            self._trouble.came(error)
            return
        for gap in gaps:
            self._tell(gap)
        if not self._has_failed:
            self._trouble.is_over()
        if self._partitions.unsettled:
            self._trouble.wait(5 * FIRST_WAIT)

    # --- what Kafka tells -----------------------------------------------------

    def _subscribe(self, topics: list[str]) -> None:
        if not topics:
            self._consumer.unsubscribe()
            return
        self._consumer.subscribe(
            topics,
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )

    def _look_for_topics(self) -> None:
        try:
            self._subscription.look()
        except SourceError as error:
            self._trouble.say(str(error))

    def _on_assign(self, _: Consumer, found: list[TopicPartition]) -> None:
        """Take lanes that are ours now, and begin them where SQL says."""
        new = {at_of(part) for part in found}
        self._assigned_at = time.monotonic()
        try:
            for gap in self._partitions.take(new):
                self._tell(gap)
        except KappaLogError as error:
            if error.retryable:
                self._trouble.came(error)
            else:
                self._failure = error
        except Exception as error:  # noqa: BLE001 - raised in the next turn
            # The client waits for its assignment all the same, also to close.
            self._failure = error
        self._partitions.begin(new)
        self._tell_whose("assigned", new)
        if not self._partitions.assigned:
            self._tell("assigned nothing; other members of the group have all there is")

    def _on_revoke(self, _: Consumer, found: list[TopicPartition]) -> None:
        """Let the batch in hand be committed, then let the lanes go."""
        if self._writer.wait(STOP_SECONDS):
            try:
                self._written()
            except Exception as error:  # noqa: BLE001 - raised in the next turn
                self._failure = error
        self._marks.commit(now=True)
        self._let_go("gave up", found)

    def _on_lost(self, _: Consumer, found: list[TopicPartition]) -> None:
        """Let lanes go that others may have already."""
        self._let_go("lost", found)

    def _let_go(self, how: str, found: list[TopicPartition]) -> None:
        gone = {at_of(part) for part in found}
        self._partitions.let_go(gone)
        self._marks.forget(gone)
        if not self._is_ending:
            self._tell_whose(how, gone)

    def _on_error(self, error: KafkaError) -> None:
        found = client.source_error(self._cluster.label, error)
        if client.is_fatal(error):
            # Waiting does not mend it, nor does another consumer of the same settings.
            found.retryable = False
            self._failure = found
        elif not self._is_ending:
            self._trouble.say(str(found))

    def _tell(self, notice: str) -> None:
        self._watch.on_notice(f"{self.id}: {notice}")

    def _tell_whose(self, how: str, which: Iterable[At]) -> None:
        topics: dict[str, list[str]] = {}
        for topic, partition in sorted(which):
            topics.setdefault(topic, []).append(str(partition))
        if topics:
            named = (f"{name} {', '.join(found)}" for name, found in topics.items())
            self._tell(f"{how} {'; '.join(named)}")

    # --- the end --------------------------------------------------------------

    def _is_read(self) -> bool:
        """Tell whether all that is assigned is read and written.

        Who is assigned nothing waits a little: members may be handing over.
        """
        if self._writer.is_busy:
            return False
        if not self._partitions.assigned:
            since = self._assigned_at
            return since is not None and time.monotonic() - since > EMPTY_SECONDS
        return self._partitions.is_read

    def _finish(self) -> None:
        """Wait for the batch in hand; what is gathered behind it will come again."""
        if self._writer.wait(STOP_SECONDS):
            self._written()
        else:
            self._tell("its last batch did not end in time; it will come again")
        self._marks.commit(now=True)
        for waiting in self._partitions.held_back():
            notices.tell("retry_aborted", self._facts | waiting)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Leave the group; with the brokers away that may take long, so not longer."""
        self._is_ending = True
        closing = threading.Thread(
            target=self._consumer.close, name=f"close {self.id}", daemon=True
        )
        closing.start()
        closing.join(CLOSE_SECONDS)

    def _where(self) -> list[LaneReport]:
        return [
            LaneReport(*held.at, held.assignment.next_offset)
            for held in self._partitions.held
        ]

    def report(
        self, lanes: Sequence[LaneReport] = (), *, reached_end: bool = False
    ) -> ConsumeReport:
        """Return what was done so far."""
        tally = self._tally
        return ConsumeReport(
            listener=self.id,
            group_id=self._section.group_id,
            counts=tally.counts,
            batches=tally.batches,
            first_position=tally.first_position,
            last_position=tally.last_position,
            seconds=time.monotonic() - tally.started,
            lanes=list(lanes),
            reached_end=reached_end,
        )


_WAITING = (
    "waits for its group to hand out partitions; one of its members may be gone, and "
    "is missed after the session.timeout.ms that it had"
)

_OUT_OF_RANGE = (
    KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001 - librdkafka's name
    KafkaError.OFFSET_OUT_OF_RANGE,
)


class Tally:
    """What a run has done so far."""

    def __init__(self) -> None:
        """Begin at nothing, now."""
        self.started = time.monotonic()
        self.counts = Counts()
        self.batches = 0
        self.first_position: Position | None = None
        self.last_position: Position | None = None

    def add(self, done: Committed) -> None:
        """Count a batch."""
        self.batches += 1
        self.counts.add(done.counts)
        if self.first_position is None:
            self.first_position = done.first_position
        self.last_position = done.last_position or self.last_position


class _GroupOffsets:
    """Kafka's own offsets of the group, for lag tools; we never read them."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._new: dict[At, int] = {}
        self._last = 0.0

    def reached(self, at: At, offset: int) -> None:
        self._new[at] = offset

    def forget(self, gone: Iterable[At]) -> None:
        for at in gone:
            self._new.pop(at, None)

    def commit(self, *, now: bool = False) -> None:
        """Send what is new, about once a second; nobody waits for an answer."""
        is_early = not now and time.monotonic() - self._last < 1.0
        if is_early or not self._new:
            return
        offsets = [TopicPartition(*at, offset) for at, offset in self._new.items()]
        self._new.clear()
        self._last = time.monotonic()
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException:
            return
