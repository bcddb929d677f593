"""Ingest: records → decisions → one transaction a batch.

The handlers decide with no transaction open. Then one transaction moves the offsets,
takes the head, draws positions and writes events, failures, duplicates and the
ledger: all of it or nothing. So a kill costs a batch of work and loses, doubles and
reorders no record; and whatever identity was decided on is checked again by unique
indexes, which roll back a batch that another writer got ahead of.

While the database works on one batch of a file, the next one is decided; it is
written only when the one before it is in the log.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log import chain
from kappa_log.decide import (
    Acked,
    Batch,
    Decided,
    Decision,
    Failed,
    Portion,
    Stopped,
    decide,
    identify,
    received,
)
from kappa_log.effects import Effects, TransactionDied
from kappa_log.errors import DatabaseBusy, HandlerError, SourceDiverged
from kappa_log.events import Position, from_micros, to_micros
from kappa_log.files import LineFile
from kappa_log.handler import FieldHandler, Handler
from kappa_log.listeners import Listener
from kappa_log.records import Lane
from kappa_log.storage import ledger, log
from kappa_log.storage.bulk import time_shift
from kappa_log.storage.database import ConstraintViolated, Database
from kappa_log.storage.ledger import Assignment, Counts
from kappa_log.telemetry import notices, tracing

Clock = Callable[[], datetime]

TOLD = 20
"""Failures of a batch that its notice names."""

MAX_RERUNS = 5
"""How often a batch is decided anew because other writers got ahead of it."""


class Committed(msgspec.Struct, frozen=True):
    """One committed batch."""

    counts: Counts
    first_position: Position | None
    last_position: Position | None
    stopped: dict[Lane, Stopped] = {}
    """Lanes that were written up to a record that is tried again."""

    def joined(self, later: Committed) -> Committed:
        """Return what this and a later batch did together."""
        counts = Counts()
        counts.add(self.counts)
        counts.add(later.counts)
        return Committed(
            counts,
            self.first_position or later.first_position,
            later.last_position or self.last_position,
            self.stopped | later.stopped,
        )


class IngestProgress(msgspec.Struct, frozen=True):
    """How far the reading of a file is."""

    file: str
    bytes_read: int
    bytes_total: int | None
    lines: int
    counts: Counts


class IngestReport(msgspec.Struct, frozen=True):
    """What one run over a file did."""

    file: str
    source: str
    topic: str
    group_id: str
    resumed_at: int
    """Lines that earlier runs had read."""
    next_offset: int
    lines: int
    blank: int
    counts: Counts
    first_position: Position | None
    last_position: Position | None
    head: Position
    seconds: float
    held_back: bool
    failure_ids: list[int]
    """The first few."""


def ingest_file(  # noqa: PLR0913 - each is a part of one run, by its name
    database: Database,
    listener: Listener,
    file: LineFile,
    *,
    fields: str | None,
    batch_size: int,
    clock: Clock,
    on_progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Take a file's lines into the log, from where the last run ended.

    Args:
        database: The log.
        listener: Who decides about the lines.
        file: What to read.
        fields: The field options as JSON, kept to refuse others later; None under
            a configured listener.
        batch_size: Most lines a transaction.
        clock: The time that events are recorded at.
        on_progress: Called after each batch.

    Raises:
        SourceError: The file cannot be read, or is not what was read before.
        Fenced: Another process took the file over.
        HandlerError: The handler's start or stop raised.
        StorageError: The database refused; what was committed is kept.
    """
    started = time.perf_counter()
    lane = Lane(file.source, listener.topic, listener.group_id)
    counts = Counts()
    lines = 0
    first_position: Position | None = None
    last_position: Position | None = None
    # Before the lane is taken: a handler that cannot start fences nobody.
    with started_handler(listener.handler):
        with database.write() as connection:
            held = ledger.assign(
                connection,
                database,
                lane,
                ledger.Reader(listener.dedupe, fields),
                clock(),
            )
        batches = _batches(lane, held, listener, file, batch_size)
        for (portion,), done in _ingested(database, listener, batches, clock):
            lines += portion.to_offset - portion.held.next_offset
            counts.add(done.counts)
            if first_position is None:
                first_position = done.first_position
            last_position = done.last_position or last_position
            if on_progress is not None:
                on_progress(
                    IngestProgress(
                        file.file, file.bytes_read, file.bytes_total, lines, counts
                    )
                )
    with database.read() as connection:
        head = log.head(connection, database).position
        failure_ids = ledger.failure_ids(
            connection, database, lane, held.source_id, held.next_offset
        )
    return IngestReport(
        file=file.file,
        source=file.source,
        topic=listener.topic,
        group_id=listener.group_id,
        resumed_at=held.next_offset,
        next_offset=held.next_offset + lines,
        lines=lines,
        blank=lines - counts.seen,
        counts=counts,
        first_position=first_position,
        last_position=last_position,
        head=head,
        seconds=time.perf_counter() - started,
        held_back=file.held_back,
        failure_ids=failure_ids if counts.failed else [],
    )


