"""Effects: what a handler writes is in the log's database with its event, or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kappa_log.errors import (
    DatabaseBusy,
    DatabaseUnavailable,
    Fenced,
    RetryFailed,
    UsageError,
)
from kappa_log.storage import ledger
from support.poison import Poisoned


@pytest.fixture
def world(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Poisoned]:
    """Give an empty log whose handler writes a row for each record."""
    monkeypatch.syspath_prepend(tmp_path)
    with Poisoned(database_url, tmp_path, "Writing", "max_retries = 0") as found:
        found.make_effects()
        yield found


@pytest.fixture
def shared(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Poisoned]:
    """Give the same where others write at the same time, which SQLite does not let."""
    monkeypatch.syspath_prepend(tmp_path)
    with Poisoned(postgresql_url, tmp_path, "Writing", "max_retries = 0") as found:
        found.make_effects()
        yield found


def take(world: Poisoned, *payloads: dict[str, Any], key: str | None = None) -> Any:
    """Commit a batch of payloads; each one is numbered by its place."""
    found = [(key, {"n": n} | payload) for n, payload in enumerate(payloads)]
    return world.read(*found, attempt=0)


def test_effects_are_there_with_their_records(world: Poisoned) -> None:
    """Kept for events and skips, gone for failures; each exactly once."""
    done = take(world, {}, {"do": "skip"}, {"do": "raise"}, {"do": "no effect"}, {})

    counts = done.counts
    assert (counts.acked, counts.skipped, counts.failed) == (3, 1, 1)
    assert world.effects() == [0, 1, 4]
    assert world.entities() == [0, 3, 4]
    world.check()


BROKEN = "INSERT INTO no_such_table VALUES (1)"


@pytest.mark.parametrize("swallow", [True, False])
def test_a_database_error_fails_the_record_also_if_it_was_swallowed(
    world: Poisoned, *, swallow: bool
) -> None:
    """Its transaction may be half done; the first error is what is told."""
    broken = {"sql": [BROKEN, "SELECT 1"], "swallow": swallow}
    done = take(world, {}, broken, {})

    assert (done.counts.acked, done.counts.failed) == (2, 1)
    (failure,) = world.app.failures()
    assert failure.offset == 1
    assert "no_such_table" in (failure.error_message or "")
    assert world.effects() == world.entities() == [0, 2]
    world.check()


def test_a_table_whose_name_is_a_word_of_trouble_is_no_trouble(
    world: Poisoned,
) -> None:
    """The record is to blame for its SQL, and the rest goes on."""
    done = take(world, {"sql": ["SELECT * FROM connections"]}, {})

    assert (done.counts.acked, done.counts.failed) == (1, 1)


@pytest.mark.parametrize(
    "name",
    ["begin", "begin_nested", "close", "commit", "connection", "detach", "engine",
     "execution_options", "get_transaction", "invalidate", "rollback"],
)  # fmt: skip
def test_what_ends_transactions_is_refused_by_name(world: Poisoned, name: str) -> None:
    """The record fails with the way out; the batch goes on."""
    done = take(world, {}, {"call": name}, {})

    assert (done.counts.acked, done.counts.failed) == (2, 1)
    (failure,) = world.app.failures()
    assert failure.error_class == "UsageError"
    assert f"metadata.connection.{name} is not for handlers" in (
        failure.error_message or ""
    )
    assert world.effects() == world.entities() == [0, 2]


@pytest.mark.parametrize(
    "statement",
    [
        "COMMIT", "  commit  ", "ROLLBACK", "END", "BEGIN", "/* now */ COMMIT",
        "-- now\nROLLBACK", "SELECT ';' ; COMMIT", "rollback work",
    ],
)  # fmt: skip
@pytest.mark.parametrize("swallow", [True, False])
def test_statements_that_end_the_transaction_are_refused(
    world: Poisoned, statement: str, *, swallow: bool
) -> None:
    """A COMMIT would keep what earlier records wrote, and a rerun write it anew."""
    done = take(world, {}, {}, {"sql": [statement], "swallow": swallow}, {})

    assert done.counts.failed == (0 if swallow else 1)
    kept = [0, 1, 2, 3] if swallow else [0, 1, 3]
    assert world.effects() == world.entities() == kept
    if not swallow:
        assert "not for handlers" in (world.app.failures()[0].error_message or "")
    world.check()


def test_words_in_texts_are_no_statements(world: Poisoned) -> None:
    """Nor are savepoints of the handler's own."""
    statements = [
        "SELECT '; COMMIT'",
        'SELECT 1 AS "; rollback"',
        "SELECT 1 -- ; commit",
        "SAVEPOINT mine",
        "INSERT INTO seen VALUES (50)",
        "ROLLBACK TO SAVEPOINT mine",
        "RELEASE SAVEPOINT mine",
    ]
    done = take(world, {"sql": statements}, {})

    assert done.counts.acked == 2, world.app.failures()[0].error_message
    assert world.effects() == world.entities() == [0, 1]


