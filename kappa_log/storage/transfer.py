"""Transfer: whole tables out of the log and into an empty one, as plain columns.

Rows leave in the order of their keys and in bounded numbers, values as the driver
gives them. They come in as they were, ids included, with the indexes made at the end:
filling an index in random order costs many times what sorting it once does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from kappa_log.errors import StorageError, UsageError
from kappa_log.events import ORIGIN, Position
from kappa_log.storage import log
from kappa_log.storage.builds import POSITION_COLUMN, Build, table_of
from kappa_log.storage.bulk import insert_rows
from kappa_log.storage.database import Database, driver_connection

ARCHIVED = (*log.EVENT_COLUMNS, "payload_digest", "personal_digest")
"""Columns of an event that leave the log: all of them."""

Columns = list[Sequence[Any]]
"""Values of some rows, a sequence for each column."""


def events(
    connection: sa.Connection, database: Database, after: Position, upto: Position
) -> Columns:
    """Return the columns `ARCHIVED` of the events in (after, upto], in order.

    Raises:
        StorageError: Events are missing.
    """
    table = database.tables.events
    quote = connection.dialect.identifier_preparer.quote
    mark = "?" if database.is_sqlite else "%b"
    query = (
        f"SELECT {', '.join(map(quote, ARCHIVED))} FROM {quote(table.name)} "
        f"WHERE position > {mark} AND position <= {mark} ORDER BY position"
    )
    rows = _executed(connection, database, query, (after, upto)).fetchall()
    if len(rows) != upto - after:
        msg = (
            f"of positions {after + 1:,} to {upto:,} only {len(rows):,} events are "
            "there: the log is damaged. See: kappa-log verify"
        )
        raise StorageError(msg)
    return list(zip(*rows, strict=True))


def table_rows(
    connection: sa.Connection, database: Database, table: sa.Table, size: int
) -> Iterator[Columns]:
    """Yield all of a table by its primary key, so many rows at a time."""
    keys = [column.name for column in table.primary_key]
    names = [column.name for column in table.c]
    if len(keys) > 1:
        # Few rows, whose texts a database may sort by a locale of its own.
        yield from _sorted_rows(connection, database, table, names, keys)
        return
    yield from _stream(connection, database, table, names, keys, size)


def build_rows(
    connection: sa.Connection, database: Database, build: Build, size: int
) -> Iterator[Columns]:
    """Yield all rows of a build by key: key columns, fields, last position."""
    names = [*build.layout.names, POSITION_COLUMN]
    keys = [key.name for key in build.layout.keys]
    table = table_of(database, build)
    yield from _stream(connection, database, table, names, keys, size)


def _stream(
    connection: sa.Connection,
    database: Database,
    table: sa.Table,
    names: Sequence[str],
    keys: Sequence[str],
    size: int,
) -> Iterator[Columns]:
    quote = connection.dialect.identifier_preparer.quote
    query = (
        f"SELECT {', '.join(map(quote, names))} FROM {quote(table.name)} "
        f"ORDER BY {', '.join(map(quote, keys))}"
    )
    driver = driver_connection(connection)
    if database.is_sqlite:
        cursor = driver.execute(query)
    else:
        # A cursor of the server's: the client never holds more than a page.
        cursor = driver.cursor(f"kappa_log_{table.name[:40]}", binary=True)
        cursor.execute(query)
    with contextlib.closing(cursor):
        while rows := cursor.fetchmany(size):
            yield list(zip(*rows, strict=True))


def _sorted_rows(
    connection: sa.Connection,
    database: Database,
    table: sa.Table,
    names: Sequence[str],
    keys: Sequence[str],
) -> Iterator[Columns]:
    quote = connection.dialect.identifier_preparer.quote
    query = f"SELECT {', '.join(map(quote, names))} FROM {quote(table.name)}"
    places = [names.index(key) for key in keys]
    rows = _executed(connection, database, query, ()).fetchall()
    rows.sort(key=lambda row: [row[place] for place in places])
    if rows:
        yield list(zip(*rows, strict=True))


def _executed(
    connection: sa.Connection, database: Database, query: str, values: Sequence[Any]
) -> Any:
    driver = driver_connection(connection)
    if database.is_sqlite:
        return driver.execute(query, values)
    return driver.cursor(binary=True).execute(query, values)


def head_at(
    connection: sa.Connection, database: Database, position: Position
) -> bytes | None:
    """Return the chain's head at the end of a batch; None if none ended there."""
    table = database.tables.checkpoints
    query = sa.select(table.c.head).where(table.c.last_position == position)
    found = connection.scalar(query.limit(1))
    return None if found is None else bytes(found)


def position_of(
    connection: sa.Connection, database: Database, digest: bytes
) -> Position | None:
    """Return where a head of the chain is; None if no batch ended in it."""
    table = database.tables.checkpoints
    query = sa.select(table.c.last_position).where(table.c.head == digest)
    found: Position | None = connection.scalar(query.limit(1))
    return found


def erasure_epoch(connection: sa.Connection, database: Database) -> int:
    """Return how often something was erased."""
    return connection.scalar(sa.select(database.tables.head.c.erasure_epoch)) or 0


# --- into an empty log --------------------------------------------------------


def require_empty(connection: sa.Connection, database: Database) -> None:
    """Lock the head of a log that holds nothing at all.

    Raises:
        UsageError: It holds something; nothing was changed.
    """
    tables = database.tables
    held = log.head(connection, database, lock=True)
    others = (tables.offsets, tables.checkpoints, tables.failures, tables.builds)
    is_empty = held.position == ORIGIN and not any(
        connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first()
        for table in others
    )
    if not is_empty:
        msg = (
            f"the log in {database.label} is not empty (its head is position "
            f"{held.position:,}); an archive is imported into an empty one. Name "
            "another database with --url, or empty this one: kappa-log db reset. "
            "Nothing was changed"
        )
        raise UsageError(msg)


def insert(
    connection: sa.Connection,
    table: sa.Table,
    names: Sequence[str],
    rows: Iterable[Sequence[Any]],
) -> None:
    """Insert rows as they were, ids included; times as `bulk.time_shift` says."""
    insert_rows(connection, table, names, rows)


@contextlib.contextmanager
def indexes_at_the_end(
    connection: sa.Connection, tables: Sequence[sa.Table]
) -> Iterator[None]:
    """Take the tables' indexes away, and make them anew after the block."""
    indexes = [index for table in tables for index in sorted_indexes(table)]
    for index in indexes:
        index.drop(connection)
    yield
    for index in indexes:
        index.create(connection)


def sorted_indexes(table: sa.Table) -> list[sa.Index]:
    """Return a table's indexes by name."""
    return sorted(table.indexes, key=lambda index: str(index.name))


def continue_ids(
    connection: sa.Connection, database: Database, tables: Sequence[sa.Table]
) -> None:
    """Let ids go on after the highest that was inserted; SQLite does by itself."""
    if database.is_sqlite:
        return
    for table in tables:
        sequence = sa.func.pg_get_serial_sequence(table.name, "id")
        highest = sa.select(sa.func.max(table.c.id)).scalar_subquery()
        connection.execute(
            sa.select(
                sa.func.setval(
                    sequence, sa.func.coalesce(highest, 1), highest.is_not(None)
                )
            )
        )


def set_erasure_epoch(
    connection: sa.Connection, database: Database, epoch: int
) -> None:
    """Write how often something was erased, as the archive says."""
    connection.execute(database.tables.head.update().values(erasure_epoch=epoch))
