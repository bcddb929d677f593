"""Lookup: by which of several columns the events that are wanted are found.

A database that knows nothing of what its columns hold, as SQLite always and PostgreSQL
until it has analysed them, may pick the index that costs most: all events of a common
topic for those of one entity, or once more for each page of a replay. So it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from kappa_log.storage.database import Database

RARE = 10_000
"""Events that are fetched and sorted within some 20 ms."""

LEADING = ("entity_id", "event_type", "topic")
"""Columns that begin an index of events, from the one that mostly says most."""


def unindexed(database: Database, name: str) -> str:
    """Return a column of texts by which only is filtered what is found by others.

    No index is of this expression. SQLite's own word for it is a unary plus:
    https://www.sqlite.org/optoverview.html
    """
    return f"+{name}" if database.is_sqlite else f"{name} || ''"


def filtering(database: Database, name: str) -> sa.ColumnElement[Any]:
    """Return the same as an expression."""
    return sa.literal_column(unindexed(database, name), sa.Text)


def best(
    connection: sa.Connection,
    database: Database,
    wanted: Mapping[str, Any],
    ordered: Sequence[str],
) -> str | None:
    """Return the column to look events up by; None reads them in the wanted order.

    The first of which there are few, else one that needs no sorting.

    Args:
        connection: Where it is found out how many there are of a value.
        database: The log.
        wanted: As `equal`.
        ordered: Columns whose index has the order that is wanted, best first.
    """
    names = [name for name in LEADING if wanted.get(name) is not None]
    in_order = [name for name in ordered if name in names]
    if names == in_order[:1]:
        return names[0] if names else None
    for name in names:
        if _is_rare(connection, database, name, wanted[name]):
            return name
    return in_order[0] if in_order else None


def equal(
    database: Database, wanted: Mapping[str, Any], by: str | None
) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that choose events by the values of columns.

    Args:
        database: The log.
        wanted: Column → its value, or a tuple of which any will do; None does not
            filter.
        by: The column that they are looked up by.
    """
    table = database.tables.events
    return [
        is_any(
            filtering(database, name)
            if name in LEADING and name != by
            else table.c[name],
            value,
        )
        for name, value in wanted.items()
        if value is not None
    ]


def is_any(column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
    """Return the condition that a column has a value, or one of a tuple."""
    return column.in_(value) if isinstance(value, tuple) else column == value


def _is_rare(
    connection: sa.Connection, database: Database, name: str, value: Any
) -> bool:
    column = database.tables.events.c[name]
    few = sa.select(sa.literal(1)).where(is_any(column, value)).limit(RARE + 1)
    count = connection.scalar(sa.select(sa.func.count()).select_from(few.subquery()))
    return (count or 0) <= RARE
