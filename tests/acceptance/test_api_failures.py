"""/v1/failures and /v1/duplicates: retry, give up, admit; one, many, and who did it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kappa_log.web import failures as web_failures
from support.api import ACKING, ApiWorld, a_failure, an_event

LISTENERS = [{"topic": "orders", "group_id": "billing", "handler": "scripted:Main"}]


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[ApiWorld]:
    """Give an application over three failures, of two kinds."""
    found = ApiWorld(database_url, tmp_path, listeners=LISTENERS)
    for number, print_ in ((1, "f1"), (2, "f1"), (3, "f2")):
        found.put_failure(a_failure(number, fingerprint=print_))
    found.script(ACKING)
    yield found
    found.close()


def _post(world: ApiWorld, path: str, **body: Any) -> tuple[int, Any]:
    response = world.client.post(path, json=body)
    return response.status_code, response.json


def _audit(world: ApiWorld) -> list[tuple[str, str, str, str | None]]:
    table = world.log.database.tables.audit.c
    with world.log.database.read() as connection:
        query = sa.select(table.who, table.action, table.subject, table.reason)
        return [tuple(row) for row in connection.execute(query.order_by(table.id))]


def test_retry_says_what_came_of_it(world: ApiWorld) -> None:
    """Beyond whether it was acknowledged: the event's position, and who did it.

    SEED A20.
    """
    response = world.client.post("/v1/failures/1/retry?reason=fixed")

    assert response.json == {"acknowledged": True, "outcome": "acked", "position": 1}
    event: Any = world.client.get("/v1/events/1").json
    assert (event["entity_id"], event["payload"]) == ("ada", {"n": 1})
    assert _audit(world) == [("api@loopback", "retry", "failure 1", "fixed")]


def test_a_handler_that_raises_again_leaves_the_failure(world: ApiWorld) -> None:
    """Its own message is the answer; where it stands is nobody's business.

    SEED A21, R6.
    """
    told = "no price in /etc/shop/prices.json today"
    world.script({"do": "raise", "message": told})

    status, body = _post(world, "/v1/failures/1/retry")

    assert status == 422
    assert body["message"] == "no price in …/prices.json today"
    assert body["type"] == "urn:kappa-log:problem:retry-failed"
    assert "shop" not in str(body)
    assert world.client.get("/v1/failures/1").json is not None
    assert world.client.get("/v1/events").json == []


def test_groups_tell_errors_apart(world: ApiWorld) -> None:
    """A thousand failures of one cause are one line."""
    found: Any = world.client.get("/v1/failures/groups").json

    assert [(g["fingerprint"], g["count"], g["example_id"]) for g in found] == [
        ("f1", 2, 2),
        ("f2", 1, 3),
    ]


def test_many_are_retried_by_a_filter(world: ApiWorld) -> None:
    """Counted first, then done; the others stay."""
    count = _post(world, "/v1/failures/retry", fingerprint="f1", dry_run=True)
    assert count[1]["matched"] == 2
    assert _audit(world) == []

    status, done = _post(world, "/v1/failures/retry", fingerprint="f1", reason="fixed")

    assert status == 200
    assert (done["matched"], done["acked"], done["failed"]) == (2, 2, 0)
    assert world.client.get("/v1/failures/count").json == {"count": 1}
    assert {who for who, *_ in _audit(world)} == {"api@loopback"}


@pytest.mark.parametrize("act", ["retry", "discard"])
def test_a_filter_of_nothing_that_there_is_is_refused(
    world: ApiWorld, act: str
) -> None:
    """As a misspelled member is: with 200 it would look like success."""
    status, said = _post(world, f"/v1/failures/{act}", topic="ordres")
    _, typo = _post(world, f"/v1/failures/{act}", fingerprnt="f1")
    _, other = _post(world, f"/v1/failures/{act}", **{"": 1})

    assert status == 422
    assert said["message"] == (
        "no failure matches topic 'ordres'; there are failures of: orders"
    )
    assert typo["message"] == ("fingerprnt: no such member; did you mean fingerprint?")
    assert "there are: ids, fingerprint, topic, " in other["message"]


def test_a_dry_run_tells_what_would_become_of_each(world: ApiWorld) -> None:
    """One or many, by the handler's own words; and nothing is kept of it."""
    world.script({"do": "raise", "message": "no price in /etc/shop/prices.json"})

    status, one = _post(world, "/v1/failures/1/retry?dry_run=true")
    _, many = _post(world, "/v1/failures/retry", all=True, dry_run=True)

    assert status == 200
    assert (one["acknowledged"], one["outcome"]) == (False, "failed")
    assert one["error_class"] == "RuntimeError"
    assert one["error_message"] == "no price in …/prices.json"
    assert [t["outcome"] for t in many["trials"]] == ["failed"] * 3
    assert "etc" not in str(many)
    world.script(ACKING)
    _, one = _post(world, "/v1/failures/1/retry?dry_run=true")
    assert (one["acknowledged"], one["position"]) == (True, None)
    assert _post(world, "/v1/failures/9/retry?dry_run=true")[0] == 404
    assert _post(world, "/v1/failures/1/retry?dry_run=maybe")[0] == 422
    failure: Any = world.client.get("/v1/failures/1").json
    assert failure["attempts"] == 1
    assert world.client.get("/v1/events").json == []
    assert _audit(world) == []


