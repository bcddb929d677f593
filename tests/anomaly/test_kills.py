"""Kills and crowds: real processes, SIGKILL at random times, two at one thing.

Whatever a killed process leaves behind, the next one makes of it the same log and
the same rows as a run that nobody disturbed.
"""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.errors import AlreadyRunning
from kappa_log.records import Lane
from kappa_log.storage import ledger
from support.logs import START, build_tables, open_log, rows
from support.processes import Worker
from support.purchases import OLD, TOPIC, folded, parked, registered
from support.worker import FIELDS

pytestmark = pytest.mark.usefixtures("uncovered")

KILLS = 8
LINES = 12_000
SINCE = 10_001
"""Position that replays with a start begin at; few customers buy after it."""


@pytest.fixture(scope="module")
def lines(cdnow: Path) -> list[str]:
    """Return the first purchases of CDNOW."""
    with gzip.open(cdnow, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in islice(file, LINES)]


@pytest.fixture
def file(lines: list[str], tmp_path: Path) -> Path:
    """Return a file of them."""
    found = tmp_path / "purchases.jsonl"
    found.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return found


@pytest.fixture
def log(database_url: str, tmp_path: Path) -> Any:
    """Open an empty log."""
    with open_log(database_url, tmp_path, *registered([1, 2])) as app:
        yield app


@pytest.fixture
def task(database_url: str, tmp_path: Path) -> dict[str, Any]:
    """Return what every worker must be told."""
    return {"url": database_url, "folder": str(tmp_path)}


