"""Databases that are missing, old, new, busy, gone or full: nothing is half done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.pool import QueuePool

from kappa_log import Event, FieldOptions, KappaLog, projection
from kappa_log.config import MIN_CONNECTIONS, load_config
from kappa_log.errors import (
    ConfigError,
    DatabaseBusy,
    NotFound,
    ProjectionNotFound,
    RegistrationError,
    SchemaOutOfDate,
    StorageError,
    UsageError,
)
from kappa_log.storage import database as storage
from kappa_log.storage.database import Database, sqlite_module
from support.logs import execute, open_log, rows

FIELDS = FieldOptions(entity_id="id")


@projection(topics=["things"], version=1)
def counter(state: int | None, _event: Event) -> int | None:
    """Count the events of an entity."""
    return (state or 0) + 1


def write(file: Path, number: int) -> Path:
    """Write a file of that many lines, a bad one among ten; return it."""
    file.write_text(
        "".join(
            f'{{"id":"entity-{n % 7}","n":{n},"filler":"{"x" * 300}"}}\n'
            if n % 10
            else f"broken {n}\n"
            for n in range(number)
        )
    )
    return file


def nothing_of_the_batch_is_kept(app: KappaLog, lines: int, batch: int) -> None:
    """Assert that whole batches are in the log and ledger, and no part of one."""
    report = app.verify()
    assert report.ok, report.findings
    with app.database.read() as connection:
        offset = connection.scalar(sa.select(app.database.tables.offsets.c.next_offset))
        failures = connection.scalar(
            sa.select(sa.func.count()).select_from(app.database.tables.failures)
        )
    assert offset is not None
    assert offset < lines
    assert offset % batch == 0
    assert failures == offset // 10
    assert app.head().position == offset - offset // 10


def the_rest_is_ingested(app: KappaLog, file: Path, lines: int) -> None:
    """Assert that a later run finishes, each line once."""
    app.ingest(file, topic="things", fields=FIELDS)

    assert app.head().position == lines - lines // 10
    assert len(app.failures(limit=lines)) == lines // 10
    assert app.duplicates() == []
    assert app.verify().ok


# --- nothing there, something older, something newer ---------------------------

COMMANDS: dict[str, Callable[[KappaLog], object]] = {
    "head": lambda app: app.head(),
    "events": lambda app: app.events(),
    "event": lambda app: app.event(1),
    "sources": lambda app: app.sources(),
    "tail": lambda app: next(app.tail(stop=threading.Event())),
    "duplicates": lambda app: app.duplicates(),
    "admit": lambda app: app.admit(1),
    "failures": lambda app: app.failures(),
    "failure": lambda app: app.failure(1),
    "projections": lambda app: app.projections(),
    "projection": lambda app: app.projection("counter"),
    "project": lambda app: app.project(),
    "plan": lambda app: app.plan_replay("counter"),
    "replay": lambda app: app.replay("counter"),
    "resume": lambda app: app.resume(1),
    "cancel": lambda app: app.cancel(1),
    "replays": lambda app: app.replays(),
    "rows": lambda app: next(app.rows("counter")),
    "explain": lambda app: next(app.explain("counter", "a")),
    "diff": lambda app: app.diff("counter"),
    "promote": lambda app: app.promote("counter"),
    "undo": lambda app: app.undo("counter"),
    "drop": lambda app: app.drop_build("counter", 1),
    "compatible": lambda app: app.compatible("counter"),
    "verify": lambda app: app.verify(),
}


def _refused(app: KappaLog, file: Path, message: str) -> None:
    everything = COMMANDS | {"ingest": lambda app: app.ingest(file, topic="things")}
    for name, command in everything.items():
        with pytest.raises(SchemaOutOfDate, match=message) as raised:
            command(app)
        assert raised.value.wanted, name


def test_an_empty_database_names_the_command_that_helps(
    database_url: str, tmp_path: Path
) -> None:
    """Whatever is asked; and nothing is created by asking."""
    app = KappaLog(database_url, config=load_config(tmp_path), projections=[counter])

    _refused(
        app, write(tmp_path / "f", 1), "has no kappa_log tables.*kappa-log db create"
    )
    for move in (app.upgrade_database, app.downgrade_database):
        with pytest.raises(SchemaOutOfDate, match="kappa-log db create"):
            move()

    assert not (tmp_path / "log.db").exists()
    assert app.drop_database() is False
    app.close()


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("0000", "is at revision 0000, this version needs .*kappa-log db upgrade"),
        ("9999", "is at revision 9999, newer than .*install the newer kappa-log"),
    ],
)
def test_an_older_or_newer_database_names_the_command_that_helps(
    database_url: str, tmp_path: Path, revision: str, message: str
) -> None:
    """Both revisions are told; tables of another shape are not read or written."""
    with open_log(database_url, tmp_path, counter) as app:
        execute(app, f"UPDATE kappa_log_alembic_version SET version_num = '{revision}'")

        _refused(app, write(tmp_path / "f", 1), message)


def test_a_file_that_is_no_database_is_said_so(tmp_path: Path) -> None:
    """And it is not touched."""
    file = tmp_path / "notes.txt"
    file.write_text("dear diary" * 1000)
    app = KappaLog(f"sqlite:///{file}", config=load_config(tmp_path))

    with pytest.raises(StorageError, match="file is not a database"):
        app.head()
    with pytest.raises(StorageError, match="file is not a database"):
        app.create_database()

    assert file.read_text() == "dear diary" * 1000
    app.close()


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """A typo in the path makes no folders."""
    app = KappaLog(f"sqlite:///{tmp_path}/typo/log.db", config=load_config(tmp_path))

    with pytest.raises(
        StorageError, match=r"folder .*typo of the database does not exist"
    ):
        app.create_database()


def test_a_server_that_is_not_there_is_said_so_without_its_password(
    tmp_path: Path,
) -> None:
    """Messages end up in logs."""
    url = f"postgresql://me:s3cret@/log?host={tmp_path}"
    app = KappaLog(url, config=load_config(tmp_path))

    for call in (app.head, app.create_database):
        with pytest.raises(
            StorageError, match=r"cannot be used: .*run the command again"
        ) as raised:
            call()
        assert "s3cret" not in str(raised.value)


def test_a_missing_database_of_a_server_is_created(
    postgresql_url: str, tmp_path: Path
) -> None:
    """`db create` makes it; before, the message says that it is missing."""
    url = postgresql_url.replace("@/t_", "@/new_t_")
    with KappaLog(url, config=load_config(tmp_path)) as app:
        with pytest.raises(StorageError, match="kappa-log db create"):
            app.head()

        assert app.create_database() is True
        assert app.create_database() is False
        assert app.head().position == 0
    with psycopg.connect(
        postgresql_url.replace("+psycopg", ""), autocommit=True
    ) as admin:
        admin.execute(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is no URL"),
        ("mysql://localhost/log", "mysql is not supported; use sqlite or postgresql"),
        ("sqlite://", "a log needs a file"),
        ("sqlite:///:memory:", "a log needs a file"),
    ],
)
def test_a_url_of_no_log_is_a_wrong_setting(url: str, message: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigError, match=f"database url.*{message}"):
        Database(url)


@pytest.mark.parametrize("prefix", ["", "Log_", "1_", "a-b", "ä_", "a" * 11, 'x"; --'])
def test_a_prefix_of_no_table_is_a_wrong_setting(prefix: str, tmp_path: Path) -> None:
    """Names of tables fit both databases, quoted or not."""
    with pytest.raises(ConfigError, match="database prefix"):
        Database(f"sqlite:///{tmp_path}/log.db", prefix)


# --- busy ---------------------------------------------------------------------


@contextmanager
def _held(url: str) -> Iterator[None]:
    """Hold what a writer needs, as another process would."""
    if url.startswith("sqlite"):
        other = sqlite_module().connect(url.removeprefix("sqlite:///"))
        other.execute("BEGIN IMMEDIATE")
        yield
        other.rollback()
        other.close()
        return
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("SELECT * FROM kappa_log_head FOR UPDATE")
        other.execute("SELECT * FROM kappa_log_builds FOR UPDATE")
        yield
        other.rollback()


def test_a_busy_database_is_said_so_and_nothing_is_kept(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process holds it for longer than we wait; the next run finishes."""
    monkeypatch.setattr(storage, "BUSY_SECONDS", 1)
    file = write(tmp_path / "f", 50)
    with open_log(database_url, tmp_path, counter, batch_size=20) as app:
        app.project()
        with _held(database_url):
            with pytest.raises(
                DatabaseBusy, match=r"held by another process.*try again"
            ):
                app.ingest(file, topic="things", fields=FIELDS)
            assert app.head().position == 0

        the_rest_is_ingested(app, file, 50)
        with _held(database_url), pytest.raises(DatabaseBusy):
            app.project()
        assert rows(app, "counter") == []
        app.project()
        assert sum(row["value"] for row in rows(app, "counter")) == 45


