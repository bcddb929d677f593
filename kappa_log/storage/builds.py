"""Builds: one table and one cursor each, and the view on the live one.

Rows and cursor of a build are written in one transaction, and the cursor moves by
compare-and-set, so a table always holds exactly the fold of the log up to its cursor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import CursorConflict, NotFound, StorageError, message_of
from kappa_log.events import Position, from_micros, in_utc, to_micros
from kappa_log.fingerprint import Fingerprints
from kappa_log.fold import Projection
from kappa_log.keys import SHARDS
from kappa_log.storage.database import Database, driver_connection
from kappa_log.storage.schema import Big, Instant

POSITION_COLUMN = "_position"


class ColumnLayout(msgspec.Struct, frozen=True):
    """A column of a build as it was made, readable without the code that made it."""

    name: str
    kind: str
    nullable: bool


class Layout(msgspec.Struct, frozen=True):
    """The columns of a build: its key's, then its state's."""

    keys: tuple[ColumnLayout, ...]
    fields: tuple[ColumnLayout, ...]

    @property
    def names(self) -> list[str]:
        """Names of all columns but the system's."""
        return [c.name for c in (*self.keys, *self.fields)]


class Mixed(msgspec.Struct, frozen=True):
    """What a build made by a replay with a start took over unfolded."""

    base_build: int
    from_position: Position
    head: Position


class Build(msgspec.Struct, frozen=True):
    """One build as it is stored."""

    id: int
    projection: str
    number: int
    version: int
    role: str
    cursor: Position
    fingerprints: Fingerprints
    layout: Layout
    mixed: Mixed | None
    unkeyed: int
    created_at: datetime
    updated_at: datetime

    @property
    def label(self) -> str:
        """Projection and number, for messages."""
        return f"{self.projection} build {self.number}"


class NewBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What a build begins with."""

    role: str
    """live, shadow or side."""
    cursor: Position = 0
    """Where its fold begins."""
    mixed: Mixed | None = None
    """For a replay with a start: what it takes over."""
    unkeyed: int = 0
    """How many events up to the cursor have no key."""
    sharded: bool = False
    """Whether its shards have cursors of their own while it is filled, from ORIGIN."""


class Move(msgspec.Struct, frozen=True):
    """A move of a build's cursor."""

    old: Position
    """Where its runner last saw it."""
    new: Position
    unkeyed: int = 0
    """How many events between the two have no key."""


def layout_of(projection: Projection) -> Layout:
    """Return the layout that builds of a projection have."""
    return Layout(
        keys=tuple(
            ColumnLayout(c.name, c.kind, nullable=False)
            for c in projection.key_shape.columns
        ),
        fields=tuple(
            ColumnLayout(c.name, c.kind, c.nullable)
            for c in projection.state_shape.columns
        ),
    )


def view_name(database: Database, projection: str) -> str:
    """Return the name of a projection's read model."""
    return f"{database.prefix}view_{projection}"


def table_of(database: Database, build: Build) -> sa.Table:
    """Return the table of a build."""
    return _table(database, build.projection, build.number, build.layout)


def create(
    connection: sa.Connection,
    database: Database,
    projection: Projection,
    new: NewBuild,
    now: datetime,
) -> Build:
    """Make a new build: its number, its row, its empty table."""
    number = _next_number(connection, database, projection.name, now)
    layout = layout_of(projection)
    table = database.tables.builds
    identifier = connection.execute(
        table.insert()
        .values(
            projection=projection.name,
            number=number,
            version=projection.version,
            role=new.role,
            cursor=new.cursor,
            fingerprints=_to_text(projection.fingerprints),
            layout=_to_text(layout),
            mixed=None if new.mixed is None else _to_text(new.mixed),
            unkeyed=new.unkeyed,
            created_at=now,
            updated_at=now,
        )
        .returning(table.c.id)
    ).scalar_one()
    if new.sharded:
        connection.execute(
            database.tables.shards.insert(),
            [
                {"build_id": identifier, "shard": shard, "cursor": 0}
                for shard in range(SHARDS)
            ],
        )
    _table(database, projection.name, number, layout).create(connection)
    return get(connection, database, projection.name, number)


def _next_number(
    connection: sa.Connection, database: Database, projection: str, now: datetime
) -> int:
    """Take a projection's next build number, making the projection known."""
    projections = database.tables.projections
    number: int | None = connection.scalar(
        sa.select(projections.c.next_build)
        .where(projections.c.name == projection)
        .with_for_update()
    )
    if number is None:
        number = 1
        connection.execute(
            projections.insert().values(name=projection, next_build=2, created_at=now)
        )
    else:
        connection.execute(
            projections.update()
            .where(projections.c.name == projection)
            .values(next_build=number + 1)
        )
    return number


def get(
    connection: sa.Connection, database: Database, projection: str, number: int
) -> Build:
    """Return a build by its number, or raise NotFound."""
    found = [
        build
        for build in of(connection, database, projection)
        if build.number == number
    ]
    if not found:
        what = f"{projection} build"
        raise NotFound(what, number)
    return found[0]


