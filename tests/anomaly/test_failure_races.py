"""Failures under crowds and kills: real threads and processes, SIGKILL at each step.

Whoever retries, discards or reads beside others: each record becomes one event, keys
keep their order, and what a killed process leaves is as if it had never begun.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kappa_log import KappaLog
from kappa_log.errors import KappaLogError, LostRace, NotFound
from support.poison import Poisoned, bad

RACES = 250
"""Failures that two retry at once, on each database."""


@pytest.fixture
def world(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Poisoned]:
    """Give an empty log whose handler fails on demand."""
    monkeypatch.syspath_prepend(tmp_path)
    with Poisoned(database_url, tmp_path, "Writing") as found:
        found.make_effects()
        yield found


def at_once(*acts: Callable[[], object]) -> list[Any]:
    """Run functions at the same time; return what each returned or raised."""
    start = threading.Barrier(len(acts))
    found: list[Any] = [None] * len(acts)

    def run(number: int, act: Callable[[], object]) -> None:
        start.wait()
        try:
            found[number] = act()
        except KappaLogError as error:
            found[number] = error

    threads = [
        threading.Thread(target=run, args=(number, act))
        for number, act in enumerate(acts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# --- crowds ------------------------------------------------------------------


def test_of_two_retries_of_one_failure_one_wins(world: Poisoned) -> None:
    """The other is told, and what its handler wrote is gone with its attempt.

    SEED R11.
    """
    world.read(*((None, bad(n)) for n in range(RACES)))
    world.fix()
    ids = sorted(failure.id for failure in world.app.failures(limit=RACES))
    rounds = threading.Barrier(2)

    def retry_all() -> list[Any]:
        found: list[Any] = []
        with KappaLog.open(world.folder) as app:
            for number in ids:
                rounds.wait()
                try:
                    found.append(app.retry_failure(number).outcome)
                except (LostRace, NotFound) as error:
                    found.append(type(error).__name__)
        return found

    first, second = at_once(retry_all, retry_all)

    for pair in zip(first, second, strict=True):
        assert max(pair) == "acked", pair
        assert min(pair) in ("LostRace", "NotFound"), pair
    assert world.failed() == []
    assert sorted(world.order()) == list(range(RACES))
    assert world.effects() == world.entities() == list(range(RACES))
    assert len(world.rows("audit", "id")) == RACES
    world.check()


def test_a_retry_that_lost_the_race_leaves_no_effect(world: Poisoned) -> None:
    """Its handler wrote before the other's failure was gone: that must roll back."""
    world.read((None, bad(1)))
    world.fix()
    world.during_call(lambda: world.app.retry_failure(1), 1)

    with pytest.raises(LostRace):
        world.app.retry_failure(1)

    assert (world.effects(), world.entities()) == ([1], [1])
    world.check()


def test_many_who_retry_and_give_up_at_once_lose_nothing(world: Poisoned) -> None:
    """Each failure ends as one event or as one entry about who gave it up."""
    world.configure("Orders")
    for start in range(0, 60, 6):
        world.read(*((f"k{n % 6}", bad(n)) for n in range(start, start + 6)))
    world.fix()
    ids = [failure.id for failure in world.app.failures(limit=100)]

    def discard_some() -> int:
        with KappaLog.open(world.folder) as app:
            return app.discard_failures(ids=tuple(ids[::7]))

    def retry() -> Any:
        with KappaLog.open(world.folder) as app:
            return app.retry_failures()

    *_, discarded = found = at_once(retry, retry, discard_some)
    with KappaLog.open(world.folder) as app:
        app.retry_failures()

    assert not any(isinstance(each, Exception) for each in found), found
    assert world.failed() == []
    assert len(world.order()) + discarded == 60
    for key in range(6):
        assert world.order(f"k{key}") == sorted(world.order(f"k{key}"))
    assert len(world.rows("audit", "id")) == 60
    world.check()


RETRY_UNTIL_TOLD = """
import threading
told = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
print("ready", flush=True)
while not told.is_set():
    try:
        app.retry_failures()
    except KappaLogError as error:
        print(type(error).__name__, flush=True)
"""


def test_keys_keep_their_order_while_others_drain_them(world: Poisoned) -> None:
    """Records come in as their keys are drained by another process, again and again."""
    world.configure("Orders")
    keys = 4
    batches = 40
    with world.process(RETRY_UNTIL_TOLD) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        try:
            for start in range(0, batches * 8, 8):
                (world.folder / "fixed").unlink(missing_ok=True)
                world.read(
                    *(
                        (f"k{n % keys}", bad(n) if n % 3 == 0 else {"n": n})
                        for n in range(start, start + 8)
                    )
                )
                world.fix()
                world.read((f"k{start % keys}", {"n": 10_000 + start}))
        finally:
            said = other.communicate("\n", timeout=60)[0]
    world.app.retry_failures()

    assert said == ""
    total = batches * 9
    assert sorted(world.order()) == list(range(total))
    for key in range(keys):
        assert world.order(f"k{key}") == sorted(world.order(f"k{key}"))
    assert world.failed() == []
    assert len(world.rows("checkpoints", "id")) > 2 * batches
    world.check()


