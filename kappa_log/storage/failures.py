"""Failures in SQL: found, drained key by key, changed and taken out.

A failure with a key has a ``park_id``: later records of its key wait behind it, as
failures that are *parked* and have no error yet. The lowest offset of a ``park_id`` is
its head, and the only one of them that may be handled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.records import Lane
from kappa_log.storage.database import Database
from kappa_log.storage.ledger import lane_is
from kappa_log.storage.lists import MAX_INT


class FailureFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which failures are meant; None does not filter."""

    ids: tuple[int, ...] | None = None
    fingerprint: str | None = None
    topic: str | None = None
    group: str | None = None
    error_class: str | None = None
    partition: int | None = None

    def among(self, ids: Collection[int]) -> FailureFilter:
        """Return the filter for those of these failures that it matches."""
        both = ids if self.ids is None else set(ids).intersection(self.ids)
        return msgspec.structs.replace(self, ids=tuple(both))


class FailureGroup(msgspec.Struct, frozen=True):
    """Failures of one error at one place."""

    fingerprint: str
    error_class: str | None
    message: str | None
    """Of the newest of them."""
    count: int
    parked: int
    """Records that wait behind failures of this group."""
    first_at: datetime
    last_at: datetime
    example_id: int
    """The newest of them."""


class Waiting(msgspec.Struct, frozen=True):
    """What decides about one failure's turn."""

    id: int
    park_id: bytes | None
    offset: int
    parked: bool
    attempts: int


def count(connection: sa.Connection, database: Database, chosen: FailureFilter) -> int:
    """Return how many failures there are, those that wait included."""
    table = database.tables.failures
    query = sa.select(sa.func.count()).select_from(table).where(*_where(table, chosen))
    return int(connection.scalar(query) or 0)


def values(
    connection: sa.Connection, database: Database, name: str, *, limit: int
) -> list[str]:
    """Return the first of the values that failures have in a column, sorted."""
    column = database.tables.failures.c[name]
    query = sa.select(column).where(column.is_not(None)).distinct()
    return list(connection.scalars(query.order_by(column).limit(limit)))


def count_states(connection: sa.Connection, database: Database) -> dict[str, int]:
    """Return how many failures raised themselves (failed), or wait behind (parked)."""
    table = database.tables.failures
    query = sa.select(table.c.parked, sa.func.count()).group_by(table.c.parked)
    found = {bool(parked): total for parked, total in connection.execute(query)}
    return {"failed": found.get(False, 0), "parked": found.get(True, 0)}


def waiting(
    connection: sa.Connection,
    database: Database,
    chosen: FailureFilter,
    *,
    after: int = 0,
    upto: int = MAX_INT,
    limit: int,
) -> list[Waiting]:
    """Return matching failures by id, a page at a time."""
    table = database.tables.failures
    rows = connection.execute(
        _waiting(table)
        .where(table.c.id > after, table.c.id <= upto, *_where(table, chosen))
        .order_by(table.c.id)
        .limit(limit)
    )
    return [_as_waiting(row) for row in rows]


def newest_id(connection: sa.Connection, database: Database) -> int:
    """Return the highest id of a failure; 0 without any."""
    return int(
        connection.scalar(sa.select(sa.func.max(database.tables.failures.c.id))) or 0
    )


def head_of(
    connection: sa.Connection, database: Database, park_id: bytes
) -> Waiting | None:
    """Return the head of a key: what all its later records wait for."""
    found = queue_of(connection, database, park_id, limit=1)
    return found[0] if found else None


def queue_of(
    connection: sa.Connection, database: Database, park_id: bytes, *, limit: int
) -> list[Waiting]:
    """Return a key's failures in the order in which they are handled, head first."""
    table = database.tables.failures
    query = _waiting(table).where(table.c.park_id == park_id)
    rows = connection.execute(query.order_by(table.c.offset).limit(limit))
    return [_as_waiting(row) for row in rows]


def is_head(connection: sa.Connection, database: Database, found: Waiting) -> bool:
    """Tell whether nothing of its key stands before a failure."""
    if found.park_id is None:
        return True
    head = head_of(connection, database, found.park_id)
    return head is not None and head.id == found.id


def take_out(connection: sa.Connection, database: Database, found: Waiting) -> bool:
    """Delete a failure; tell whether it still was as it was found.

    The row count decides between two who act on it at once.
    """
    table = database.tables.failures
    gone = connection.execute(sa.delete(table).where(_unchanged(table, found)))
    return gone.rowcount == 1


