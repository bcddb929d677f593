"""The log's tables: append under the head lock, read by position.

Positions are head + 1 … drawn while the head row is locked, in the transaction that
inserts the events: no holes, and whoever has seen n can see all below n. A sequence
would leave holes at rollback and let n + 1 become visible before n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import StorageError
from kappa_log.events import EventPage, Position, from_micros, kept_instant, to_micros
from kappa_log.records import Lane, decode_headers
from kappa_log.storage.bulk import insert_rows
from kappa_log.storage.database import Database, driver_connection
from kappa_log.storage.lookup import filtering, unindexed

EVENT_COLUMNS = (
    "position",
    "source_id",
    "topic",
    "group_id",
    "partition",
    "offset",
    "key",
    "headers",
    "timestamp",
    "entity_id",
    "event_time",
    "event_type",
    "event_version",
    "recorded_at",
    "checksum",
    "message_id",
    "payload",
    "raw",
)
"""Columns of an event as it is appended, in the order of its row."""


class Head(msgspec.Struct, frozen=True):
    """The end of the log."""

    position: Position
    digest: bytes
    """Head of the chain, 32 bytes."""
    recorded_at: int | None
    """Of the last event, in microseconds since 1970."""


class Known(msgspec.Struct, frozen=True, gc=False):
    """An event that a record repeats."""

    position: Position
    checksum: str | None


def head(connection: sa.Connection, database: Database, *, lock: bool = False) -> Head:
    """Return the head; with ``lock``, no other writer moves it until the end.

    SQLite needs no lock: a write transaction is the only one.
    """
    table = database.tables.head
    query = sa.select(table.c.position, table.c.digest, table.c.recorded_at)
    if lock:
        query = query.with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        msg = "the log has no head row: the database is damaged; restore a backup"
        raise StorageError(msg)
    recorded = None if row.recorded_at is None else to_micros(row.recorded_at)
    return Head(row.position, bytes(row.digest), recorded)


def move_head(
    connection: sa.Connection, database: Database, old: Head, new: Head
) -> None:
    """Write the new head over the old one that this transaction has locked."""
    table = database.tables.head
    recorded = None if new.recorded_at is None else from_micros(new.recorded_at)
    result = connection.execute(
        table.update()
        .where(table.c.position == old.position)
        .values(position=new.position, digest=new.digest, recorded_at=recorded)
    )
    assert result.rowcount == 1, "the head moved although it was locked"


def append(
    connection: sa.Connection, database: Database, rows: Iterable[Sequence[Any]]
) -> None:
    """Insert events; a repeated identity or coordinate refuses the transaction.

    Args:
        connection: Write transaction that holds the head.
        database: Where to.
        rows: In order of `EVENT_COLUMNS`; times as `bulk.time_shift` says.
    """
    insert_rows(connection, database.tables.events, EVENT_COLUMNS, rows)


def known(
    connection: sa.Connection, database: Database, ids: Sequence[bytes]
) -> dict[bytes, Known]:
    """Return the events of the log that have one of these message ids."""
    name = database.tables.events.name
    columns = "message_id, position, checksum"
    driver = driver_connection(connection)
    found: dict[bytes, Known] = {}
    if database.is_sqlite:
        for start in range(0, len(ids), _MAX_VARIABLES):
            chunk = ids[start : start + _MAX_VARIABLES]
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT {columns} FROM {name} WHERE message_id IN ({marks})"
            for message_id, position, checksum in driver.execute(query, chunk):
                found[message_id] = Known(position, checksum)
        return found
    query = f"SELECT {columns} FROM {name} WHERE message_id = ANY(%b)"
    with driver.cursor(binary=True) as cursor:
        for message_id, position, checksum in cursor.execute(query, [list(ids)]):
            found[message_id] = Known(position, checksum)
    return found


_MAX_VARIABLES = 10_000


class Kept(msgspec.Struct, frozen=True):
    """What is kept of a record under its coordinates."""

    what: str
    checksum: str | None
    counted: str
    """How a second pass counts it; see `ledger.Counts`."""


def kept_at(
    connection: sa.Connection,
    database: Database,
    lane: Lane,
    source: int,
    span: range,
) -> dict[int, Kept]:
    """Return offset → what is kept of the records at a span of a lane's offsets."""
    tables = database.tables
    events, duplicates, failures = tables.events, tables.duplicates, tables.failures

    def of(table: sa.Table, *columns: Any) -> sa.Select[Any]:
        where = (
            table.c.source_id == source,
            table.c.group_id == lane.group_id,
            table.c.topic == lane.topic,
            table.c.partition == lane.partition,
            table.c.offset.between(span.start, span.stop - 1),
        )
        return sa.select(table.c.offset, *columns).where(*where)

    repeated = duplicates.join(events, events.c.position == duplicates.c.repeats)
    parked = sa.case((failures.c.parked > 0, "parked"), else_="failed")
    rows = connection.execute(
        sa.union_all(
            of(
                failures,
                sa.literal("failure"),
                failures.c.id,
                failures.c.checksum,
                parked,
            ),
            of(
                duplicates,
                sa.literal("duplicate"),
                duplicates.c.id,
                events.c.checksum,
                sa.literal("duplicate"),
            ).select_from(repeated),
            of(
                events,
                sa.literal("event"),
                events.c.position,
                events.c.checksum,
                sa.literal("duplicate"),
            ),
        )
    )
    return {
        offset: Kept(f"{noun} {number}", checksum, counted)
        for offset, noun, number, checksum, counted in rows
    }


