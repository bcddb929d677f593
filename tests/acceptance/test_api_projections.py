"""/v1/projections, /v1/replays and the ledger: rebuild, compare, promote, look."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from kappa_log import Event, KappaLog, projection
from kappa_log.storage.replays import ReplayRow
from kappa_log.web.jobs import Job
from kappa_log.web.replays import JOBS
from support.api import ApiWorld, a_failure
from support.logs import append, set_bounds


@dataclass
class Spent:
    """What somebody spent."""

    events: int = 0
    total: int = 0


@projection(topics=["things"], version=1)
def spent(state: Spent | None, event: Event) -> Spent:
    """Sum what an entity spent."""
    old = state or Spent()
    return Spent(old.events + 1, old.total + event.payload["n"])


def _by_day(event: Event) -> tuple[str, date]:
    return event.payload["path"], date(2026, 1, event.payload["n"])


@projection(topics=["things"], version=1, key=_by_day)
def days(state: int | None, _event: Event) -> int:
    """Count by a key of two parts."""
    return (state or 0) + 1


def _number(event: Event) -> int:
    return int(event.payload["n"])


@projection(topics=["things"], version=1, key=_number)
def numbers(state: int | None, _event: Event) -> int:
    """Count by a number."""
    return (state or 0) + 1


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[ApiWorld]:
    """Give an application over ten events of five entities, projected."""
    found = ApiWorld(database_url, tmp_path, spent, days, numbers)
    append(
        found.log,
        tmp_path / "things.jsonl",
        [{"id": f"e{n % 5}", "n": n, "path": f"a/{n}"} for n in range(1, 11)],
    )
    found.log.project()
    yield found
    found.close()


def _get(world: ApiWorld, path: str, status: int = 200) -> Any:
    response = world.client.get(path)
    assert response.status_code == status, response.text
    return response.json


def _post(world: ApiWorld, path: str, status: int = 200, **body: Any) -> Any:
    response = world.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json


def _ended(world: ApiWorld, identifier: int) -> Any:
    """Wait for the end of a replay and return it."""
    while True:
        found = _get(world, f"/v1/replays/{identifier}")
        if found["state"] != "running":
            return found
        time.sleep(0.05)


def test_status_tells_what_is_live_and_how_far_behind(world: ApiWorld) -> None:
    """As the command line does."""
    found = _get(world, "/v1/projections")
    assert [status["name"] for status in found] == ["days", "numbers", "spent"]

    status = _get(world, "/v1/projections/spent")

    assert status["live"]["rows"] == 5
    assert status["lag"] == {"events": 0, "seconds": 0.0}
    assert status["key_columns"] == ["entity_id"]
    _get(world, "/v1/projections/unknown", 404)


@pytest.mark.parametrize("name", ["spent", "days"])
def test_rows_come_in_pages(world: ApiWorld, name: str) -> None:
    """Each once, in the order of their keys, by whatever key."""
    whole = _get(world, f"/v1/projections/{name}/rows?limit=500")
    path = f"/v1/projections/{name}/rows?limit=2"
    seen: list[Any] = []

    while path:
        response = world.client.get(path)
        seen += response.json or []
        link = re.match("<(.*)>", response.headers.get("Link", ""))
        path = link[1] if link else ""

    assert seen == whole
    assert len(whole) == {"spent": 5, "days": 10}[name]


def test_a_row_and_how_it_came_to_be(world: ApiWorld) -> None:
    """The last state of its events is the row."""
    (row,) = _get(world, "/v1/projections/spent/rows?key=e1")
    assert row == {"entity_id": "e1", "events": 2, "total": 7}

    steps = _get(world, "/v1/projections/spent/explain?key=e1")

    assert [step["event"]["id"] for step in steps] == [1, 6]
    assert steps[-1]["state"] == {"events": 2, "total": 7}
    assert _get(world, "/v1/projections/spent/explain?key=e1&limit=1") == steps[1:]
    assert _get(world, "/v1/projections/spent/rows?key=nobody") == []
    _get(world, "/v1/projections/days/rows?key=nobody", 422)
    _get(world, "/v1/projections/spent/explain", 422)
    _get(world, "/v1/projections/spent/rows?build=9223372036854775807", 404)
    for number in ("9" * 30, "-" + "9" * 30, "1.5", "%00", ""):
        _get(world, f"/v1/projections/numbers/rows?key={number}", 422)
        _get(world, f"/v1/projections/numbers/rows?after={number}", 422)
        _get(world, f"/v1/projections/numbers/explain?key={number}", 422)


def test_a_replay_is_accepted_watched_and_promoted(world: ApiWorld) -> None:
    """The answer says where its progress is; the row stays."""
    response = world.client.post(
        "/v1/replays", json={"projection": "spent", "reason": "checking"}
    )

    assert response.status_code == 202
    accepted: Any = response.json
    assert response.headers["Location"] == f"/v1/replays/{accepted['id']}"
    done = _ended(world, accepted["id"])
    assert (done["state"], done["outcome"]) == ("ended", "promoted")
    assert (done["diff"]["changed"], done["reason"]) == (0, "checking")
    assert _get(world, "/v1/projections/spent")["live"]["number"] == 2
    assert [row["id"] for row in _get(world, "/v1/replays?projection=spent")] == [
        accepted["id"]
    ]
    assert _get(world, "/v1/replays?unfinished=true") == []

    undone = _post(world, "/v1/projections/spent/undo", reason="no need")
    assert (undone["live"], undone["retired"]) == (1, 2)


def test_a_replay_may_stop_before_it_promotes(world: ApiWorld) -> None:
    """Then it is compared, and promoted by another request."""
    begun = _post(world, "/v1/replays", 202, projection="spent", promote=False)
    assert _ended(world, begun["id"])["outcome"] == "kept"

    diff = _get(world, "/v1/projections/spent/diff")
    assert (diff["old_build"], diff["new_build"], diff["changed"]) == (1, 2, 0)

    done = _post(world, "/v1/projections/spent/promote", max_changed="0")
    assert (done["outcome"], done["build"]) == ("promoted", 2)
    _post(world, "/v1/projections/spent/promote", 404)


def test_a_plan_says_what_would_be_done(world: ApiWorld) -> None:
    """And nothing is written: not even a build."""
    plan = _post(
        world, "/v1/replays", projection="spent", from_position=9, dry_run=True
    )

    assert (plan["kind"], plan["keys"], plan["from_position"]) == ("since", 2, 9)
    assert len(_get(world, "/v1/projections/spent")["builds"]) == 1


@pytest.mark.parametrize(
    ("start", "keys"),
    [
        ({"from_position": 9}, 2),
        ({"from_offset": {"topic": "things", "partition": 0, "offset": 8}}, 2),
        ({"since": "2001-01-01"}, 5),
    ],
)
def test_a_replay_may_have_a_start(
    world: ApiWorld, start: dict[str, Any], keys: int
) -> None:
    """By time, by position, by record."""
    begun = _post(world, "/v1/replays", 202, projection="spent", **start)

    assert begun["plan"]["keys"] == keys
    assert _ended(world, begun["id"])["outcome"] == "promoted"


def test_nothing_to_replay_is_no_replay(world: ApiWorld) -> None:
    """A start past the head: the plan says so."""
    plan = _post(world, "/v1/replays", projection="spent", from_position=11)

    assert plan["nothing"] is True
    assert _get(world, "/v1/replays") == []


def test_a_request_that_contradicts_itself_is_refused(world: ApiWorld) -> None:
    """Before anything is written."""
    bodies: list[dict[str, Any]] = [
        {},
        {"projection": "spent", "sinse": "2026-01-01"},
        {"projection": "spent", "since": "2026-01-01T00:00:00"},
        {"projection": "spent", "since": "2026-02-30"},
        {"projection": "spent", "since": 1},
        {"projection": "spent", "since": "2026-01-01", "from_position": 1},
        {"projection": "spent", "from_position": 1, "until": "2026-01-01"},
        {"projection": "spent", "from_position": 0},
        {"projection": "spent", "from_position": 1.5},
        {"projection": "spent", "from_position": 2**63},
        {"projection": "spent", "from_offset": {"topic": "things"}},
        {"projection": "spent", "by": "mood"},
        {"projection": "spent", "max_changed": "many"},
        {"projection": "spent", "promote": "no"},
        {"projection": "spent", "source": "tape"},
        {"projection": "spent", "source": None},
        {"projection": 5},
    ]

    for body in bodies:
        _post(world, "/v1/replays", 422, **body)

    _post(world, "/v1/replays", 404, projection="unknown")
    assert _get(world, "/v1/replays") == []


def test_a_replay_may_read_the_archive(world: ApiWorld) -> None:
    """As `kappa-log replay --from` does: it must be there, whole, and of this log."""
    asked: dict[str, Any] = {"projection": "spent", "source": "archive"}
    said = _post(world, "/v1/replays", 422, projection="spent", source="tape")
    assert list(said["errors"]) == ["source"]
    for more in ({}, {"dry_run": True}):
        said = _post(world, "/v1/replays", 409, **asked, **more)
        assert "kappa-log export" in said["message"]
    assert _get(world, "/v1/replays") == []
    world.log.export()
    append(world.log, world.folder / "more.jsonl", [{"id": "e9", "n": 9, "path": "b"}])

    plan = _post(world, "/v1/replays", **asked, dry_run=True)
    begun = _post(world, "/v1/replays", 202, **asked)

    assert (plan["archive"], plan["archive_end"], plan["head"]) == ("archive", 10, 11)
    done = _ended(world, begun["id"])
    assert (done["outcome"], done["events"]) == ("promoted", 11)
    assert (done["request"]["source"], done["plan"]) == ("archive", plan)
    plain = _post(world, "/v1/replays", projection="spent", dry_run=True)
    assert plain["archive"] is None
    (segment,) = world.folder.glob("archive/events/*/*.parquet")
    segment.unlink()
    begun = _post(world, "/v1/replays", 202, **asked)
    stopped = _ended(world, begun["id"])
    assert (stopped["state"], "missing" in stopped["error"]) == ("unfinished", True)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fold be told of after each event, and take its time."""
    set_bounds(page_events=1, flush_seconds=0.0, patch=monkeypatch)


