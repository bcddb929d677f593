"""Import: the events and failures of Phobos DB Checkpoint into the log.

Each old row is a record: its source is named after the old database and table, its
partition is 0, its offset the old id. Rows come in the order of their ids, through the
transaction that all records come through: with positions, chain, ledger and offsets.
A row of the ledger is of one topic and group and of positions that adjoin, so those of
a batch that were kept within an hour come topic by topic and group by group: else rows
that take turns would cost a row of the ledger each. So a kill costs one batch, and the
same command goes on after the last row that is in the log. An event has the identity
that the same Kafka message would have: when its topic is read later, what was imported
is recognised.

What is kept of a row: topic, group, entity, time, type, version and its checksum (MD5,
of the old system's own encoding); `created_at` as the time it was recorded, never
falling with the position; of a failure its error and metadata too. A payload that is
no strict JSON becomes a JSON string, and its bytes are kept in `raw`. A row that the
log cannot keep as an event becomes a failure; one that repeats a message a duplicate.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from hashlib import blake2b, md5
from typing import Any

import msgspec
from typing_extensions import override

from kappa_log import chain
from kappa_log.backtrace import BACKTRACE_BYTES, storable
from kappa_log.codec import Decoded, decode_json, made
from kappa_log.decide import (
    Acked,
    Decided,
    Decision,
    Failed,
    Outlook,
    Portion,
    received,
)
from kappa_log.effects import Effects
from kappa_log.errors import (
    DatabaseBusy,
    DecodeError,
    KappaLogError,
    SourceDiverged,
    SourceError,
)
from kappa_log.events import Header, to_micros
from kappa_log.handler import Ack, FieldHandler, FieldOptions, ack
from kappa_log.ingest import MAX_RERUNS, Clock, Committed, commit_decided
from kappa_log.listeners import Listener
from kappa_log.records import Identity, Lane, Record, checksum
from kappa_log.storage import ledger, log
from kappa_log.storage import phobos as old_tables
from kappa_log.storage.database import ConstraintViolated, Database
from kappa_log.storage.ledger import Assignment
from kappa_log.storage.phobos import OldDatabase, OldRow

BATCH_ROWS = 500
"""Rows a transaction, and in memory."""

WINDOW_MICROS = 3_600_000_000
"""Within this time, by `created_at`, order across topics and groups may give way: so
`recorded_at`, which never falls, is at most that much later than it was."""

UNKNOWN = 0
"""When a row was kept that does not say it: 1970, which the API shows as null."""

SHOWN = 5
"""Ids that are named of rows that have something in common."""

MAX_TRIES = 1_000_000_000
"""More are not believed."""

_READER = ledger.Reader("payload", None)
_NOTHING_SAID = Ack(None, None, None, None)


class Odd(msgspec.Struct):
    """Rows that have something in common that people should know."""

    rows: int = 0
    ids: list[int] = []
    """The first few."""

    def add(self, row: int) -> None:
        """Count one more."""
        self.rows += 1
        if len(self.ids) < SHOWN:
            self.ids.append(row)

    @override
    def __str__(self) -> str:
        """Return the ids, and how many are left out."""
        more = self.rows - len(self.ids)
        return ", ".join(map(str, self.ids)) + (f" and {more:,} more" if more else "")


class TableReport(msgspec.Struct):
    """What became of one of the old tables."""

    table: str
    source: str
    before: int = 0
    """Rows that earlier runs had brought in."""
    rows: int = 0
    """Rows of this run."""
    events: int = 0
    failures: int = 0
    duplicates: int = 0
    proved: int = 0
    """Rows whose old checksum is that of their payload."""
    unproved: int = 0
    """Rows with another checksum: made of a payload in another form, or damaged."""
    not_utf8: Odd = msgspec.field(default_factory=Odd)
    """Rows whose payload is no UTF-8: an event's bytes are in its `raw`."""
    no_events: Odd = msgspec.field(default_factory=Odd)
    """Rows of events that cannot be events here: they become failures."""
    compared: int = 0
    """Rows of the old table that are in the log, byte for byte and with checksum."""
    settled: int = 0
    """Failures that were discarded, or retried and skipped, since then."""


class PhobosReport(msgspec.Struct):
    """What an import did, or with dry_run would do."""

    database: str
    dry_run: bool
    tables: list[TableReport]
    problems: list[str]
    """What is not in the log as it is in the old tables; the first few."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Tell whether all rows are in the log as they were."""
        return not self.problems


class PhobosProgress(msgspec.Struct, frozen=True):
    """How far an import is."""

    phase: str
    """``events``, ``failures``, or ``compare``."""
    done: int
    total: int


