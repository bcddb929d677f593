"""What a person meets who got stuck: a bad projection, a lost one, a long history."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa

import kappa_log
from kappa_log import KappaLog
from kappa_log.app import folding
from kappa_log.cli import projections
from kappa_log.errors import UsageError
from support.logs import execute, tables
from support.typed import Type, enter_project, typist

COUNTS = '''
from kappa_log import Event, projection

@projection(topics=["sales"], version=1)
def {name}(state: int | None, event: Event) -> int:
    """How many."""
    return (state or 0) + 1
'''

BROKEN = """
from kappa_log import sql_projection

broken = sql_projection(
    name="broken",
    version=1,
    topics=["sales"],
    columns={
        "sales": "count(*)",
        "amount": "sum((payload->>'amount')::DOUBLE)",
    },
)
"""

BY_AMOUNT = """
from kappa_log import sql_projection

by_amount = sql_projection(
    name="by_amount",
    version=1,
    topics=["sales"],
    key="(payload->>'amount')::INTEGER",
    columns={"sales": "count(*)"},
)
"""

SALES = [
    {"till": "north", "amount": 3.0},
    {"till": "south", "amount": "free"},
    {"till": "north", "amount": 4.0},
]

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what is the same on any database."""


@pytest.fixture
def typed(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Type commands in a folder where one of three projections meets a bad event."""
    counts = {name: COUNTS.format(name=name) for name in ("alpha", "zulu")}
    enter_project(monkeypatch, tmp_path, database_url, {"broken": BROKEN} | counts)
    lines = "".join(json.dumps(sale) + "\n" for sale in SALES)
    (tmp_path / "sales.jsonl").write_text(lines)

    type_ = typist(capsys)
    type_("db", "create")
    type_("ingest", "sales.jsonl", "--topic", "sales", "--entity-id", "till")
    return type_


def test_a_projection_that_fails_stops_no_other(typed: Type) -> None:
    """Each is folded as far as it can; what failed is named last, with its column."""
    said = typed("project", code=1)

    assert [line.split()[0] for line in said.out.splitlines()] == ["alpha", "zulu"]
    assert "column 'amount': Conversion Error" in said.err
    assert "'broken' failed on the event at position 2" in said.err
    found = typed("projections", "list", "--json").json
    cursors = {status["name"]: status["live"]["cursor"] for status in found}
    assert cursors == {"alpha": 3, "broken": 1, "zulu": 3}
    assert "or says why it cannot" in typed("doctor").out

    Path("projections/by_amount.py").write_text(BY_AMOUNT)
    said = typed("project", "--json", code=1)
    assert [report["projection"] for report in said.json] == ["alpha", "zulu"]
    assert "'broken' failed" in said.err
    assert "'by_amount' failed on the event at position 2: key: Conv" in said.err


@ON_SQLITE
def test_following_ends_only_where_nothing_is_left_to_fold(
    typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are folded, and the failure told once however often it comes."""
    rounds = []

    def watch(notice: kappa_log.Notice) -> None:
        rounds.append(notice)
        if len(rounds) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(folding, "POLL_SECONDS", 0.0)
    subscription = kappa_log.subscribe("projection_seen_to", watch)
    try:
        said = typed("project", "--follow")
    finally:
        subscription.cancel()

    assert [line.split()[0] for line in said.out.splitlines()] == ["alpha", "zulu"]
    assert said.err.count("'broken' failed on the event at position 2") == 1
    assert "'broken' failed" in typed("project", "broken", "--follow", code=1).err


def test_a_projection_whose_code_is_gone_can_be_dropped(typed: Type) -> None:
    """All builds and the view, once and for all, with its reason; and nothing else."""
    typed("project", "alpha", "zulu")
    typed("replay", "zulu", "--no-promote")
    refused = typed("projections", "drop", "zulu", "--all", "--yes", code=2)
    assert "'zulu' is registered" in refused.err
    Path("projections/zulu.py").unlink()

    would = typed("projections", "drop", "zulu", "--all", "--dry-run")
    assert "--yes" in typed("projections", "drop", "zulu", "--all", code=2).err
    why = ("--yes", "--reason", "no tills any more")
    done = typed("projections", "drop", "zulu", "--all", *why)

    assert would.out.replace("would ", "") == done.out
    assert "build 1 of zulu, which is live" in done.out
    found = typed("projections", "list", "--json").json
    assert [status["name"] for status in found] == ["alpha", "broken"]
    typed("projections", "drop", "zulu", "--all", "--yes", code=2)
    typed("projections", "drop", "zulu", code=2)
    with KappaLog.open() as log:
        assert not [name for name in tables(log) if "zulu" in name]
        with log.database.read() as connection:
            query = sa.text("SELECT action, detail, reason FROM kappa_log_audit")
            acts = connection.execute(query).all()
    assert ("drop", '{"builds":[1,2]}', "no tills any more") in acts
    Path("projections/zulu.py").write_text(COUNTS.format(name="zulu"))
    assert typed("project", "zulu", "--json").json[0]["build"] == 3


@ON_SQLITE
def test_what_is_not_registered_is_told_with_the_way_out(typed: Type) -> None:
    """By whatever looks at it, until it is dropped; the next export is without it."""
    typed("project", "alpha", "zulu")
    typed("export")
    Path("projections/zulu.py").unlink()
    way = "kappa-log projections drop zulu --all"

    assert way in typed("projections", "list").err
    assert way in typed("doctor", code=1).out
    assert way in typed("project", "zulu", code=2).err
    assert way in typed("projections", "drop", "zulu", "1", "--yes", code=2).err
    assert way in typed("replay", "zulu", code=2).err

    typed("projections", "drop", "zulu", "--all", "--yes")
    typed("doctor")
    typed("export")
    (left,) = Path("archive/projections").rglob("*.parquet")
    assert "alpha" in str(left)


def test_what_others_built_on_it_keeps_a_projection(typed: Type) -> None:
    """Their view is named; a replay that was left is cancelled with the rest."""
    typed("project", "broken", "zulu", code=1)
    typed("replay", "broken", code=1)
    Path("projections/broken.py").unlink()
    with KappaLog.open() as log:
        execute(log, "CREATE VIEW mine AS SELECT * FROM kappa_log_view_broken")

        with pytest.raises(UsageError, match="mine; drop them first"):
            log.drop_projection("broken")
        execute(log, "DROP VIEW mine")
        assert [build.role for build in log.drop_projection("broken")] == [
            "live",
            "shadow",
        ]

        assert log.replays(unfinished=True) == []
        assert [found.name for found in log.projections()] == ["alpha", "zulu"]


@ON_SQLITE
def test_a_replay_that_failed_names_both_ways_on(typed: Type) -> None:
    """By its error, when it is asked again, and by doctor; with when each is right."""
    resume, cancel = "kappa-log replay --resume 1", "kappa-log replay --cancel 1"

    said = typed("replay", "broken", code=1).err
    assert said.index("Fix the fold") < said.index(cancel) < said.index(resume)
    for told in (typed("replay", "broken", code=75).err, typed("doctor", code=1).out):
        assert "failed in its fold at position 2: column 'amount'" in told
        assert told.index(cancel) < told.index(resume)
    assert "failed: fill" in typed("replay", "--list").out
    done = typed("replay", "alpha", "broken", "zulu", "--no-promote", code=75)
    assert [line.split()[0] for line in done.out.splitlines() if line[0] != " "] == [
        "alpha",
        "zulu",
    ]
    typed("replay", "--cancel", "1")

    typed("export")
    (segment,) = Path("archive").glob("events/*/*.parquet")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-9])
    said = typed("replay", "zulu", "--from", "archive", code=4).err
    assert "Once that is mended, go on: kappa-log replay --resume 4" in said
    assert "kappa-log replay --cancel 4" in said
    assert "was interrupted while it did 'fill'" in typed("doctor", code=1).out
    segment.write_bytes(whole)
    typed("replay", "--resume", "4")


