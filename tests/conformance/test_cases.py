"""The events API answers as the one that it succeeds did, case by case.

Rows are put into the tables verbatim, as rows imported from the original are. What an
answer has beyond what a case expects is welcome.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import TestResponse

from support.api import ApiWorld

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "cases.json").read_text()
)["cases"]


def _world(url: str, folder: Path, setup: dict[str, Any]) -> ApiWorld:
    """Return the application that a case is about, in its state."""
    settings = setup["config"]
    retries = settings["max_retries"]
    listeners = [
        {
            "topic": listener["topic"],
            "group_id": listener["group_id"],
            "handler": {"main": "scripted:Main"}.get(
                listener["handler"], listener["handler"]
            ),
        }
        | ({} if retries is None else {"max_retries": retries})
        for listener in settings["listeners"]
    ]
    world = ApiWorld(url, folder, listeners=listeners)
    for row in setup["events"]:
        world.put_event(row)
    for row in setup["failures"]:
        world.put_failure(row)
    world.script(setup["handler"] or {"do": "return", "value": None})
    return world


def _ask(world: ApiWorld, request: dict[str, Any]) -> TestResponse:
    return world.client.open(
        request["path"], method=request["method"], headers=request["headers"]
    )


def _check(expected: dict[str, Any], response: TestResponse) -> None:
    """Compare an answer with what is expected of it, each by its own rule."""
    assert response.status_code == expected["status"], response.text
    assert (response.content_type or "").startswith(expected.get("content_type", ""))
    if "text" in expected:
        assert response.text == expected["text"]
    body: Any = response.get_json(silent=True)
    for wanted in ("json", "json_subset"):
        if wanted in expected:
            _is_in(expected[wanted], body)
    if "length" in expected:
        assert len(body) == expected["length"]
    if "pluck" in expected:
        field, values = expected["pluck"]["field"], expected["pluck"]["values"]
        assert [found[field] for found in body] == values
    if "message_contains" in expected:
        assert expected["message_contains"] in body["message"]


def _is_in(wanted: Any, found: Any) -> None:
    """Check that all members of an object are there and equal; a list is equal."""
    if isinstance(wanted, dict):
        assert {name: found[name] for name in wanted} == wanted
    else:
        assert found == wanted


def _check_after(world: ApiWorld, after: dict[str, Any]) -> None:
    """Compare what is there after the requests."""
    events = world.client.get("/v1/events?limit=500").json
    failures = world.client.get("/v1/failures?limit=500").json
    assert events is not None
    assert failures is not None
    calls = world.calls()
    found: dict[str, Any] = {
        "events_count": len(events),
        "failures_count": len(failures),
        "failure_ids": sorted(row["id"] for row in failures),
        "handler_calls": len(calls),
    }
    for name, value in after.items():
        if name in found:
            assert found[name] == value, name
        elif name == "handler_call":
            payload, metadata = calls[0]
            assert payload == value["payload_json"]
            _is_in(value["metadata"], metadata)
        else:
            rows = {"events": events, "failures": failures}[name]
            rows = sorted(rows, key=lambda row: int(row["id"]))
            for wanted, row in zip(value, rows, strict=True):
                _is_in(wanted, row)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_case_of_the_original(
    database_url: str, tmp_path: Path, case: dict[str, Any]
) -> None:
    """Programs that were written for the original go on working.

    SEED A2, A3, A5, A6, A8 to A10, A12, A14 to A22, D7, F11, F16, F17, R2, R4, R5.
    """
    world = _world(database_url, tmp_path, case["setup"])
    try:
        _check(case["expect"], _ask(world, case["request"]))
        for step in case.get("then", []):
            _check(step["expect"], _ask(world, step["request"]))
        _check_after(world, case.get("after", {}))
    finally:
        world.close()