def test_many_are_given_up_by_a_filter(world: ApiWorld) -> None:
    """By ids, or all of them where that is said."""
    assert _post(world, "/v1/failures/discard", ids=[1, 99]) == (200, {"count": 1})
    assert _post(world, "/v1/failures/discard", all=True, dry_run=True)[1] == {
        "count": 2
    }
    assert _post(world, "/v1/failures/discard", all=True, reason="old") == (
        200,
        {"count": 2},
    )
    assert world.client.get("/v1/failures").json == []
    assert world.calls() == []


def test_too_many_at_once_are_refused(
    world: ApiWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client does not wait for hours; counting them is no work."""
    monkeypatch.setattr(web_failures, "MAX_AT_ONCE", 2)

    assert _post(world, "/v1/failures/retry", all=True)[0] == 422
    assert _post(world, "/v1/failures/discard", all=True)[0] == 422
    assert _post(world, "/v1/failures/discard", all=True, dry_run=True)[0] == 200
    assert _post(world, "/v1/failures/retry", fingerprint="f1")[1]["acked"] == 2


@pytest.mark.parametrize("act", ["retry", "discard"])
def test_a_body_that_may_mean_more_than_was_meant_is_refused(
    world: ApiWorld, act: str
) -> None:
    """No filter, a misspelled one, or both all and some: nothing is done."""
    bodies: list[dict[str, Any]] = [
        {},
        {"fingerprnt": "f1"},
        {"fingerprint": "f1", "al": True},
        {"all": True, "topic": "orders"},
        {"ids": []},
        {"ids": ["1x"]},
        {"ids": [0]},
        {"all": "yes"},
        {"fingerprint": "a\0b"},
        {"all": True, "reason": "x" * 1001},
    ]

    for body in bodies:
        assert _post(world, f"/v1/failures/{act}", **body)[0] == 422, body

    assert world.client.get("/v1/failures/count").json == {"count": 3}


def test_giving_one_up_is_noted(world: ApiWorld) -> None:
    """SEED A19: why is optional here, as it always was."""
    assert world.client.delete("/v1/failures/1").status_code == 200
    assert world.client.delete("/v1/failures/2?reason=stale").status_code == 200

    assert [row[1:] for row in _audit(world)] == [
        ("discard", "failure 1", None),
        ("discard", "failure 2", "stale"),
    ]


def test_an_event_is_handed_to_its_handler_again(world: ApiWorld) -> None:
    """SEED A23: nothing is stored twice, whatever the handler says."""
    world.put_event(an_event(7))

    acked = world.client.post("/v1/events/7/retry").json
    world.script({"do": "return", "value": 5})
    skipped = world.client.post("/v1/events/7/retry").json
    world.script({"do": "raise", "message": "no"})
    failed = world.client.post("/v1/events/7/retry")

    assert (acked, skipped) == ({"acknowledged": True}, {"acknowledged": False})
    assert failed.status_code == 422
    assert failed.json is not None
    assert failed.json["message"] == "no"
    assert len(world.calls()) == 3
    assert len(world.client.get("/v1/events").json or []) == 1
    assert world.client.post("/v1/events/8/retry").status_code == 404


def test_a_duplicate_is_admitted_once(world: ApiWorld, tmp_path: Path) -> None:
    """What dedupe dropped becomes an event after all, by name."""
    file = tmp_path / "things.jsonl"
    file.write_text('{"n":1}\n{"n":1}\n{"n":1}\n')
    world.log.ingest(file, topic="things")

    first = world.client.get("/v1/duplicates?limit=1")
    (found,) = first.json or []
    assert (found["offset"], found["repeats"]) == (1, 1)
    assert first.headers["Link"] == '</v1/duplicates?limit=1&after=1>; rel="next"'

    status, done = _post(world, "/v1/duplicates/1/admit", reason="two orders")

    assert (status, done) == (200, {"id": 1, "position": 2})
    assert _post(world, "/v1/duplicates/1/admit")[0] == 404
    assert _audit(world) == [("api@loopback", "admit", "duplicate 1", "two orders")]
