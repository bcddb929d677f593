"""Arrow: what the tables hold as record batches, column by column.

A reader asks for some columns and gets just these, in the types that `columns` says,
the same on both databases. Events are read a span of positions at a time, each in a
transaction of its own: they never change, so nothing holds a snapshot open for them.
Other tables are small, and are read whole in one snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from kappa_log.arrow import EVENT_KINDS, MAX_DECIMAL_DIGITS, TYPES, array
from kappa_log.errors import StorageError
from kappa_log.events import Position
from kappa_log.storage import builds, lists, log
from kappa_log.storage.builds import Build, table_of
from kappa_log.storage.database import Database, driver_connection
from kappa_log.storage.log import LogReader
from kappa_log.storage.schema import Instant

BATCH_ROWS = 20_000
"""Rows of a batch: what is in memory twice while it is converted."""

_VIEW_KINDS = {
    "position": "int",
    "source": "str",
    **{name: kind for name, kind in EVENT_KINDS.items() if name != "source_id"},
}

EVENTS_SCHEMA = pa.schema([(n, TYPES[k]) for n, k in _VIEW_KINDS.items()])
"""Columns of an event as people look at it: with its source's name for the id."""


class EventSource:
    """The events of the log up to its head, as they are when they are read."""

    name = "events"
    schema = EVENTS_SCHEMA

    def __init__(self, database: Database) -> None:
        """Prepare; nothing is read."""
        self._database = database

    def head(self) -> Position:
        """Return the position of the head."""
        with self._database.read() as connection:
            return log.head(connection, self._database).position

    def batches(
        self, names: Sequence[str], spans: Iterable[tuple[Position, Position]]
    ) -> Iterator[pa.RecordBatch]:
        """Yield some columns of the events in spans (after, upto] of positions."""
        database, schema = self._database, _part(self.schema, names)
        reader = LogReader(database)
        wanted = ["source_id" if name == "source" else name for name in names]
        sources: dict[int, str] = {}
        for after, upto in spans:
            found = dict(zip(wanted, reader.raw(wanted, after, upto), strict=True))
            ids = found.get("source_id", ())
            if not sources.keys() >= set(ids):
                with database.read() as connection:
                    sources = lists.sources(connection, database)
            if ids:
                found["source_id"] = [sources[i] for i in ids]
            yield pa.RecordBatch.from_arrays(
                [
                    array(
                        _VIEW_KINDS[name], found[column], is_sqlite=database.is_sqlite
                    )
                    for name, column in zip(names, wanted, strict=True)
                ],
                schema=schema,
            )


class TableSource:
    """One of the engine's small tables, with the source's name for its id."""

    def __init__(
        self, database: Database, table: sa.Table, kinds: Mapping[str, str]
    ) -> None:
        """Prepare; nothing is read.

        Args:
            database: The log.
            table: Which table.
            kinds: Kinds of columns that their SQL types do not tell; "" hides one.
        """
        self.name = table.name.removeprefix(database.prefix)
        self._database = database
        self._table = table
        every = {c.name: kinds.get(c.name, _kind_of(c)) for c in table.columns}
        self._kinds = {
            ("source" if n == "source_id" else n): ("str" if n == "source_id" else k)
            for n, k in every.items()
            if k
        }
        self.schema = pa.schema([(n, TYPES[k]) for n, k in self._kinds.items()])

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of all rows, as one snapshot has them."""
        table, sources = self._table, self._database.tables.sources
        columns = [
            sources.c.name if name == "source" else table.c[name] for name in names
        ]
        query = sa.select(*columns).select_from(table.join(sources))
        return _whole(self._database, query, names, self._kinds, self.schema, {})


class BuildSource:
    """The rows of a projection: those of the build that is live when they are read."""

    def __init__(self, database: Database, build: Build) -> None:
        """Look how wide its decimals are; no other column is read."""
        self.name = build.projection
        self._database = database
        self._layout = build.layout
        columns = (*build.layout.keys, *build.layout.fields)
        self._kinds = {c.name: c.kind for c in columns}
        self._scales = _scales(database, build)
        self.schema = pa.schema(
            [(name, self._type_of(name, kind)) for name, kind in self._kinds.items()]
        )

    def _type_of(self, name: str, kind: str) -> pa.DataType:
        if kind != "decimal":
            return TYPES[kind]
        scale = self._scales[name]
        if scale is None:
            return pa.string()
        return pa.decimal128(MAX_DECIMAL_DIGITS, scale)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of all rows, as one snapshot has them.

        Raises:
            StorageError: Another build with other columns is live by now.
        """
        database = self._database
        with database.read() as connection:
            live = builds.in_role(connection, database, self.name, "live")
        if live is None or live.layout != self._layout:
            msg = (
                f"the columns of '{self.name}' changed since this connection was "
                "opened; open another"
            )
            raise StorageError(msg)
        table = table_of(database, live)
        query = sa.select(*(table.c[name] for name in names))
        return _whole(database, query, names, self._kinds, self.schema, self._scales)


