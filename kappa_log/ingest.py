"""Ingest: records → decisions → one transaction a batch.

The handlers decide with no transaction open. Then one transaction moves the offsets,
takes the head, draws positions and writes events, failures, duplicates and the
ledger: all of it or nothing. So a kill costs a batch of work and loses, doubles and
reorders no record; and whatever identity was decided on is checked again by unique
indexes, which roll back a batch that another writer got ahead of.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any

import msgspec

from kappa_log import chain
from kappa_log.codec import Decoded, decode
from kappa_log.errors import DecodeError, HandlerError, SourceDiverged, message_of
from kappa_log.events import Position, from_micros, to_micros
from kappa_log.files import LineFile
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
from kappa_log.storage import ledger, log
from kappa_log.storage.bulk import time_shift
from kappa_log.storage.database import ConstraintViolated, Database
from kappa_log.storage.ledger import Assignment, Counts

Clock = Callable[[], datetime]

MAX_RERUNS = 5
"""How often a batch is decided anew because other writers got ahead of it."""

BACKTRACE_BYTES = 64 * 1024
"""Most of a backtrace that is kept."""


class Portion(msgspec.Struct, frozen=True):
    """A batch's records of one lane, and the right to move its offset."""

    lane: Lane
    held: Assignment
    listener: Listener
    records: list[Record]
    to_offset: int
    content_digest: bytes | None = None


class Acked(msgspec.Struct, frozen=True, gc=False):
    """A record that becomes an event, but for what only the head can tell."""

    record: Record
    ack: Ack
    message_id: bytes
    checksum: str | None
    decoded: Decoded
    headers: bytes | None
    digest_tail: bytes


class Failed(msgspec.Struct, frozen=True):
    """A record that could not become an event, with its error: all but the times."""

    record: Record
    error: BaseException
    checksum: str | None
    message_id: bytes | None
    received: tuple[Any, ...]
    """In order of `ledger.RECEIVED`."""
    said: Ack
    """What the handler's extractors could tell."""
    park_id: bytes | None
    explained: tuple[str, str, str, str]
    """Error's class, message, backtrace as JSON, and fingerprint."""


class Decided(msgspec.Struct):
    """What became of a portion's records."""

    acked: list[Acked] = []
    duplicates: list[tuple[Record, Position | int]] = []
    """With the position repeated, or minus the index among the batch's acked."""
    failed: list[Failed] = []
    skipped: int = 0
    seen_before: Counts = msgspec.field(default_factory=Counts)
    """Of a second pass: records whose coordinates are kept already, with the same
    bytes. They are counted, and nothing is kept twice."""

    @property
    def counts(self) -> Counts:
        """What became of the portion's records."""
        counts = Counts(
            acked=len(self.acked),
            skipped=self.skipped,
            duplicate=len(self.duplicates),
            failed=len(self.failed),
        )
        counts.add(self.seen_before)
        return counts


class Committed(msgspec.Struct, frozen=True):
    """One committed batch."""

    counts: Counts
    first_position: Position | None
    last_position: Position | None


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
    lines = blank = 0
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
        first = held.next_offset
        for chunk in file.chunks(first, held.content_digest, batch_size):
            portion = Portion(
                lane,
                held,
                listener,
                chunk.records,
                chunk.next_offset,
                chunk.content_digest,
            )
            done = ingest_batch(database, [portion], clock)
            lines += chunk.next_offset - held.next_offset
            blank += chunk.blank
            held = held.moved(chunk.next_offset)
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
            connection, database, lane, held.source_id, first
        )
    return IngestReport(
        file=file.file,
        source=file.source,
        topic=listener.topic,
        group_id=listener.group_id,
        resumed_at=first,
        next_offset=held.next_offset,
        lines=lines,
        blank=blank,
        counts=counts,
        first_position=first_position,
        last_position=last_position,
        head=head,
        seconds=time.perf_counter() - started,
        held_back=file.held_back,
        failure_ids=failure_ids if counts.failed else [],
    )


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
    portions = sorted(portions, key=lambda portion: portion.lane)
    refused: ConstraintViolated | None = None
    for _ in range(MAX_RERUNS):
        decided = decide(database, portions)
        try:
            return _commit(database, portions, decided, clock)
        except ConstraintViolated as error:
            # Another writer committed one of these messages since we looked, or the
            # coordinates hold another event. Looking again tells which.
            refused = error
    where = ", ".join(f"{p.lane.topic} of {p.lane.source}" for p in portions)
    msg = (
        f"records of {where} have coordinates that the log holds with other contents "
        f"({refused}); the batch was rolled back and nothing of it was kept"
    )
    raise SourceDiverged(msg) from refused


def decide(database: Database, portions: Sequence[Portion]) -> list[Decided]:
    """Return what becomes of each portion's records, with no transaction open.

    A record that is known is not handed to its handler: known is what the log has,
    or what an earlier record of this batch will be.
    """
    portions, seen_before = _without_known_coordinates(database, portions)
    prepared = [_prepare(portion) for portion in portions]
    ids = [i for found in prepared for _, i, _ in found if i is not None]
    with database.read() as connection:
        known = log.known(connection, database, ids)
    decided: list[Decided] = []
    acked = 0
    for portion, found, again in zip(portions, prepared, seen_before, strict=True):
        result = _decide_portion(portion, found, known, acked)
        result.seen_before = again
        acked += len(result.acked)
        decided.append(result)
    return decided


