"""Decide: what becomes of each record of a batch, before anything is written.

A record that is known is a duplicate and calls no handler. One whose key has a failure
waits behind it. The others go to their handler, and become an event, a skip or a
failure; or they end their portion, to be tried again in their place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log import backtrace, chain
from kappa_log.codec import Decoded, decode, kept
from kappa_log.effects import Effects
from kappa_log.errors import (
    DecodeError,
    RegistryUnavailable,
    SourceDiverged,
    StorageError,
    message_of,
)
from kappa_log.events import Position, make_event
from kappa_log.handler import (
    Ack,
    FieldHandler,
    Handler,
    Metadata,
    ack,
    is_overridden,
    key_of,
)
from kappa_log.listeners import Listener
from kappa_log.records import (
    Identity,
    Lane,
    Record,
    checksum,
    encode_headers,
    text_field,
)
from kappa_log.storage import failures, log
from kappa_log.storage.database import Database
from kappa_log.storage.ledger import Assignment, Counts
from kappa_log.telemetry import notices, tracing
from kappa_log.telemetry.notices import Attempt

MAX_PARKED = 10_000
"""Most records that wait behind one failure; the next one waits in its topic."""


class Portion(msgspec.Struct, frozen=True):
    """A batch's records of one lane, and the right to move its offset."""

    lane: Lane
    held: Assignment
    listener: Listener
    records: list[Record]
    to_offset: int
    content_digest: bytes | None = None
    attempt: int | None = None
    """How often its first record was tried; None if none is tried again in place."""

    @property
    def waits(self) -> bool:
        """Tell whether its records wait behind failures of their keys."""
        return self.listener.park == "key"

    def tries_of(self, record: Record) -> int:
        """Return how often a record was tried; only the first can have been."""
        if not self.attempt or record.offset != self.held.next_offset:
            return 0
        return self.attempt

    def pieces(self) -> Iterator[Portion]:
        """Yield it record by record; the holes between belong to who follows.

        The digest is of all that was read, so only the last piece has it.
        """
        if not self.records:
            yield self
            return
        held, attempt = self.held, self.attempt
        ends = [*(record.offset for record in self.records[1:]), self.to_offset]
        for record, end in zip(self.records, ends, strict=True):
            digest = self.content_digest if end == self.to_offset else None
            yield Portion(
                self.lane, held, self.listener, [record], end, digest, attempt
            )
            attempt = attempt and 0
            held = held.moved(end, digest)

    def cut(self, offset: int) -> Portion:
        """Return it ending before an offset."""
        return msgspec.structs.replace(self, to_offset=offset)


class Stopped(msgspec.Struct, frozen=True):
    """A record that ends its portion: it is tried again, in its place, later."""

    offset: int
    attempt: int
    """How often it was tried."""
    why: str
    wait: float
    """Seconds until then."""
    error: BaseException | None = None
    """What its handler raised; None if it was not called."""


class Acked(msgspec.Struct, frozen=True, gc=False):
    """A record that becomes an event, but for what only the head can tell."""

    record: Record
    ack: Ack
    message_id: bytes
    checksum: str | None
    text: str | None
    raw: bytes | None
    headers: bytes | None
    digest_tail: bytes
    recorded: int | None = None
    """When another system recorded it, in microseconds; None for now."""


class Failed(msgspec.Struct, frozen=True):
    """A record that could not become an event, with its error: all but the times."""

    record: Record
    error: BaseException | None
    """None for one that was not tried: it waits behind a failure of its key."""
    checksum: str | None
    message_id: bytes | None
    received: tuple[Any, ...]
    """In order of `ledger.RECEIVED`."""
    said: Ack
    """What the handler's extractors could tell."""
    park_id: bytes | None
    explained: tuple[str | None, str | None, str | None, str | None]
    """Error's class, message, backtrace as JSON, and fingerprint."""
    attempts: int = 1
    kept_at: int | None = None
    """When another system kept it, in microseconds; None for now."""
    metadata: str | None = None
    """What another system knew of it beyond our columns, as JSON."""


