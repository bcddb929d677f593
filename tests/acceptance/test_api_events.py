"""/v1/events and /v1/failures as lists: order, pages, filters, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kappa_log.web.query import EventQuery
from support.api import ApiWorld, a_failure, an_event


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[ApiWorld]:
    """Give an application over an empty log."""
    found = ApiWorld(database_url, tmp_path)
    yield found
    found.close()


def _ids(world: ApiWorld, path: str) -> list[int]:
    response = world.client.get(path)
    assert response.status_code == 200, response.text
    found: Any = response.json
    return [row["id"] for row in found]


def _following(world: ApiWorld, path: str) -> Iterator[list[int]]:
    """Yield page after page, as the Link headers lead."""
    while path:
        response = world.client.get(path)
        assert response.status_code == 200, response.text
        found: Any = response.json
        yield [row["id"] for row in found]
        link = re.fullmatch(r'<(.*)>; rel="next"', response.headers.get("Link", ""))
        path = link[1] if link else ""


TIMES = [None, "2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z"]


@pytest.mark.parametrize("limit", [1, 3, 4, 500])
@pytest.mark.parametrize("noun", ["events", "failures"])
def test_cursors_pass_over_nothing_and_repeat_nothing(
    world: ApiWorld, noun: str, limit: int
) -> None:
    """Through ties and rows without a time, the pages together are the list.

    SEED D7.
    """
    put, make = (
        (world.put_event, an_event)
        if noun == "events"
        else (world.put_failure, a_failure)
    )
    for number, (happened, kept) in enumerate(product(TIMES, ["01", "02", "02"]), 1):
        created = f"2026-01-{kept}T00:00:00.123456Z"
        put(make(number, event_time=happened, created_at=created))
    whole = _ids(world, f"/v1/{noun}?limit=500")

    pages = list(_following(world, f"/v1/{noun}?limit={limit}&topic=orders"))

    assert sorted(whole) == list(range(1, 10))
    assert whole[:1] == [9]
    assert [number for page in pages for number in page] == whole
    assert all(len(page) <= limit for page in pages)


def test_a_page_by_offset_is_the_one_by_cursor(world: ApiWorld) -> None:
    """Both ways lead through the same list."""
    for number in range(1, 8):
        world.put_event(an_event(number))

    query = "limit=3&topic[]=orders&topic[]=none"
    by_cursor = list(_following(world, f"/v1/events?{query}"))

    assert by_cursor[1] == _ids(world, "/v1/events?limit=3&offset=3") == [4, 3, 2]


FILTERS = [
    ("since=2026-01-01T00:00:03Z", [5, 4, 3]),
    ("until=2026-01-01T00:00:03Z", [2, 1]),
    ("since=2026-01-01T00:00:02Z&until=2026-01-01T00:00:04Z", [3, 2]),
    ("since=2026-01-01T01:00:03+01:00", [5, 4, 3]),
    ("since=2026-01-01T01:00:03%2B01:00", [5, 4, 3]),
    ("since=2026-01-01", [5, 4, 3, 2, 1]),
    ("since=2027-01-01", []),
    ("until=2025-01-01", []),
    ("partition=1", [4, 2]),
    ("partition=1&record_offset=4", [4]),
    ("entity_id=e5", [5]),
    ("topic=orders&event_type=placed&group_id=billing&entity_id=e1", [1]),
    ("topic=", []),
    ("colour=red", [5, 4, 3, 2, 1]),
    ("topic=none&topic=orders", [5, 4, 3, 2, 1]),
    ("limit=1&limit=2", [5, 4]),
    ("entity_id[]=e2&entity_id[]=e4&entity_id[]=none", [4, 2]),
    ("entity_id%5B%5D=e2", [2]),
    ("topic[]=none", []),
    ("topic[]=orders&group_id[]=billing&event_type[]=placed&entity_id=e1", [1]),
]


def test_filters(world: ApiWorld) -> None:
    """SEED A12, A13: exact, joined by and; the last of a repeated one; any of []."""
    for number in range(1, 6):
        world.put_event(an_event(number, partition=int(number % 2 == 0)))

    found = [(query, _ids(world, f"/v1/events?{query}")) for query, _ in FILTERS]

    assert found == FILTERS


def test_filters_by_position_and_event_time(world: ApiWorld) -> None:
    """Positions are exclusive; event times are those that handlers told."""
    for number in range(1, 6):
        world.put_event(an_event(number, event_time=f"2026-02-0{number}T00:00:00Z"))

    assert _ids(world, "/v1/events?after=1&before=4") == [3, 2]
    assert _ids(world, "/v1/events?since=2026-02-04&by=event-time") == [5, 4]
    assert _ids(world, "/v1/events?until=2026-02-02&by=event-time") == [1]


def test_filters_of_failures(world: ApiWorld) -> None:
    """SEED A14: by what the error is, and when it was first seen."""
    world.put_failure(a_failure(1))
    world.put_failure(a_failure(2, fingerprint="f2", error_class="KeyError"))

    assert _ids(world, "/v1/failures?fingerprint=f2") == [2]
    assert _ids(world, "/v1/failures?error_class=RuntimeError") == [1]
    assert _ids(world, "/v1/failures?since=2026-01-01T00:00:02Z") == [2]
    assert _ids(world, "/v1/failures?until=2026-01-01T00:00:02Z") == [1]


REFUSED = [
    "limit=0",
    "limit=-1",
    "limit=501",
    "limit=1e3",
    "limit=+5",
    "limit=%20 5",
    "limit=1_0",
    "limit=1000000000000000000000",
    "limit=",
    "limit=abc",
    "limit=１２",  # noqa: RUF001 - not the digits that programs write
    "offset=-1",
    "offset=9223372036854775808",
    "since=yesterday",
    "since=2026-02-30",
    "since=2026-01-01T00:00:00",
    "since=0001-01-01T00:00:00%2B23:00",
    "by=mood",
    "cursor=x",
    "cursor=..1.abc",
    "topic=%00",
    "topic=" + "x" * 1100,
    "partition=one",
    "after=1.5",
    "topic=a&topic[]=b",
    "topic[]=%00",
    "&".join(["topic[]=a"] * 101),
]


def test_a_parameter_that_is_none_is_refused(world: ApiWorld) -> None:
    """SEED A11: nothing is read as something else than was meant."""
    for query in REFUSED:
        response = world.client.get(f"/v1/events?{query}")

        assert response.status_code == 422, query
        body: Any = response.json
        assert (body["error"], body["status"]) == (True, 422)
        assert body["instance"] == "/v1/events"
    body = world.client.get("/v1/events?limit=-1").json
    assert body["message"] == (
        "limit: a whole number from 1 to 500, in the digits 0 to 9"
    )


def test_a_cursor_is_of_its_list_and_filters(world: ApiWorld) -> None:
    """With others it would pass over rows, so it is refused; cut ones too."""
    for number in range(1, 4):
        world.put_event(an_event(number))
    link = world.client.get("/v1/events?limit=1").headers["Link"]
    cursor = re.search("cursor=([^&>]*)", link)
    assert cursor is not None

    statuses = [
        world.client.get(path).status_code
        for path in (
            f"/v1/events?limit=2&cursor={cursor[1]}",
            f"/v1/events?topic=orders&cursor={cursor[1]}",
            f"/v1/failures?cursor={cursor[1]}",
            f"/v1/events?cursor={cursor[1][:-1]}",
            f"/v1/events?cursor={cursor[1]}&offset=1",
        )
    ]

    assert statuses == [200, 422, 422, 422, 422]


def test_a_forged_cursor_is_refused(world: ApiWorld) -> None:
    """The seal keeps mistakes out, not attackers; they learn and break nothing."""
    query = EventQuery()
    for text in ("x.1.1", f"1.{10**30}.1", f".1.{2**63}", "1.1", ".1.-1", ".0.1"):
        seal = query._seal(text)  # noqa: SLF001 - as an attacker would
        status = world.client.get(f"/v1/events?cursor={text}.{seal}").status_code
        assert status == (200 if text == ".0.1" else 422), text


def test_the_ends_of_time_are_times(world: ApiWorld) -> None:
    """Both databases keep them."""
    world.put_event(an_event(1, event_time="2026-01-01T00:00:00Z"))
    world.put_failure(a_failure(1))

    for noun, by in product(["events", "failures"], ["recorded", "event-time"]):
        path = f"/v1/{noun}?by={by}&since=0001-01-01&until=9999-12-31T23:59:59.999999Z"
        assert len(_ids(world, path)) == (noun == "events" or by == "recorded")


def test_no_digit_of_a_payload_is_lost(world: ApiWorld, tmp_path: Path) -> None:
    """Its text passes through: numbers beyond a double, spaces, order of keys.

    SEED H13.
    """
    text = '{"b":12345678901234567890.12345678901234567890, "a" : 1E5,"é":"\\u00e9"}'
    file = tmp_path / "orders.jsonl"
    file.write_text(text + "\n")
    world.log.ingest(file, topic="orders")

    assert f'"payload":{text}' in world.client.get("/v1/events/1").text
    assert f'"payload":{text}' in world.client.get("/v1/events").text


def test_a_failure_shows_bytes_that_are_no_json(
    world: ApiWorld, tmp_path: Path
) -> None:
    """SEED F16, A18: as base64: what came is never lost, nor does it break the list."""
    file = tmp_path / "orders.jsonl"
    file.write_bytes(b'{"n":1}\n{"n":\xff\n')
    world.log.ingest(file, topic="orders")

    (found,) = world.client.get("/v1/failures").json or []

    assert found["payload"] is None
    assert found["value"] == "eyJuIjr/"
    assert found["metadata"]["offset"] == 1
    assert world.client.get(f"/v1/failures/{found['id']}").json == found


def test_times_are_as_fine_as_they_are(world: ApiWorld) -> None:
    """SEED A9: milliseconds, or microseconds where there are any."""
    world.put_event(an_event(1, created_at="2026-01-01T00:00:00.120Z"))
    world.put_event(an_event(2, created_at="2026-01-01T00:00:00.120001Z"))

    found: Any = world.client.get("/v1/events").json

    assert [row["created_at"] for row in found] == [
        "2026-01-01T00:00:00.120001Z",
        "2026-01-01T00:00:00.120Z",
    ]


NO_IDS = ["0", "-1", "1abc", "1.0", "+1", "%31%20", "x", "9" * 19, "9" * 40]


def test_an_id_that_is_no_whole_number_is_not_there(world: ApiWorld) -> None:
    """It is not rounded to one that is: what would be deleted is another row.

    SEED A7.
    """
    world.put_event(an_event(1))
    world.put_failure(a_failure(1))

    for noun, number in product(["event", "failure"], NO_IDS):
        for method, path in (
            ("GET", f"/v1/{noun}s/{number}"),
            ("POST", f"/v1/{noun}s/{number}/retry"),
        ):
            response = world.client.open(path, method=method)
            assert response.status_code == 404, path
            body: Any = response.json
            assert body["message"] == f"{noun} not found"
        assert world.client.delete(f"/v1/failures/{number}").status_code == 404
    assert world.client.get("/v1/failures/count").json == {"count": 1}


def test_head_is_answered_for_every_get(world: ApiWorld) -> None:
    """SEED A6: with the status and headers of GET, and no body."""
    world.put_event(an_event(1))
    paths = [
        str(rule)
        for rule in world.app.url_map.iter_rules()
        if "GET" in (rule.methods or ()) and not rule.arguments
    ]
    assert len(paths) > 10

    for path in [*paths, "/v1/events/1"]:
        asked, head = world.client.get(path), world.client.head(path)
        assert (head.status_code, head.content_type) == (
            asked.status_code,
            asked.content_type,
        )
        assert head.data == b""


NO_ROUTES = [
    ("GET", "/v1/events/"),
    ("GET", "/v1//events"),
    ("POST", "/v1/events"),
    ("DELETE", "/v1/events/1"),
    ("OPTIONS", "/v1/events"),
    ("TRACE", "/v1/events"),
    ("GET", "/"),
]


def test_what_is_no_route_is_not_found(world: ApiWorld) -> None:
    """SEED A2: a wrong method too, as it always was."""
    for method, path in NO_ROUTES:
        response = world.client.open(path, method=method)

        assert response.status_code == 404, (method, path)
        body: Any = response.json
        assert (body["error"], body["message"]) == (True, "not found")
