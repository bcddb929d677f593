"""Migrations: create, drop, move and judge the engine's tables, by Alembic.

The scripts are in ``migrations/`` of a checkout, or inside the installed package.
A project has its own in its ``migrations/``, one after the other, with a version table
of their own; `own` knows them. They go up after ours and down before. Each move, of
both, is one transaction on both databases: a kill leaves the old revisions.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from kappa_log.chain import HEAD_OF_NOTHING
from kappa_log.errors import SchemaOutOfDate, StorageError
from kappa_log.storage import builds
from kappa_log.storage.database import Database, DatabaseMissing
from kappa_log.storage.schema import REVISION, Tables
from kappa_log.storage.views import drop_view

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    from kappa_log.storage.own import OwnMigrations


_alembic = threading.Lock()
"""Alembic keeps its context in the process: one migration at a time."""


class RevisionFailed(Exception):
    """A project's migration raised; the transaction of all of them rolls back."""


class SchemaState(msgspec.Struct, frozen=True):
    """Which revision a database has, and which this version wants."""

    database: str
    found: str | None
    wanted: str

    @property
    def verdict(self) -> str:
        """One of: current, empty, behind, ahead."""
        if self.found is None:
            return "empty"
        if self.found == self.wanted:
            return "current"
        return "behind" if self.found < self.wanted else "ahead"


class Revision(msgspec.Struct, frozen=True):
    """One migration."""

    revision: str
    down_revision: str | None
    title: str
    is_current: bool
    owner: str = "kappa_log"
    """Whose it is: ``kappa_log``, or ``project``."""


def state(database: Database) -> SchemaState:
    """Return the state of a database's tables; a missing one is empty."""
    found = _revision(database) if database.exists() else None
    return SchemaState(database.label, found, REVISION)


def _revision(database: Database) -> str | None:
    table = database.tables.version_table
    try:
        with database.read() as connection:
            if not sa.inspect(connection).has_table(table):
                return None
            found: str | None = connection.scalar(
                sa.text(f"SELECT version_num FROM {table}")
            )
            return found
    except DatabaseMissing:
        return None


def require_current(database: Database) -> None:
    """Raise SchemaOutOfDate unless the tables are of this version."""
    current = state(database)
    if current.verdict == "current":
        return
    message = {
        "empty": "has no kappa_log tables yet; run: kappa-log db create",
        "behind": (
            f"is at revision {current.found}, this version needs {current.wanted}; "
            "run: kappa-log db upgrade"
        ),
        "ahead": (
            f"is at revision {current.found}, newer than {current.wanted}, the newest "
            "that this version knows; install the newer kappa-log, or with it run: "
            f"kappa-log db downgrade {current.wanted}"
        ),
    }[current.verdict]
    raise SchemaOutOfDate(
        current.found, current.wanted, f"the database {current.database} {message}"
    )


def create(database: Database, own: OwnMigrations | None = None) -> bool:
    """Create the database if its server lacks it, and all tables; tell whether new."""
    make_room(database)
    if state(database).verdict != "empty":
        return False
    upgrade(database, own=own)
    return True


def make_room(database: Database) -> None:
    """Create the database, without tables, if its server lacks it."""
    if database.is_sqlite:
        folder = (database.path or Path()).absolute().parent
        if not folder.is_dir():
            msg = f"the folder {folder} of the database does not exist; make it first"
            raise StorageError(msg)
    else:
        _create_postgresql(database)


def upgrade(
    database: Database, revision: str = "head", own: OwnMigrations | None = None
) -> None:
    """Move the tables up to a revision, ours or the project's; ``head`` moves both."""
    with _command(database) as (config, connection):
        from alembic import command

        is_own = own is not None and own.has(revision)
        command.upgrade(config, "head" if is_own else revision)
        begin_log(connection, database)
        if own is not None and (is_own or revision == "head"):
            own.upgrade(connection, database, revision)


def begin_log(connection: sa.Connection, database: Database) -> None:
    """Write the head of an empty log, if there is none."""
    head = database.tables.head
    if connection.scalar(sa.select(sa.func.count()).select_from(head)) == 0:
        connection.execute(
            head.insert().values(
                id=1, position=0, digest=HEAD_OF_NOTHING, erasure_epoch=0
            )
        )


def downgrade(
    database: Database, revision: str = "-1", own: OwnMigrations | None = None
) -> None:
    """Move the tables down; ``base`` removes them, builds and views too.

    The project's go first: by ``-N`` as many of them as there are, and ours by what
    is left of it; one of its revisions moves no table of ours.
    """
    with _command(database) as (config, connection):
        from alembic import command

        if own is not None:
            if own.has(revision):
                own.downgrade(connection, database, revision)
                return
            revision = own.step_down(connection, database, revision)
        target = _target(config, connection, database, revision)
        if target is None:
            _drop_builds(connection, database)
        command.downgrade(config, target or "base")


