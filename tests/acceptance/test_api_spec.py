"""/openapi.json: what is described is there, and what is answered is as described."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from kappa_log import Event, projection
from support.api import ACKING, ApiWorld, a_failure
from support.logs import append

EXAMPLES = 15
"""Requests an operation; there are about thirty operations."""

CHECKS = [
    checks.not_a_server_error,
    *(
        getattr(checks, name)
        for name in (
            "status_code_conformance",
            "content_type_conformance",
            "response_headers_conformance",
            "response_schema_conformance",
        )
        if hasattr(checks, name)
    ),
]


@projection(topics=["things"], version=1)
def counter(state: int | None, _event: Event) -> int | None:
    """Count the events of an entity."""
    return (state or 0) + 1


def _world(url: str, folder: Path) -> ApiWorld:
    """Return an application over a log that has one of each thing."""
    listeners = [{"topic": "orders", "group_id": "billing", "handler": "scripted:Main"}]
    world = ApiWorld(url, folder, counter, listeners=listeners)
    world.script(ACKING)
    for number in range(1, 4):
        world.put_failure(a_failure(number))
    objects = [{"id": "a", "n": n % 3} for n in range(5)]
    append(world.log, folder / "things.jsonl", objects)
    world.log.project()
    world.log.replay("counter", promote=False)
    return world


def test_what_is_answered_is_as_described(database_url: str, tmp_path: Path) -> None:
    """Whatever is asked: no error of the server, no status or member unheard of."""
    world = _world(database_url, tmp_path)
    schema = schemathesis.openapi.from_wsgi("/openapi.json", world.app)
    names = set()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        names.add(operation.label)

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()

    world.app.extensions["kappa_log_jobs"].stop()
    world.close()
    assert len(CHECKS) == 5
    assert len(names) > 25


def _described(world: ApiWorld) -> dict[str, Any]:
    found: dict[str, Any] | None = world.client.get("/openapi.json").json
    assert found is not None
    return found


def test_every_route_is_described(sqlite_url: str, tmp_path: Path) -> None:
    """And nothing that is no route."""
    world = _world(sqlite_url, tmp_path)
    document = _described(world)
    routes = {
        (re.sub("<(.*?)>", r"{\1}", str(rule)), method.lower())
        for rule in world.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if str(rule) != "/openapi.json"
    }

    described = {
        (path, method)
        for path, operations in document["paths"].items()
        for method in operations
    }

    assert described == routes
    assert document["openapi"].startswith("3.1")
    world.close()


def test_every_operation_says_what_it_answers(sqlite_url: str, tmp_path: Path) -> None:
    """With a name of its own, a summary, and types that are there."""
    world = _world(sqlite_url, tmp_path)
    document = _described(world)
    operations = [
        operation
        for operations in document["paths"].values()
        for operation in operations.values()
    ]

    assert len({o["operationId"] for o in operations}) == len(operations)
    for operation in operations:
        assert operation["summary"].endswith(".") or operation["summary"]
        assert operation["responses"]["200"]["content"]
        for content in operation.get("requestBody", {}).get("content", {}).values():
            assert content["example"]
    used = set(re.findall(r"#/components/schemas/([\w.]+)", str(document)))
    assert used <= set(document["components"]["schemas"])
    assert "security" not in document
    world.close()


def test_tokens_are_described_where_they_are_needed(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Generated clients ask for one."""
    world = ApiWorld(sqlite_url, tmp_path, needs_token=True, hosts=None)
    secret = world.log.create_token("ann", "read")

    found = world.client.get(
        "/openapi.json", headers={"Authorization": f"Bearer {secret}"}
    )

    assert found.json is not None
    assert found.json["security"] == [{"token": []}]
    world.close()