# --- kills -------------------------------------------------------------------

AT = {
    "in the handler": "",
    "before the failure goes": """
@sa.event.listens_for(app.database.engine, "before_cursor_execute")
def before(connection, cursor, statement, *_):
    if statement.startswith("DELETE FROM kappa_log_failures"):
        die()
""",
    "after the failure went": """
@sa.event.listens_for(app.database.engine, "after_cursor_execute")
def after(connection, cursor, statement, *_):
    if statement.startswith("DELETE FROM kappa_log_failures"):
        die()
""",
    "before the audit trail": """
@sa.event.listens_for(app.database.engine, "before_cursor_execute")
def before(connection, cursor, statement, *_):
    if statement.startswith("INSERT INTO kappa_log_audit"):
        die()
""",
    "before it commits": """
@sa.event.listens_for(app.database.engine, "commit")
def commit(connection):
    if connection.info.get("immediate"):
        die()
""",
}

RETRY = "\napp.retry_failures()\n"


@pytest.mark.parametrize("step", sorted(AT))
def test_a_killed_retry_leaves_nothing_behind(world: Poisoned, step: str) -> None:
    """SEED R11: no lock, no half: the next one does all of it, once."""
    world.read(("a", bad(1)), ("a", {"n": 2}))
    killing = world.folder / "killing"
    if step == "in the handler":
        killing.touch()
    world.fix()

    with world.process(AT[step] + RETRY) as other:
        assert other.wait(60) == -signal.SIGKILL

    assert world.failed() == [(0, False), (1, True)]
    assert world.app.failure(1).attempts == 1
    assert (world.effects(), world.entities()) == ([], [])
    assert world.rows("audit", "id") == []
    world.check()
    killing.unlink(missing_ok=True)
    done = world.app.retry_failures()
    assert (done.acked, done.failed) == (2, 0)
    assert world.effects() == world.entities() == [1, 2]
    world.check()


def test_a_retry_killed_after_its_commit_is_done(world: Poisoned) -> None:
    """The first of two is an event for good; the other one still waits its turn."""
    world.read(("a", bad(1)), ("a", {"n": 2}))
    world.fix()
    kill_at_second = """
seen = []
@sa.event.listens_for(app.database.engine, "before_cursor_execute")
def before(connection, cursor, statement, *_):
    if statement.startswith("DELETE FROM kappa_log_failures"):
        seen.append(1)
        if len(seen) == 2:
            die()
"""

    with world.process(kill_at_second + RETRY) as other:
        assert other.wait(60) == -signal.SIGKILL

    assert world.failed() == [(1, True)]
    assert world.effects() == world.entities() == [1]
    world.check()
    assert world.app.retry_failure(2).outcome == "acked"
    assert world.effects() == world.entities() == [1, 2]
    world.check()


INGEST = """
app.ingest(given["file"], topic="orders")
"""

AT_COMMIT = """
seen = []
@sa.event.listens_for(app.database.engine, "{event}")
def commit(connection):
    if connection.info.get("immediate"):
        seen.append(1)
        if len(seen) == {number}:
            die()
"""


@pytest.mark.parametrize(
    ("kill", "kept"),
    [
        ("", 20),
        (AT_COMMIT.format(event="commit", number=3), 10),
        # The lane, two batches, and the third one begins.
        (AT_COMMIT.format(event="begin", number=4), 20),
    ],
    ids=["in the handler", "before a commit", "after a commit"],
)
def test_effects_of_a_killed_batch_are_gone_with_it(
    world: Poisoned, kill: str, kept: int
) -> None:
    """What handlers wrote is there with the events of their records, and once."""
    world.configure("Writing", more="[ingest]\nbatch_size = 10")
    do = "kill" if not kill else "ack"
    file = world.folder / "orders.jsonl"
    lines = [f'{{"n":{n},"do":"{do if n == 25 else "ack"}"}}\n' for n in range(40)]
    file.write_text("".join(lines))

    with world.process(kill + INGEST, file=str(file)) as other:
        assert other.wait(60) == -signal.SIGKILL

    assert world.effects() == world.entities() == list(range(kept))
    world.check()
    world.fix()
    world.app.ingest(file, topic="orders")
    assert world.effects() == world.entities() == list(range(40))
    world.check()
