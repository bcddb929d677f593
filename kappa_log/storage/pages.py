"""Pages: events and failures in the order in which people look at them.

The latest event time first, then what was recorded last, what has no event time at the
end. The index ``…_listed`` has this very order, and so have those of a topic's and of a
type's events: the deepest page costs what the first one does when it is asked for by a
cursor, which is what came last on the page before.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from kappa_log.events import Event
from kappa_log.storage import lookup
from kappa_log.storage.database import Database
from kappa_log.storage.lists import MAX_INT, Failure, event_of, failure_of
from kappa_log.storage.log import EVENT_COLUMNS, first_recorded

Place = tuple[datetime | None, datetime, int]
"""Where a row stands in the order: event time, time it was kept, id."""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a list is wanted."""

    limit: int
    offset: int = 0
    """Rows to pass over; those that a database counts one by one."""
    after: Place | None = None
    """Where the page before ended."""


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows are wanted; None does not filter."""

    equal: Mapping[str, Any] = {}
    """Column → its value, or a tuple of which any will do; None does not filter."""
    since: datetime | None = None
    until: datetime | None = None
    """Exclusive."""
    by: Literal["recorded", "event-time"] = "recorded"
    """Which time since and until mean."""
    after: int | None = None
    before: int | None = None
    """Positions, both exclusive."""


def events(
    connection: sa.Connection, database: Database, chosen: Chosen, page: Page
) -> list[Event]:
    """Return a page of events, the latest event time first."""
    table = database.tables.events
    ordered = ("event_type", "topic")
    by = lookup.best(connection, database, chosen.equal, ordered)
    where = lookup.equal(database, chosen.equal, by)
    if chosen.after is not None:
        where.append(table.c.position > min(chosen.after, MAX_INT))
    if chosen.before is not None:
        where.append(table.c.position < min(chosen.before, MAX_INT))
    if chosen.by == "event-time":
        where += _between(table.c.event_time, chosen)
    else:
        where += _recorded_between(connection, database, chosen)
    query = sa.select(*(table.c[name] for name in EVENT_COLUMNS)).where(*where)
    order = (table.c.event_time, table.c.recorded_at, table.c.position)
    return [event_of(row) for row in _paged(connection, query, order, page)]


def failures(
    connection: sa.Connection, database: Database, chosen: Chosen, page: Page
) -> list[Failure]:
    """Return a page of failures in the order of events."""
    table, source = database.tables.failures, database.tables.sources
    by_event = chosen.by == "event-time"
    time = table.c.event_time if by_event else table.c.first_at
    query = (
        sa.select(table, source.c.name.label("source"))
        .join(source)
        .where(*_equal(table, chosen), *_between(time, chosen))
    )
    order = (table.c.event_time, table.c.first_at, table.c.id)
    return [failure_of(row) for row in _paged(connection, query, order, page)]


def _equal(table: sa.Table, chosen: Chosen) -> list[sa.ColumnElement[bool]]:
    return [
        lookup.is_any(table.c[name], value)
        for name, value in chosen.equal.items()
        if value is not None
    ]


def _between(time: sa.Column[Any], chosen: Chosen) -> list[sa.ColumnElement[bool]]:
    since = [] if chosen.since is None else [time >= chosen.since]
    until = [] if chosen.until is None else [time < chosen.until]
    return [*since, *until]


def _recorded_between(
    connection: sa.Connection, database: Database, chosen: Chosen
) -> list[sa.ColumnElement[bool]]:
    """Return a range of positions: recorded_at never falls as they rise."""
    position = database.tables.events.c.position
    conditions: list[sa.ColumnElement[bool]] = []
    if chosen.since is not None:
        first = first_recorded(connection, database, chosen.since)
        conditions.append(position >= first if first else sa.false())
    if chosen.until is not None:
        end = first_recorded(connection, database, chosen.until)
        if end is not None:
            conditions.append(position < end)
    return conditions


def _paged(
    connection: sa.Connection,
    query: sa.Select[Any],
    order: tuple[sa.Column[Any], sa.Column[Any], sa.Column[Any]],
    page: Page,
) -> list[sa.Row[Any]]:
    """Return the rows of a page.

    Past a cursor there are two stretches of the index, each read from its start: the
    rest of those with an event time, then those without. One condition for both would
    read the index from its very beginning.
    """
    time, kept, identifier = order
    latest = [time.desc(), kept.desc()]
    if connection.dialect.name != "sqlite":
        # As the index spells it; in SQLite NULL is last by itself, and only so.
        latest = [column.nulls_last() for column in latest]
    ordered = query.order_by(*latest, identifier.desc())
    if page.after is None:
        limited = ordered.limit(page.limit).offset(page.offset)
        return list(connection.execute(limited))
    rows: list[sa.Row[Any]] = []
    without = ordered.where(time.is_(None))
    if page.after[0] is not None:
        rest = ordered.where(sa.tuple_(*order) < page.after)
        rows += connection.execute(rest.limit(page.limit))
    else:
        without = without.where(sa.tuple_(kept, identifier) < page.after[1:])
    if len(rows) < page.limit:
        rows += connection.execute(without.limit(page.limit - len(rows)))
    return rows