def _ingested(
    database: Database,
    listener: Listener,
    batches: Iterable[Sequence[Portion]],
    clock: Clock,
) -> Iterator[tuple[Sequence[Portion], Committed]]:
    """Yield batches as they are committed, in the fastest way that is right."""
    if isinstance(listener.handler, FieldHandler):
        yield from ingest_batches(database, batches, clock)
        return
    # A handler may read what it wrote for the batch before: that must be there.
    for portions in batches:
        yield portions, ingest_batch(database, portions, clock)


def _batches(
    lane: Lane, held: Assignment, listener: Listener, file: LineFile, size: int
) -> Iterator[list[Portion]]:
    for chunk in file.chunks(held.next_offset, held.content_digest, size):
        yield [
            Portion(
                lane,
                held,
                listener,
                chunk.records,
                chunk.next_offset,
                chunk.content_digest,
            )
        ]
        held = held.moved(chunk.next_offset)


@contextlib.contextmanager
def started_handler(handler: Handler) -> Iterator[None]:
    """Start a handler, and stop it at the end of the block, however that ends.

    Raises:
        HandlerError: Its start or stop raised. If the block raised before stop did,
            the block's error is what goes on.
    """
    _call_hook(handler, "start")
    try:
        yield
    except BaseException as error:
        try:
            _call_hook(handler, "stop")
        except HandlerError as second:
            error.add_note(str(second))
        raise
    _call_hook(handler, "stop")


def _call_hook(handler: Handler, hook: str) -> None:
    try:
        getattr(handler, hook)()
    except (Exception, SystemExit) as error:
        name = f"{type(handler).__module__}:{type(handler).__name__}"
        raise HandlerError(name, hook, error) from error


def ingest_batch(
    database: Database, portions: Sequence[Portion], clock: Clock
) -> Committed:
    """Decide about a batch's records and commit it whole.

    Raises:
        Fenced: A lane belongs to somebody else now; the batch was rolled back.
        SourceDiverged: A record's coordinates are in the log with other bytes.
    """
    portions = sorted(portions, key=_lane)
    refused: ConstraintViolated | None = None
    died: TransactionDied | None = None
    for _ in range(MAX_RERUNS):
        try:
            return _attempt(database, portions, clock, died)
        except ConstraintViolated as error:
            # Another writer committed one of these messages since we looked, or the
            # coordinates hold another event. Looking again tells which.
            refused = error
        except _Overtaken:
            # A key's last failure was retried since we looked, or a first one came.
            continue
        except TransactionDied as error:
            if sum(len(portion.records) for portion in portions) > 1:
                return _one_by_one(database, portions, clock)
            # Alone, it is refused the connection, so it fails by its own handler.
            died = error
    where = ", ".join(f"{p.lane.topic} of {p.lane.source}" for p in portions)
    if refused is None:
        msg = (
            f"failures of {where} are retried faster than their keys can be looked at; "
            "nothing of this batch was kept"
        )
        raise DatabaseBusy(msg)
    msg = (
        f"records of {where} have coordinates that the log holds with other contents "
        f"({refused}); the batch was rolled back and nothing of it was kept"
    )
    raise SourceDiverged(msg) from refused