class LogReader:
    """Reads matching events page by page, fetching only columns that are used.

    A column that a page had to load late is fetched with the pages after it.

    Args:
        database: Where from.
        topics: Topics to read; None reads all.
        groups: Groups to read; None reads all.
        entities: Entities to read; None reads all.
    """

    def __init__(
        self,
        database: Database,
        topics: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        entities: Sequence[str] | None = None,
    ) -> None:
        self._database = database
        self._columns = ["position", "entity_id", "payload_text"]
        self._filters: list[tuple[str, list[str]]] = [
            (name, list(values))
            for name, values in (
                ("topic", topics),
                ("group_id", groups),
                ("entity_id", entities),
            )
            if values is not None
        ]

    @property
    def waits(self) -> bool:
        """Whether reading mostly waits for another process."""
        return not self._database.is_sqlite

    def page(
        self, after: Position, upto: Position, connection: sa.Connection | None = None
    ) -> EventPage:
        """Return the matching events in (after, upto], in order.

        Args:
            after: Exclusive lower bound.
            upto: Inclusive upper bound; with it, bounds the size of the page.
            connection: Open transaction to read in, for a caller that must see its
                snapshot; a transaction of its own if None, since events never change.
        """

        def load(name: str) -> Sequence[Any]:
            if name not in _SOURCES:
                raise AttributeError(name)
            if name not in self._columns:
                self._columns.append(name)
            # Translated here: a fold asks for it, whose own errors are other ones.
            with self._database.translating():
                return self._fetch([name], after, upto, connection)[name]

        # A page before this one may ask for more while this is read ahead.
        names = tuple(self._columns)
        return EventPage(self._fetch(names, after, upto, connection), load)

    def raw(
        self,
        names: Sequence[str],
        after: Position,
        upto: Position,
        connection: sa.Connection | None = None,
    ) -> list[Sequence[Any]]:
        """Return columns of the matching events in (after, upto] as the driver does.

        Names are those of `Event`, or of the table; otherwise as `page`.
        """
        if connection is None:
            with self._database.read() as own:
                rows = self._rows(own, names, after, upto)
        else:
            rows = self._rows(connection, names, after, upto)
        return list(zip(*rows, strict=True)) if rows else [()] * len(names)

    def query(
        self, columns: str, after: Position, upto: Position
    ) -> tuple[str, list[Any]]:
        """Return the statement for the matching events in (after, upto], in order."""
        is_sqlite = self._database.is_sqlite
        parameters: list[Any] = [after, upto]
        mark = "?" if is_sqlite else "%b"
        conditions = [f"position > {mark}", f"position <= {mark}"]
        for column, values in self._filters:
            # Else by the range of positions, whose rows are in order: see `lookup`.
            by_index = column == "entity_id"
            found = column if by_index else unindexed(self._database, column)
            if is_sqlite:
                conditions.append(f"{found} IN ({', '.join('?' * len(values))})")
                parameters += values
            else:
                conditions.append(f"{found} = ANY(%b)")
                parameters.append(values)
        table = self._database.tables.events.name
        where = " AND ".join(conditions)
        text = f"SELECT {columns} FROM {table} WHERE {where} ORDER BY position"
        return text, parameters

    def _fetch(
        self,
        names: Sequence[str],
        after: Position,
        upto: Position,
        connection: sa.Connection | None,
    ) -> dict[str, Sequence[Any]]:
        columns = self.raw(names, after, upto, connection)
        return {
            name: _converted(name, values, is_sqlite=self._database.is_sqlite)
            for name, values in zip(names, columns, strict=True)
        }

    def _rows(
        self,
        connection: sa.Connection,
        names: Sequence[str],
        after: Position,
        upto: Position,
    ) -> list[tuple[Any, ...]]:
        quote = connection.dialect.identifier_preparer.quote
        columns = ", ".join(quote(_SOURCES.get(name, name)) for name in names)
        query, parameters = self.query(columns, after, upto)
        driver = driver_connection(connection)
        if self._database.is_sqlite:
            return driver.execute(query, parameters).fetchall()  # type: ignore[no-any-return]
        with driver.cursor(binary=True) as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall()  # type: ignore[no-any-return]


_SOURCES = {name: name for name in EVENT_COLUMNS if name != "payload"} | {
    "payload_text": "payload"
}
"""Column of `Event` → column of the table."""


def _converted(name: str, values: Sequence[Any], *, is_sqlite: bool) -> Sequence[Any]:
    convert: Callable[[Any], Any] | None = None
    if name in ("event_time", "recorded_at"):
        convert = kept_instant if is_sqlite else _utc
    elif name == "headers":
        return [decode_headers(value) for value in values]
    elif name == "message_id":
        convert = bytes.hex
    if convert is None:
        return values
    return [None if value is None else convert(value) for value in values]