def of(
    connection: sa.Connection, database: Database, projection: str | None = None
) -> list[Build]:
    """Return the builds of one projection, or of all, by name and number."""
    table = database.tables.builds
    query = sa.select(table).order_by(table.c.projection, table.c.number)
    if projection is not None:
        query = query.where(table.c.projection == projection)
    return [
        Build(
            id=row.id,
            projection=row.projection,
            number=row.number,
            version=row.version,
            role=row.role,
            cursor=row.cursor,
            fingerprints=msgspec.json.decode(row.fingerprints, type=Fingerprints),
            layout=msgspec.json.decode(row.layout, type=Layout),
            mixed=None
            if row.mixed is None
            else msgspec.json.decode(row.mixed, type=Mixed),
            unkeyed=row.unkeyed,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )
        for row in connection.execute(query)
    ]


def in_role(
    connection: sa.Connection, database: Database, projection: str, role: str
) -> Build | None:
    """Return the projection's live or retired build, if it has one."""
    found = [b for b in of(connection, database, projection) if b.role == role]
    return found[0] if found else None


def lock_cursor(
    connection: sa.Connection, database: Database, build: Build
) -> Position | None:
    """Return a build's cursor, locked until the end; None if the build is gone."""
    table = database.tables.builds
    return connection.scalar(
        sa.select(table.c.cursor).where(table.c.id == build.id).with_for_update()
    )


def move_cursor(
    connection: sa.Connection,
    database: Database,
    build: Build,
    move: Move,
    now: datetime,
) -> None:
    """Move a build's cursor from where its runner last saw it.

    Two runners may both have folded the events after ``move.old``, but only one finds
    the cursor there: the other raises CursorConflict and its rows roll back.
    """
    table = database.tables.builds
    result = connection.execute(
        table.update()
        .where(
            table.c.id == build.id,
            table.c.cursor == move.old,
            # A build that was promoted or retired meanwhile has another runner.
            table.c.role == build.role,
        )
        .values(
            cursor=move.new,
            unkeyed=table.c.unkeyed + move.unkeyed,
            updated_at=now,
        )
    )
    if result.rowcount != 1:
        msg = (
            f"another process moved {build.label} from position {move.old}; "
            "nothing of this batch was kept"
        )
        raise CursorConflict(msg)


def move_shards(
    connection: sa.Connection,
    database: Database,
    build: Build,
    old: Position,
    new: Position,
) -> None:
    """Move all shard cursors of a build that is being filled."""
    table = database.tables.shards
    result = connection.execute(
        table.update()
        .where(table.c.build_id == build.id, table.c.cursor == old)
        .values(cursor=new)
    )
    if result.rowcount != SHARDS:
        msg = f"the shards of {build.label} are not all at {old}"
        raise CursorConflict(msg)


def drop_shards(connection: sa.Connection, database: Database, build: Build) -> None:
    """Forget the shard cursors of a build whose filling is over."""
    table = database.tables.shards
    connection.execute(table.delete().where(table.c.build_id == build.id))


def set_role(
    connection: sa.Connection,
    database: Database,
    build: Build,
    role: str,
    now: datetime,
) -> None:
    """Give a build another role."""
    table = database.tables.builds
    connection.execute(
        table.update().where(table.c.id == build.id).values(role=role, updated_at=now)
    )


def set_fingerprints(
    connection: sa.Connection,
    database: Database,
    build: Build,
    prints: Fingerprints,
    now: datetime,
) -> None:
    """Declare that other code makes the same rows."""
    table = database.tables.builds
    connection.execute(
        table.update()
        .where(table.c.id == build.id)
        .values(fingerprints=_to_text(prints), updated_at=now)
    )


