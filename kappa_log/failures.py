"""Failures: handled again in order, or given up, each in one transaction.

A failure with a key is the head of a queue: records of its key that came later wait
behind it. Retrying drains the queue from its head, in the order of offsets, until one
fails again. The event is appended and the failure removed together or not at all, and
the count of removed rows decides between two who try at once. Nothing is claimed
beforehand, so a kill leaves nothing locked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec

from kappa_log.decide import Acked, Decided, Failed, Portion, consume, decide, identify
from kappa_log.effects import Effects, TransactionDied
from kappa_log.errors import (
    LostRace,
    NotFound,
    RetryFailed,
    SourceDiverged,
    UsageError,
)
from kappa_log.events import Event, Position, from_micros
from kappa_log.handler import Ack, FieldOptions
from kappa_log.ingest import (
    MAX_RERUNS,
    Clock,
    Committed,
    append,
    started_handler,
    tell_of,
)
from kappa_log.listeners import Listener, field_listener
from kappa_log.records import Lane, Record, checksum
from kappa_log.storage import failures, lists, log, replays
from kappa_log.storage.database import ConstraintViolated, Database
from kappa_log.storage.failures import FailureFilter, Waiting
from kappa_log.storage.ledger import Assignment, source_id
from kappa_log.telemetry import notices
from kappa_log.trial import MAX_TRIALS, Trial, Trier

PAGE = 500
"""Failures that are looked up at a time."""

ListenerOf = Callable[[lists.Received], Listener]
"""Who decides about a record that was kept."""


class Retried(msgspec.Struct, frozen=True):
    """What became of a failure."""

    outcome: str
    """``acked``, ``skipped`` or ``duplicate``."""
    position: Position | None
    """Of the event that it became, or that it repeats."""


class BulkRetry(msgspec.Struct):
    """What became of many failures, those that waited behind them included."""

    matched: int = 0
    acked: int = 0
    skipped: int = 0
    duplicate: int = 0
    failed: int = 0
    stopped_keys: int = 0
    """Keys whose later records still wait."""
    errors: list[str] = []
    """The first few."""
    waiting: int = 0
    """Of a dry run: records that would wait behind one that fails again."""
    untried: int = 0
    """Of a dry run: matching failures that were only counted."""
    trials: list[Trial] = []
    """Of a dry run: what would become of each, what waits behind it included."""


class Retrier:
    """Handles failures again.

    Args:
        database: The log.
        listener_of: Finds who decides about a failure.
        clock: The time.
        act: Who does it and why, for the audit trail.
    """

    def __init__(
        self,
        database: Database,
        listener_of: ListenerOf,
        clock: Clock,
        act: replays.Audit,
    ) -> None:
        self._database = database
        self._listener_of = listener_of
        self._clock = clock
        self._act = act
        self._run = ExitStack()
        self._listeners: dict[tuple[str, str, str], Listener] = {}
        """With handlers that are started, until the run's end."""

    def one(self, identifier: int) -> Retried:
        """Handle one failure again, and what waits before and behind it.

        Raises:
            NotFound: No such failure.
            RetryFailed: It failed again, or one that it waits behind did.
            LostRace: Somebody else retried or discarded it first.
            HandlerError: Its handler's start or stop raised.
        """
        with self._run:
            found = self._find(identifier)
            if found.park_id is None:
                return self._handle(found)
            for head in self._heads(found.park_id):
                if head.offset > found.offset:
                    break
                done = self._handle(head)
                if head.id == identifier:
                    self._drain_rest(found.park_id)
                    return done
            raise LostRace(_TAKEN.format(identifier=identifier))

    def many(
        self, chosen: FailureFilter, on_progress: Callable[[BulkRetry], None]
    ) -> BulkRetry:
        """Handle all matching failures again, and what waits behind them.

        Raises:
            HandlerError: A handler's start or stop raised.
        """
        result = BulkRetry()
        stopped: set[bytes] = set()
        with self._run:
            for found in self._matching(chosen):
                result.matched += 1
                if found.park_id not in stopped:
                    self._try(found, result, stopped)
                on_progress(result)
        result.stopped_keys = len(stopped)
        return result

    def try_one(self, identifier: int) -> Trial:
        """Tell what a retry of one failure would come to; nothing is kept of it.

        Raises:
            NotFound: No such failure.
            UsageError: Too many of its key come before it.
            HandlerError: Its handler's start or stop raised.
        """
        with self._run:
            found = self._find(identifier)
            queue = self._queue(found, MAX_TRIALS)
            ids = [waiting.id for waiting in queue]
            if identifier not in ids:
                msg = (
                    f"failure {identifier}: {MAX_TRIALS} or more of its key come "
                    f"before it; try the first of them, failure {ids[0]}"
                )
                raise UsageError(msg)
            upto = queue[: ids.index(identifier) + 1]
            *_, trial = Trier(self._database, self._portion).walk(upto)
        return trial

    def try_many(
        self, chosen: FailureFilter, on_progress: Callable[[BulkRetry], None]
    ) -> BulkRetry:
        """Tell what `many` would come to; nothing is kept of it.

        At most `MAX_TRIALS` failures are looked at, what waits behind them included.

        Raises:
            HandlerError: A handler's start or stop raised.
        """
        result = BulkRetry()
        seen: set[int] = set()
        trier = Trier(self._database, self._portion)
        with self._run:
            for found in self._matching(chosen):
                if len(seen) >= MAX_TRIALS:
                    break
                if found.id in seen:
                    continue
                queue = self._queue(found, MAX_TRIALS - len(seen))
                for trial in trier.walk(queue):
                    seen.add(trial.id)
                    _note(trial, found, result)
                    on_progress(result)
        with self._database.read() as connection:
            result.matched = failures.count(connection, self._database, chosen)
            result.untried = result.matched - failures.count(
                connection, self._database, chosen.among(seen)
            )
        return result

    def _queue(self, found: Waiting, limit: int) -> list[Waiting]:
        """Return a failure's key, head first; itself alone if it has none."""
        if found.park_id is None:
            return [found]
        with self._database.read() as connection:
            return failures.queue_of(
                connection, self._database, found.park_id, limit=limit
            )

    def _try(self, found: Waiting, result: BulkRetry, stopped: set[bytes]) -> None:
        """Handle one of many again, and what waits with it; note what came of it."""
        try:
            self._count(found, result)
        except RetryFailed as error:
            result.failed += 1
            if len(result.errors) < _SHOWN:
                result.errors.append(str(error))
            if found.park_id is not None:
                stopped.add(found.park_id)

    def discard(self, identifier: int) -> None:
        """Give a failure up; the next of its key may be retried.

        Raises:
            NotFound: No such failure.
            LostRace: It is retried again and again while we try.
        """
        for _ in range(MAX_RERUNS):
            if self._give_up(self._find(identifier)):
                return
        raise LostRace(_TAKEN.format(identifier=identifier))

    def discard_many(self, chosen: FailureFilter) -> int:
        """Give all matching failures up; return how many."""
        return sum(self._give_up(found) for found in self._matching(chosen))

    def _give_up(self, found: Waiting) -> bool:
        """Take a failure out for nothing; tell whether it still was as it was found.

        Its listener has no say, and may be gone.
        """
        try:
            kept = self._kept(found)
            nobody = field_listener(kept.topic, kept.group_id, FieldOptions(), "offset")
            portion = _portion_of(kept, _record_of(kept), nobody)
            self._settle(
                found, Decided(skipped=1), "discard", portion, Effects(self._database)
            )
        except LostRace:
            return False
        return True

    def _find(self, identifier: int) -> Waiting:
        with self._database.read() as connection:
            found = failures.waiting(
                connection, self._database, FailureFilter(ids=(identifier,)), limit=1
            )
        if not found:
            raise NotFound("failure", identifier, "See: kappa-log failures list")
        return found[0]

    def _matching(self, chosen: FailureFilter) -> Iterator[Waiting]:
        """Yield what matches now; what fails meanwhile is left for another time."""
        after = 0
        with self._database.read() as connection:
            upto = failures.newest_id(connection, self._database)
        while True:
            with self._database.read() as connection:
                page = failures.waiting(
                    connection,
                    self._database,
                    chosen,
                    after=after,
                    upto=upto,
                    limit=PAGE,
                )
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1].id

    def _heads(self, park_id: bytes) -> Iterator[Waiting]:
        """Yield the head of a key, again and again, until nothing waits."""
        while True:
            with self._database.read() as connection:
                head = failures.head_of(connection, self._database, park_id)
            if head is None:
                return
            yield head

    def _count(self, found: Waiting, result: BulkRetry) -> None:
        heads = iter([found]) if found.park_id is None else self._heads(found.park_id)
        for head in heads:
            try:
                done = self._handle(head)
            except LostRace:
                return
            setattr(result, done.outcome, getattr(result, done.outcome) + 1)

    def _drain_rest(self, park_id: bytes) -> None:
        """Handle what waited; the first that fails is a failure, told as such."""
        try:
            for head in self._heads(park_id):
                self._handle(head)
        except (RetryFailed, LostRace):
            return

    def _handle(self, found: Waiting) -> Retried:
        """Handle one failure again, in a transaction of its own.

        Raises:
            RetryFailed: It failed again; its error, attempts and time are kept.
            LostRace: Somebody else acted on it first.
        """
        refused: TransactionDied | None = None
        for _ in range(MAX_RERUNS):
            try:
                decided = self._attempt(found, refused)
            except ConstraintViolated:
                # The message became an event since we looked: a duplicate now.
                continue
            except TransactionDied as error:
                refused = error
                continue
            if decided.failed:
                self._fail(found, decided.failed[0], decided.told)
            return self._outcome(decided)
        msg = f"failure {found.id}: its coordinates hold another event"
        raise SourceDiverged(msg)

    def _attempt(self, found: Waiting, refused: TransactionDied | None) -> Decided:
        """Decide about a failure, and settle it unless it failed again."""
        portion = self._portion(found)
        with Effects(self._database, refused=refused) as effects:
            batch = identify(self._database, [portion])
            (decided,) = decide(self._database, batch, effects).decided
            if not decided.failed:
                started = time.perf_counter()
                done = self._settle(found, decided, "retry", portion, effects)
                seconds = time.perf_counter() - started
                tell_of([portion], [decided], done, seconds)
                outcome = "acked" if decided.acked else "skipped"
                outcome = "duplicate" if decided.duplicates else outcome
                facts = {
                    "id": found.id,
                    "topic": portion.lane.topic,
                    "group_id": portion.lane.group_id,
                    "outcome": outcome,
                    "position": done.first_position,
                }
                notices.tell("failure_settled", facts, seconds=seconds)
        return decided

    def _portion(self, found: Waiting) -> Portion:
        """Return a failure's record, with who decides about it.

        Raises:
            LostRace: It is gone.
        """
        kept = self._kept(found)
        return _portion_of(kept, _record_of(kept), self._listener(kept))

    def _kept(self, found: Waiting) -> lists.Failure:
        with self._database.read() as connection:
            kept = lists.failures(connection, self._database, limit=1, only=found.id)
        if not kept:
            raise LostRace(_TAKEN.format(identifier=found.id))
        return kept[0]

    def _listener(self, kept: lists.Received) -> Listener:
        """Return who decides about a record, with its handler started for this run."""
        place = kept.source, kept.topic, kept.group_id
        if place not in self._listeners:
            found = self._listener_of(kept)
            self._run.enter_context(started_handler(found.handler))
            self._listeners[place] = found
            self._run.callback(self._listeners.pop, place)
        told = kept.metadata if isinstance(kept, lists.Failure) else {}
        # Its turn has come: it waits behind nothing.
        return msgspec.structs.replace(self._listeners[place], told=told, park="event")

    def _fail(
        self, found: Waiting, failed: Failed, told: Sequence[notices.Attempt]
    ) -> None:
        names = ("error_class", "error_message", "error_backtrace", "fingerprint")
        changes = dict(zip(names, failed.explained, strict=True))
        with self._database.write() as connection:
            known = failures.failed_again(
                connection,
                self._database,
                found,
                self._clock(),
                **changes | _told(failed.said),
            )
        if not known:
            raise LostRace(_TAKEN.format(identifier=found.id))
        for attempt in told:
            attempt.end()
        raise RetryFailed("failure", found.id, failed.error) from failed.error

    def _settle(
        self,
        found: Waiting,
        decided: Decided,
        action: str,
        portion: Portion,
        effects: Effects,
    ) -> Committed:
        """Take a failure out and write what it became, in one transaction.

        Raises:
            LostRace: It is not as it was found, or not its turn; nothing is kept.
        """
        now = self._clock()
        with effects.transaction() as connection:
            # Before the failure goes: a consumer that holds the head sees it, or waits.
            log.head(connection, self._database, lock=True)
            is_due = action == "discard" or failures.is_head(
                connection, self._database, found
            )
            if not is_due or not failures.take_out(connection, self._database, found):
                raise LostRace(_TAKEN.format(identifier=found.id))
            source = source_id(connection, self._database, portion.lane.source, now)
            held = msgspec.structs.replace(portion.held, source_id=source)
            portion = msgspec.structs.replace(portion, held=held)
            done = append(
                connection, self._database, [portion], [decided], now, kind="retry"
            )
            act = msgspec.structs.replace(
                self._act,
                action=action,
                subject=f"failure {found.id}",
                detail={"position": done.last_position},
            )
            replays.write_audit(connection, self._database, act, now)
        return done

    def _outcome(self, decided: Decided) -> Retried:
        if decided.duplicates:
            return Retried("duplicate", decided.duplicates[0][1])
        if not decided.acked:
            return Retried("skipped", None)
        message_id = decided.acked[0].message_id
        with self._database.read() as connection:
            known = log.known(connection, self._database, [message_id])
        return Retried("acked", known[message_id].position)

    def event(self, event: Event, kept: lists.Received) -> bool:
        """Hand a kept event to its handler again; tell whether it acknowledges it.

        Nothing is stored: what it writes by its connection is rolled back.

        Raises:
            RetryFailed: The handler raised.
            HandlerError: Its start or stop raised.
        """
        text = event.payload_text
        value = event.raw
        if value is None and text is not None:
            value = text.encode()
        record = Record(
            event.offset, value, event.key, tuple(event.headers), event.timestamp
        )
        message_id = bytes.fromhex(event.message_id)
        with self._run, Effects(self._database) as effects:
            portion = _portion_of(kept, record, self._listener(kept))
            value_sum = checksum(record.value)
            try:
                done = consume(portion, record, message_id, value_sum, effects)
            except TransactionDied as error:
                raise RetryFailed("event", event.position, error) from error
        if isinstance(done, Failed):
            raise RetryFailed("event", event.position, done.error) from done.error
        return isinstance(done, Acked)