DYING = {"sql": ["RELEASE SAVEPOINT sa_savepoint_3"]}
"""Takes away what the third record's work is undone by."""


def test_one_that_kills_the_transaction_of_all_fails_alone(world: Poisoned) -> None:
    """The batch runs again one by one; that record is refused the connection."""
    done = take(world, {}, {}, DYING, {"do": "skip"}, {})

    # Alone, its savepoint has another name: what it asks for is an error of its own.
    assert (done.counts.acked, done.counts.skipped, done.counts.failed) == (3, 1, 1)
    assert world.effects() == [0, 1, 3, 4]
    assert world.entities() == [0, 1, 4]
    assert world.failed() == [(2, False)]
    assert world.held().next_offset == 5
    world.check()


@pytest.mark.parametrize("swallow", [True, False])
def test_one_that_dies_alone_too_fails_by_its_own(
    world: Poisoned, *, swallow: bool
) -> None:
    """It is refused the connection, and to swallow that makes no event of it."""
    world.configure("Dying", "max_retries = 0")
    dying = {"do": "die", "swallow": swallow}

    done = take(world, {}, dying, {}, key="a")

    assert (done.counts.acked, done.counts.failed, done.counts.parked) == (1, 1, 1)
    failure = world.app.failure(1)
    assert failure.error_class == "UsageError"
    assert "the transaction ended while a handler had it" in (
        failure.error_message or ""
    )
    assert world.effects() == world.entities() == [0]
    with pytest.raises(RetryFailed, match="the transaction ended"):
        world.app.retry_failure(1)
    assert world.effects() == [0]
    world.check()


def test_a_file_goes_on_after_a_run_one_by_one_that_was_cut(world: Poisoned) -> None:
    """What is kept of how far it was read must fit what was read."""
    world.configure("Dying", "max_retries = 0")
    file = world.folder / "orders.jsonl"
    lines = [f'{{"n":{n},"do":"{"die" if n == 1 else "ack"}"}}\n' for n in range(4)]
    file.write_text("".join(lines))

    def cut() -> None:
        raise KeyboardInterrupt

    def at_second_time() -> None:
        world.during_call(cut, 2)

    world.during_call(at_second_time, 0)
    with pytest.raises(KeyboardInterrupt):
        world.app.ingest(file, topic="orders")
    world.check()

    world.app.ingest(file, topic="orders")

    assert world.effects() == world.entities() == [0, 2, 3]
    assert [offset for offset, _ in world.failed()] == [1]
    world.check()


def test_what_a_handler_defers_is_its_own_fault(world: Poisoned) -> None:
    """A constraint that is looked at only at the commit fails its record, not all."""
    with world.app.database.write() as connection:
        connection.execute(sa.text("CREATE TABLE parents (id INTEGER PRIMARY KEY)"))
        connection.execute(
            sa.text(
                "CREATE TABLE children (parent INTEGER REFERENCES parents(id) "
                "DEFERRABLE INITIALLY DEFERRED)"
            )
        )
    orphan = {"sql": ["INSERT INTO children VALUES (7)"]}

    done = take(world, {}, orphan, {})

    assert (done.counts.acked, done.counts.failed) == (2, 1)
    assert world.effects() == world.entities() == [0, 2]
    world.check()


def test_a_batch_that_was_got_ahead_of_writes_its_effects_once(
    shared: Poisoned,
) -> None:
    """A message became an event meanwhile: the first attempt's effects roll back.

    SEED H15.
    """
    # Its transaction is open, with effects of record 0, when another one commits 1.
    other = shared.portion([(None, {"n": 1})], partition=1)
    shared.during_call(lambda: shared.take(other), 1)

    done = take(shared, {}, {"n": 1})

    assert (done.counts.acked, done.counts.duplicate) == (1, 1)
    assert shared.effects() == shared.entities() == [0, 1]
    shared.check()


