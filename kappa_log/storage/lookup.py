"""Lookup: by which of several columns the events that are wanted are found.

A database that knows nothing of what its columns hold, as SQLite always and PostgreSQL
until it has analysed them, may pick the index that costs most: all events of a common
topic for those of one entity, or once more for each page of a replay. So it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.operators import custom_op

from kappa_log.storage.database import Database

RARE = 10_000
"""Events that are fetched and sorted within some 20 ms."""

LEADING = ("entity_id", "event_type", "topic")
"""Columns that begin an index of events, from the one that mostly says most."""


def unindexed(database: Database, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return a column of texts by which only is filtered what is found by others.

    No index is of this expression. SQLite's own word for it is a unary plus:
    https://www.sqlite.org/optoverview.html
    """
    if database.is_sqlite:
        return sa.UnaryExpression(column, operator=_PLUS, type_=column.type)
    return column.concat(sa.literal_column("''"))


_PLUS = custom_op[Any]("+")


def equal(
    connection: sa.Connection,
    database: Database,
    wanted: Mapping[str, Any],
    *,
    ordered: Sequence[str],
) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that choose events by the values of columns.

    Args:
        connection: Where it is found out how many there are of a value.
        database: The log.
        wanted: Column → its value, or a tuple of which any will do; None does not
            filter.
        ordered: Columns whose index has the order that is wanted, best first.
    """
    table = database.tables.events
    given = {name: value for name, value in wanted.items() if value is not None}
    by = _best(connection, database, given, ordered)
    found = []
    for name, value in given.items():
        is_filter = name in LEADING and name != by
        column = unindexed(database, table.c[name]) if is_filter else table.c[name]
        found.append(_is(column, value))
    return found


def _best(
    connection: sa.Connection,
    database: Database,
    given: Mapping[str, Any],
    ordered: Sequence[str],
) -> str | None:
    """Return the column to look events up by; None reads them in the wanted order.

    The first of which there are few, else one that needs no sorting.
    """
    names = [name for name in LEADING if name in given]
    in_order = [name for name in ordered if name in given]
    if names == in_order[:1]:
        return names[0] if names else None
    for name in names:
        if _is_rare(connection, database, name, given[name]):
            return name
    return in_order[0] if in_order else None


def _is_rare(
    connection: sa.Connection, database: Database, name: str, value: Any
) -> bool:
    column = database.tables.events.c[name]
    few = sa.select(sa.literal(1)).where(_is(column, value)).limit(RARE + 1)
    count = connection.scalar(sa.select(sa.func.count()).select_from(few.subquery()))
    return (count or 0) <= RARE


def _is(column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
    return column.in_(value) if isinstance(value, tuple) else column == value