def _without_known_coordinates(
    database: Database, portions: Sequence[Portion]
) -> tuple[list[Portion], list[Counts]]:
    """Take out what is kept already under the very coordinates: a second pass.

    Raises:
        SourceDiverged: The log holds other bytes under a record's coordinates.
    """
    left: list[Portion] = []
    seen: list[Counts] = []
    for portion in portions:
        counts = Counts()
        if portion.held.reads_again and portion.records:
            span = range(portion.records[0].offset, portion.to_offset)
            source = portion.held.source_id
            with database.read() as connection:
                kept = log.kept_at(connection, database, portion.lane, source, span)
            portion = _unseen(portion, kept, counts)  # noqa: PLW2901
        left.append(portion)
        seen.append(counts)
    return left, seen


def _unseen(portion: Portion, kept: dict[int, log.Kept], counts: Counts) -> Portion:
    """Return a portion with the records that are not kept yet; count the others."""
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
        setattr(counts, known.counted, getattr(counts, known.counted) + 1)
    return msgspec.structs.replace(portion, records=unseen)


def _decide_portion(
    portion: Portion,
    found: Sequence[Prepared],
    known: dict[bytes, log.Known],
    acked_before: int,
) -> Decided:
    """Return what becomes of one portion's records; what it acks is known after it.

    An event of this batch has no position yet: minus its index stands for it.
    """
    result = Decided(acked=[], duplicates=[], failed=[])
    for record, message_id, problem in found:
        if problem is not None:
            result.failed.append(problem)
            continue
        assert message_id is not None
        value_sum = checksum(record.value)
        repeated = known.get(message_id)
        if repeated is None:
            outcome = consume(portion, record, message_id, value_sum)
            if isinstance(outcome, Acked):
                index = acked_before + len(result.acked)
                known[message_id] = log.Known(-index, value_sum)
                result.acked.append(outcome)
            elif outcome is None:
                result.skipped += 1
            else:
                result.failed.append(outcome)
        elif repeated.checksum != value_sum:
            result.failed.append(_contradiction(portion, record, message_id))
        else:
            result.duplicates.append((record, repeated.position))
    return result


Prepared = tuple[Record, bytes | None, Failed | None]


def _prepare(portion: Portion) -> list[Prepared]:
    """Return each record with its message id, or with why it has none."""
    identity = Identity(portion.listener.dedupe, portion.lane)
    path = portion.listener.key_path
    found: list[Prepared] = []
    for record in portion.records:
        try:
            if path:
                payload = decode(portion.listener.decoder, record.value).payload
                record = msgspec.structs.replace(record, key=key_of(payload, path))  # noqa: PLW2901
            found.append((record, identity.of(record), None))
        except DecodeError as error:
            found.append((record, None, _failed(portion, record, error, None)))
    return found


def consume(
    portion: Portion, record: Record, message_id: bytes, value_sum: str | None
) -> Acked | Failed | None:
    """Return the record as an event, as a Failure, or None for a skip."""
    listener = portion.listener
    received: Any = None
    try:
        decoded = decode(listener.decoder, record.value)
        handler = listener.handler
        if handler.__class__ is FieldHandler:
            result: object = handler.consume(decoded.payload, None)  # type: ignore[arg-type]
        else:
            metadata = _metadata(portion, record, message_id, value_sum)

            def proceed(given: Any) -> object:
                nonlocal received
                received = given
                return handler.consume(given, metadata)

            result = handler.around_consume(decoded.payload, metadata, proceed)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is kept
        return _failed(portion, record, error, message_id, received)
    if not isinstance(result, Ack):
        return None
    headers = encode_headers(record.headers)
    # Without raw, the text is the received value itself.
    text = record.value if decoded.raw is None else (decoded.text or "").encode()
    parts = chain.payload_digest(text) + chain.personal_digest(
        decoded.raw, record.key, headers, result.entity_id
    )
    tail = chain.digest_tail(
        result.event_type, result.event_version, message_id, value_sum, parts
    )
    return Acked(record, result, message_id, value_sum, decoded, headers, tail)


def _metadata(
    portion: Portion, record: Record, message_id: bytes, value_sum: str | None
) -> Metadata:
    return Metadata(
        listener_id=portion.listener.id,
        group_id=portion.lane.group_id,
        topic=portion.lane.topic,
        partition=portion.lane.partition,
        offset=record.offset,
        key=record.key,
        timestamp=record.timestamp,
        headers=record.headers,
        retry_count=0,
        checksum=value_sum,
        message_id=message_id.hex(),
    )


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
    lines = traceback.format_exception(error)
    return Failed(
        record,
        error,
        checksum(record.value),
        message_id,
        _received(portion, record),
        _what_can_be_told(portion.listener.handler, payload),
        park_id(portion, record),
        (
            type(error).__name__,
            _storable(message_of(error)),
            json.dumps([_storable(line) for line in _capped(lines)]),
            fingerprint_of(error),
        ),
    )


