"""Rows: what the table of a build holds, written and read for folds and for people.

Folds get states and keys back exactly as they settled; people get plain values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from itertools import chain
from typing import Any

import sqlalchemy as sa

from kappa_log.errors import StorageError, message_of
from kappa_log.events import in_utc, kept_instant, to_micros
from kappa_log.fold import Projection, Rows
from kappa_log.storage.builds import POSITION_COLUMN, Build, table_of
from kappa_log.storage.database import Database, driver_connection

_ARRAY_ROWS = 20_000
_SQLITE_VARIABLES = 20_000
_SQLITE_ROWS = 100
"""Rows of one INSERT: twice as fast as one by one, and more would gain nothing."""


class RowStore:
    """Reads and writes the rows of one build for the fold of one projection."""

    def __init__(
        self, database: Database, build: Build, projection: Projection
    ) -> None:
        """Prepare the statements; nothing is read or written."""
        self.build = build
        self._is_sqlite = database.is_sqlite
        self._shape = projection.state_shape
        self._keys = projection.key_shape
        self._key_names = [c.name for c in build.layout.keys]
        names = [c.name for c in build.layout.stored]
        kinds = [c.kind for c in build.layout.stored]
        self._writers = _writers(kinds, is_sqlite=self._is_sqlite)
        self._readers = _readers(kinds, is_sqlite=self._is_sqlite)
        self._table = table_of(database, build)
        quote = database.engine.dialect.identifier_preparer.quote
        self._target = quote(self._table.name)
        self._quoted_keys = [quote(name) for name in self._key_names]
        self._quoted = [quote(name) for name in names]
        self._casts = [] if self._is_sqlite else [_PG_ARRAY[k] for k in kinds]

    def load_all(self, connection: sa.Connection) -> dict[Any, Any]:
        """Return key → state of all rows."""
        query = f"SELECT {', '.join(self._quoted)} FROM {self._target}"
        return self._states(self._driver_rows(connection, query, ()))

    def load(self, connection: sa.Connection, keys: Iterable[Any]) -> dict[Any, Any]:
        """Return key → state of those keys that have a row."""
        found: dict[Any, Any] = {}
        for rows in self._chunks(keys):
            source, parameters = self._wanted(rows)
            on = " AND ".join(
                f"b.{k} = w.k{n}" for n, k in enumerate(self._quoted_keys)
            )
            columns = ", ".join(f"b.{name}" for name in self._quoted)
            query = (
                f"WITH {source} SELECT {columns} "
                f"FROM w CROSS JOIN {self._target} b WHERE {on}"
            )
            found.update(self._states(self._driver_rows(connection, query, parameters)))
        return found

    def save(
        self, connection: sa.Connection, rows: Rows, *, is_empty: bool = False
    ) -> None:
        """Write rows, and delete those that are gone.

        Args:
            connection: Write transaction.
            rows: What the fold changed.
            is_empty: The table is known to have no rows, so they can be copied in.
        """
        self._convert(rows.kept, len(self._quoted))
        if rows.gone and not is_empty:
            self._delete(connection, rows.gone)
        if not rows.kept:
            return
        if is_empty:
            self._copy(connection, rows.kept)
        else:
            self._upsert(connection, rows.kept)

    def _convert(self, rows: list[Any], width: int) -> None:
        """Make the first values of each row what the driver takes."""
        writers = [(index, write) for index, write in self._writers if index < width]
        if not rows or not writers:
            return
        columns: list[Iterable[Any]] = list(zip(*rows, strict=True))
        for index, write in writers:
            columns[index] = [None if v is None else write(v) for v in columns[index]]
        rows[:] = zip(*columns, strict=True)

    def delete(self, connection: sa.Connection, keys: Iterable[Any]) -> None:
        """Delete the rows of these keys."""
        self._delete(connection, [self._keys.values(key) for key in keys])

    def _copy(self, connection: sa.Connection, rows: list[Any]) -> None:
        driver = driver_connection(connection)
        columns = ", ".join((*self._quoted, f'"{POSITION_COLUMN}"'))
        rows.sort()
        if self._is_sqlite:
            width = len(self._quoted) + 1
            marks = f"({', '.join('?' * width)})"
            size = max(1, min(_SQLITE_ROWS, _SQLITE_VARIABLES // width))
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                driver.execute(
                    f"INSERT INTO {self._target} ({columns}) "
                    f"VALUES {', '.join([marks] * len(some))}",
                    list(chain.from_iterable(some)),
                )
            return
        types = [cast.removesuffix("[]") for cast in (*self._casts, "bigint[]")]
        with (
            driver.cursor() as cursor,
            cursor.copy(
                f"COPY {self._target} ({columns}) FROM STDIN (FORMAT BINARY)"
            ) as copy,
        ):
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    def _upsert(self, connection: sa.Connection, rows: list[Any]) -> None:
        driver = driver_connection(connection)
        names = [*self._quoted, f'"{POSITION_COLUMN}"']
        changes = ", ".join(
            f"{name} = excluded.{name}" for name in names[len(self._quoted_keys) :]
        )
        into = f"INSERT INTO {self._target} ({', '.join(names)})"
        conflict = (
            f"ON CONFLICT ({', '.join(self._quoted_keys)}) DO UPDATE SET {changes}"
        )
        if self._is_sqlite:
            marks = ", ".join("?" * len(names))
            driver.executemany(f"{into} VALUES ({marks}) {conflict}", rows)
            return
        arrays = ", ".join(f"%b::{cast}" for cast in (*self._casts, "bigint[]"))
        for start in range(0, len(rows), _ARRAY_ROWS):
            columns = [
                list(c) for c in zip(*rows[start : start + _ARRAY_ROWS], strict=True)
            ]
            with driver.cursor(binary=True) as cursor:
                cursor.execute(
                    f"{into} SELECT * FROM unnest({arrays}) {conflict}", columns
                )

    def _delete(self, connection: sa.Connection, rows: list[Any]) -> None:
        driver = driver_connection(connection)
        self._convert(rows, len(self._quoted_keys))
        if self._is_sqlite:
            where = " AND ".join(f"{name} = ?" for name in self._quoted_keys)
            driver.executemany(f"DELETE FROM {self._target} WHERE {where}", rows)
            return
        on = " AND ".join(f"b.{k} = w.k{n}" for n, k in enumerate(self._quoted_keys))
        for start in range(0, len(rows), _ARRAY_ROWS):
            source, parameters = self._wanted(rows[start : start + _ARRAY_ROWS])
            with driver.cursor() as cursor:
                cursor.execute(
                    f"WITH {source} DELETE FROM {self._target} b USING w WHERE {on}",
                    parameters,
                )

    def _chunks(self, keys: Iterable[Any]) -> Iterable[list[Any]]:
        width = len(self._quoted_keys)
        size = _SQLITE_VARIABLES // width if self._is_sqlite else _ARRAY_ROWS
        rows: list[Any] = [self._keys.values(key) for key in keys]
        self._convert(rows, width)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _wanted(self, rows: list[Any]) -> tuple[str, list[Any]]:
        """Return a common table expression ``w(k0, k1 …)`` of keys, and its values."""
        width = len(self._quoted_keys)
        names = ", ".join(f"k{n}" for n in range(width))
        if self._is_sqlite:
            marks = f"({', '.join('?' * width)})"
            values = ", ".join([marks] * len(rows))
            flat = [part for row in rows for part in row]
            return f"w({names}) AS (VALUES {values})", flat
        arrays = ", ".join(f"%b::{cast}" for cast in self._casts[:width])
        columns = [list(column) for column in zip(*rows, strict=True)]
        return f"w({names}) AS (SELECT * FROM unnest({arrays}))", columns

    def _driver_rows(
        self, connection: sa.Connection, query: str, parameters: Sequence[Any]
    ) -> list[Any]:
        driver = driver_connection(connection)
        if self._is_sqlite:
            return driver.execute(query, parameters).fetchall()  # type: ignore[no-any-return]
        with driver.cursor(binary=True) as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall()  # type: ignore[no-any-return]

    def _states(self, rows: Iterable[Sequence[Any]]) -> dict[Any, Any]:
        width = len(self._quoted_keys)
        found = {}
        try:
            for row in rows:
                values = _read(row, self._readers)
                key = self._keys.build(values[:width])
                found[key] = self._shape.build(values[width:])
        except Exception as error:
            msg = (
                f"a row of {self.build.label} cannot be read back as the state that "
                f"its code declares ({message_of(error)}); it was not changed. Run: "
                f"kappa-log replay {self.build.projection}"
            )
            raise StorageError(msg) from error
        return found


def plain_rows(  # noqa: PLR0913 - each is a part of one query, by its name
    connection: sa.Connection,
    database: Database,
    build: Build,
    *,
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
    past: Mapping[str, Any] | None = None,
    offset: int = 0,
) -> Iterable[dict[str, Any]]:
    """Yield a build's rows as plain values by column name, in key order.

    JSON columns come parsed; whoever prints them decides how.

    Args:
        connection: Open transaction.
        database: The log.
        build: Which build.
        where: Column name → value, of key columns.
        limit: Most rows to yield; None yields all.
        past: Column name → value, of all key columns: only rows past that key.
        offset: Rows to pass over.
    """
    table = table_of(database, build)
    names = build.layout.names
    query = sa.select(*(table.c[name] for name in names)).order_by(
        *(table.c[key.name] for key in build.layout.keys)
    )
    for name, value in (where or {}).items():
        query = query.where(table.c[name] == value)
    if past is not None:
        keys = sa.tuple_(*(table.c[name] for name in past))
        query = query.where(keys > tuple(past.values()))
    if limit is not None:
        query = query.limit(limit)
    if offset:
        query = query.offset(offset)
    kinds = [c.kind for c in (*build.layout.keys, *build.layout.fields)]
    # Closed here, not when it is exhausted: a caller may stop after the first row.
    with connection.execution_options(yield_per=1000).execute(query) as rows:
        for row in rows:
            yield {
                name: _plain(kind, value)
                for name, kind, value in zip(names, kinds, row, strict=True)
            }


def count_rows(connection: sa.Connection, database: Database, build: Build) -> int:
    """Return the number of rows of a build."""
    query = sa.select(sa.func.count()).select_from(table_of(database, build))
    return connection.scalar(query) or 0


def copy_rows(
    connection: sa.Connection, database: Database, old: Build, new: Build
) -> int:
    """Copy all rows of one build into another of the same layout; return how many."""
    source, target = table_of(database, old), table_of(database, new)
    names = [*(c.name for c in old.layout.stored), POSITION_COLUMN]
    result = connection.execute(
        target.insert().from_select(names, sa.select(*(source.c[n] for n in names)))
    )
    return result.rowcount


_PG_ARRAY = {
    "int": "bigint[]",
    "float": "float8[]",
    "decimal": "numeric[]",
    "str": "text[]",
    "bool": "bool[]",
    "bytes": "bytea[]",
    "date": "date[]",
    "datetime": "timestamptz[]",
    "enum": "text[]",
    "json": "text[]",
}


def _writers(kinds: list[str], *, is_sqlite: bool) -> list[tuple[int, Any]]:
    """Return what to call on which column before the driver gets its values."""
    if not is_sqlite:
        return []
    calls: dict[str, Any] = {
        "bool": int,
        "decimal": str,
        "date": date.isoformat,
        "datetime": to_micros,
    }
    return [(n, calls[kind]) for n, kind in enumerate(kinds) if kind in calls]


def _readers(kinds: list[str], *, is_sqlite: bool) -> list[tuple[int, Any]]:
    """Return what to call on which column that the driver gave."""
    calls: dict[str, Any] = {"datetime": in_utc}
    if is_sqlite:
        calls = {
            "bool": bool,
            "decimal": Decimal,
            "date": date.fromisoformat,
            "datetime": kept_instant,
        }
    return [(n, calls[kind]) for n, kind in enumerate(kinds) if kind in calls]


def _read(row: Sequence[Any], readers: list[tuple[int, Any]]) -> Sequence[Any]:
    if not readers:
        return row
    values = list(row)
    for index, read in readers:
        if values[index] is not None:
            values[index] = read(values[index])
    return values


_PLAIN: dict[str, Any] = {
    "json": json.loads,
    "bool": bool,
    "bytes": bytes,
    "decimal": Decimal,
    "date": lambda value: date.fromisoformat(str(value)),
}


def _plain(kind: str, value: Any) -> Any:
    if value is None or kind not in _PLAIN:
        return value
    return _PLAIN[kind](value)