class Decided(msgspec.Struct):
    """What became of a portion's records."""

    acked: list[Acked] = []
    duplicates: list[tuple[Record, Position | int]] = []
    """With the position repeated, or minus the index among the batch's acked."""
    failed: list[Failed] = []
    """Those that wait behind a failure included."""
    skipped: int = 0
    stopped: Stopped | None = None
    seen_before: Counts = msgspec.field(default_factory=Counts)
    """Of a second pass: records whose coordinates are kept already, with the same
    bytes. They are counted, and nothing is kept twice."""
    told: list[Attempt] = []
    """What subscribers are told of each record once all of it is committed."""

    @property
    def counts(self) -> Counts:
        """What became of the portion's records."""
        counts = Counts(
            acked=len(self.acked),
            skipped=self.skipped,
            duplicate=len(self.duplicates),
            failed=sum(failed.error is not None for failed in self.failed),
            parked=sum(failed.error is None for failed in self.failed),
        )
        counts.add(self.seen_before)
        return counts


class Outlook(msgspec.Struct, frozen=True):
    """What a batch was decided upon, to be looked at again under the head's lock."""

    lanes: list[tuple[Lane, int]]
    """With the ids of their sources."""
    park_ids: list[bytes]
    """Keys of the batch's records, as far as keys can wait."""
    waiting: frozenset[bytes]
    """Those of them that had failures."""

    def still_holds(self, connection: sa.Connection, database: Database) -> bool:
        """Tell whether the same keys wait: nothing may overtake, or be left behind."""
        found = failures.waited_for(connection, database, self.lanes, self.park_ids)
        return found == self.waiting


Seen = list[tuple[Record, str]]
"""Those whose records are kept already, and how each is counted."""


class Batch(msgspec.Struct, frozen=True):
    """Portions, and what identifies their messages."""

    portions: Sequence[Portion]
    unseen: list[Portion]
    """The portions without records that are kept already; keys are in place."""
    ids: list[list[bytes | Failed]]
    """Of each unseen portion's records: message id, or why there is none."""
    seen: list[Seen]
    messages: list[bytes]
    """All message ids."""


def identify(database: Database, portions: Sequence[Portion]) -> Batch:
    """Return a batch's portions with the message ids of what is left of them.

    Raises:
        SourceDiverged: A record's coordinates are in the log with other bytes.
    """
    unseen, seen = _without_known_coordinates(database, portions)
    keyed: list[Portion] = []
    ids: list[list[bytes | Failed]] = []
    for portion in unseen:
        with_keys, found = _message_ids(portion)
        keyed.append(with_keys)
        ids.append(found)
    messages = [i for found in ids for i in found if isinstance(i, bytes)]
    return Batch(portions, keyed, ids, seen, messages)


class Decision(msgspec.Struct, frozen=True):
    """What becomes of a batch."""

    portions: Sequence[Portion]
    decided: list[Decided]
    """Of each portion's records."""
    outlook: Outlook

    @property
    def has_failures(self) -> bool:
        """Tell whether a later record may have to wait behind one of these."""
        return any(found.failed for found in self.decided)


def decide(
    database: Database,
    batch: Batch,
    effects: Effects | None = None,
    also_known: Mapping[bytes, log.Known] = {},
) -> Decision:
    """Return what becomes of each portion's records, and upon what it was decided.

    No transaction is open, unless a handler asks for its connection.

    Args:
        database: The log.
        batch: What is decided about.
        effects: The transaction of what handlers write.
        also_known: Messages that are taken for events of the log, by message id.
    """
    lanes = [(p.lane, p.held.source_id) for p in batch.portions if p.waits]
    started = time.perf_counter()
    with database.read() as connection:
        known = log.known(connection, database, batch.messages)
        park_ids: list[bytes] = []
        if failures.are_there(connection, database, lanes):
            park_ids = _park_ids(batch.unseen)
        waiting = failures.waited_for(connection, database, lanes, park_ids)
    known.update(also_known)
    decider = _Decider(database, known, waiting, effects)
    decider.looked_up = time.perf_counter() - started
    decided = []
    for portion, ids, seen in zip(batch.unseen, batch.ids, batch.seen, strict=True):
        result = decider.portion(portion, ids)
        end = result.stopped.offset if result.stopped else portion.to_offset
        for record, counted in seen:
            if record.offset < end:
                result.seen_before.count(counted)
                if decider.is_heard:
                    result.told.append(_seen_again(portion, record, counted))
        decided.append(result)
    outlook = Outlook(lanes, park_ids, frozenset(waiting))
    return Decision(batch.portions, decided, outlook)


