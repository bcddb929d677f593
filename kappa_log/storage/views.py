"""Views: the read models, and the swap from one build to another.

A statement reads the old rows or the new. The view keeps its identity where its
columns stay, so prepared statements go on; where they change it is made anew, and
views that users built on it are named and the swap refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import sqlalchemy as sa

from kappa_log.errors import UsageError
from kappa_log.storage.builds import Build, table_of, view_name
from kappa_log.storage.database import Database

SWAP_SECONDS = 2
"""How long a swap waits for readers before it lets them pass and tries again."""


def limit_waiting(connection: sa.Connection, database: Database) -> None:
    """Let this transaction give way to readers soon, rather than queue others up."""
    if not database.is_sqlite:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{SWAP_SECONDS}s'")


def point_view(
    connection: sa.Connection, database: Database, build: Build, old: Build | None
) -> None:
    """Make a projection's view read a build.

    Args:
        connection: Write transaction.
        database: The log.
        build: What it shall read.
        old: What it reads now; None if there is no view yet.

    Raises:
        UsageError: Columns change and users' views depend on this one.
    """
    quote = connection.dialect.identifier_preparer.quote
    name = view_name(database, build.projection)
    columns = ", ".join(map(quote, build.layout.names))
    body = f"SELECT {columns} FROM {quote(table_of(database, build).name)}"
    is_same = old is not None and old.layout == build.layout
    if old is not None and not is_same:
        _refuse_change(connection, database, name)
    if is_same and not database.is_sqlite:
        connection.exec_driver_sql(f"CREATE OR REPLACE VIEW {quote(name)} AS {body}")
        return
    drop_view(connection, database, build.projection)
    connection.exec_driver_sql(f"CREATE VIEW {quote(name)} AS {body}")


def drop_view(connection: sa.Connection, database: Database, projection: str) -> None:
    """Drop a projection's view, if it has one."""
    quote = connection.dialect.identifier_preparer.quote
    name = quote(view_name(database, projection))
    connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")


def dependants(connection: sa.Connection, database: Database, name: str) -> list[str]:
    """Return the users' views that read one of ours, sorted."""
    found: Sequence[str]
    if database.is_sqlite:
        rows = connection.execute(
            sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'view'")
        )
        # SQLite keeps views as text. Whole words: one projection's name may begin
        # another's.
        reads = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
        found = [r.name for r in rows if r.name != name and reads.search(r.sql)]
    else:
        found = list(
            connection.scalars(
                sa.text(
                    "SELECT DISTINCT v.oid::regclass::text FROM pg_depend d "
                    "JOIN pg_rewrite r ON r.oid = d.objid "
                    "JOIN pg_class v ON v.oid = r.ev_class "
                    "WHERE d.refclassid = 'pg_class'::regclass "
                    "AND d.refobjid = to_regclass(:name) "
                    "AND v.oid <> to_regclass(:name)"
                ),
                {"name": name},
            )
        )
    return sorted(found)


def refuse_dependants(
    connection: sa.Connection, database: Database, projection: str
) -> None:
    """Raise UsageError if users' views read the view that is to be dropped."""
    found = dependants(connection, database, view_name(database, projection))
    if found:
        msg = (
            f"these views read the rows of '{projection}': {', '.join(found)}; drop "
            "them first; nothing was dropped"
        )
        raise UsageError(msg)


def _refuse_change(connection: sa.Connection, database: Database, name: str) -> None:
    found = dependants(connection, database, name)
    if found:
        msg = (
            f"the columns of {name} change, but these views read it: "
            f"{', '.join(found)}; drop them, promote, and make them again; the live "
            "build was not changed"
        )
        raise UsageError(msg)
