"""Migrations: up, down and up again, on both databases, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op

from kappa_log import Event, KappaLog, projection
from kappa_log.config import load_config
from kappa_log.errors import StorageError
from kappa_log.storage import migrations
from kappa_log.storage.database import Database
from kappa_log.storage.schema import REVISION
from support.logs import open_log, tables


@projection(topics=["things"], version=1)
def counter(state: int | None, _event: Event) -> int | None:
    """Count the events of an entity."""
    return (state or 0) + 1


def used(url: str, folder: Path) -> KappaLog:
    """Return a log with an event, a build and a replay in it."""
    file = folder / "things.jsonl"
    file.write_text("1\n2\n")
    app = open_log(url, folder, counter)
    app.ingest(file, topic="things")
    app.project()
    app.replay("counter")
    return app


def test_up_down_and_up_again(database_url: str, tmp_path: Path) -> None:
    """Down takes all that is ours, builds and views too; up makes it as it was.

    SEED D5, D6.
    """
    with used(database_url, tmp_path) as app:
        engine_tables = set(app.database.tables.metadata.tables)
        assert engine_tables < set(tables(app))

        app.downgrade_database("base")

        assert tables(app) == ["kappa_log_alembic_version"]
        assert app.database_state().verdict == "empty"
        assert app.create_database() is True
        assert app.database_state().verdict == "current"
        assert set(tables(app)) == engine_tables | {"kappa_log_alembic_version"}
        assert app.head().position == 0
        app.upgrade_database()
        assert app.verify().ok


def test_migrations_make_what_the_schema_says(
    database_url: str, tmp_path: Path
) -> None:
    """Builds and users' tables are none of Alembic's business."""
    with used(database_url, tmp_path) as app:
        with app.database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE notes (id INTEGER)")

        assert migrations.drift(app.database) == []


def test_a_difference_to_the_schema_is_found(database_url: str, tmp_path: Path) -> None:
    """Else the test before would prove nothing."""
    with used(database_url, tmp_path) as app:
        with app.database.write() as connection:
            connection.exec_driver_sql("DROP INDEX kappa_log_events_message_id")

        assert migrations.drift(app.database) != []


def test_both_ways_of_making_tables_have_the_same_parts(
    database_url: str, tmp_path: Path
) -> None:
    """Columns with types and nullability, keys, indexes and checks, table by table."""
    made = Database(database_url, "made_")
    with made.write() as connection:
        made.tables.metadata.create_all(connection)
    app = open_log(database_url, tmp_path)
    kind = "sqlite" if made.is_sqlite else "postgresql"

    def where(index: Any) -> str:
        return str(index.get("dialect_options", {}).get(f"{kind}_where"))

    def parts(database: Database) -> dict[str, Any]:
        found = sa.inspect(database.engine)
        strip = database.prefix
        return {
            name.removeprefix(strip): repr(
                [
                    [
                        (c["name"], str(c["type"]), c["nullable"])
                        for c in found.get_columns(name)
                    ],
                    found.get_pk_constraint(name)["constrained_columns"],
                    sorted(
                        (str(i["name"]), repr(i["column_names"]), i["unique"], where(i))
                        for i in found.get_indexes(name)
                    ),
                    sorted(str(u) for u in found.get_unique_constraints(name)),
                    sorted(str(c) for c in found.get_check_constraints(name)),
                    sorted(
                        str(f["constrained_columns"])
                        for f in found.get_foreign_keys(name)
                    ),
                ]
            ).replace(strip, "")
            for name in database.tables.metadata.tables
        }

    assert parts(app.database) == parts(made)
    made.dispose()
    app.close()


def test_the_code_knows_the_newest_revision(sqlite_url: str) -> None:
    """And history tells which one the database has."""
    database = Database(sqlite_url)
    newest = migrations.history(database)[-1]
    assert newest.revision == REVISION
    assert not newest.is_current

    migrations.create(database)

    assert migrations.history(database)[-1].is_current
    assert migrations.history(database)[0].down_revision is None
    assert all(step.title for step in migrations.history(database))
    database.dispose()


def test_another_prefix_is_another_log(database_url: str, tmp_path: Path) -> None:
    """SEED D1: two logs may share a database; dropping one leaves the other."""
    with used(database_url, tmp_path) as app:
        before = tables(app)
        other = KappaLog(
            config=load_config(
                tmp_path, {"database.url": database_url, "database.prefix": "other_"}
            ),
            projections=[counter],
        )
        assert other.database_state().verdict == "empty"
        other.create_database()
        other.ingest(tmp_path / "things.jsonl", topic="things")
        other.project()
        assert migrations.drift(other.database) == migrations.drift(app.database) == []
        assert "other_view_counter" in tables(app)

        assert other.drop_database() is True

        assert tables(app) == before
        assert app.verify().ok
        other.close()


class Interrupted(Exception):
    """As a kill in the middle of a migration."""


@pytest.mark.parametrize("way", ["up", "down"])
def test_an_interrupted_migration_leaves_the_old_state(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """On SQLite too, whose drivers like to commit at each CREATE TABLE."""
    with open_log(database_url, tmp_path) as app:
        if way == "up":
            app.drop_database()
        before = tables(app)
        calls: list[str] = []
        name = {"up": "create_table", "down": "drop_table"}[way]
        real = getattr(op, name)

        def interrupt(table: str, *arguments: Any, **options: Any) -> Any:
            calls.append(table)
            if len(calls) == 5:
                raise Interrupted
            return real(table, *arguments, **options)

        monkeypatch.setattr(op, name, interrupt)
        move = app.create_database if way == "up" else app.downgrade_database
        with pytest.raises(Interrupted):
            move()

        assert len(calls) == 5
        assert tables(app) == before
        assert app.database_state().verdict == ("empty" if way == "up" else "current")
        monkeypatch.undo()
        move()
        assert app.database_state().verdict == ("current" if way == "up" else "empty")


def test_creating_twice_changes_nothing(database_url: str, tmp_path: Path) -> None:
    """Nor does upgrading what is current."""
    with used(database_url, tmp_path) as app:
        head, before = app.head(), tables(app)

        assert app.create_database() is False
        app.upgrade_database()

        assert app.head() == head
        assert tables(app) == before


def test_dropping_leaves_other_tables(database_url: str, tmp_path: Path) -> None:
    """Only what is ours goes; a SQLite file with nothing else in it goes too."""
    with used(database_url, tmp_path) as app:
        with app.database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE kappa_notes (id INTEGER)")
            connection.exec_driver_sql("INSERT INTO kappa_notes VALUES (7)")

        assert app.drop_database() is True
        assert app.drop_database() is False

        assert tables(app) == ["kappa_notes"]
        with app.database.write() as connection:
            assert (
                connection.exec_driver_sql("SELECT id FROM kappa_notes").scalar() == 7
            )
            connection.exec_driver_sql("DROP TABLE kappa_notes")
        app.create_database()
        app.drop_database()
        assert not (tmp_path / "log.db").exists()


def test_a_file_that_somebody_has_open_is_emptied_and_stays(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Unlinked, it would take in what that process writes next, and be gone with it."""
    with used(sqlite_url, tmp_path) as app, open_log(sqlite_url, tmp_path) as other:
        assert other.head().position == 2

        app.reset_database()

        other.ingest(tmp_path / "things.jsonl", topic="things")
        assert app.head().position == 2
        app.drop_database()
        assert tables(other) == []
        other.close()
        app.create_database()
        app.drop_database()
        assert not (tmp_path / "log.db").exists()


def test_dropping_after_going_down_leaves_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """Not even the table that says that there is nothing."""
    with used(database_url, tmp_path) as app:
        app.downgrade_database("base")

        app.drop_database()

        assert tables(app) == []


def test_resetting_empties_a_log(database_url: str, tmp_path: Path) -> None:
    """And build numbers begin again: it is another log."""
    with used(database_url, tmp_path) as app:
        app.reset_database()

        assert app.head().position == 0
        assert app.projection("counter").builds == []


@pytest.mark.parametrize("revision", ["7777", "nonsense", "-x", "+1"])
def test_a_revision_that_is_not_there_is_said_so(
    database_url: str, tmp_path: Path, revision: str
) -> None:
    """Nothing is changed."""
    with used(database_url, tmp_path) as app:
        for move in (app.upgrade_database, app.downgrade_database):
            with pytest.raises(StorageError, match=r"migration failed.*not changed"):
                move(revision)

        assert app.verify().ok