def _park_ids(portions: Sequence[Portion]) -> list[bytes]:
    found = {park_id(portion, r) for portion in portions for r in portion.records}
    return sorted(key for key in found if key is not None)


def _without_known_coordinates(
    database: Database, portions: Sequence[Portion]
) -> tuple[list[Portion], list[Seen]]:
    """Take out what is kept already under the very coordinates: a second pass.

    Raises:
        SourceDiverged: The log holds other bytes under a record's coordinates.
    """
    left: list[Portion] = []
    seen: list[Seen] = []
    for portion in portions:
        known: Seen = []
        if portion.held.reads_again and portion.records:
            span = range(portion.records[0].offset, portion.to_offset)
            source = portion.held.source_id
            with database.read() as connection:
                kept = log.kept_at(connection, database, portion.lane, source, span)
            portion = _unseen(portion, kept, known)  # noqa: PLW2901
        left.append(portion)
        seen.append(known)
    return left, seen


def _unseen(portion: Portion, kept: dict[int, log.Kept], seen: Seen) -> Portion:
    """Return a portion with the records that are not kept yet; note the others."""
    unseen: list[Record] = []
    for record in portion.records:
        known = kept.get(record.offset)
        if known is None:
            unseen.append(record)
            continue
        if known.checksum != checksum(record.value):
            lane = portion.lane
            msg = (
                f"{lane.topic} partition {lane.partition}, offset {record.offset}: "
                "there are other bytes now than those that became "
                f"{known.what}; this batch was rolled back and nothing of it was kept"
            )
            raise SourceDiverged(msg)
        seen.append((record, known.counted))
    return msgspec.structs.replace(portion, records=unseen)


def _message_ids(portion: Portion) -> tuple[Portion, list[bytes | Failed]]:
    """Return a portion, its records with their keys, and the message id of each.

    Where a record has none, there is why: a Failure.
    """
    identity = Identity(portion.listener.dedupe, portion.lane)
    path = portion.listener.key_path
    records = list(portion.records)
    ids: list[bytes | Failed] = []
    for index, record in enumerate(records):
        try:
            if path:
                payload = decode(
                    portion.listener.decoder, record.value, record.headers
                ).payload
                record = msgspec.structs.replace(record, key=key_of(payload, path))  # noqa: PLW2901
                records[index] = record
            ids.append(identity.of(record))
        except DecodeError as error:
            ids.append(_failed(portion, record, error, None))
    return msgspec.structs.replace(portion, records=records), ids


