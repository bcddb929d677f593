"""The schema as SQL text: dumped, and loaded where nothing is yet.

It holds the tables that kappa_log and the project's migrations made, and which
revisions they are at; no rows, and no builds: replays make those anew. What a
PostgreSQL schema has beside tables and indexes (functions, triggers, views) is not in
it; of SQLite all but views is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from kappa_log.errors import UsageError
from kappa_log.storage import migrations
from kappa_log.storage.database import Database
from kappa_log.storage.schema import REVISION

_NEXT = "\n\n--\n"
"""Between two statements: a trigger of SQLite has semicolons inside."""

_HEADING = re.compile(
    r"-- kappa_log schema: (?P<kind>\w+), prefix (?P<prefix>\w+), "
    r"revision (?P<at>\w+)\n"
)


def dump(database: Database) -> str:
    """Return the schema as SQL that `load`, and each database's own shell, can run.

    Raises:
        SchemaOutOfDate: The tables are not of this version.
    """
    migrations.require_current(database)
    kind = "sqlite" if database.is_sqlite else "postgresql"
    heading = (
        f"-- kappa_log schema: {kind}, prefix {database.prefix}, revision {REVISION}\n"
    )
    with database.read() as connection:
        tables = (
            _of_sqlite(connection, database)
            if database.is_sqlite
            else _of_postgresql(connection, database)
        )
        statements = [*tables, *_versions(connection, database)]
    return (
        heading
        + "".join(
            f"{_NEXT}{statement.strip().rstrip(';')};" for statement in statements
        )
        + "\n"
    )


def load(database: Database, text: str) -> None:
    """Make the tables of a dump in a database that has none of ours.

    Raises:
        UsageError: The text is no dump for this database, or there are tables.
    """
    _check(database, text)
    migrations.make_room(database)
    found = migrations.state(database)
    if found.verdict != "empty":
        msg = (
            f"{found.database} has kappa_log tables, at revision {found.found}; a "
            "schema is loaded where there is none. Nothing was changed"
        )
        raise UsageError(msg)
    with database.write() as connection:
        for statement in text.rstrip().split(_NEXT)[1:]:
            connection.exec_driver_sql(statement.replace("%", "%%"))
        migrations.begin_log(connection, database)


def _check(database: Database, text: str) -> None:
    found = _HEADING.match(text)
    if found is None:
        msg = "this is no schema that `kappa-log db dump` wrote; nothing was changed"
        raise UsageError(msg)
    kind = "sqlite" if database.is_sqlite else "postgresql"
    for name, wanted in (
        ("kind", kind),
        ("prefix", database.prefix),
        ("at", REVISION),
    ):
        if found[name] != wanted:
            msg = (
                f"the schema was dumped for {found['kind']}, prefix {found['prefix']}, "
                f"revision {found['at']}; this is {kind}, prefix {database.prefix}, "
                f"revision {REVISION}. Nothing was changed"
            )
            raise UsageError(msg)


def _is_ours_to_make(database: Database, name: str) -> bool:
    """Tell whether a table is of no build, nor the view of one."""
    made = (f"{database.prefix}build_", f"{database.prefix}view_", "sqlite_")
    return not name.startswith(made)


def _of_sqlite(connection: sa.Connection, database: Database) -> Iterator[str]:
    """Yield what SQLite itself keeps: the statements as they were."""
    rows = connection.execute(
        sa.text(
            "SELECT tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL "
            "AND type IN ('table', 'index', 'trigger') "
            "ORDER BY type = 'trigger', type = 'index', rowid"
        )
    )
    for name, statement in rows:
        if _is_ours_to_make(database, name):
            yield statement


def _of_postgresql(connection: sa.Connection, database: Database) -> Iterator[str]:
    """Yield our tables from our own schema, others as they are found."""
    ours = database.tables.metadata
    others = sa.MetaData()
    others.reflect(
        connection,
        only=lambda name, _: (
            name not in ours.tables and _is_ours_to_make(database, name)
        ),
    )
    # What others refer to was found with them: ours are there already.
    tables = [
        *ours.sorted_tables,
        *(table for table in others.sorted_tables if table.name not in ours.tables),
    ]
    for table in tables:
        for column in table.columns:
            if "nextval(" in str(getattr(column.server_default, "arg", "")):
                # Its sequence is made with the column.
                column.server_default = None
        yield str(CreateTable(table).compile(dialect=connection.dialect))
        for index in sorted(table.indexes, key=lambda found: str(found.name)):
            yield str(CreateIndex(index).compile(dialect=connection.dialect))


def _versions(connection: sa.Connection, database: Database) -> Iterator[str]:
    tables = database.tables
    inspector = sa.inspect(connection)
    for name in (tables.version_table, tables.project_version_table):
        if inspector.has_table(name):
            for at in connection.scalars(sa.text(f"SELECT version_num FROM {name}")):
                yield f"INSERT INTO {name} (version_num) VALUES ('{at}')"