OnProgress = Callable[[PhobosProgress], None]


class Importer:
    """Brings the rows of one old database into a log.

    Args:
        database: The log.
        old: The old database.
        clock: The time, for the ledger alone.
        name: Of the sources; that of the old database if None.
        on_progress: Called after each batch.
    """

    def __init__(
        self,
        database: Database,
        old: OldDatabase,
        clock: Clock,
        *,
        name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._database = database
        self._old = old
        self._clock = clock
        self._name = name or old.name
        self._on_progress = on_progress or (lambda _: None)
        self._held: dict[Lane, Assignment] = {}

    def plan(self) -> PhobosReport:
        """Read what would be imported, and say what is odd in it; nothing is written.

        Raises:
            SourceError: The old database cannot be read.
        """
        with self._saying("nothing was imported"):
            tables = [self._planned(table) for table in old_tables.COLUMNS]
        return PhobosReport(self._old.label, True, tables, [])

    def _planned(self, table: str) -> TableReport:
        report = self._report(table)
        reached = self._reached(report)
        total = self._left(table, reached)
        for rows in self._pages(table, reached - 1):
            report.rows += len(rows)
            _note_odd(report, rows)
            self._on_progress(PhobosProgress(table, report.rows, total))
        return report

    def run(self) -> PhobosReport:
        """Import what is not in the log yet, then compare all of it.

        Raises:
            AlreadyRunning: Another process imports into this log.
            SourceError: The old database cannot be read; what was imported is kept.
            SourceDiverged: The last imported row is another one now.
            StorageError: The log's database refused; what was committed is kept.
        """
        started = time.monotonic()
        held = f"another process imports into {self._database.label}; see to it first"
        with self._database.lock("import", held), self._saying():
            for table in old_tables.COLUMNS:
                self._check_last(self._report(table))
            tables = [self._table(table) for table in old_tables.COLUMNS]
            problems = [
                problem for report in tables for problem in self._compare(report)
            ]
        return PhobosReport(
            self._old.label, False, tables, problems, time.monotonic() - started
        )

    @contextlib.contextmanager
    def _saying(self, state: str | None = None) -> Iterator[None]:
        """Say with an error of the old database, or Ctrl-C, what state is left."""
        try:
            yield
        except SourceDiverged:
            raise
        except SourceError as error:
            msg = f"{error}; {state or self._kept_so_far()}"
            raise SourceError(msg) from error
        except KeyboardInterrupt as stop:
            stop.add_note(state or self._kept_so_far())
            raise

    def _kept_so_far(self) -> str:
        rows = 0
        with self._database.read() as connection:
            for table in old_tables.COLUMNS:
                source = self._source(table)
                rows += old_tables.brought(connection, self._database, source)
        if not rows:
            return "nothing was imported"
        return (
            f"{rows:,} of its rows are in the log, and the same command goes on after "
            "them"
        )

    # --- one table ------------------------------------------------------------

    def _source(self, table: str) -> str:
        return f"phobos:{self._name}/{table}"

    def _left(self, table: str, reached: int) -> int:
        """Return how many rows of a table are to be imported."""
        return sum(counted.rows for counted in self._old.counts(table, reached - 1))

    def _report(self, table: str) -> TableReport:
        report = TableReport(table, self._source(table))
        reached = self._reached(report)
        report.before = self._old.count_upto(table, reached - 1) if reached else 0
        return report

    def _reached(self, report: TableReport) -> int:
        with self._database.read() as connection:
            return old_tables.reached(connection, self._database, report.source)

    def _table(self, table: str) -> TableReport:
        report = self._report(table)
        reached = self._reached(report)
        total = self._left(table, reached)
        for rows in self._pages(table, reached - 1):
            self._batch(report, rows)
            self._on_progress(PhobosProgress(table, report.rows, total))
        return report

    def _pages(
        self, table: str, after: int, upto: int | None = None
    ) -> Iterator[list[OldRow]]:
        while page := self._old.page(table, after, BATCH_ROWS):
            after = page[-1].id
            if upto is not None and after > upto:
                yield [row for row in page if row.id <= upto]
                return
            yield page

    def _check_last(self, report: TableReport) -> None:
        """Refuse to go on after rows of another database of that name.

        Raises:
            SourceDiverged: The row that was imported last is not there as it was.
        """
        last = self._reached(report) - 1
        if last < 0:
            return
        rows = [r for r in self._old.page(report.table, last - 1, 1) if r.id == last]
        kept = self._kept(report, rows)
        if rows and all(row.id not in kept or _is_same(row, kept) for row in rows):
            return
        msg = (
            f"row {last} of {report.table} in {self._old.label} is not the one that "
            f"was imported as {report.source}; nothing was imported. Another database "
            "is imported under another name: --source NAME"
        )
        raise SourceDiverged(msg)

    # --- one batch ------------------------------------------------------------

    def _batch(self, report: TableReport, rows: Sequence[OldRow]) -> None:
        make = self._event if report.table == "events" else self._failure
        for _ in range(MAX_RERUNS):
            portions = list(self._portions(report.source, rows))
            decided = self._decided(portions, rows, make)
            try:
                self._commit(portions, decided)
            except ConstraintViolated:
                # A consumer committed one of these messages since we looked.
                self._held.clear()
                continue
            self._count(report, rows, decided)
            return
        msg = "other writers keep getting ahead; stop them and run the command again"
        raise DatabaseBusy(msg)

    def _portions(self, source: str, rows: Sequence[OldRow]) -> Iterator[Portion]:
        """Yield each window's rows by topic and group, the first one's first."""
        held = dict(self._held)
        for window in _windows(rows):
            lanes: dict[Lane, list[Record]] = {}
            for row in window:
                lane = Lane(source, *_place(row))
                lanes.setdefault(lane, []).append(Record(row.id, *_record_of(row)))
            for lane, records in lanes.items():
                if lane not in held:
                    held[lane] = self._taken(lane)
                to_offset = records[-1].offset + 1
                yield Portion(lane, held[lane], _listener(lane), records, to_offset)
                held[lane] = held[lane].moved(to_offset)

    def _taken(self, lane: Lane) -> Assignment:
        with self._database.write() as connection:
            found = ledger.assign(
                connection, self._database, lane, _READER, self._clock()
            )
        self._held[lane] = found
        return found

    def _decided(
        self,
        portions: Sequence[Portion],
        rows: Sequence[OldRow],
        make: Callable[[Portion, Record, OldRow, bytes], Acked | Failed],
    ) -> list[Decided]:
        ids = [_identities(portion) for portion in portions]
        with self._database.read() as connection:
            known = log.known(
                connection, self._database, [i for found in ids for i in found]
            )
        by_id = {row.id: row for row in rows}
        decided = []
        acked = 0
        for portion, found in zip(portions, ids, strict=True):
            result = Decided(acked=[], duplicates=[], failed=[])
            for record, message_id in zip(portion.records, found, strict=True):
                made = make(portion, record, by_id[record.offset], message_id)
                if isinstance(made, Failed):
                    result.failed.append(made)
                elif message_id in known:
                    result.duplicates.append((record, known[message_id].position))
                else:
                    known[message_id] = log.Known(-acked, made.checksum)
                    acked += 1
                    result.acked.append(made)
            decided.append(result)
        return decided

    def _commit(self, portions: list[Portion], decided: list[Decided]) -> Committed:
        outlook = Outlook([], [], frozenset())
        done = commit_decided(
            Effects(self._database),
            Decision(portions, decided, outlook),
            self._clock(),
        )
        for portion in portions:
            self._held[portion.lane] = portion.held.moved(portion.to_offset)
        return done

    def _event(
        self, portion: Portion, record: Record, row: OldRow, message_id: bytes
    ) -> Acked | Failed:
        """Return an old event as it will be kept; a Failure if it cannot be."""
        try:
            said, recorded = _acknowledged(row)
        except DecodeError as error:
            return _failed(portion, record, row, message_id, error)
        decoded = _decoded(record.value)
        parts = chain.payload_digest(
            None if decoded.text is None else decoded.text.encode()
        ) + chain.personal_digest(decoded.raw, None, None, said.entity_id)
        tail = chain.digest_tail(
            said.event_type, said.event_version, message_id, row.checksum, parts
        )
        return Acked(
            record,
            said,
            message_id,
            row.checksum,
            decoded.text,
            decoded.raw,
            None,
            tail,
            recorded,
        )

    def _failure(
        self, portion: Portion, record: Record, row: OldRow, message_id: bytes
    ) -> Failed:
        """Return an old failure, which waits behind nothing."""
        return _failed(portion, record, row, message_id, None)

    def _count(
        self, report: TableReport, rows: Sequence[OldRow], decided: Sequence[Decided]
    ) -> None:
        report.rows += len(rows)
        _note_odd(report, rows)
        for found in decided:
            report.events += len(found.acked)
            report.duplicates += len(found.duplicates)
            report.failures += len(found.failed)
        proved = sum(map(_is_proved, rows))
        report.proved += proved
        report.unproved += len(rows) - proved

    # --- comparison -----------------------------------------------------------

    def _compare(self, report: TableReport) -> list[str]:
        """Look at all rows once more, and say what the log has not, or otherwise."""
        differing, missing = Odd(), Odd()
        last = self._reached(report) - 1
        total = 0
        for rows in self._pages(report.table, -1, last):
            kept = self._kept(report, rows)
            total += len(rows)
            for row in rows:
                if row.id not in kept:
                    missing.add(row.id)
                elif not _is_same(row, kept):
                    differing.add(row.id)
            report.compared = total - missing.rows - differing.rows
            self._on_progress(PhobosProgress("compare", total, total))
        with self._database.read() as connection:
            brought = old_tables.brought(connection, self._database, report.source)
        if brought == total:
            # All of them were here once: these failures were settled since.
            report.settled = missing.rows
            missing = Odd()
        return _told(report.table, differing, _DIFFERS) + _told(
            report.table, missing, _MISSING
        )

    def _kept(
        self, report: TableReport, rows: Sequence[OldRow]
    ) -> dict[int, tuple[str | None, bytes | None]]:
        span = range(rows[0].id, rows[-1].id + 1) if rows else range(0)
        found: dict[int, tuple[str | None, bytes | None]] = {}
        with self._database.read() as connection:
            for topic, group in sorted(set(map(_place, rows))):
                lane = Lane(report.source, topic, group)
                row = ledger.peek(connection, self._database, lane)
                if row is not None:
                    found |= old_tables.kept_values(
                        connection, self._database, lane, row.source_id, span
                    )
        return found


_DIFFERS = "in the log with another checksum or payload"
_MISSING = "not in the log: committed after later ones were imported, or removed there"


def _told(table: str, found: Odd, what: str) -> list[str]:
    return [f"{table}, rows {found}: {what}"] if found.rows else []


def _windows(rows: Sequence[OldRow]) -> Iterator[list[OldRow]]:
    """Yield rows in parts that were kept within an hour; who does not say, was too."""
    window: list[OldRow] = []
    since = UNKNOWN
    for row in rows:
        kept_at = _known_micros(row.created_at)
        is_known = UNKNOWN not in (since, kept_at)
        if is_known and abs(kept_at - since) > WINDOW_MICROS:
            yield window
            window, since = [], UNKNOWN
        window.append(row)
        since = since or kept_at
    if window:
        yield window


def _note_odd(report: TableReport, rows: Sequence[OldRow]) -> None:
    for row in rows:
        if not _is_utf8(row.payload or ""):
            report.not_utf8.add(row.id)
        if report.table == "events":
            try:
                _acknowledged(row)
            except DecodeError:
                report.no_events.add(row.id)


def _acknowledged(row: OldRow) -> tuple[Ack, int]:
    """Return what the old handler said of an event, and when it was recorded.

    Raises:
        DecodeError: The log cannot keep one of it.
    """
    said = ack(row.entity_id, _time(row.event_time), row.event_type, row.event_version)
    return said, _micros(row.created_at)


def _is_utf8(text: str) -> bool:
    """Tell whether a text is that of UTF-8; see `storage.phobos`."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_same(row: OldRow, kept: dict[int, tuple[str | None, bytes | None]]) -> bool:
    """Tell whether the log has a row as it was; what was retried has our checksum."""
    found, value = kept[row.id]
    return value == _record_of(row)[0] and found in (row.checksum, checksum(value))


def _place(row: OldRow) -> tuple[str, str]:
    """Return topic and group; the old columns may be NULL, ours are empty then."""
    group = row.group_id
    if group is None:
        # As the old system reads it (F17).
        group = _metadata_of(row).get("group_id")
    return row.topic or "", group if isinstance(group, str) else ""


def _listener(lane: Lane) -> Listener:
    return Listener(
        "import",
        lane.topic,
        lane.group_id,
        FieldHandler(FieldOptions()),
        decode_json,
        "payload",
        park="event",
    )


def _identities(portion: Portion) -> list[bytes]:
    identity = Identity("payload", portion.lane)
    return [identity.of(record) for record in portion.records]


def _record_of(
    row: OldRow,
) -> tuple[bytes | None, bytes | None, tuple[Header, ...], int | None]:
    """Return value, key, headers and timestamp of the record that a row was."""
    metadata = _metadata_of(row)
    key = metadata.get("key")
    headers = metadata.get("headers")
    return (
        _value_of(row),
        key.encode("utf-8", "surrogatepass") if isinstance(key, str) else None,
        _headers(headers) if isinstance(headers, dict) else (),
        None,
    )


def _headers(found: dict[str, Any]) -> tuple[Header, ...]:
    return tuple(
        (name, value.encode("utf-8", "surrogatepass"))
        for name, value in found.items()
        if isinstance(value, str)
    )


def _value_of(row: OldRow) -> bytes | None:
    """Return the bytes that were received, as far as the old system kept them.

    JSON text was kept as a JSON string that holds it (H13); what a handler had decoded
    before, as that value's JSON.
    """
    if row.payload is None:
        return None
    if row.payload.startswith('"'):
        try:
            text = json.loads(row.payload)
            return text.encode()  # type: ignore[no-any-return]
        except (ValueError, UnicodeEncodeError):
            pass
    return _bytes_of(row.payload)


def _bytes_of(text: str) -> bytes:
    """Return the bytes that a text was read of; see `storage.phobos`."""
    return text.encode("utf-8", "surrogateescape")


def _decoded(value: bytes | None) -> Decoded:
    """Return the payload; what is no strict JSON becomes a JSON string, bytes kept.

    Text is that string; what is no UTF-8 is base64 in it, as for handlers of bytes.
    """
    if value is None:
        return Decoded(None, None, None)
    try:
        return decode_json(value)
    except DecodeError:
        pass
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return made(value, value)
    return Decoded(json.dumps(text), text, value)


def _metadata_of(row: OldRow) -> dict[str, Any]:
    if row.metadata is None:
        return {}
    try:
        found = json.loads(row.metadata)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _failed(
    portion: Portion,
    record: Record,
    row: OldRow,
    message_id: bytes,
    error: DecodeError | None,
) -> Failed:
    """Return a failure with the error it had, or why an event cannot be one."""
    metadata = _metadata_of(row)
    if error is None:
        explained = (
            row.error_class and storable(row.error_class, BACKTRACE_BYTES),
            row.error_message and storable(row.error_message, BACKTRACE_BYTES),
            _backtrace(row),
        )
    else:
        explained = (type(error).__name__, str(error), "[]")
    return Failed(
        record,
        error or KappaLogError(row.error_message or ""),
        row.checksum,
        message_id,
        received(portion, record),
        _NOTHING_SAID if error else _said(row),
        None,
        (*explained, _fingerprint(explained)),
        attempts=1 + _tries(metadata),
        kept_at=_known_micros(row.created_at),
        metadata=json.dumps(metadata) if metadata else None,
    )


def _tries(metadata: dict[str, Any]) -> int:
    found = metadata.get("retry_count")
    return min(max(found, 0), MAX_TRIES) if isinstance(found, int) else 0


def _said(row: OldRow) -> Ack:
    """Return what the extractors of old said; what cannot be kept is left out."""
    said: dict[str, Any] = {"entity_id": None, "event_time": None}
    for name in ("entity_id", "event_time", "event_type", "event_version"):
        value: Any = getattr(row, name)
        try:
            value = _time(value) if name == "event_time" else value
            ack(**({"entity_id": None, "event_time": None} | {name: value}))
        except DecodeError:
            continue
        said[name] = value
    return ack(**said)


def _backtrace(row: OldRow) -> str:
    try:
        lines = json.loads(row.error_backtrace or "[]")
    except (ValueError, RecursionError):
        lines = [row.error_backtrace]
    return json.dumps([str(line) for line in lines] if isinstance(lines, list) else [])


def _fingerprint(explained: tuple[str | None, str | None, str]) -> str:
    """Return what groups failures: the error's class and the place it was raised."""
    lines = json.loads(explained[2])
    text = f"{explained[0]}:{lines[0] if lines else ''}"
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _is_proved(row: OldRow) -> bool:
    """Tell whether a row's checksum is that of its payload (H8, H11)."""
    if row.payload is None:
        return row.checksum is None
    data = _bytes_of(row.payload)
    return md5(data, usedforsecurity=False).hexdigest() == row.checksum


def _time(text: str | None) -> datetime | None:
    """Return an old time, which is in UTC and does not say so.

    Raises:
        DecodeError: It is none that can be kept.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
        if found.utcoffset() is None:
            found = found.replace(tzinfo=UTC)
        to_micros(found)
    except ValueError:
        msg = f"{text[:64]!r} is no time that can be kept"
        raise DecodeError(msg) from None
    return found


def _micros(text: str | None) -> int:
    found = _time(text)
    return UNKNOWN if found is None else max(UNKNOWN, to_micros(found))


def _known_micros(text: str | None) -> int:
    try:
        return _micros(text)
    except DecodeError:
        return UNKNOWN