class _Decider:
    """Decides record by record; what it decided so far counts for those that follow.

    An event of this batch has no position yet: minus its index stands for it.
    """

    def __init__(
        self,
        database: Database,
        known: dict[bytes, log.Known],
        waiting: set[bytes],
        effects: Effects | None,
    ) -> None:
        self._database = database
        self._known = known
        self._waiting = set(waiting)
        self._parked: dict[bytes, int] = {}
        self._effects = effects
        self._acked = 0
        self.is_heard = notices.records_are_heard()
        self._tracer = tracing.tracer()
        self.looked_up = 0.0
        """How long it took to find out what is known; for subscribers alone."""

    def portion(self, portion: Portion, ids: Sequence[bytes | Failed]) -> Decided:
        """Return what becomes of one portion's records, up to one that stops it."""
        result = Decided(acked=[], duplicates=[], failed=[], told=[])
        for record, message_id in zip(portion.records, ids, strict=True):
            attempt = None
            if self.is_heard:
                identity = b"" if isinstance(message_id, Failed) else message_id
                attempt = _begun(portion, record, identity, self.looked_up)
            outcome = self._record(portion, record, message_id, result)
            if attempt is not None:
                attempt.decide(outcome, _error_of(outcome, result))
                if result.stopped is not None:
                    attempt.waiting_time = result.stopped.wait
                result.told.append(attempt)
            if result.stopped is not None:
                break
        return result

    def _record(
        self,
        portion: Portion,
        record: Record,
        message_id: bytes | Failed,
        result: Decided,
    ) -> str:
        """Decide about one record; return what became of it."""
        if isinstance(message_id, Failed):
            self._fail(message_id, result)
            return "refused"
        value_sum = checksum(record.value)
        repeated = self._known.get(message_id)
        if repeated is None:
            return self._new(portion, record, message_id, value_sum, result)
        if _contradicts(portion, repeated, value_sum):
            self._fail(_contradiction(portion, record, message_id), result)
            return "refused"
        result.duplicates.append((record, repeated.position))
        return "duplicate"

    def _new(
        self,
        portion: Portion,
        record: Record,
        message_id: bytes,
        value_sum: str | None,
        result: Decided,
    ) -> str:
        """Decide about a record that is no duplicate; return what became of it."""
        if self._waiting and self._park(portion, record, message_id, result):
            return "parked"
        outcome = self._consumed(portion, record, message_id, value_sum)
        if isinstance(outcome, Acked):
            self._known[message_id] = log.Known(-self._acked, value_sum)
            self._acked += 1
            result.acked.append(outcome)
            return "acked"
        if outcome is None:
            result.skipped += 1
            return "skipped"
        if isinstance(outcome, Stopped):
            result.stopped = outcome
            return "stopped"
        self._fail(outcome, result)
        return "failed"

    def _consumed(
        self, portion: Portion, record: Record, message_id: bytes, value_sum: str | None
    ) -> Acked | Failed | Stopped | None:
        """Call the handler, in a span of its own where spans are wanted."""
        if self._tracer is None:
            return consume(portion, record, message_id, value_sum, self._effects)
        with tracing.processing(self._tracer, portion.lane, record) as span:
            outcome = consume(portion, record, message_id, value_sum, self._effects)
            if isinstance(outcome, Failed | Stopped):
                tracing.failed(span, outcome.error)
            return outcome

    def _fail(self, failed: Failed, result: Decided) -> None:
        result.failed.append(failed)
        key = failed.park_id
        if key is None:
            return
        if key not in self._waiting:
            self._waiting.add(key)
            self._parked[key] = 1
        elif key in self._parked:
            self._parked[key] += 1

    def _park(
        self, portion: Portion, record: Record, message_id: bytes, result: Decided
    ) -> bool:
        """Let a record wait behind a failure of its key, if there is one.

        Where too many wait already, the record stays in its topic, and with it all
        of its partition that follows.
        """
        key = park_id(portion, record)
        if key is None or key not in self._waiting:
            return False
        parked = self._parked.get(key)
        if parked is None:
            with self._database.read() as connection:
                parked = failures.parked_behind(
                    connection, self._database, key, MAX_PARKED + 1
                )
        if parked > MAX_PARKED and portion.attempt is not None:
            why = f"{MAX_PARKED:,} records wait behind a failure of its key"
            result.stopped = _stopped(portion, record, portion.tries_of(record), why)
            return True
        self._parked[key] = parked + 1
        result.failed.append(
            Failed(
                record,
                None,
                checksum(record.value),
                message_id,
                received(portion, record),
                _NOTHING_SAID,
                key,
                (None, None, None, None),
                attempts=0,
            )
        )
        return True


def _stopped(
    portion: Portion,
    record: Record,
    attempt: int,
    why: str,
    error: BaseException | None = None,
) -> Stopped:
    """Return a record as one to be tried again after a wait that is drawn here once."""
    wait = portion.listener.backoff.drawn(attempt)
    return Stopped(record.offset, attempt, why, wait, error)


_NOTHING_SAID = Ack(None, None, None, None)


def _begun(
    portion: Portion, record: Record, message_id: bytes, looked_up: float
) -> Attempt:
    """Tell subscribers that a record was looked up, in so many seconds."""
    metadata = _metadata(portion, record, message_id, checksum(record.value), None)
    facts = msgspec.structs.asdict(metadata)
    del facts["effects"]
    facts["handler"] = portion.listener.handler_name
    return Attempt.begin(facts, looked_up)


def _seen_again(portion: Portion, record: Record, counted: str) -> Attempt:
    """Return what is told of a second pass: a duplicate, or what is a failure still."""
    attempt = _begun(portion, record, b"", 0.0)
    attempt.decide("duplicate" if counted == "duplicate" else "kept", None)
    return attempt


def _error_of(outcome: str, result: Decided) -> BaseException | None:
    """Return the error of the record that was decided last."""
    if outcome in ("failed", "refused"):
        return result.failed[-1].error
    return result.stopped.error if result.stopped is not None else None


def _contradicts(portion: Portion, known: log.Known, value_sum: str | None) -> bool:
    """Tell whether a message has another payload than the event of its identity.

    Where the payload is part of the identity it cannot. Then the checksums are not
    compared: an imported event has kept the one of its old system.
    """
    if "payload" in portion.listener.dedupe:
        return False
    return known.checksum != value_sum