def test_a_fenced_batch_leaves_no_effect(world: Poisoned) -> None:
    """Who has lost its partition has lost what its handlers wrote as well."""

    def take_over() -> None:
        with world.app.database.write() as connection:
            ledger.assign(
                connection,
                world.app.database,
                world.lane(),
                ledger.Reader("payload", None),
                world.app.now(),
            )

    world.during_call(take_over, 0)
    with pytest.raises(Fenced):
        take(world, {}, {})

    assert world.effects() == world.entities() == []


def test_a_record_that_is_tried_again_in_place_leaves_no_effect(
    world: Poisoned,
) -> None:
    """Each attempt begins from nothing; those before it are kept."""
    world.configure("Writing")

    done = take(world, {}, {"do": "raise"}, {})

    assert done.stopped[world.lane()].offset == 1
    assert world.effects() == world.entities() == [0]


def test_a_retry_commits_its_effects_with_its_event(world: Poisoned) -> None:
    """SEED R11: a failed one leaves none, a skip and a duplicate the handler's due."""
    take(world, {"do": "raise"}, {"sql": [BROKEN]})
    with pytest.raises(RetryFailed):
        world.app.retry_failure(1)
    with pytest.raises(RetryFailed, match="no_such_table"):
        world.app.retry_failure(2)
    assert world.effects() == []
    assert [f.attempts for f in world.app.failures()] == [2, 2]
    world.fix()

    world.app.retry_failures()

    assert world.effects() == world.entities() == [0]
    world.check()


def test_an_event_that_is_handled_again_writes_nothing(world: Poisoned) -> None:
    """Its effects are there already, and must not be twice."""
    take(world, {}, {"do": "no effect"})

    assert world.app.retry_event(1)

    assert world.effects() == [0]
    assert world.app.retry_event(2)
    world.check()


def test_a_connection_is_of_one_record_alone(world: Poisoned) -> None:
    """Kept for later, it would write outside of what can be undone."""
    done = take(world, {}, {"do": "kept"})

    assert (done.counts.acked, done.counts.failed) == (1, 1)
    assert "was of a record that is decided" in (
        world.app.failures()[0].error_message or ""
    )
    take(world, {"n": 9, "do": "told"})
    with pytest.raises(UsageError, match="has ended"):
        _ = world.told.connection


def test_a_lost_connection_blames_no_record(shared: Poisoned) -> None:
    """SEED F7: the batch fails as a whole, to be tried again; nothing of it is kept."""
    cut = {"sql": ["SELECT pg_terminate_backend(pg_backend_pid())"], "swallow": True}
    with pytest.raises(DatabaseUnavailable):
        take(shared, {}, cut, {})

    assert (shared.effects(), shared.entities(), shared.failed()) == ([], [], [])
    assert take(shared, {}, {}).counts.acked == 2
    assert shared.effects() == shared.entities() == [0, 1]


def test_a_deadlock_blames_no_record(shared: Poisoned) -> None:
    """Whoever the database picks tries again; nobody's record fails."""
    with shared.app.database.write() as connection:
        connection.execute(sa.text("INSERT INTO seen VALUES (100), (200)"))
    first = {"sql": ["UPDATE seen SET n = n WHERE n = 100"]}
    second = {"sql": ["UPDATE seen SET n = n WHERE n = 200"]}
    outcome: list[str] = []
    with shared.app.database.engine.connect() as other, other.begin():
        other.execute(sa.text("SET deadlock_timeout = '10s'"))
        other.execute(sa.text("UPDATE seen SET n = n WHERE n = 200"))

        def block() -> None:
            other.execute(sa.text("UPDATE seen SET n = n WHERE n = 100"))

        blocker = threading.Thread(target=block)
        shared.during_call(blocker.start, 1)
        try:
            take(shared, first, second)
        except DatabaseBusy:
            outcome.append("busy")
        blocker.join()

    assert outcome == ["busy"]
    assert (shared.effects(), shared.failed()) == ([100, 200], [])