def drop(database: Database, own: OwnMigrations | None = None) -> bool:
    """Remove all that kappa_log made; other tables of the database stay.

    Returns:
        Whether there was anything. A SQLite file that holds nothing else goes too,
        unless another connection has it open.
    """
    if state(database).verdict != "empty":
        downgrade(database, "base", own)
    elif not _has_version_table(database):
        return False
    with database.write() as connection:
        for table in (
            database.tables.version_table,
            database.tables.project_version_table,
        ):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")
        left = sa.inspect(connection).get_table_names()
    if database.path is not None and not left and _is_ours_alone(database):
        for ending in ("", "-wal", "-shm"):
            Path(f"{database.path}{ending}").unlink(missing_ok=True)
        for lock in database.path.parent.glob(f"{database.path.name}.*.lock"):
            lock.unlink(missing_ok=True)
    return True


def _is_ours_alone(database: Database) -> bool:
    """Tell whether nobody else has a SQLite file open, and close our connections.

    Somebody who kept it open would go on in a file without a name, and what that one
    wrote would be lost in silence. Leaving WAL takes a lock that no other connection,
    not even an idle one, lets us have.
    """
    database.dispose()
    connection = database.engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 0")
        cursor.execute("PRAGMA journal_mode = DELETE")
    except database.driver_errors:
        return False
    finally:
        connection.invalidate()
    return True


def _has_version_table(database: Database) -> bool:
    """Tell whether Alembic was here: its table stays when all others are gone."""
    if not database.exists():
        return False
    with database.read() as connection:
        return sa.inspect(connection).has_table(database.tables.version_table)


def history(database: Database, own: OwnMigrations | None = None) -> list[Revision]:
    """Return all migrations, oldest first; a project's after ours."""
    from alembic.script import ScriptDirectory

    found = state(database).found
    script = ScriptDirectory.from_config(_config(database))
    ours = list(revisions_of(script, found))
    if own is None:
        return ours
    return ours + list(own.history(database))


def revisions_of(
    script: ScriptDirectory, found: str | None, owner: str = "kappa_log"
) -> Iterator[Revision]:
    """Yield the migrations of a folder, oldest first."""
    for step in reversed(list(script.walk_revisions())):
        down = step.down_revision
        yield Revision(
            revision=step.revision,
            down_revision=down if isinstance(down, str) else None,
            title=step.doc,
            is_current=step.revision == found,
            owner=owner,
        )


def drift(database: Database) -> list[Any]:
    """Return what differs between the database and `schema`; empty if nothing does."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.read() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": database.tables.version_table,
                "include_name": lambda name, kind, _: (
                    kind != "table" or is_engine_table(database.tables, name)
                ),
                "compare_type": True,
            },
        )
        return list(compare_metadata(context, database.tables.metadata))


def is_engine_table(tables: Tables, name: str | None) -> bool:
    """Tell whether migrations own a table: ours, but no build."""
    return name in tables.metadata.tables


def script_location() -> Path:
    """Return the folder of the migrations: of the checkout, else of the package.

    An editable install's copy goes stale, so the checkout's comes first.
    """
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "migrations"
    if (checkout / "env.py").is_file() and (
        package.parent / "pyproject.toml"
    ).is_file():
        return checkout
    return package / "_migrations"


def _config(database: Database, connection: sa.Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    config.attributes["tables"] = database.tables
    config.attributes["version_table"] = database.tables.version_table
    config.attributes["connection"] = connection
    return config


@contextlib.contextmanager
def _command(database: Database) -> Iterator[tuple[Config, sa.Connection]]:
    from alembic.util import CommandError

    try:
        with _alembic, database.write() as connection:
            if not database.is_sqlite:
                # Two who create the tables at once: the second finds them made.
                key = f"hashtext('{database.tables.version_table}')"
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({key})")
            yield _config(database, connection), connection
    except CommandError as error:
        msg = f"migration failed: {error}; the database was not changed"
        raise StorageError(msg) from error
    except RevisionFailed as error:
        raise StorageError(str(error)) from error.__cause__


def _target(
    config: Config, connection: sa.Connection, database: Database, revision: str
) -> str | None:
    """Return the revision to go down to; None for none at all."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(config)
    if revision in ("base", ""):
        return None
    if not (revision.startswith("-") and revision[1:].isdecimal()):
        return script.get_revision(revision).revision
    current: str | None = connection.scalar(
        sa.text(f"SELECT version_num FROM {database.tables.version_table}")
    )
    for _ in range(int(revision[1:])):
        step = script.get_revision(current) if current else None
        down = step.down_revision if step else None
        current = down if isinstance(down, str) else None
    return current


def _drop_builds(connection: sa.Connection, database: Database) -> None:
    for build in builds.of(connection, database):
        drop_view(connection, database, build.projection)
    for build in builds.of(connection, database):
        builds.drop(connection, database, build)


def _create_postgresql(database: Database) -> None:
    """Create the database on its server when the server says that it is missing."""
    try:
        with database.read():
            return
    except DatabaseMissing:
        pass
    name = database.url.database or ""
    engine = sa.create_engine(
        database.url.set(database="postgres"), isolation_level="AUTOCOMMIT"
    )
    try:
        with engine.connect() as connection:
            quoted = connection.dialect.identifier_preparer.quote_identifier(name)
            connection.exec_driver_sql(f"CREATE DATABASE {quoted} TEMPLATE template0")
    except sa.exc.SQLAlchemyError as error:
        text = str(getattr(error, "orig", error)).partition("\n")[0]
        msg = f"database {database.label} cannot be created: {text}"
        raise StorageError(msg) from error
    finally:
        engine.dispose()
