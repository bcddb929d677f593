"""Each command as a person types it: what it prints, how it ends, on both databases."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from kappa_log.app import KappaLog
from support.typed import Type, enter_project, typist

BIKES = '''
from dataclasses import dataclass
from kappa_log import Event, projection

@dataclass(frozen=True)
class Bike:
    rides: int = 0
    km: float = 0.0

@projection(topics=["rides"], version=1)
def bikes(state: Bike | None, event: Event) -> Bike:
    """Rides and distance of each bike."""
    state = state or Bike()
    return Bike(state.rides + 1, state.km + event.payload["km"])
'''

RIDES = [
    {"bike": "blue", "at": "2026-03-01T08:10:00Z", "km": 3.0},
    {"bike": "green", "at": "2026-03-01T09:00:00Z", "km": 5.0},
    {"bike": "blue", "at": "2026-03-02T18:45:00Z", "km": 1.0},
    {"bike": "green", "at": "2026-03-03T07:30:00Z", "km": 4.0},
]

INGEST = ("--topic", "rides", "--entity-id", "bike", "--event-time", "at")


@pytest.fixture
def typed(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Return a function that types a command in a folder with a projection."""
    enter_project(monkeypatch, tmp_path, database_url, {"bikes": BIKES})
    lines = [json.dumps(ride) for ride in RIDES]
    (tmp_path / "rides.jsonl").write_text("\n".join([*lines, lines[0], "{bad"]) + "\n")

    return typist(capsys)


@pytest.fixture
def filled(typed: Type) -> Type:
    """The same, with the rides ingested: one duplicate, one failure."""
    typed("db", "create")
    typed("ingest", "rides.jsonl", *INGEST, code=3)
    return typed


@pytest.fixture
def built(filled: Type) -> Type:
    """The same, with a live build."""
    filled("project")
    return filled


def test_the_database_is_made_judged_and_removed(typed: Type) -> None:
    """Each state is named with the command that helps."""
    assert "db create" in typed("events", "list", code=78).err
    assert typed("db", "create", "--dry-run").err
    assert typed("db", "status", "--json").json[0]["verdict"] == "empty"
    typed("db", "create")
    assert "exists" in typed("db", "create").out
    assert typed("db", "status", "--json").json[0]["verdict"] == "current"
    assert typed("db", "version").out.strip() == "0001"
    assert typed("db", "history", "--json").json[0]["revision"] == "0001"
    assert typed("db", "history").out
    typed("db", "upgrade")
    typed("db", "downgrade", "base", "--yes")
    assert typed("db", "status", "--json").json[0]["verdict"] == "empty"
    typed("db", "create")
    typed("db", "reset", "--yes")
    assert "--yes" in typed("db", "drop", code=2).err
    typed("db", "drop", "--dry-run")
    typed("db", "drop", "--yes")


def test_what_ingest_did_is_told(typed: Type) -> None:
    """Kept, skipped, duplicate and failed, and what to look at next."""
    typed("db", "create")

    first = typed("ingest", "rides.jsonl", *INGEST, code=3)
    again = typed("ingest", "rides.jsonl", *INGEST)

    assert "kept 4" in first.out
    assert "duplicate 1" in first.out
    assert "failed 1" in first.out
    assert "failures show" in first.out + first.err
    assert "nothing new" in again.out
    assert typed("ingest", "gone.jsonl", *INGEST, code=69).err