def ingest_batches(
    database: Database, batches: Iterable[Sequence[Portion]], clock: Clock
) -> Iterator[tuple[Sequence[Portion], Committed]]:
    """Decide about batches and commit them, each while the next one is decided.

    The log is that of one batch after the other. No transaction begins before the one
    before it has committed, and none after one that failed. What is decided early
    holds, since nothing that it rests on is in the batch before: else it waits, and
    if that batch had to be decided anew, so is this one.

    Args:
        database: The log.
        batches: Portions of a batch; the next ones are read while one commits.
        clock: The time that events are recorded at.

    Yields:
        Each batch that was committed, while no transaction is open.

    Raises:
        Fenced: A lane belongs to somebody else now; its batch was rolled back.
        SourceDiverged: A record's coordinates are in the log with other bytes.
    """
    before: _Commit | None = None
    with ThreadPoolExecutor(1, "kappa-log-commit") as worker:
        try:
            for portions in batches:
                batch = identify(database, sorted(portions, key=_lane))
                decision: Decision | None = None
                if before is None or not before.concerns(batch):
                    decision = decide(database, batch)
                if before is not None:
                    ended, before = before, None
                    yield ended.outcome()
                    if ended.was_decided_anew:
                        decision = None
                decision = decision or decide(database, batch)
                before = _Commit(worker, database, batch, decision, clock)
        except Exception:
            # Reading or deciding failed. The batch before came first, so what became
            # of it is told first, be it an error.
            if before is not None:
                yield before.outcome()
            raise
        if before is not None:
            yield before.outcome()


def _lane(portion: Portion) -> Lane:
    return portion.lane


class _Commit:
    """A decided batch on its way into the log, in a thread of its own.

    It is made when the database was given the last event. From there on it is the
    database that works, on indexes and on the disk, and Python that waits. Before,
    two threads would take turns at Python's lock, and that costs more than it gains.
    """

    def __init__(
        self,
        worker: Executor,
        database: Database,
        batch: Batch,
        decision: Decision,
        clock: Clock,
    ) -> None:
        self.was_decided_anew = False
        """Whether another writer got ahead of the batch; known with its outcome."""
        self._database = database
        self._batch = batch
        self._clock = clock
        self._has_failures = decision.has_failures
        given = threading.Event()
        now = clock()

        def commit() -> Committed:
            try:
                return commit_decided(Effects(database), decision, now, given.set)
            finally:
                given.set()

        self._future = worker.submit(commit)
        given.wait()

    def concerns(self, later: Batch) -> bool:
        """Tell whether a later batch cannot be decided before this one is in the log.

        It may repeat a message of this one, or have to wait behind a failure of it.
        """
        return self._has_failures or not set(self._batch.messages).isdisjoint(
            later.messages
        )

    def outcome(self) -> tuple[Sequence[Portion], Committed]:
        """Wait for the end of the commit; return the portions and what it did."""
        portions = self._batch.portions
        try:
            return portions, self._future.result()
        except (ConstraintViolated, _Overtaken):
            self.was_decided_anew = True
            return portions, ingest_batch(self._database, portions, self._clock)


class _Overtaken(Exception):
    """Other keys wait than those that the batch was decided upon."""


def _attempt(
    database: Database,
    portions: Sequence[Portion],
    clock: Clock,
    refused: TransactionDied | None = None,
) -> Committed:
    with Effects(database, refused=refused) as effects:
        decision = decide(database, identify(database, portions), effects)
        return commit_decided(effects, decision, clock())


def _one_by_one(
    database: Database, portions: Sequence[Portion], clock: Clock
) -> Committed:
    """Commit each record by itself: one of them killed the transaction of all."""
    total = Committed(Counts(), None, None)
    for portion in portions:
        for piece in portion.pieces():
            done = ingest_batch(database, [piece], clock)
            total = total.joined(done)
            if done.stopped:
                break
    return total


def commit_decided(
    effects: Effects,
    decision: Decision,
    now: datetime,
    given: Callable[[], None] | None = None,
) -> Committed:
    """Write a decided batch in one transaction, in the order that avoids deadlocks.

    Args:
        effects: Whose transaction it is.
        decision: What becomes of the batch.
        now: The clock.
        given: Called when the database was given the last event.

    Raises:
        _Overtaken: Keys wait now that did not, or not any more; nothing is kept.
    """
    started = time.perf_counter()
    done = _write(effects, decision, now, given)
    tell_of(decision.portions, decision.decided, done, time.perf_counter() - started)
    return done