def _commit(
    database: Database,
    portions: Sequence[Portion],
    decided: Sequence[Decided],
    clock: Clock,
) -> Committed:
    """Write a decided batch in one transaction, in the order that avoids deadlocks."""
    now = clock()
    total = Counts()
    with database.write() as connection:
        for portion in portions:
            reached = portion.held.moved(portion.to_offset, portion.content_digest)
            ledger.advance(
                connection, database, portion.lane, portion.held, reached, now
            )
        old = log.head(connection, database, lock=True)
        micros = max(to_micros(now), old.recorded_at or 0)
        recorded_at = from_micros(micros)
        writer = RowWriter(database, old, micros)
        for portion, result in zip(portions, decided, strict=True):
            writer.take(portion, result)
        log.append(connection, database, writer.events)
        ledger.keep_duplicates(
            connection, database, writer.duplicates(decided, portions)
        )
        ledger.keep_failures(connection, database, writer.failures)
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
                    kind="batch",
                    source_id=portion.held.source_id,
                    from_offset=portion.held.next_offset,
                    to_offset=portion.to_offset,
                    counts=counts,
                    positions=positions,
                    head=digest,
                    recorded_at=recorded_at,
                ),
            )
        if writer.events:
            new = log.Head(writer.position, writer.digest, micros)
            log.move_head(connection, database, old, new)
    if not writer.events:
        return Committed(total, None, None)
    return Committed(total, old.position + 1, writer.position)


class RowWriter:
    """Makes the rows of a batch: what needs the position and the chain's head."""

    def __init__(self, database: Database, old: log.Head, micros: int) -> None:
        self.position = old.position
        self.digest = old.digest
        self.events: list[tuple[Any, ...]] = []
        self.failures: list[tuple[Any, ...]] = []
        self.ranges: list[tuple[tuple[int, int] | None, bytes | None]] = []
        self._first = old.position + 1
        self._micros = micros
        self._shift = time_shift(database)

    def take(self, portion: Portion, result: Decided) -> None:
        """Give a portion's events the next positions, and make all its rows."""
        lane, source = portion.lane, portion.held.source_id
        digests = chain.LaneDigest(lane)
        shift, recorded = self._shift, self._micros
        position, digest = self.position, self.digest
        first = position + 1
        for item in result.acked:
            position += 1
            record, given = item.record, item.ack
            digest = chain.extend(
                digest,
                digests.of(
                    position,
                    recorded,
                    offset=record.offset,
                    timestamp=record.timestamp,
                    event_time=given.event_time,
                    tail=item.digest_tail,
                ),
            )
            self.events.append(
                (
                    position,
                    source,
                    lane.topic,
                    lane.group_id,
                    lane.partition,
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
                    item.decoded.text,
                    item.decoded.raw,
                )
            )
        self.position, self.digest = position, digest
        has_events = position >= first
        self.ranges.append(
            ((first, position) if has_events else None, digest if has_events else None)
        )
        self.failures += [
            failure_row(failed, recorded - shift, shift) for failed in result.failed
        ]

    def duplicates(
        self, decided: Sequence[Decided], portions: Sequence[Portion]
    ) -> list[tuple[Any, ...]]:
        """Return the rows of duplicates; this batch's events have positions now."""
        return [
            (
                *_received(portion, record),
                repeats if repeats > 0 else self._first - repeats,
                self._micros - self._shift,
            )
            for portion, result in zip(portions, decided, strict=True)
            for record, repeats in result.duplicates
        ]


def _received(portion: Portion, record: Record) -> tuple[Any, ...]:
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


def failure_row(failed: Failed, recorded: int, shift: int) -> tuple[Any, ...]:
    """Return a failure in order of `ledger.FAILURE_COLUMNS`."""
    said = failed.said
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
        0,
        *failed.explained,
        1,
        recorded,
        recorded,
    )


def park_id(portion: Portion, record: Record) -> bytes | None:
    """Return what later records of the same key wait behind; None parks alone."""
    if record.key is None or portion.listener.park != "key":
        return None
    lane = portion.lane
    parts = (lane.source, lane.topic, lane.group_id, str(lane.partition))
    where = b"".join(map(text_field, parts)) + record.key
    return blake2b(where, digest_size=16).digest()


def fingerprint_of(error: BaseException) -> str:
    """Return what groups failures: the error's class and the place it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (
        f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}" if frames else ""
    )
    text = f"{type(error).__module__}.{type(error).__qualname__}:{place}"
    return blake2b(text.encode(), digest_size=8).hexdigest()


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


def _capped(lines: list[str]) -> list[str]:
    kept: list[str] = []
    size = 0
    for line in "".join(lines).splitlines():
        size += len(line)
        if size > BACKTRACE_BYTES:
            kept.append("… cut")
            break
        kept.append(line)
    return kept


def _storable(text: str) -> str:
    """Return a text that both databases take: no NUL, no lone surrogates."""
    shown = text.replace("\0", "\\x00")[:BACKTRACE_BYTES]
    return shown.encode(errors="backslashreplace").decode()
