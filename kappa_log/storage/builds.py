"""Builds: one table and one cursor each, and the view on the live one.

Rows and cursor of a build are written in one transaction, and the cursor moves by
compare-and-set, so a table always holds exactly the fold of the log up to its cursor.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import CursorConflict, NotFound
from kappa_log.events import Position
from kappa_log.fingerprint import Fingerprints
from kappa_log.fold import Projection
from kappa_log.keys import SHARDS
from kappa_log.storage.database import Database
from kappa_log.storage.schema import Big, Instant

POSITION_COLUMN = "_position"


class ColumnLayout(msgspec.Struct, frozen=True):
    """A column of a build as it was made, readable without the code that made it."""

    name: str
    kind: str
    nullable: bool
    magnitude: str | None = None
    """Of a sum of floats: the hidden column with the sum of their absolute values,
    which says how far two sums of the same numbers may differ."""


class Layout(msgspec.Struct, frozen=True):
    """The columns of a build: its key's, then its state's."""

    keys: tuple[ColumnLayout, ...]
    fields: tuple[ColumnLayout, ...]

    @property
    def names(self) -> list[str]:
        """Names of all columns but the system's and the hidden ones."""
        return [c.name for c in (*self.keys, *self.fields)]

    @property
    def stored(self) -> list[ColumnLayout]:
        """All columns but the system's: keys, fields, and the hidden ones."""
        hidden = [
            ColumnLayout(c.magnitude, "float", nullable=True)
            for c in self.fields
            if c.magnitude is not None
        ]
        return [*self.keys, *self.fields, *hidden]


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
    epoch: int
    """How often rows were changed by something else than folding on."""
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
    shape = projection.state_shape
    hidden = shape.magnitudes.values()
    return Layout(
        keys=tuple(
            ColumnLayout(c.name, c.kind, nullable=False)
            for c in projection.key_shape.columns
        ),
        fields=tuple(
            ColumnLayout(c.name, c.kind, c.nullable, shape.magnitudes.get(c.name))
            for c in shape.columns
            if c.name not in hidden
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
            fingerprints=to_text(projection.fingerprints),
            layout=to_text(layout),
            mixed=None if new.mixed is None else to_text(new.mixed),
            unkeyed=new.unkeyed,
            epoch=0,
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
            epoch=row.epoch,
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
            # And one whose rows were changed otherwise: what it remembers is void.
            table.c.epoch == build.epoch,
        )
        .values(
            cursor=move.new,
            unkeyed=table.c.unkeyed + move.unkeyed,
            updated_at=now,
        )
    )
    if result.rowcount != 1:
        msg = (
            f"another process worked on {build.label} at position {move.old}; "
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
        .values(fingerprints=to_text(prints), updated_at=now)
    )


def start_epoch(connection: sa.Connection, database: Database, build: Build) -> None:
    """Make runners that folded before this transaction drop what they remember.

    For whatever changes rows beside them without moving the cursor.
    """
    table = database.tables.builds
    connection.execute(
        table.update().where(table.c.id == build.id).values(epoch=table.c.epoch + 1)
    )


def drop(connection: sa.Connection, database: Database, build: Build) -> None:
    """Drop a build: its table, shard cursors, parked keys and row.

    Its number is not used again.
    """
    parked = database.tables.parked_keys
    connection.execute(parked.delete().where(parked.c.build_id == build.id))
    drop_shards(connection, database, build)
    table_of(database, build).drop(connection, checkfirst=True)
    table = database.tables.builds
    connection.execute(table.delete().where(table.c.id == build.id))


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
        for c in layout.stored[len(keys) :]
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


def to_text(value: Any) -> str:
    """Return a value as the JSON text that a column of ours keeps."""
    return msgspec.json.encode(value).decode()


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


def shard_cursor(
    connection: sa.Connection, database: Database, build: Build
) -> Position:
    """Return how far the filling of a build is: the lowest of its shards' cursors."""
    table = database.tables.shards
    query = sa.select(sa.func.min(table.c.cursor)).where(table.c.build_id == build.id)
    return connection.scalar(query) or 0