def _write(
    effects: Effects,
    decision: Decision,
    now: datetime,
    given: Callable[[], None] | None,
) -> Committed:
    stopped: dict[Lane, Stopped] = {}
    portions: list[Portion] = []
    decided: list[Decided] = []
    for portion, found in zip(decision.portions, decision.decided, strict=True):
        end = portion.to_offset
        if found.stopped is not None:
            stopped[portion.lane] = found.stopped
            end = found.stopped.offset
        if end > portion.held.next_offset:
            portions.append(portion.cut(end))
            decided.append(found)
    if not portions:
        return Committed(Counts(), None, None, stopped)
    database = effects.database
    with effects.transaction() as connection:
        for portion in portions:
            reached = portion.held.moved(portion.to_offset, portion.content_digest)
            ledger.advance(
                connection, database, portion.lane, portion.held, reached, now
            )
        # Under its lock, so that no retry takes a key's last failure in between.
        log.head(connection, database, lock=True)
        if not decision.outlook.still_holds(connection, database):
            raise _Overtaken
        done = append(connection, database, portions, decided, now, given=given)
    return msgspec.structs.replace(done, stopped=stopped)


def tell_of(
    portions: Sequence[Portion],
    decided: Sequence[Decided],
    done: Committed,
    seconds: float,
) -> None:
    """Tell subscribers and tracers of a batch that is in the log.

    Args:
        portions: Whose records they were.
        decided: What became of each portion's.
        done: What was committed.
        seconds: How long the transaction took.
    """
    position = done.first_position or 0
    for found in decided:
        for attempt in found.told:
            is_event = attempt.outcome == "acked"
            attempt.end(position if is_event else None)
            position += is_event
    if notices.is_heard("batch_committed") and done.counts.seen:
        lanes = [_lane_facts(*pair) for pair in zip(portions, decided, strict=True)]
        facts = msgspec.structs.asdict(done) | {
            "counts": msgspec.structs.asdict(done.counts),
            "lanes": lanes,
            "failures": list(itertools.islice(_failure_facts(portions, decided), TOLD)),
            "stopped": len(done.stopped),
        }
        notices.tell("batch_committed", facts, seconds=seconds)
    tracer = tracing.tracer()
    if tracer is not None and done.first_position is not None:
        tracing.committed(
            tracer,
            (done.first_position, done.last_position or 0),
            seconds,
            (item.record for found in decided for item in found.acked),
        )


def _lane_facts(portion: Portion, found: Decided) -> dict[str, Any]:
    lane = portion.lane
    return {
        "source": lane.source,
        "topic": lane.topic,
        "group_id": lane.group_id,
        "partition": lane.partition,
        "listener_id": portion.listener.id,
        "counts": msgspec.structs.asdict(found.counts),
        "stopped": found.stopped is not None,
    }


def _failure_facts(
    portions: Sequence[Portion], decided: Sequence[Decided]
) -> Iterator[dict[str, Any]]:
    for portion, found in zip(portions, decided, strict=True):
        for failed in found.failed:
            if failed.error is not None:
                yield {
                    "topic": portion.lane.topic,
                    "group_id": portion.lane.group_id,
                    "partition": portion.lane.partition,
                    "offset": failed.record.offset,
                    "error_class": failed.explained[0],
                    "error_message": failed.explained[1],
                    "attempts": failed.attempts,
                }


def append(  # noqa: PLR0913 - each is a part of one transaction, by its name
    connection: sa.Connection,
    database: Database,
    portions: Sequence[Portion],
    decided: Sequence[Decided],
    now: datetime,
    *,
    kind: str = "batch",
    given: Callable[[], None] | None = None,
) -> Committed:
    """Take the head and write what was decided, but for the lanes' offsets.

    Args:
        connection: Write transaction; the head is locked until its end.
        database: The log.
        portions: Whose records they are.
        decided: What becomes of each portion's.
        now: The clock.
        kind: Of the ledger's rows.
        given: Called when the database was given the last event.
    """
    old = log.head(connection, database, lock=True)
    micros = max(to_micros(now), old.recorded_at or 0)
    writer = RowWriter(database, old, micros)
    log.append(connection, database, writer.events(portions, decided, given))
    ledger.keep_duplicates(connection, database, writer.duplicates(portions, decided))
    ledger.keep_failures(connection, database, writer.failures(decided))
    total = Counts()
    for portion, result, (positions, digest) in zip(
        portions, decided, writer.ranges, strict=True
    ):
        counts = result.counts
        total.add(counts)
        ledger.write_checkpoint(
            connection,
            database,
            portion.lane,
            ledger.Checkpoint(
                kind=kind,
                source_id=portion.held.source_id,
                from_offset=portion.held.next_offset,
                to_offset=portion.to_offset,
                counts=counts,
                positions=positions,
                head=digest,
                recorded_at=from_micros(micros),
            ),
        )
    if writer.position == old.position:
        return Committed(total, None, None)
    log.move_head(
        connection,
        database,
        old,
        log.Head(writer.position, writer.digest, writer.recorded),
    )
    return Committed(total, old.position + 1, writer.position)


