"""Lists: events, failures and duplicates as people look them up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import NotFound
from kappa_log.events import Event, EventPage, Header, Position
from kappa_log.records import decode_headers
from kappa_log.storage import ledger, lookup
from kappa_log.storage.database import Database
from kappa_log.storage.log import EVENT_COLUMNS, first_recorded

MAX_INT = 2**63 - 1
"""Largest number that both drivers take."""


class EventFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which events to list; None does not filter."""

    topic: str | None = None
    group: str | None = None
    entity_id: str | None = None
    event_type: str | None = None
    after: Position | None = None
    before: Position | None = None
    since: datetime | None = None


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A record that is kept outside the log."""

    id: int
    source: str
    topic: str
    group_id: str
    partition: int
    offset: int
    key: bytes | None
    headers: list[Header]
    timestamp: int | None


class Duplicate(Received, frozen=True, kw_only=True):
    """A record that was dropped because the log has its message."""

    repeats: Position
    recorded_at: datetime


class Failure(Received, frozen=True, kw_only=True):
    """A record that could not become an event, whole, with its error."""

    value: bytes | None
    checksum: str | None
    entity_id: str | None
    event_time: datetime | None
    event_type: str | None
    event_version: str | None
    parked: bool
    error_class: str | None
    error_message: str | None
    error_backtrace: list[str]
    fingerprint: str | None
    attempts: int
    first_at: datetime
    last_at: datetime
    metadata: dict[str, Any] = {}
    """What was known of it where it was imported from, beyond our columns."""


def events(
    connection: sa.Connection,
    database: Database,
    chosen: EventFilter,
    *,
    limit: int,
    oldest_first: bool = False,
) -> list[Event]:
    """Return matching events by position, the newest or the oldest ones first."""
    table = database.tables.events
    wanted = {
        "topic": chosen.topic,
        "group_id": chosen.group,
        "entity_id": chosen.entity_id,
        "event_type": chosen.event_type,
    }
    by = lookup.best(connection, database, wanted, ordered=("entity_id",))
    conditions = lookup.equal(database, wanted, by)
    if chosen.after is not None:
        conditions.append(table.c.position > min(chosen.after, MAX_INT))
    if chosen.before is not None:
        conditions.append(table.c.position < min(chosen.before, MAX_INT))
    if chosen.since is not None:
        # By position: recorded_at has no index of its own and needs none.
        first = first_recorded(connection, database, chosen.since)
        conditions.append(table.c.position >= first if first else sa.false())
    if by is None and chosen.topic is not None and not oldest_first:
        # Else all that came after a topic of the past would be read first.
        last = ledger.last_of_topic(connection, database, chosen.topic)
        conditions.append(table.c.position <= last)
    order = table.c.position.asc() if oldest_first else table.c.position.desc()
    query = sa.select(*(table.c[name] for name in EVENT_COLUMNS))
    rows = connection.execute(
        query.where(*conditions).order_by(order).limit(min(limit, MAX_INT))
    )
    return [event_of(row) for row in rows]


def event(connection: sa.Connection, database: Database, position: Position) -> Event:
    """Return one event, or raise NotFound."""
    table = database.tables.events
    query = sa.select(*(table.c[name] for name in EVENT_COLUMNS))
    query = query.where(table.c.position == _within_64_bits(position))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound("event", position)
    return event_of(row)


def sources(connection: sa.Connection, database: Database) -> dict[int, str]:
    """Return source_id → name of all sources."""
    table = database.tables.sources
    return {row.id: row.name for row in connection.execute(sa.select(table))}


class Checkpointed(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the ledger, as people look at it."""

    id: int
    kind: str
    source: str
    group_id: str
    topic: str
    partition: int
    from_offset: int
    to_offset: int
    acked: int
    skipped: int
    duplicate: int
    failed: int
    parked: int
    first_position: Position | None
    last_position: Position | None
    head: str | None
    recorded_at: datetime


def checkpoints(
    connection: sa.Connection,
    database: Database,
    *,
    limit: int,
    after: int | None = None,
) -> list[Checkpointed]:
    """Return the ledger's rows by id."""
    table, source = database.tables.checkpoints, database.tables.sources
    query = sa.select(table, source.c.name.label("source")).join(source)
    if after is not None:
        query = query.where(table.c.id > after)
    rows = connection.execute(query.order_by(table.c.id).limit(limit)).mappings()
    names = Checkpointed.__struct_fields__
    return [
        Checkpointed(
            **{name: row[name] for name in names if name != "head"},
            head=None if row["head"] is None else bytes(row["head"]).hex(),
        )
        for row in rows
    ]


def duplicates(
    connection: sa.Connection,
    database: Database,
    *,
    limit: int,
    after: int | None = None,
    only: int | None = None,
) -> list[Duplicate]:
    """Return dropped duplicates by id; ``only`` one of them."""
    table, source = database.tables.duplicates, database.tables.sources
    query = sa.select(table, source.c.name.label("source")).join(source)
    if after is not None:
        query = query.where(table.c.id > after)
    if only is not None:
        query = query.where(table.c.id == _within_64_bits(only))
    rows = connection.execute(query.order_by(table.c.id).limit(limit))
    return [
        Duplicate(**_received(row), repeats=row.repeats, recorded_at=row.recorded_at)
        for row in rows
    ]


def failures(
    connection: sa.Connection,
    database: Database,
    *,
    limit: int,
    only: int | None = None,
) -> list[Failure]:
    """Return failures, newest first; ``only`` one of them."""
    table, source = database.tables.failures, database.tables.sources
    query = sa.select(table, source.c.name.label("source")).join(source)
    if only is not None:
        query = query.where(table.c.id == _within_64_bits(only))
    rows: Sequence[Any] = connection.execute(
        query.order_by(table.c.id.desc()).limit(limit)
    ).all()
    return [failure_of(row) for row in rows]


def failure_of(row: Any) -> Failure:
    """Return the failure of a row of its table, with the name of its source."""
    return Failure(
        **_received(row),
        value=None if row.value is None else bytes(row.value),
        checksum=row.checksum,
        entity_id=row.entity_id,
        event_time=row.event_time,
        event_type=row.event_type,
        event_version=row.event_version,
        parked=bool(row.parked),
        error_class=row.error_class,
        error_message=row.error_message,
        error_backtrace=json.loads(row.error_backtrace or "[]"),
        fingerprint=row.fingerprint,
        attempts=row.attempts,
        first_at=row.first_at,
        last_at=row.last_at,
        metadata=json.loads(row.metadata or "{}"),
    )


def _received(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "source": row.source,
        "topic": row.topic,
        "group_id": row.group_id,
        "partition": row.partition,
        "offset": row.offset,
        "key": None if row.key is None else bytes(row.key),
        "headers": decode_headers(row.headers),
        "timestamp": row.timestamp,
    }


def event_of(row: Any) -> Event:
    """Return the event of a row of `EVENT_COLUMNS`."""
    values = dict(zip(EVENT_COLUMNS, row, strict=True))
    text = values.pop("payload")
    columns = {name: [value] for name, value in values.items()}
    columns["payload_text"] = [text]
    columns["headers"] = [decode_headers(values["headers"])]
    columns["message_id"] = [bytes(values["message_id"]).hex()]
    payload = None if text is None else msgspec.json.decode(text)
    return Event(
        values["position"], values["entity_id"], payload, EventPage(columns), 0
    )


def _within_64_bits(number: int) -> int:
    """Return a number that both drivers take; nothing has the number 0."""
    return number if 0 < number <= MAX_INT else 0