def failed_again(
    connection: sa.Connection,
    database: Database,
    found: Waiting,
    now: datetime,
    **changes: Any,
) -> bool:
    """Keep another attempt's error; tell whether the failure was as it was found."""
    table = database.tables.failures
    changed = connection.execute(
        table.update()
        .where(_unchanged(table, found))
        .values(parked=0, attempts=found.attempts + 1, last_at=now, **changes)
    )
    return changed.rowcount == 1


def are_there(
    connection: sa.Connection, database: Database, lanes: Sequence[tuple[Lane, int]]
) -> bool:
    """Tell whether any of these lanes, with the ids of their sources, has a failure."""
    if not lanes:
        return False
    table = database.tables.failures
    of_lanes = sa.or_(*(lane_is(table, lane, source) for lane, source in lanes))
    query = sa.select(sa.literal(1)).where(of_lanes).limit(1)
    return connection.scalar(query) is not None


def waited_for(
    connection: sa.Connection,
    database: Database,
    lanes: Sequence[tuple[Lane, int]],
    park_ids: Sequence[bytes],
) -> set[bytes]:
    """Return those of these keys that records must wait behind.

    Args:
        connection: Transaction.
        database: The log.
        lanes: Lanes with the ids of their sources; most have no failure at all, and
            then the keys need not be looked for.
        park_ids: Keys of records at hand.
    """
    table = database.tables.failures
    if not park_ids or not are_there(connection, database, lanes):
        return set()
    found: set[bytes] = set()
    for start in range(0, len(park_ids), _CHUNK):
        chunk = park_ids[start : start + _CHUNK]
        query = sa.select(table.c.park_id).where(table.c.park_id.in_(chunk)).distinct()
        found.update(bytes(value) for value in connection.scalars(query))
    return found


def parked_behind(
    connection: sa.Connection, database: Database, park_id: bytes, limit: int
) -> int:
    """Return how many records wait in a key, up to a limit."""
    table = database.tables.failures
    inner = sa.select(table.c.id).where(table.c.park_id == park_id).limit(limit)
    return int(
        connection.scalar(sa.select(sa.func.count()).select_from(inner.subquery())) or 0
    )


def groups(
    connection: sa.Connection, database: Database, limit: int
) -> list[FailureGroup]:
    """Return failures by error and place, the largest groups first."""
    table = database.tables.failures
    behind = table.alias()
    newest = sa.func.max(table.c.id)
    query = (
        sa.select(
            table.c.fingerprint,
            sa.func.count().label("total"),
            sa.func.min(table.c.first_at).label("first_at"),
            sa.func.max(table.c.last_at).label("last_at"),
            newest.label("newest"),
        )
        .where(table.c.fingerprint.is_not(None))
        .group_by(table.c.fingerprint)
        .order_by(sa.func.count().desc(), newest.desc())
        .limit(limit)
    )
    parked = (
        sa.select(sa.func.count(behind.c.id.distinct()))
        .select_from(behind.join(table, table.c.park_id == behind.c.park_id))
        .where(behind.c.parked == 1, table.c.parked == 0)
    )
    found = []
    for row in connection.execute(query).all():
        example = connection.execute(
            sa.select(table.c.error_class, table.c.error_message).where(
                table.c.id == row.newest
            )
        ).one()
        waits = connection.scalar(parked.where(table.c.fingerprint == row.fingerprint))
        found.append(
            FailureGroup(
                fingerprint=row.fingerprint,
                error_class=example.error_class,
                message=example.error_message,
                count=row.total,
                parked=int(waits or 0),
                first_at=row.first_at,
                last_at=row.last_at,
                example_id=row.newest,
            )
        )
    return found


_CHUNK = 10_000


def _waiting(table: sa.Table) -> sa.Select[Any]:
    columns = table.c
    return sa.select(
        columns.id, columns.park_id, columns.offset, columns.parked, columns.attempts
    )


def _as_waiting(row: Any) -> Waiting:
    return Waiting(
        row.id,
        None if row.park_id is None else bytes(row.park_id),
        row.offset,
        bool(row.parked),
        row.attempts,
    )


def _unchanged(table: sa.Table, found: Waiting) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.id == found.id, table.c.attempts == found.attempts)


def _where(table: sa.Table, chosen: FailureFilter) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if chosen.ids is not None:
        ids = [number for number in chosen.ids if 0 < number <= MAX_INT]
        conditions.append(table.c.id.in_(ids))
    for column, value in (
        (table.c.fingerprint, chosen.fingerprint),
        (table.c.topic, chosen.topic),
        (table.c.group_id, chosen.group),
        (table.c.error_class, chosen.error_class),
        (table.c.partition, chosen.partition),
    ):
        if value is not None:
            conditions.append(column == value)
    return conditions