def _note(trial: Trial, found: Waiting, result: BulkRetry) -> None:
    """Count what a retry of a failure, or of one of its key, would come to."""
    result.trials.append(trial)
    counted = {"waits": "waiting"}.get(trial.outcome, trial.outcome)
    if counted != "gone":
        setattr(result, counted, getattr(result, counted) + 1)
    if trial.outcome == "failed" and found.park_id is not None:
        result.stopped_keys += 1


def _record_of(kept: lists.Failure) -> Record:
    return Record(
        kept.offset, kept.value, kept.key, tuple(kept.headers), kept.timestamp
    )


def _portion_of(kept: lists.Received, record: Record, listener: Listener) -> Portion:
    lane = Lane(kept.source, kept.topic, kept.group_id, kept.partition)
    held = Assignment(0, 0, kept.offset, None, is_new=False)
    return Portion(lane, held, listener, [record], kept.offset + 1)


def _told(said: Ack) -> dict[str, Any]:
    """Return what a handler's extractors could tell, by column."""
    found = {name: getattr(said, name) for name in said.__struct_fields__}
    if said.event_time is not None:
        found["event_time"] = from_micros(said.event_time)
    return {name: value for name, value in found.items() if value is not None}


_SHOWN = 5

_TAKEN = (
    "failure {identifier} was retried or discarded by somebody else; nothing was "
    "changed by this attempt"
)