@pytest.fixture
def small(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A log's database to which a process may have two connections at once."""
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0.2)
    with KappaLog(database_url, projections=[]) as app:
        app.create_database()
    found = Database(database_url, pool_size=2)
    yield found
    found.dispose()


def test_more_work_than_connections_names_the_setting(small: Database) -> None:
    """Who asks for one more waits, then is told; SEED 12.9: the pool was too small."""
    with (
        small.read(),
        small.read(),
        pytest.raises(DatabaseBusy, match=r"all 2 connections.*database\.pool_size"),
        small.read(),
    ):
        pass

    with small.read(), small.read() as other:
        assert other.scalar(sa.select(1)) == 1


def test_each_consumer_has_its_connections(database_url: str, tmp_path: Path) -> None:
    """SEED G3, G4: a pool for all that the listeners can use, and some more."""
    settings = {
        "listeners": [
            {"topic": topic, "group_id": "g", "handler": "h:H", "max_concurrency": 7}
            for topic in ("a", "b")
        ]
    }
    config = load_config(tmp_path, settings)
    with KappaLog(database_url, config=config, projections=[]) as app:
        app.create_database()
        assert app.database.pool_size == 20 + 2 * 7 * 3
        with ExitStack() as held:
            for _ in range(app.database.pool_size):
                held.enter_context(app.database.read())