@ON_SQLITE
def test_a_long_history_is_explained_from_its_end(
    typed: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A screen of it, and how to see the rest; a program gets all of it."""
    monkeypatch.setattr(projections, "PEOPLE_STEPS", 3)
    more = [{"till": "east", "n": n} for n in range(8)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(s) + "\n" for s in more))
    typed("ingest", "more.jsonl", "--topic", "sales", "--entity-id", "till")
    typed("project", "alpha")
    explain = ("projections", "explain", "alpha", "east")

    said = typed(*explain)
    assert said.out.count("→ value") == 3
    assert "value 5 → 6" in said.out
    assert "These are the last 3 of 8 events; --limit N" in said.err
    few = typed(*explain, "--limit", "7")
    assert (few.out.count("→ value"), "last 7 of 8" in few.err) == (7, True)
    assert typed(*explain, "--limit", "8").err == ""
    assert len(typed(*explain, "--json").json) == 8
    (last,) = typed(*explain, "--json", "--limit", "1").json
    assert (last["event"]["position"], last["state"]) == (11, {"value": 8})
    assert (
        "column 'amount'"
        in typed("projections", "explain", "broken", "south", code=1).err
    )


STOPPED = """
import signal
from pathlib import Path
from kappa_log import projection

@projection(topics=["sales"], version=1)
def stopped(state: int | None, event) -> int:
    if Path("stop").exists():
        signal.raise_signal(signal.SIGINT)
    return (state or 0) + 1
"""


@ON_SQLITE
def test_ctrl_c_says_what_is_kept(typed: Type) -> None:
    """Of folding and of verifying, after a real signal; and what is said is true."""
    Path("projections/stopped.py").write_text(STOPPED)
    Path("stop").touch()
    said = typed("project", "stopped", code=130).err
    assert "Interrupted; rows and cursors that were written are kept" in said
    Path("stop").unlink()
    assert typed("project", "stopped", "--json").json[0]["events"] == 3
    Path("stop").touch()
    said = typed("verify", "stopped", code=130).err
    assert "Interrupted; nothing was changed" in said
