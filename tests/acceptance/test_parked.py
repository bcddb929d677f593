"""Parked keys as a person meets them: project, look, mend, retry; and by the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.api import ApiWorld
from support.logs import append
from support.tallies import knows, sums, tallies
from support.typed import Type, enter_project, typist

BIKES = '''
from kappa_log import Event, projection

@projection(topics=["rides"], version=1)
def bikes(state: float | None, event: Event) -> float:
    """Distance of each bike."""
    if event.payload["km"] < 0:
        raise ValueError("a negative distance")
    return (state or 0.0) + event.payload["km"]
'''

MENDED = BIKES.replace('raise ValueError("a negative distance")', "return state or 0.0")

RIDES = [
    {"bike": "blue", "km": 3.0},
    {"bike": "green", "km": 5.0},
    {"bike": "blue", "km": -1.0},
    {"bike": "green", "km": 4.0},
    {"bike": "blue", "km": 2.0},
]


@pytest.fixture
def typed(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Type commands in a folder with rides, and a projection that one of them fails."""
    enter_project(monkeypatch, tmp_path, database_url, {"bikes": BIKES}, columns=200)
    (tmp_path / "rides.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RIDES))

    type_ = typist(capsys)
    type_("db", "create")
    type_("ingest", "rides.jsonl", "--topic", "rides", "--entity-id", "bike")
    return type_


def test_a_key_is_parked_and_looked_at(typed: Type) -> None:
    """Each command says the next one, and nothing else is held up by it."""
    said = typed("project", code=3)
    assert "1 key parked, 1 of them now" in said.out
    assert "kappa-log projections parked bikes" in said.err
    assert typed("project", "--json").json[0]["parked"] == 1
    rows = typed("projections", "rows", "bikes", "--json").json
    assert rows == [
        {"entity_id": "blue", "value": 3.0},
        {"entity_id": "green", "value": 9.0},
    ]

    (parked,) = typed("projections", "parked", "bikes", "--json").json
    assert (parked["key"], parked["position"], parked["waiting"]) == ("blue", 3, 2)
    said = typed("projections", "parked", "bikes")
    assert "ValueError: a negative distance" in said.out
    assert "retry bikes --all --dry-run" in said.err
    assert "parked here" in typed("projections", "explain", "bikes", "blue").out
    steps = typed("projections", "explain", "bikes", "blue", "--json").json
    assert [step.get("error") for step in steps] == [
        None,
        "ValueError: a negative distance",
    ]
    assert "1 key parked" in typed("projections", "list").out
    assert (
        typed("projections", "show", "bikes", "--json").json[0]["live"]["parked"] == 1
    )
    assert "1 parked key;" in typed("verify", "bikes").err


def test_a_parked_key_is_mended_and_retried(typed: Type, tmp_path: Path) -> None:
    """Once its code is what the build's is declared to be."""
    typed("project", code=3)
    assert "failed again 1" in typed(
        "projections", "retry", "bikes", "blue", code=3
    ).out  # fmt: skip

    (tmp_path / "projections" / "bikes.py").write_text(MENDED)
    assert (
        "compatible bikes"
        in typed("projections", "retry", "bikes", "--all", code=2).err
    )
    said = typed("projections", "compatible", "bikes")
    assert "projections retry bikes --all --dry-run" in said.err
    said = typed("projections", "retry", "bikes", "--all", "--dry-run")
    assert "would be folded on 1   failed again 0" in said.out
    assert "blue  2 events to position 5" in said.out
    (done,) = typed("projections", "retry", "bikes", "blue", "--json").json
    assert (done["folded"], done["failed"]) == (1, 0)

    rows = typed("projections", "rows", "bikes", "--key", "blue", "--json").json
    assert rows == [{"entity_id": "blue", "value": 5.0}]
    typed("verify", "bikes")
    assert "No key of bikes is parked" in typed("projections", "parked", "bikes").err
    assert "No key" in typed("projections", "retry", "bikes", "--all").err


def test_wrong_uses_are_told(typed: Type, tmp_path: Path) -> None:
    """With the exit codes of all commands."""
    said = typed("project", "--on-error", "stop", code=1)
    assert "position 3 for key 'blue'" in said.err
    assert "kappa-log project bikes --on-error park" in said.err
    typed("project", code=3)
    for keys in ((), ("blue", "--all")):
        said = typed("projections", "retry", "bikes", *keys, code=2)
        assert "say which keys" in said.err
    assert "not found" in typed("projections", "retry", "bikes", "red", code=2).err
    typed("projections", "parked", "unknown", code=2)
    said = typed("replay", "bikes", "--on-error", "park", code=2)
    assert "a parked key, the first of them 'blue' at position 3" in said.err
    assert "parked bikes --build 2" in said.err
    (shown,) = typed("projections", "parked", "bikes", "--build", "2", "--json").json
    assert shown["key"] == "blue"
    assert "drop bikes 2" in typed("projections", "parked", "bikes", "--build", "2").err
    said = typed("replay", "bikes", "--on-error", "park", "--no-promote", code=3)
    assert "1 key parked" in said.out
    (tmp_path / "kappa_log.toml").write_text('[projections]\non_error = "skip"\n')
    assert "projections.on_error" in typed("project", code=78).err


# --- the API ------------------------------------------------------------------


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[ApiWorld]:
    """Give an application over a log with two parked keys of three."""
    found = ApiWorld(database_url, tmp_path, tallies("things"))
    bad = {4, 5}
    objects = [{"id": f"e{n % 3}", "n": n, "bad": n in bad} for n in range(1, 10)]
    append(found.log, tmp_path / "things.jsonl", objects)
    found.log.project()
    yield found
    found.close()


def _asked(world: ApiWorld, path: str, status: int = 200, **body: Any) -> Any:
    client, path = world.client, f"/v1/projections/things{path}"
    answer = client.post(path, json=body) if body else client.get(path)
    assert answer.status_code == status, answer.text
    return answer.json


def test_the_api_lists_and_retries_parked_keys(world: ApiWorld) -> None:
    """One, all, or as a trial; what cannot be is told as everywhere."""
    assert _asked(world, "")["live"]["parked"] == 2
    assert (
        'kappa_log_projection_parked_keys{projection="things"} 2.0'
        in world.client.get("/metrics").get_data(as_text=True)
    )
    found = _asked(world, "/parked?limit=1")
    assert [(one["key"], one["position"], one["waiting"]) for one in found] == [
        ("e1", 4, 2)
    ]
    link = world.client.get("/v1/projections/things/parked?limit=1").headers["Link"]
    assert "offset=1" in link
    assert _asked(world, "/parked?offset=1")[0]["key"] == "e2"
    assert _asked(world, "/explain?key=e1")[-1]["error"] == "ValueError: bad 4"
    again = _asked(world, "/retry", keys=["e1"])
    assert (again["failed"], again["keys"][0]["error"]) == (1, "ValueError: bad 4")
    bodies: list[dict[str, Any]] = [
        {"dry_run": True},
        {"keys": ["e1"], "all": True},
        {"keys": []},
    ]
    for body in bodies:
        _asked(world, "/retry", 422, **body)
    _asked(world, "/retry", 404, keys=["e0"])
    _asked(world, "/parked?build=7", 404)

    world.log.__dict__["registry"] = knows(
        world.log, tallies("things", broken=False)
    ).registry
    _asked(world, "/retry", 409, all=True)
    world.log.compatible("things")
    assert _asked(world, "/retry", all=True, dry_run=True)["folded"] == 2
    assert _asked(world, "/parked?limit=5")[0]["attempts"] == 2
    assert _asked(world, "/retry", keys=["e1"], reason="mended")["folded"] == 1
    assert _asked(world, "/retry", all=True)["folded"] == 1

    assert _asked(world, "/parked") == []
    assert sums(world.log, "things") == {"e0": 18, "e1": 12, "e2": 15}


def test_only_operators_retry(database_url: str, tmp_path: Path) -> None:
    """Who may read may look."""
    world = ApiWorld(
        database_url, tmp_path, tallies("things"), needs_token=True, hosts=None
    )
    world.log.project()
    secret = world.log.create_token("ann", "read")
    headers = {"Authorization": f"Bearer {secret}"}
    path = "/v1/projections/things"

    looked = world.client.get(f"{path}/parked", headers=headers)
    tried = world.client.post(f"{path}/retry", json={"all": True}, headers=headers)

    assert (looked.status_code, tried.status_code) == (200, 403)
    world.close()