def _utc(moment: datetime) -> datetime:
    return from_micros(to_micros(moment))


def first_recorded(
    connection: sa.Connection, database: Database, moment: datetime
) -> Position | None:
    """Return the first position with recorded_at ≥ moment, or None.

    recorded_at never falls as positions rise, so halving finds it by the primary key.
    """
    table = database.tables.events
    low, high = 1, head(connection, database).position + 1
    end = high
    while low < high:
        middle = (low + high) // 2
        recorded = connection.scalar(
            sa.select(table.c.recorded_at).where(table.c.position == middle)
        )
        if recorded is None or recorded >= moment:
            high = middle
        else:
            low = middle + 1
    return low if low < end else None


def first_happened(
    connection: sa.Connection, database: Database, moment: datetime
) -> Position | None:
    """Return the first position whose event_time ≥ moment, or None."""
    table = database.tables.events
    found: Position | None = connection.scalar(
        sa.select(sa.func.min(table.c.position)).where(table.c.event_time >= moment)
    )
    return found


def first_from_offset(
    connection: sa.Connection,
    database: Database,
    topic: str,
    partition: int,
    offset: int,
    groups: Sequence[str] | None,
) -> Position | None:
    """Return the lowest position of a topic's partition from an offset on."""
    table = database.tables.events
    query = sa.select(sa.func.min(table.c.position)).where(
        filtering(database, "topic") == topic,
        table.c.partition == partition,
        table.c.offset >= offset,
    )
    if groups is not None:
        query = query.where(table.c.group_id.in_(groups))
    found: Position | None = connection.scalar(query)
    return found


def recorded_after(
    connection: sa.Connection, database: Database, cursor: Position
) -> datetime | None:
    """Return when the event after a cursor was recorded, or None at the head."""
    table = database.tables.events
    return connection.scalar(
        sa.select(table.c.recorded_at).where(table.c.position == cursor + 1)
    )


def groups_of(
    connection: sa.Connection, database: Database, topics: Sequence[str]
) -> dict[str, list[str]]:
    """Return topic → the groups under which the log has events of it, sorted."""
    lanes, table = database.tables.offsets, database.tables.events
    rows = connection.execute(
        sa.select(lanes.c.topic, lanes.c.group_id, lanes.c.source_id)
        .where(lanes.c.topic.in_(topics))
        .order_by(lanes.c.topic, lanes.c.group_id)
    ).all()
    found: dict[str, list[str]] = {}
    for topic, group, source in rows:
        if group in found.setdefault(topic, []):
            continue
        # One row by the index of coordinates: a group may be known and have no event,
        # after a file that is not there for instance.
        query = sa.select(table.c.position).where(
            table.c.source_id == source,
            table.c.group_id == group,
            table.c.topic == topic,
        )
        if connection.scalar(query.limit(1)) is not None:
            found[topic].append(group)
    return found


def count(
    connection: sa.Connection,
    database: Database,
    upto: Position,
    topics: Sequence[str],
    groups: Sequence[str] | None,
) -> int:
    """Return the number of matching events up to a position.

    The ledger knows how many events each checkpoint brought; only the one that the
    position lies within is counted event by event.
    """
    table = database.tables.checkpoints
    matching = [table.c.topic.in_(topics)]
    if groups is not None:
        matching.append(table.c.group_id.in_(groups))
    whole = connection.scalar(
        sa.select(sa.func.sum(table.c.acked)).where(
            *matching, table.c.last_position <= upto
        )
    )
    begun: Position | None = connection.scalar(
        sa.select(table.c.first_position).where(
            *matching, table.c.first_position <= upto, table.c.last_position > upto
        )
    )
    return int(whole or 0) + (0 if begun is None else upto - begun + 1)


def count_of_entities(
    connection: sa.Connection,
    database: Database,
    upto: Position,
    topics: Sequence[str],
    groups: Sequence[str] | None,
    entities: Iterable[str],
) -> int:
    """Return the number of matching events of some entities up to a position."""
    table = database.tables.events
    query = (
        sa.select(sa.func.count())
        .select_from(table)
        .where(table.c.position <= upto, filtering(database, "topic").in_(topics))
    )
    if groups is not None:
        query = query.where(table.c.group_id.in_(groups))
    wanted = list(entities)
    return sum(
        connection.scalar(
            query.where(table.c.entity_id.in_(wanted[start : start + _MAX_VARIABLES]))
        )
        or 0
        for start in range(0, len(wanted), _MAX_VARIABLES)
    )


def count_of_entity(
    connection: sa.Connection,
    database: Database,
    entity: str,
    span: tuple[Position, Position],
    topics: Sequence[str],
    groups: Sequence[str] | None,
) -> int:
    """Return the number of matching events of one entity in a span, both ends in."""
    table = database.tables.events
    query = (
        sa.select(sa.func.count())
        .select_from(table)
        .where(
            table.c.entity_id == entity,
            table.c.position.between(*span),
            filtering(database, "topic").in_(topics),
        )
    )
    if groups is not None:
        query = query.where(table.c.group_id.in_(groups))
    return connection.scalar(query) or 0