def test_events_are_listed_shown_and_followed(
    filled: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log can be read by hand, and by a program."""
    listed = filled("events", "list", "--json").json
    assert [event["position"] for event in listed] == [4, 3, 2, 1]
    assert filled("events", "list", "--entity-id", "blue", "--json").json
    assert filled("events", "list", "--topic", "none").err
    rows = filled("events", "list").out.splitlines()
    assert "green  " in rows[1]
    assert not any("Z recorded" in row for row in rows)  # it has a time of its own
    shown = filled("events", "show", "2", "--json").json[0]
    assert shown["payload"] == RIDES[1]
    assert "rides" in filled("events", "show", "2").out
    assert "9 not found" in filled("events", "show", "9", code=2).err

    stop = threading.Event()
    tail = KappaLog.tail

    def once(self: KappaLog, **options: Any) -> Any:
        for event in tail(self, **options):
            yield event
            if event.position == 4:
                options["stop"].set()

    monkeypatch.setattr(KappaLog, "tail", once)
    followed = filled("events", "tail", "--after", "0", "--json")
    assert len(followed.json) == 4
    stop.set()


def test_duplicates_and_failures_are_found_and_admitted(filled: Type) -> None:
    """Nothing that was dropped or failed is out of reach."""
    (duplicate,) = filled("duplicates", "list", "--json").json
    assert duplicate["repeats"] == 1
    assert filled("duplicates", "list").out
    filled("duplicates", "admit", str(duplicate["id"]), "--reason", "a real ride")
    filled("duplicates", "admit", str(duplicate["id"]), code=2)
    assert filled("duplicates", "list").err
    (failure,) = filled("failures", "list", "--json").json
    assert failure["error_class"] == "DecodeError"
    assert "DecodeError" in filled("failures", "list").out
    shown = filled("failures", "show", str(failure["id"]))
    assert "{bad" in shown.out
    assert filled("failures", "show", str(failure["id"]), "--json").json
    filled("failures", "show", "99", code=2)
    filled("verify")


def test_projections_are_listed_shown_and_explained(built: Type) -> None:
    """What is live, its rows, and how a row came to be."""
    (status,) = built("projections", "list", "--json").json
    assert (status["name"], status["live"]["rows"]) == ("bikes", 2)
    assert "bikes" in built("projections", "list").out
    assert "Rides and distance" in built("projections", "show", "bikes").out
    assert built("projections", "show", "bikes", "--json").json
    assert "green" in built("projections", "rows", "bikes").out
    (row,) = built("projections", "rows", "bikes", "--key", "blue", "--json").json
    assert row == {"entity_id": "blue", "rides": 2, "km": 4.0}
    assert built("projections", "rows", "bikes", "--key", "red").err
    steps = built("projections", "explain", "bikes", "blue", "--json").json
    assert [step["state"]["rides"] for step in steps] == [1, 2]
    assert "3.0" in built("projections", "explain", "bikes", "blue").out
    built("projections", "explain", "bikes", "red")
    assert "bikes" in built("projections", "show", "bike", code=2).err
    report = built("project", "bikes", "--json").json[0]
    assert report["events"] == 0


def test_a_replay_is_planned_refused_promoted_and_undone(
    built: Type, tmp_path: Path
) -> None:
    """The whole life of a changed fold."""
    file = tmp_path / "projections" / "bikes.py"
    file.write_text(BIKES.replace("version=1", "version=2").replace("+ 1,", "+ 10,"))

    assert "code" in built("project", code=2).err
    plan = built("replay", "--from-position", "4", "--dry-run", "--json").json[0]
    assert (plan["kind"], plan["keys"], plan["events"]) == ("since", 1, 2)
    assert built("replay", "--since", "2026-03-03", "--by", "event-time", "--dry-run")
    assert built("replay", "--from-offset", "rides:0:3", "--dry-run").out
    (refused,) = built("replay", "--max-changed", "1", "--json", code=4).json
    assert (refused["changed"], refused["outcome"]) == (2, "refused")
    assert "2 changed" in " ".join(built("projections", "diff", "bikes").out.split())
    assert built("projections", "diff", "bikes", "--json").json[0]["changed"] == 2
    assert "live" in built("projections", "promote", "bikes", "--reason", "new").out
    (row,) = built("projections", "rows", "bikes", "--key", "blue", "--json").json
    assert row["rides"] == 20
    assert built("projections", "undo", "bikes").out
    built("replay", "--until", "2026-03-02", "--by", "event-time")
    assert len(built("replay", "--list", "--json").json) == 2
    assert "side" in built("replay", "--list").out
    shown = built("projections", "show", "bikes", "--json").json[0]
    side = next(b["number"] for b in shown["builds"] if b["role"] == "side")
    built("projections", "drop", "bikes", str(side), "--yes")
    assert "live" in built("projections", "drop", "bikes", "1", "--yes", code=2).err
    assert built("replay", "--from-position", "99").out
    built("replay", "--resume", "1", code=2)
    built("replay", "--cancel", "77", code=2)


def test_code_that_means_the_same_is_declared_compatible(
    built: Type, tmp_path: Path
) -> None:
    """A refactoring needs no replay when its author says so."""
    file = tmp_path / "projections" / "bikes.py"
    file.write_text(BIKES.replace("state.rides + 1", "1 + state.rides"))

    assert built("doctor", code=1).out
    said = built("projections", "compatible", "bikes", "--reason", "same sum")

    assert "code" in said.out + said.err
    built("project")
    assert built("projections", "compatible", "bikes")


def test_verify_and_doctor_say_what_they_looked_at(built: Type) -> None:
    """A report that names its limits."""
    assert "head" in built("verify", "bikes").out
    found = built("verify", "--json").json[0]
    assert found["ok"]
    assert built("verify", "--head", "ab" * 32, code=4).out
    checks = {check["name"]: check["ok"] for check in built("doctor", "--json").json}
    assert checks["database"]
    assert checks["projections"]
    assert built("doctor").out


def test_versions_are_printed(typed: Type) -> None:
    """A bug report starts with them."""
    said = typed("--version").out

    assert "kappa-log" in said
    assert "SQLite" in said