def test_a_setting_says_how_many_connections_there_are(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEED G3: over what would be counted; SEED G6: closed, the log holds none."""
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0.05)
    config = load_config(tmp_path, {"database.pool_size": MIN_CONNECTIONS})
    app = KappaLog(database_url, config=config, projections=[])
    app.create_database()
    pool = app.database.engine.pool
    assert isinstance(pool, QueuePool)

    with ExitStack() as held:
        for _ in range(MIN_CONNECTIONS):
            held.enter_context(app.database.read())
        with (
            pytest.raises(DatabaseBusy, match=f"all {MIN_CONNECTIONS} connections"),
            app.database.read(),
        ):
            pass
    assert pool.checkedin() == MIN_CONNECTIONS

    app.close()
    assert pool.checkedin() == 0


def test_a_server_without_connections_is_said_so(postgresql_url: str) -> None:
    """It may have one again soon, so it counts as busy."""
    url = sa.make_url(postgresql_url)
    with psycopg.connect(postgresql_url.replace("+psycopg", "")) as admin:
        admin.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 0")
    try:
        database = Database(
            url.set(username="crowded").render_as_string(hide_password=False)
        )
        with (
            pytest.raises(DatabaseBusy, match=r"no connection left.*pool_size"),
            database.read(),
        ):
            pass
    finally:
        with psycopg.connect(postgresql_url.replace("+psycopg", "")) as admin:
            admin.execute("DROP ROLE crowded")


# --- gone ---------------------------------------------------------------------


class Killer:
    """Ends all other connections to a database at a chosen statement, once."""

    def __init__(self, url: str, app: KappaLog, word: str, times: int = 1) -> None:
        """Wait for the nth statement that has the word in it."""
        self.url = url.replace("+psycopg", "")
        self.left = times
        self.word = word
        sa.event.listen(app.database.engine, "after_cursor_execute", self)

    def __call__(self, *arguments: Any) -> None:
        """Look at a statement that was just run."""
        if self.word in arguments[2] and self.left:
            self.left -= 1
            if not self.left:
                self.kill()

    def kill(self) -> None:
        """End them."""
        with psycopg.connect(self.url, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.mark.parametrize(
    "word",
    ["UPDATE kappa_log_offsets", "FOR UPDATE", "INSERT INTO kappa_log_checkpoints"],
)
def test_a_connection_lost_in_a_batch_loses_the_batch_alone(
    postgresql_url: str, tmp_path: Path, word: str
) -> None:
    """Wherever in the transaction it was; the next run goes on where it was."""
    file = write(tmp_path / "f", 100)
    with open_log(postgresql_url, tmp_path, counter, batch_size=20) as app:
        killer = Killer(postgresql_url, app, word, times=3)

        with pytest.raises(StorageError, match=r"terminat|closed|cannot be used"):
            app.ingest(file, topic="things", fields=FIELDS)

        assert killer.left == 0
        nothing_of_the_batch_is_kept(app, 100, 20)
        the_rest_is_ingested(app, file, 100)


def test_a_connection_lost_in_a_fold_loses_the_flush_alone(
    postgresql_url: str, tmp_path: Path
) -> None:
    """Rows and cursor move together or not at all."""
    file = write(tmp_path / "f", 100)
    with open_log(postgresql_url, tmp_path, counter) as app:
        app.ingest(file, topic="things", fields=FIELDS)
        Killer(postgresql_url, app, "UPDATE kappa_log_builds")

        with pytest.raises(StorageError):
            app.project()

        live = app.projection("counter").live
        assert live is not None
        assert (live.cursor, live.rows) == (0, 0)
        app.project()
        assert sum(row["value"] for row in rows(app, "counter")) == 90


HANDLER = """
import psycopg
from kappa_log import Handler, ack

class Kills(Handler):
    done = False

    def consume(self, payload, metadata):
        if payload["n"] == 25 and not Kills.done:
            Kills.done = True
            with psycopg.connect("{url}", autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        return ack(payload["id"], None)
"""


def test_a_connection_lost_while_a_handler_works_costs_nothing(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transaction is open then: the batch is committed over a new connection.

    SEED H18.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "killing_handlers.py").write_text(
        HANDLER.replace("{url}", postgresql_url.replace("+psycopg", ""))
    )
    (tmp_path / "kappa_log.toml").write_text(
        '[[listeners]]\ntopic = "things"\ngroup_id = "g"\n'
        'handler = "killing_handlers:Kills"\n'
    )
    file = write(tmp_path / "f", 100)
    with open_log(postgresql_url, tmp_path, batch_size=20) as app:
        report = app.ingest(file, topic="things")

        assert (report.counts.acked, report.counts.failed) == (90, 10)
        assert app.verify().ok


# --- full ---------------------------------------------------------------------


@contextmanager
def _full(app: KappaLog, room: int) -> Iterator[None]:
    """Let a SQLite file grow by so many pages and no more."""
    app.database.dispose()

    def limit(connection: Any, _: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + room}")

    sa.event.listen(app.database.engine, "connect", limit)
    yield
    sa.event.remove(app.database.engine, "connect", limit)
    app.database.dispose()


def test_a_full_disk_loses_the_batch_alone(sqlite_url: str, tmp_path: Path) -> None:
    """The message says what to do; with space again the next run finishes."""
    file = write(tmp_path / "f", 1000)
    with open_log(sqlite_url, tmp_path, counter, batch_size=100) as app:
        with (
            _full(app, 60),
            pytest.raises(
                StorageError, match=r"disk .* is full.*free some space and run"
            ),
        ):
            app.ingest(file, topic="things", fields=FIELDS)

        assert 0 < app.head().position < 900
        nothing_of_the_batch_is_kept(app, 1000, 100)
        the_rest_is_ingested(app, file, 1000)


def test_a_full_disk_in_a_replay_leaves_the_live_build(
    sqlite_url: str, tmp_path: Path
) -> None:
    """The replay can be resumed when there is space again."""

    def replayed(version: int) -> Any:
        @projection(topics=["things"], version=version, name="wide")
        def wide(_state: str | None, event: Event) -> str | None:
            return f"{version}{event.payload['filler'] * 40}"

        return wide

    file = write(tmp_path / "f", 100)
    with open_log(sqlite_url, tmp_path, replayed(1)) as app:
        app.ingest(file, topic="things", fields=FIELDS)
        app.project()
    with open_log(sqlite_url, tmp_path, replayed(1), replayed(2)) as app:
        before = rows(app, "wide")
        with _full(app, 8), pytest.raises(StorageError, match=r"disk .* is full"):
            app.replay("wide")

        assert rows(app, "wide") == before
        for left in app.replays(unfinished=True):
            assert app.resume(left.id).promoted
        if not app.projection("wide").live or app.projection("wide").version != 2:
            app.replay("wide")
        assert rows(app, "wide")[0]["value"].startswith("2")


def test_a_full_disk_of_a_server_loses_the_batch_alone(
    postgresql_url: str, tmp_path: Path
) -> None:
    """PostgreSQL says 53100; a trigger says so here."""
    file = write(tmp_path / "f", 100)
    with open_log(postgresql_url, tmp_path, batch_size=20) as app:
        execute(
            app,
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.position > 40 THEN RAISE EXCEPTION 'could not extend file' "
            "USING ERRCODE = '53100'; END IF; RETURN NEW; END $$",
        )
        execute(
            app,
            "CREATE TRIGGER full_disk BEFORE INSERT ON kappa_log_events "
            "FOR EACH ROW EXECUTE FUNCTION full_disk()",
        )

        with pytest.raises(
            StorageError, match=r"disk .* is full.*could not extend file"
        ):
            app.ingest(file, topic="things", fields=FIELDS)

        assert app.head().position == 36
        nothing_of_the_batch_is_kept(app, 100, 20)
        execute(app, "DROP TRIGGER full_disk ON kappa_log_events")
        the_rest_is_ingested(app, file, 100)


# --- what is asked for and not there -------------------------------------------


def test_what_is_not_there_is_not_found(database_url: str, tmp_path: Path) -> None:
    """By noun and number, beyond 64 bits too; projections name those there are."""
    with open_log(database_url, tmp_path, counter) as app:
        for number in (0, -1, 1, 2**63 - 1, 2**63, 2**70):
            for noun, find in (
                ("event", app.event),
                ("failure", app.failure),
                ("duplicate", app.admit),
                ("replay", app.resume),
                ("replay", app.cancel),
            ):
                with pytest.raises(NotFound, match=f"{noun} {number} not found"):
                    find(number)
        for call in (
            lambda: app.project(["countr"]),
            lambda: app.replay("countr"),
            lambda: app.plan_replay("countr"),
            lambda: app.projection("countr"),
            lambda: next(app.rows("countr")),
            lambda: next(app.explain("countr", "a")),
            lambda: app.verify(names=["countr"]),
            lambda: app.compatible("countr"),
            lambda: app.diff("countr"),
        ):
            with pytest.raises(ProjectionNotFound, match=r"'countr' .*known: counter"):
                call()
        absent: list[tuple[Callable[[], object], str]] = [
            (lambda: app.undo("countr"), "retired build of countr"),
            (lambda: app.promote("countr"), "shadow build of countr"),
            (
                lambda: next(app.rows("counter")),
                "live build of counter.*project counter",
            ),
            (lambda: app.drop_build("counter", 7), "counter build 7"),
        ]
        for attempt, message in absent:
            with pytest.raises(NotFound, match=message):
                attempt()


def test_a_topic_of_two_groups_stops_the_projection_and_names_both(
    database_url: str, tmp_path: Path
) -> None:
    """Each event would be folded twice; groups= says which."""

    @projection(topics=["things"], version=1, groups=["b"])
    def of_b(state: int | None, _event: Event) -> int | None:
        return (state or 0) + 1

    file = write(tmp_path / "f", 30)
    with open_log(database_url, tmp_path, counter, of_b) as app:
        app.ingest(file, topic="things", group="a", fields=FIELDS)
        app.project(["counter"])
        report = app.ingest(file, topic="things", group="b", fields=FIELDS)
        assert report.counts.acked == 27  # An event per topic and group.

        for call in (
            lambda: app.project(["counter"]),
            lambda: app.replay("counter"),
            lambda: app.plan_replay("counter"),
        ):
            with pytest.raises(
                RegistrationError,
                match=r"'counter' reads topic 'things'.*'a', 'b'.*groups=",
            ):
                call()

        live = app.projection("counter").live
        assert live is not None
        assert live.cursor == 27
        app.project(["of_b"])
        assert sum(row["value"] for row in rows(app, "of_b")) == 27


def test_a_group_without_events_stops_no_projection(
    database_url: str, tmp_path: Path
) -> None:
    """A file that was not there, or had no events, doubles nothing."""
    file = write(tmp_path / "f", 30)
    (tmp_path / "bad").write_text("nonsense\n")
    with open_log(database_url, tmp_path, counter) as app:
        app.ingest(file, topic="things", fields=FIELDS)
        with pytest.raises(Exception, match="No such file"):
            app.ingest(tmp_path / "typo", topic="things", group="other", fields=FIELDS)
        app.ingest(tmp_path / "bad", topic="things", group="other", fields=FIELDS)

        assert app.project()[0].events == 27


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": "a\0"}, "topic.*NUL"),
        ({"topic": "\udcff"}, "topic.*surrogate"),
        ({"topic": "t" * 1025}, "topic.*1025 bytes"),
        ({"topic": "t", "group": "a\0"}, "group.*NUL"),
        ({"topic": "t", "group": "\udcff"}, "group.*surrogate"),
        ({"topic": "t", "group": "g" * 1025}, "group.*1025 bytes"),
        ({"topic": "t", "source": "s\0"}, "source.*NUL"),
        ({"topic": "t", "fields": FieldOptions(entity_id="a..b")}, "'a..b'"),
    ],
)
def test_names_that_no_database_takes_are_refused(
    database_url: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Before a line is read, alike on both."""
    app = KappaLog(database_url, config=load_config(tmp_path))
    with pytest.raises(UsageError, match=message):
        app.ingest(write(tmp_path / "f", 1), **options)
    app.close()
