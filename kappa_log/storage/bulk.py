"""Bulk writes: binary COPY on PostgreSQL, executemany on SQLite.

Times travel as integers here: microseconds since 1970 on SQLite, since 2000 on
PostgreSQL, which is what its binary format holds (src/include/datatype/timestamp.h),
so no datetime is made for a row that only passes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import sqlalchemy as sa

from kappa_log.storage.database import Database, driver_connection
from kappa_log.storage.schema import Instant

PG_EPOCH_MICROS = 946_684_800_000_000
"""2000-01-01 in microseconds since 1970."""

Rows = Iterable[Sequence[Any]]


def time_shift(database: Database) -> int:
    """Return what to subtract from microseconds since 1970 before a bulk write."""
    return 0 if database.is_sqlite else PG_EPOCH_MICROS


def insert_rows(
    connection: sa.Connection, table: sa.Table, names: Sequence[str], rows: Rows
) -> None:
    """Insert rows into a table, all or none; times as `time_shift` says.

    Args:
        connection: Open write transaction.
        table: Where to.
        names: The columns that the rows hold, in their order.
        rows: One sequence a row, taken one by one: PostgreSQL puts the first into its
            indexes while the last are still made.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    rows = chain((first,), rows)
    quote = connection.dialect.identifier_preparer.quote
    columns = ", ".join(map(quote, names))
    target = quote(table.name)
    driver = driver_connection(connection)
    if connection.dialect.name == "sqlite":
        marks = ", ".join("?" * len(names))
        driver.executemany(f"INSERT INTO {target} ({columns}) VALUES ({marks})", rows)
        return
    types = [_copy_type(table.c[name].type) for name in names]
    with driver.cursor() as cursor:
        with cursor.copy(
            f"COPY {target} ({columns}) FROM STDIN (FORMAT BINARY)"
        ) as copy:
            copy.set_types(types)
            write = copy.write_row
            given = 0
            for row in rows:
                write(row)
                given += 1
        assert cursor.rowcount == given, "COPY took fewer rows than it was given"


def _copy_type(column_type: sa.types.TypeEngine[Any]) -> str:
    for kind, name in _COPY_TYPES:
        if isinstance(column_type, kind):
            return name
    msg = f"no binary COPY type for {column_type!r}"
    raise TypeError(msg)


_COPY_TYPES: tuple[tuple[type, str], ...] = (
    (Instant, "int8"),
    (sa.Boolean, "bool"),
    (sa.Double, "float8"),
    (sa.Numeric, "numeric"),
    (sa.BigInteger, "int8"),
    (sa.DateTime, "timestamptz"),
    (sa.Date, "date"),
    (sa.LargeBinary, "bytea"),
    (sa.Text, "text"),
)