def _whole(
    database: Database,
    query: sa.Select[Any],
    names: Sequence[str],
    kinds: Mapping[str, str],
    schema: pa.Schema,
    scales: Mapping[str, int | None],
) -> Iterator[pa.RecordBatch]:
    """Return all batches of a query, read before the first is given.

    Who reads them may stop halfway, or take its time: no snapshot waits for it.
    """
    part = _part(schema, names)
    found = []
    with database.read() as connection:
        for rows in _driver_rows(database, connection, query):
            columns = zip(*rows, strict=True)
            arrays = [
                _converted(database, name, kinds[name], values, scales.get(name))
                for name, values in zip(names, columns, strict=True)
            ]
            found.append(pa.RecordBatch.from_arrays(arrays, schema=part))
    return iter(found)


def _converted(
    database: Database,
    name: str,
    kind: str,
    values: Sequence[Any],
    scale: int | None,
) -> pa.Array:
    try:
        return array(kind, values, is_sqlite=database.is_sqlite, scale=scale)
    except pa.ArrowInvalid as error:
        if kind != "decimal":
            raise
        msg = (
            f"column '{name}' has more digits by now than when this connection was "
            f"opened ({error}); open another"
        )
        raise StorageError(msg) from error


def _driver_rows(
    database: Database, connection: sa.Connection, query: sa.Select[Any]
) -> Iterator[list[Any]]:
    """Yield the rows of a query as the driver gives them, some at a time."""
    text = str(query.compile(database.engine))
    driver = driver_connection(connection)
    if database.is_sqlite:
        cursor = driver.execute(text)
        while rows := cursor.fetchmany(BATCH_ROWS):
            yield rows
        return
    with driver.cursor("arrow", binary=True) as cursor:
        cursor.execute(text)
        while rows := cursor.fetchmany(BATCH_ROWS):
            yield rows


def _part(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names])


def _kind_of(column: sa.Column[Any]) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (Instant, "datetime"),
        (sa.Integer, "int"),
        (sa.LargeBinary, "bytes"),
        (sa.Text, "str"),
    )
    return next(kind for of, kind in kinds if isinstance(column.type, of))


def _scales(database: Database, build: Build) -> dict[str, int | None]:
    """Return how many digits behind the point each decimal column needs.

    None for one that has more digits than any decimal of DuckDB: it is text then.
    """
    names = [c.name for c in build.layout.fields if c.kind == "decimal"]
    if not names:
        return {}
    table = table_of(database, build)
    digits = [_digits(table.c[name], is_sqlite=database.is_sqlite) for name in names]
    query = sa.select(*(sa.func.max(part) for pair in digits for part in pair))
    with database.read() as connection:
        found = [value or 0 for value in connection.execute(query).one()]
    pairs = zip(names, found[::2], found[1::2], strict=True)
    return {
        name: fraction if whole + fraction <= MAX_DECIMAL_DIGITS else None
        for name, whole, fraction in pairs
    }


def _digits(
    column: sa.Column[Any], *, is_sqlite: bool
) -> tuple[sa.ColumnElement[int], sa.ColumnElement[int]]:
    """Return how many digits stand before and behind a decimal's point."""
    text: Any = sa.cast(column, sa.Text)
    point: Callable[..., Any] = sa.func.instr if is_sqlite else sa.func.strpos
    bare = sa.func.replace(text, "-", "")
    at = point(bare, ".")
    length = sa.func.length(bare)
    whole = sa.case((at > 0, at - 1), else_=length)
    return whole, sa.case((at > 0, length - at), else_=0)


TABLE_KINDS: Mapping[str, Mapping[str, str]] = {
    "failures": {
        "headers": "headers",
        "message_id": "hex",
        "parked": "bool",
        "park_id": "",
        "metadata": "",
    },
    "checkpoints": {"head": "hex"},
    "duplicates": {"headers": "headers"},
}
"""Tables to look at beside the events, and what their SQL types do not tell."""


def small_tables(database: Database) -> list[TableSource]:
    """Return the sources of the tables that people look at beside the events."""
    return [
        TableSource(database, getattr(database.tables, name), kinds)
        for name, kinds in TABLE_KINDS.items()
    ]