def kill_again_and_again(
    start: Callable[[], dict[str, Any]], *, seed: int, steps: int, kills: int = KILLS
) -> int:
    """Start a worker and kill it, again and again; return how many hit it at work.

    Args:
        start: Returns the task of the next worker.
        seed: Of the times to wait.
        steps: How many pages or batches all of the work takes; a kill comes within
            a part of them, and then at any moment of the next.
        kills: How often.
    """
    chance = random.Random(seed)
    hits = 0
    for _ in range(kills):
        with Worker(**start(), tell=True) as worker:
            worker.watch(chance.randrange(2 * steps // kills))
            time.sleep(chance.uniform(0, 0.02))
            hits += worker.kill()
    return hits


def kept(app: KappaLog) -> list[str | None]:
    """Return the payloads of the log, in order."""
    table = app.database.tables.events
    with app.database.read() as connection:
        return list(
            connection.scalars(sa.select(table.c.payload).order_by(table.c.position))
        )


def as_rows(states: dict[str, Any]) -> list[dict[str, Any]]:
    """Return states as rows in key order."""
    return [{"entity_id": key} | asdict(states[key]) for key in sorted(states)]


def patiently(act: Callable[[], Any]) -> Any:
    """Do something once the server has noticed that a killed process is gone."""
    for _ in range(100):
        try:
            return act()
        except AlreadyRunning as error:
            if "another process" not in str(error):
                raise
            time.sleep(0.05)
    return act()


# --- kills --------------------------------------------------------------------


def test_killed_ingests_leave_the_log_of_one_that_was_not(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """The payloads are those of the file, each once, in its order."""
    task |= {"work": "ingest", "file": str(file), "batch_size": 100}
    heads: list[int] = []

    def start() -> dict[str, Any]:
        heads.append(log.head().position)
        return task

    hits = kill_again_and_again(start, seed=1, steps=LINES // 100)
    half_way = sum(0 < head < LINES for head in heads)
    with Worker(**task) as worker:
        done = worker.result()

    assert hits >= 3
    assert half_way >= 2
    assert 0 < done["resumed_at"] <= LINES
    assert kept(log) == lines
    assert log.verify().findings == []
    with Worker(**task) as worker:
        assert worker.result() == {"resumed_at": LINES, "acked": 0}


def test_killed_live_folding_leaves_the_rows_of_one_that_was_not(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """Rows and cursor move together, so nothing is folded twice or left out."""
    log.ingest(file, topic=TOPIC, fields=FIELDS)
    task |= {"work": "project", "page_events": 100}
    cursors: list[int] = []

    def start() -> dict[str, Any]:
        live = log.projection(OLD.name).live
        cursors.append(live.cursor if live else 0)
        return task

    hits = kill_again_and_again(start, seed=2, steps=LINES // 100)
    with Worker(**task) as worker:
        done = worker.result()

    assert hits >= 3
    assert sum(0 < cursor < LINES for cursor in cursors) >= 2
    assert done["to"] == LINES
    assert rows(log, OLD.name) == as_rows(folded(lines, 31))
    assert log.verify(names=[OLD.name]).findings == []


def test_killed_live_folding_parks_the_keys_that_one_does_that_was_not(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """Parked keys move with rows and cursor, so each row ends where its key stands."""
    log.ingest(file, topic=TOPIC, fields=FIELDS)
    task |= {"work": "project", "page_events": 100, "versions": [0]}
    stood: list[int] = []

    def start() -> dict[str, Any]:
        live = log.projection(OLD.name).live
        stood.append(live.parked if live else 0)
        return task

    hits = kill_again_and_again(start, seed=4, steps=LINES // 100, kills=4)
    with Worker(**task) as worker:
        assert worker.result()["to"] == LINES

    expected_parked = parked(lines)
    assert hits >= 2
    assert any(0 < count < len(expected_parked) for count in stood)
    assert {one.key: one.position for one in log.parked(OLD.name)} == expected_parked
    below = [
        line
        for position, line in enumerate(lines, start=1)
        if position < expected_parked.get(json.loads(line)["customer_id"], LINES + 1)
    ]
    assert rows(log, OLD.name) == as_rows(folded(below, 31))
    log.__dict__["registry"] = type(log.registry)([OLD])
    assert log.compatible(OLD.name) == ["code"]
    assert log.retry_parked(OLD.name).folded == len(expected_parked)
    assert rows(log, OLD.name) == as_rows(folded(lines, 31))
    assert log.verify(names=[OLD.name]).findings == []


@pytest.mark.parametrize(
    "request_", [{}, {"from_position": SINCE}], ids=["full", "since"]
)
def test_killed_replays_resume_to_the_rows_of_one_that_was_not(
    log: KappaLog,
    task: dict[str, Any],
    file: Path,
    lines: list[str],
    request_: dict[str, Any],
) -> None:
    """A kill at any time costs a page, and users read whole rows all along."""
    live_at(log, file, lines, 11_000)
    before = as_rows(folded(lines[:11_000], 31))
    after = as_rows(expected(lines, 11_000, request_))
    task |= {"versions": [1, 2], "page_events": 100}
    resumed: list[str] = []

    def start() -> dict[str, Any]:
        assert rows(log, OLD.name) in (before, after)
        left = log.replays(OLD.name, unfinished=True)
        if not left:
            return task | {"work": "replay", "request": request_}
        resumed.append(left[0].phase)
        patiently(lambda: refuses_another(log, left[0].id))
        return task | {"work": "resume", "id": left[0].id}

    hits = kill_again_and_again(start, seed=3, steps=LINES // 100)
    last = start()
    if log.replays(OLD.name)[0].outcome is None:
        with Worker(**last) as worker:
            assert worker.result() == {"outcome": "promoted"}

    assert hits >= 3
    assert len(resumed) >= 3
    assert rows(log, OLD.name) == after
    assert log.verify(names=[OLD.name]).findings == []
    roles = [build.role for build in log.projection(OLD.name).builds]
    assert roles.count("live") == roles.count("retired") == 1
    assert "shadow" not in roles


def live_at(log: KappaLog, file: Path, lines: list[str], cursor: int) -> None:
    """Ingest all, with the live build by the old code at a position."""
    file.write_text("".join(line + "\n" for line in lines[:cursor]), encoding="utf-8")
    log.ingest(file, topic=TOPIC, fields=FIELDS)
    registry = log.__dict__.pop("registry", None) or log.registry
    log.__dict__["registry"] = type(registry)([OLD])
    log.project([OLD.name])
    log.__dict__["registry"] = registry
    with file.open("a", encoding="utf-8") as more:
        more.writelines(line + "\n" for line in lines[cursor:])
    log.ingest(file, topic=TOPIC, fields=FIELDS)


def expected(lines: list[str], live: int, request: dict[str, Any]) -> dict[str, Any]:
    """Return the states that a replay must make, by the law of touched keys."""
    whose = [json.loads(line)["customer_id"] for line in lines]
    start = request.get("from_position", 1)
    touched = set(whose[start - 1 :])
    kept = folded(lines[:live], 31)
    untouched = {key: state for key, state in kept.items() if key not in touched}
    again = [
        line
        for number, (key, line) in enumerate(zip(whose, lines, strict=True), start=1)
        if key in touched or number > live
    ]
    return folded(again, 37, untouched)


def refuses_another(log: KappaLog, identifier: int) -> None:
    """Check that a second replay is refused, naming both ways out."""
    with pytest.raises(AlreadyRunning) as found:
        log.replay(OLD.name)
    if "another process" in str(found.value):
        raise found.value
    for way in (f"--resume {identifier}", f"--cancel {identifier}"):
        assert way in str(found.value)


def test_a_killed_replay_can_be_cancelled_and_leaves_nothing(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """Its table goes, the live rows stay, and another replay may begin."""
    live_at(log, file, lines, 11_000)
    before = rows(log, OLD.name)
    tables = build_tables(log)
    task |= {"work": "replay", "versions": [1, 2], "pause": True}
    with Worker(**task) as worker:
        worker.wait_for("paused")
        assert worker.kill()
    assert len(build_tables(log)) == len(tables) + 1
    (left,) = log.replays(OLD.name, unfinished=True)

    ended = patiently(lambda: log.cancel(left.id))

    assert ended.outcome == "cancelled"
    assert build_tables(log) == tables
    assert rows(log, OLD.name) == before
    assert log.replay(OLD.name).outcome == "promoted"
    assert rows(log, OLD.name) == as_rows(folded(lines, 37))


# --- crowds -------------------------------------------------------------------


def test_two_processes_ingest_two_files_into_one_gapless_log(
    log: KappaLog, task: dict[str, Any], tmp_path: Path, lines: list[str]
) -> None:
    """Lines that both files have become one event; each file keeps its order."""
    halves = [lines[:3000], lines[2800:6000]]
    tasks = []
    for number, half in enumerate(halves):
        file = tmp_path / f"half-{number}.jsonl"
        file.write_text("".join(line + "\n" for line in half), encoding="utf-8")
        tasks.append(
            task
            | {"work": "ingest", "file": str(file), "batch_size": 50, "pause": True}
        )

    with Worker(**tasks[0]) as one, Worker(**tasks[1]) as two:
        for worker in (one, two):
            worker.wait_for("paused")
        for worker in (one, two):
            worker.go_on()
        done = [one.result(), two.result()]

    assert sum(found["acked"] for found in done) == 6000
    assert log.head().position == 6000
    found = kept(log)
    assert sorted(found) == sorted(lines[:6000])  # type: ignore[type-var]
    assert len(log.duplicates(limit=1000)) == 200
    for half in halves:
        alone = [line for line in half if half is halves[0] or line not in halves[0]]
        mine = set(alone) - set(lines[2800:3000])
        assert [p for p in found if p in mine] == [p for p in alone if p in mine]
    assert log.verify().findings == []


def test_two_processes_over_one_file_double_nothing(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """Who comes later takes the file over; who had it is fenced, and loses nothing."""
    task |= {"work": "ingest", "file": str(file), "batch_size": 100}
    with Worker(**task, pause=True) as first:
        first.wait_for("paused")
        with Worker(**task) as second:
            taken = second.result()
        first.go_on()
        refused = first.result()

    assert taken == {"resumed_at": 100, "acked": LINES - 100}
    assert refused["error"] == "Fenced"
    assert kept(log) == lines
    assert log.verify().findings == []


def test_processes_that_begin_one_file_at_the_same_moment_double_nothing(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """SEED H15: each is done or fenced, and a last run has nothing left to do wrong."""
    task |= {"work": "ingest", "file": str(file), "batch_size": 500}

    with Worker(**task) as one, Worker(**task) as two, Worker(**task) as three:
        done = [worker.result() for worker in (one, two, three)]

    assert {found.get("error") for found in done} <= {None, "Fenced"}
    log.ingest(file, topic=TOPIC, fields=FIELDS)
    assert kept(log) == lines
    assert log.verify().findings == []


def test_a_file_that_another_process_takes_up_at_the_same_moment_is_waited_for(
    log: KappaLog, file: Path, lines: list[str]
) -> None:
    """Both see a file that nobody has read; the second takes it over from the first."""
    lane = Lane(f"file:{file.name}", TOPIC, "kappa-log")
    reader = ledger.Reader("payload", msgspec.json.encode(FIELDS).decode())
    done: list[Any] = []

    def ingest() -> None:
        done.append(log.ingest(file, topic=TOPIC, fields=FIELDS))

    second = threading.Thread(target=ingest)
    with log.database.write() as connection:
        # Known already, from another topic; else the second would wait for the source.
        ledger.source_id(connection, log.database, lane.source, START)
    with log.database.write() as connection:
        first = ledger.assign(connection, log.database, lane, reader, START)
        second.start()
        time.sleep(0.3)
        assert not done
    second.join()

    assert (first.epoch, first.is_new) == (1, True)
    assert done[0].counts.acked == LINES
    assert kept(log) == lines


def test_two_runners_of_one_projection_make_the_rows_of_one(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """The loser of each race drops what it folded and looks again."""
    log.ingest(file, topic=TOPIC, fields=FIELDS)
    task |= {"work": "project", "page_events": 50, "pause": True}

    with Worker(**task) as one, Worker(**task) as two:
        for worker in (one, two):
            worker.wait_for("paused")
        for worker in (one, two):
            worker.go_on()
        done = [one.result(), two.result()]

    assert [found["to"] for found in done] == [LINES, LINES]
    assert rows(log, OLD.name) == as_rows(folded(lines, 31))
    assert log.verify(names=[OLD.name]).findings == []


def test_a_second_replay_is_refused_while_one_runs(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """Running is a lock that is held: neither replay, resume, cancel nor undo pass."""
    live_at(log, file, lines, 11_000)
    task |= {"work": "replay", "versions": [1, 2], "pause": True}
    with Worker(**task) as worker:
        worker.wait_for("paused")
        (left,) = log.replays(OLD.name, unfinished=True)
        acts: list[Callable[[], Any]] = [
            lambda: log.replay(OLD.name),
            lambda: log.resume(left.id),
            lambda: log.cancel(left.id),
            lambda: log.promote(OLD.name),
            lambda: log.undo(OLD.name),
        ]
        for act in acts:
            with pytest.raises(AlreadyRunning, match="another process replays"):
                act()
        worker.go_on()
        assert worker.result() == {"outcome": "promoted"}

    assert rows(log, OLD.name) == as_rows(folded(lines, 37))


def test_live_folding_goes_on_while_a_replay_runs(
    log: KappaLog, task: dict[str, Any], file: Path, lines: list[str]
) -> None:
    """A live runner that was retired in mid-run goes on with the new live build."""
    live_at(log, file, lines, 6000)
    replaying = task | {"work": "replay", "versions": [1, 2], "page_events": 50}
    living = task | {"work": "project", "versions": [1, 2], "page_events": 50}

    with Worker(**living, pause=True) as live:
        live.wait_for("paused")
        with Worker(**replaying) as replay:
            assert replay.result() == {"outcome": "promoted"}
        live.go_on()
        assert live.result()["to"] == LINES

    assert rows(log, OLD.name) == as_rows(folded(lines, 37))
    assert log.verify(names=[OLD.name]).findings == []