def consume(
    portion: Portion,
    record: Record,
    message_id: bytes,
    value_sum: str | None,
    effects: Effects | None = None,
) -> Acked | Failed | Stopped | None:
    """Return the record as an event, as a Failure, or None for a skip.

    Where its listener tries records again in their place, and this one is to be
    tried again, it is `Stopped`.
    """
    listener = portion.listener
    call: _Call | None = None
    failure: BaseException | None = None
    decoded: Decoded | None = None
    result: object = None
    try:
        decoded = decode(listener.decoder, record.value, record.headers)
        if listener.handler.__class__ is FieldHandler:
            result = listener.handler.consume(decoded.payload, None)  # type: ignore[arg-type]
        else:
            metadata = _metadata(portion, record, message_id, value_sum, effects)
            call = _Call(listener.handler, metadata)
            result = call.make(decoded.payload)
            is_bytes = decoded.text is None and decoded.raw is not None
            if is_bytes and isinstance(result, Ack):
                decoded = kept(call.received, decoded.raw or b"")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is kept
        failure = error
    if call is not None and effects is not None:
        # A database error fails the record also if its handler swallowed it.
        swallowed = effects.end_of_record(keep=failure is None)
        failure = failure or swallowed
    if failure is not None:
        said = None if decoded is None else decoded.said
        return _not_consumed(portion, record, message_id, call, failure, said)
    if decoded is None or not isinstance(result, Ack):
        return None
    return _acked(record, result, message_id, value_sum, decoded)


class _Call:
    """One call of a handler, which may hand its `consume` something else."""

    def __init__(self, handler: Handler, metadata: Metadata) -> None:
        self.metadata = metadata
        self.received: Any = None
        """What `consume` received; None until it was called."""
        self._handler = handler

    def make(self, payload: Any) -> object:
        return self._handler.around_consume(payload, self.metadata, self._proceed)

    def _proceed(self, given: Any, metadata: Metadata | None = None) -> object:
        self.received = given
        return self._handler.consume(given, metadata or self.metadata)


def _not_consumed(
    portion: Portion,
    record: Record,
    message_id: bytes,
    call: _Call | None,
    error: BaseException,
    said: Ack | None,
) -> Failed | Stopped:
    """Return what becomes of a record that raised; its format may have said some."""
    if isinstance(error, StorageError) and error.retryable:
        # The log's own database: no record is to blame.
        raise error
    if isinstance(error, RegistryUnavailable) and call is None:
        # Nor for this; and it was not tried, so it does not count.
        if portion.attempt is None:
            raise error
        return _stopped(portion, record, portion.tries_of(record), str(error))
    if call is not None and _is_tried_again(portion, call, error):
        tries = portion.tries_of(record) + 1
        why = f"{type(error).__name__}: {message_of(error)}"
        return _stopped(portion, record, tries, why, error)
    given = None if call is None else call.received
    failed = _failed(portion, record, error, message_id, given)
    if said is None:
        return failed
    return msgspec.structs.replace(failed, said=_completed(failed.said, said))


def _acked(
    record: Record,
    result: Ack,
    message_id: bytes,
    value_sum: str | None,
    decoded: Decoded,
) -> Acked:
    text, raw = decoded.text, decoded.raw
    if decoded.said is not None:
        result = _completed(result, decoded.said)
    headers = encode_headers(record.headers)
    # Without raw, the text is the received value itself.
    value = record.value if raw is None else (text or "").encode()
    parts = chain.payload_digest(value) + chain.personal_digest(
        raw, record.key, headers, result.entity_id
    )
    tail = chain.digest_tail(
        result.event_type, result.event_version, message_id, value_sum, parts
    )
    return Acked(record, result, message_id, value_sum, text, raw, headers, tail)


def _completed(given: Ack, said: Ack) -> Ack:
    """Return an ack with what the format says where the handler said nothing."""
    return Ack(
        given.entity_id if given.entity_id is not None else said.entity_id,
        given.event_time if given.event_time is not None else said.event_time,
        given.event_type if given.event_type is not None else said.event_type,
        given.event_version if given.event_version is not None else said.event_version,
    )