def drop(connection: sa.Connection, database: Database, build: Build) -> None:
    """Drop a build: its table, shard cursors and row. Its number is not used again."""
    drop_shards(connection, database, build)
    table_of(database, build).drop(connection, checkfirst=True)
    table = database.tables.builds
    connection.execute(table.delete().where(table.c.id == build.id))


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
        self._field_names = [c.name for c in build.layout.fields]
        kinds = [c.kind for c in (*build.layout.keys, *build.layout.fields)]
        self._writers = _writers(kinds, is_sqlite=self._is_sqlite)
        self._readers = _readers(kinds, is_sqlite=self._is_sqlite)
        self._table = table_of(database, build)
        quote = database.engine.dialect.identifier_preparer.quote
        self._target = quote(self._table.name)
        self._quoted_keys = [quote(name) for name in self._key_names]
        self._quoted = [quote(n) for n in (*self._key_names, *self._field_names)]
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
        self,
        connection: sa.Connection,
        changed: Mapping[Any, tuple[Any, Position]],
        *,
        is_empty: bool = False,
    ) -> None:
        """Write key → (state or None, position); None deletes the row.

        Args:
            connection: Write transaction.
            changed: What the fold changed.
            is_empty: The table is known to have no rows, so they can be copied in.
        """
        keys, values = self._keys.values, self._shape.values
        kept: list[list[Any]] = []
        gone: list[list[Any]] = []
        for key, (state, position) in changed.items():
            if state is None:
                gone.append(keys(key))
            else:
                kept.append([*keys(key), *values(state), position])
        self._convert(kept, len(self._quoted))
        if gone and not is_empty:
            self._delete(connection, gone)
        if not kept:
            return
        if is_empty:
            self._copy(connection, kept)
        else:
            self._upsert(connection, kept)

    def _convert(self, rows: list[list[Any]], width: int) -> None:
        """Make the first values of each row what the driver takes."""
        for index, write in self._writers:
            if index < width:
                for row in rows:
                    if row[index] is not None:
                        row[index] = write(row[index])

    def delete(self, connection: sa.Connection, keys: Iterable[Any]) -> None:
        """Delete the rows of these keys."""
        self._delete(connection, [self._keys.values(key) for key in keys])

    def _copy(self, connection: sa.Connection, rows: list[list[Any]]) -> None:
        driver = driver_connection(connection)
        columns = ", ".join((*self._quoted, f'"{POSITION_COLUMN}"'))
        rows.sort()
        if self._is_sqlite:
            marks = ", ".join("?" * (len(self._quoted) + 1))
            driver.executemany(
                f"INSERT INTO {self._target} ({columns}) VALUES ({marks})", rows
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

    def _upsert(self, connection: sa.Connection, rows: list[list[Any]]) -> None:
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

    def _delete(self, connection: sa.Connection, rows: list[list[Any]]) -> None:
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

    def _chunks(self, keys: Iterable[Any]) -> Iterable[list[list[Any]]]:
        width = len(self._quoted_keys)
        size = _SQLITE_VARIABLES // width if self._is_sqlite else _ARRAY_ROWS
        rows = [self._keys.values(key) for key in keys]
        self._convert(rows, width)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _wanted(self, rows: list[list[Any]]) -> tuple[str, list[Any]]:
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


def plain_rows(
    connection: sa.Connection,
    database: Database,
    build: Build,
    *,
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> Iterable[dict[str, Any]]:
    """Yield a build's rows as plain values by column name, in key order.

    JSON columns come parsed; whoever prints them decides how.

    Args:
        connection: Open transaction.
        database: The log.
        build: Which build.
        where: Column name → value, of key columns.
        limit: Most rows to yield; None yields all.
    """
    table = table_of(database, build)
    names = build.layout.names
    query = sa.select(*(table.c[name] for name in names)).order_by(
        *(table.c[key.name] for key in build.layout.keys)
    )
    for name, value in (where or {}).items():
        query = query.where(table.c[name] == value)
    if limit is not None:
        query = query.limit(limit)
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
    names = [*old.layout.names, POSITION_COLUMN]
    result = connection.execute(
        target.insert().from_select(names, sa.select(*(source.c[n] for n in names)))
    )
    return result.rowcount


def column_type(kind: str, *, is_key: bool = False) -> sa.types.TypeEngine[Any]:
    """Return the SQL type of a kind of column on both databases."""
    if is_key and kind == "str":
        # Byte order is what SQLite and Python sort by; a locale's is not.
        return sa.Text(collation="C").with_variant(sa.Text(), "sqlite")
    return _TYPES[kind]


def _table(
    database: Database, projection: str, number: int, layout: Layout
) -> sa.Table:
    name = f"{database.prefix}build_{projection}_{number}"
    keys = [
        sa.Column(c.name, column_type(c.kind, is_key=True), nullable=False)
        for c in layout.keys
    ]
    fields = [
        sa.Column(c.name, column_type(c.kind), nullable=c.nullable)
        for c in layout.fields
    ]
    return sa.Table(
        name,
        sa.MetaData(),
        *keys,
        *fields,
        sa.Column(POSITION_COLUMN, Big, nullable=False),
        sa.PrimaryKeyConstraint(*(c.name for c in layout.keys)),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def _to_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_ARRAY_ROWS = 20_000
_SQLITE_VARIABLES = 20_000

_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "int": Big,
    "float": sa.Double().with_variant(sa.REAL(), "sqlite"),
    "decimal": sa.Numeric().with_variant(sa.Text(), "sqlite"),
    "str": sa.Text(),
    "bool": sa.Boolean().with_variant(sa.Integer(), "sqlite"),
    "bytes": sa.LargeBinary(),
    "date": sa.Date().with_variant(sa.Text(), "sqlite"),
    "datetime": Instant(),
    "enum": sa.Text(),
    "json": sa.Text(),
}

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
            "datetime": from_micros,
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


def shard_cursor(
    connection: sa.Connection, database: Database, build: Build
) -> Position:
    """Return how far the filling of a build is: the lowest of its shards' cursors."""
    table = database.tables.shards
    query = sa.select(sa.func.min(table.c.cursor)).where(table.c.build_id == build.id)
    return connection.scalar(query) or 0