@pytest.mark.usefixtures("slow")
def test_a_replay_is_cancelled_and_resumed(
    world: ApiWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is interrupted is unfinished, and stands in the way of the next."""
    begun, seen = [], []

    def stop_at_once(job: Job, progress: Any) -> None:
        begun.append(job)
        seen.append(progress)
        job.stop()
        original(job, progress)

    original = Job.on_progress
    monkeypatch.setattr(Job, "on_progress", stop_at_once)
    first = _post(world, "/v1/replays", 202, projection="spent")
    assert _ended(world, first["id"])["state"] == "unfinished"
    _post(world, "/v1/replays", 409, projection="spent")
    monkeypatch.setattr(Job, "on_progress", original)

    resumed = _post(world, f"/v1/replays/{first['id']}/resume", 202)

    assert resumed["id"] == first["id"]
    assert _ended(world, first["id"])["outcome"] == "promoted"
    _post(world, f"/v1/replays/{first['id']}/resume", 422)
    _post(world, f"/v1/replays/{first['id']}/cancel", 422)

    monkeypatch.setattr(Job, "on_progress", stop_at_once)
    second = _post(world, "/v1/replays", 202, projection="spent")
    assert _ended(world, second["id"])["state"] == "unfinished"
    gone = _post(world, f"/v1/replays/{second['id']}/cancel")
    assert (gone["state"], gone["outcome"]) == ("ended", "cancelled")
    _post(world, "/v1/replays/99/cancel", 404)


@pytest.mark.usefixtures("slow")
def test_a_replay_that_ends_while_it_is_looked_at_was_running(
    world: ApiWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row was read before its end: who asks must not take it for interrupted."""
    may_end = threading.Event()
    go_on, read = Job.on_progress, KappaLog.replay_row

    def slowly(job: Job, progress: Any) -> None:
        may_end.wait(250)
        go_on(job, progress)

    def just_before_its_end(log: KappaLog, identifier: int) -> ReplayRow:
        found = read(log, identifier)
        may_end.set()
        assert world.app.extensions[JOBS].of(identifier).wait(250)
        return found

    monkeypatch.setattr(Job, "on_progress", slowly)
    begun = _post(world, "/v1/replays", 202, projection="spent")
    monkeypatch.setattr(KappaLog, "replay_row", just_before_its_end)

    assert _get(world, f"/v1/replays/{begun['id']}")["state"] == "running"
    assert _get(world, f"/v1/replays/{begun['id']}")["state"] == "ended"


@pytest.mark.usefixtures("slow")
def test_a_running_replay_is_cancelled(
    world: ApiWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after what it is writing; the live build is not changed."""
    original = Job.on_progress

    def slowly(job: Job, progress: Any) -> None:
        job._stop.wait(250)  # noqa: SLF001 - until it is told to stop
        original(job, progress)

    monkeypatch.setattr(Job, "on_progress", slowly)
    begun = _post(world, "/v1/replays", 202, projection="spent")
    assert _get(world, f"/v1/replays/{begun['id']}")["state"] == "running"

    gone = _post(world, f"/v1/replays/{begun['id']}/cancel")

    assert gone["outcome"] == "cancelled"
    assert _get(world, "/v1/projections/spent")["live"]["number"] == 1


def test_the_ledger_and_its_proof(world: ApiWorld) -> None:
    """What was read, and that it is what it was."""
    (row,) = _get(world, "/v1/checkpoints")
    assert (row["acked"], row["first_position"], row["last_position"]) == (10, 1, 10)
    assert _get(world, "/v1/checkpoints?after=1") == []

    found = _post(world, "/v1/verify", head=row["head"], projections=["spent"])

    assert (found["ok"], found["events"], found["limits"]) == (True, 10, [])
    assert _post(world, "/v1/verify", head="0" * 63 + "1")["ok"] is False
    _post(world, "/v1/verify", 422, head="abc")
    _post(world, "/v1/verify", 404, projections=["unknown"])


def test_metrics_are_what_the_log_counts(world: ApiWorld) -> None:
    """In Prometheus' text, read when it is asked for; a state without any is 0."""
    before = world.client.get("/metrics").text
    for number in (1, 2, 3):
        world.put_failure(a_failure(number, parked=int(number == 3)))
    response = world.client.get("/metrics")

    assert 'kappa_log_failures{state="parked"} 0.0' in before.splitlines()

    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    for line in (
        "kappa_log_head_position 10.0",
        'kappa_log_failures{state="failed"} 2.0',
        'kappa_log_failures{state="parked"} 1.0',
        'kappa_log_records_total{fate="acked"} 10.0',
        'kappa_log_projection_lag_events{projection="spent"} 0.0',
    ):
        assert line in response.text.splitlines()


def test_readiness_notices_a_cursor_that_is_stuck(
    world: ApiWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught up and dead look alike, but for the events that wait."""
    from kappa_log.web import health

    monkeypatch.setattr(health, "STUCK_SECONDS", -1)
    assert _get(world, "/readyz")["ready"] is True
    append(world.log, tmp_path / "things.jsonl", [{"id": "x", "n": 1, "path": "y"}])

    assert _get(world, "/readyz", 503)["checks"] == {
        "database": "ok",
        "cursors": "3 stuck",
    }
    monkeypatch.setattr(health, "STUCK_SECONDS", 300)
    assert _get(world, "/readyz")["ready"] is True


def test_readiness_needs_the_database_at_its_revision(world: ApiWorld) -> None:
    """Alive it is all the same; other answers say no word about the inside."""
    world.log.downgrade_database("base")

    assert _get(world, "/readyz", 503)["ready"] is False
    assert _get(world, "/livez") == {"alive": True}
    found = _get(world, "/v1/events", 503)
    assert found["type"] == "urn:kappa-log:problem:schema-out-of-date"
    assert "kappa-log db status" in found["message"]
    world.log.create_database()


def test_a_fold_that_fails_is_told_with_its_replay(
    database_url: str, tmp_path: Path
) -> None:
    """It began, so its row says where it stands; cancelled, it is out of the way."""

    @projection(topics=["things"], version=1)
    def picky(_state: int | None, event: Event) -> int:
        """Take no twos."""
        assert event.payload["n"] != 2, "no twos"
        return 1

    found = ApiWorld(database_url, tmp_path, picky)
    file = tmp_path / "things.jsonl"
    append(found.log, file, [{"id": "a", "n": n} for n in (1, 2)])
    begun = _post(found, "/v1/replays", 202, projection="picky")

    told = _ended(found, begun["id"])

    assert (told["state"], told["outcome"]) == ("unfinished", None)
    assert "position 2" in told["error"]
    assert _post(found, f"/v1/replays/{begun['id']}/cancel")["state"] == "ended"
    found.close()


def test_a_log_that_is_large_is_not_verified_while_a_client_waits(
    world: ApiWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line does it, and shows how far it is."""
    from kappa_log.web import ledger

    monkeypatch.setattr(ledger, "MAX_VERIFIED", 9)

    assert "kappa-log verify" in _post(world, "/v1/verify", 422)["message"]