def _is_tried_again(portion: Portion, call: _Call, error: BaseException) -> bool:
    """Tell whether a record is tried again in its place, after its handler raised.

    What is wrong with the record itself stays so: it becomes a failure at once.
    """
    if portion.attempt is None or isinstance(error, DecodeError):
        return False
    listener = portion.listener
    # Its transaction is not the record's any more.
    metadata = msgspec.structs.replace(call.metadata, effects=None)
    if is_overridden(listener.handler, "retry_consume"):
        event = make_event(
            0,
            call.received,
            topic=metadata.topic,
            group_id=metadata.group_id,
            partition=metadata.partition,
            offset=metadata.offset,
            key=metadata.key,
            headers=list(metadata.headers),
            timestamp=metadata.timestamp,
            checksum=metadata.checksum,
            message_id=metadata.message_id,
        )
        try:
            return bool(listener.handler.retry_consume(event, metadata, error))
        except (Exception, SystemExit) as second:  # noqa: BLE001 - the record fails
            error.add_note(f"retry_consume raised {second!r}")
            return False
    most = listener.max_retries
    return most is None or metadata.retry_count < most


def _metadata(
    portion: Portion,
    record: Record,
    message_id: bytes,
    value_sum: str | None,
    effects: Effects | None,
) -> Metadata:
    told = portion.listener.told
    partition, offset = portion.lane.partition, record.offset
    if told:
        partition = _told_number(told, "partition", partition)
        offset = _told_number(told, "offset", offset)
    return Metadata(
        listener_id=told.get("listener_id", portion.listener.id),
        group_id=portion.lane.group_id,
        topic=portion.lane.topic,
        partition=partition,
        offset=offset,
        key=record.key,
        timestamp=record.timestamp,
        headers=record.headers,
        retry_count=portion.tries_of(record),
        checksum=told.get("checksum", value_sum),
        message_id=message_id.hex(),
        effects=effects,
    )


def _told_number(told: Mapping[str, Any], name: str, otherwise: int) -> int:
    found = told.get(name)
    return found if type(found) is int else otherwise


def _contradiction(portion: Portion, record: Record, message_id: bytes) -> Failed:
    error = DecodeError(
        f"under dedupe '{portion.listener.dedupe}' this record has the identity of an "
        "event with another payload"
    )
    return _failed(portion, record, error, message_id)


def _failed(
    portion: Portion,
    record: Record,
    error: BaseException,
    message_id: bytes | None,
    payload: Any = None,
) -> Failed:
    """Return a failure whole but for its times, before any lock is taken.

    Args:
        portion: Whose record it is.
        record: As it was received.
        error: Why it is no event.
        message_id: Its identity, if it has one.
        payload: What `consume` received; None if it received nothing.
    """
    return Failed(
        record,
        error,
        checksum(record.value),
        message_id,
        received(portion, record),
        _what_can_be_told(portion.listener.handler, payload),
        park_id(portion, record),
        backtrace.kept(error),
        portion.tries_of(record) + 1,
    )


def received(portion: Portion, record: Record) -> tuple[Any, ...]:
    """Return a record's coordinates in order of `ledger.RECEIVED`."""
    return (
        portion.held.source_id,
        portion.lane.group_id,
        portion.lane.topic,
        portion.lane.partition,
        record.offset,
        record.key,
        encode_headers(record.headers),
        record.timestamp,
    )


def park_id(portion: Portion, record: Record) -> bytes | None:
    """Return what later records of the same key wait behind; None parks alone."""
    if record.key is None or portion.listener.park != "key":
        return None
    lane = portion.lane
    parts = (lane.source, lane.topic, lane.group_id, str(lane.partition))
    where = b"".join(map(text_field, parts)) + record.key
    return blake2b(where, digest_size=16).digest()


def _what_can_be_told(handler: Handler, payload: Any) -> Ack:
    """Return what the handler's extractors say; an error in one says nothing."""
    said: dict[str, Any] = {}
    for hook in ("entity_id", "event_time", "event_type", "event_version"):
        if payload is None or not is_overridden(handler, hook):
            continue
        try:
            value = getattr(handler, hook)(payload)
            ack(**{"entity_id": None, "event_time": None, hook: value})
        except (Exception, SystemExit):  # noqa: BLE001, S112 - the record's error counts
            continue
        said[hook] = value
    return ack(**({"entity_id": None, "event_time": None} | said))