class RowWriter:
    """Makes the rows of a batch: what needs the position and the chain's head."""

    def __init__(self, database: Database, old: log.Head, micros: int) -> None:
        self.position = old.position
        self.digest = old.digest
        self.recorded = old.recorded_at or 0
        """When the last event was recorded; it never falls."""
        self.ranges: list[tuple[tuple[int, int] | None, bytes | None]] = []
        """Of each portion: its positions, and the chain's head at the last."""
        self._first = old.position + 1
        self._micros = micros
        self._shift = time_shift(database)

    def events(
        self,
        portions: Sequence[Portion],
        decided: Sequence[Decided],
        given: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Give the events the next positions, and yield their rows.

        Position, digest and ranges are those of the batch once all rows are taken;
        then ``given`` is called.
        """
        for portion, result in zip(portions, decided, strict=True):
            before = self.position
            yield from self._rows(portion, result.acked)
            self.ranges.append(
                ((before + 1, self.position), self.digest)
                if result.acked
                else (None, None)
            )
        if given is not None:
            given()

    def _rows(
        self, portion: Portion, acked: Sequence[Acked]
    ) -> Iterator[tuple[Any, ...]]:
        lane, source = portion.lane, portion.held.source_id
        topic, group, partition = lane.topic, lane.group_id, lane.partition
        digests = chain.LaneDigest(lane)
        shift, recorded = self._shift, self._micros
        for item in acked:
            self.position = position = self.position + 1
            record, given = item.record, item.ack
            if item.recorded is not None:
                recorded = max(item.recorded, self.recorded)
            self.recorded = recorded
            self.digest = chain.extend(
                self.digest,
                digests.of(
                    position,
                    recorded,
                    offset=record.offset,
                    timestamp=record.timestamp,
                    event_time=given.event_time,
                    tail=item.digest_tail,
                ),
            )
            yield (
                position,
                source,
                topic,
                group,
                partition,
                record.offset,
                record.key,
                item.headers,
                record.timestamp,
                given.entity_id,
                None if given.event_time is None else given.event_time - shift,
                given.event_type,
                given.event_version,
                recorded - shift,
                item.checksum,
                item.message_id,
                item.text,
                item.raw,
            )

    def duplicates(
        self, portions: Sequence[Portion], decided: Sequence[Decided]
    ) -> list[tuple[Any, ...]]:
        """Return the rows of duplicates; this batch's events have positions now."""
        return [
            (
                *received(portion, record),
                repeats if repeats > 0 else self._first - repeats,
                self._micros - self._shift,
            )
            for portion, result in zip(portions, decided, strict=True)
            for record, repeats in result.duplicates
        ]

    def failures(self, decided: Sequence[Decided]) -> list[tuple[Any, ...]]:
        """Return the rows of failures."""
        return [
            failure_row(failed, self._micros, self._shift)
            for result in decided
            for failed in result.failed
        ]


def failure_row(failed: Failed, recorded: int, shift: int) -> tuple[Any, ...]:
    """Return a failure in order of `ledger.FAILURE_COLUMNS`."""
    said = failed.said
    kept_at = (recorded if failed.kept_at is None else failed.kept_at) - shift
    return (
        *failed.received,
        failed.record.value,
        failed.checksum,
        failed.message_id,
        said.entity_id,
        None if said.event_time is None else said.event_time - shift,
        said.event_type,
        said.event_version,
        failed.park_id,
        int(failed.error is None),
        *failed.explained,
        failed.attempts,
        kept_at,
        kept_at,
        failed.metadata,
    )
