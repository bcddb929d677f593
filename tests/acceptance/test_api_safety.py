"""Who may ask what: hosts, origins, tokens, sizes, repeated requests, and silence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import QueuePool

from kappa_log import KappaLog, errors
from kappa_log.config import load_config
from kappa_log.errors import KappaLogError
from kappa_log.storage import database as storage
from kappa_log.web import create_app, rates
from kappa_log.web.errors import STATUSES, public, status_of
from kappa_log.web.rates import Rates
from kappa_log.web.security import RATES
from support.api import ACKING, ApiWorld, a_failure
from support.logs import execute

LISTENERS = [{"topic": "orders", "group_id": "billing", "handler": "scripted:Main"}]


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[ApiWorld]:
    """Give an application for this machine alone, with failures."""
    found = ApiWorld(database_url, tmp_path, listeners=LISTENERS)
    found.script(ACKING)
    for number in (1, 2, 3):
        found.put_failure(a_failure(number))
    yield found
    found.close()


@pytest.fixture
def guarded(database_url: str, tmp_path: Path) -> Iterator[ApiWorld]:
    """Give an application that others reach."""
    found = ApiWorld(
        database_url, tmp_path, listeners=LISTENERS, needs_token=True, hosts=None
    )
    found.script(ACKING)
    found.put_failure(a_failure(1))
    yield found
    found.close()


def _kept(world: ApiWorld) -> int:
    return world.log.count_failures()


# --- hosts and origins --------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "a b"])
def test_another_host_is_refused(world: ApiWorld, host: str) -> None:
    """A name that an attacker points at 127.0.0.1 is not ours."""
    for method, path in (("GET", "/v1/failures"), ("DELETE", "/v1/failures/1")):
        response = world.client.open(path, method=method, headers={"Host": host})
        assert response.status_code == 400
    assert _kept(world) == 3


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://localhost"},
        {"Origin": "http://localhost:8081"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_origin_changes_nothing(
    world: ApiWorld, headers: dict[str, str]
) -> None:
    """SEED A1: a page of another site may make a browser ask, and is refused."""
    for method, path in (
        ("DELETE", "/v1/failures/1"),
        ("POST", "/v1/failures/1/retry"),
        ("POST", "/v1/failures/discard"),
    ):
        response = world.client.open(path, method=method, headers=headers, json={})
        assert response.status_code == 403, response.text
    assert _kept(world) == 3
    assert world.calls() == []


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {}],
)
def test_the_same_origin_may(world: ApiWorld, headers: dict[str, str]) -> None:
    """And so may what is no browser."""
    assert world.client.delete("/v1/failures/1", headers=headers).status_code == 200


def test_a_form_is_no_body(world: ApiWorld) -> None:
    """Only what declares JSON is read; a form of another site cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = world.client.post(
            "/v1/failures/discard", data='{"all":true}', content_type=kind
        )
        assert response.status_code == 415
    assert _kept(world) == 3


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff", b"[" * 100_000, b"nul", b'{"all":NaN}', b'{"all":1'],
)
def test_a_body_that_is_no_json_is_refused(world: ApiWorld, body: bytes) -> None:
    """However deep it nests."""
    response = world.client.post(
        "/v1/failures/discard", data=body, content_type="application/json"
    )

    assert response.status_code in (400, 422)
    assert _kept(world) == 3


def test_sizes_are_bounded(world: ApiWorld) -> None:
    """Of bodies and of queries."""
    large = b'{"reason":"' + b"x" * 1024 * 1024 + b'"}'
    body = world.client.post(
        "/v1/failures/discard", data=large, content_type="application/json"
    )
    query = world.client.get("/v1/events?topic=" + "x" * 5000)

    assert (body.status_code, query.status_code) == (413, 414)


# --- often --------------------------------------------------------------------


def _limited(world: ApiWorld, rate: float) -> list[float]:
    """Bound how often an application may be asked; return its clock's hand."""
    now = [0.0]
    world.app.extensions[RATES] = Rates(rate, lambda: now[0])
    return now


def test_who_asks_too_often_is_told_when_to_come_again(world: ApiWorld) -> None:
    """A second's worth may come at once; liveness is told however often."""
    now = _limited(world, 0.5)

    def ask(path: str = "/v1/events") -> Any:
        return world.client.get(path)

    assert ask().status_code == 200
    refused = ask()
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "2")
    assert refused.json["message"].startswith("too many requests")
    assert refused.json["type"] == "urn:kappa-log:problem:too-many-requests"
    assert ask("/readyz").status_code == ask("/livez").status_code == 200
    now[0] += 1.5
    assert ask().headers["Retry-After"] == "1"
    now[0] += 100
    assert [ask().status_code for _ in range(2)] == [200, 429]
    assert world.client.post("/v1/failures/1/retry").status_code == 429
    assert world.calls() == []


def test_each_token_may_ask_as_often_as_any_other(guarded: ApiWorld) -> None:
    """And whoever has no good one shares the bucket of its address."""
    _limited(guarded, 2)
    first, second = (
        _bearer(guarded.log.create_token(name, "read")) for name in ("ann", "bob")
    )

    def codes(headers: dict[str, str]) -> list[int]:
        get = guarded.client.get
        return [get("/v1/events", headers=headers).status_code for _ in range(3)]

    assert codes(_bearer("guessed")) == [401, 401, 429]
    assert codes(first) == codes(second) == [200, 200, 429]
    assert codes({}) == [429] * 3


def test_rates_are_as_configured(tmp_path: Path) -> None:
    """Without a word, tokens have one and this machine has none."""
    for rate, needs_token, limited in (
        (None, False, False),
        (None, True, True),
        (0, True, False),
        (3, False, True),
    ):
        log = KappaLog(config=load_config(tmp_path, {"api.rate_per_second": rate}))
        app = create_app(log, needs_token=needs_token)
        assert (RATES in app.extensions) is limited, (rate, needs_token)


def test_buckets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes from ever new addresses fills no memory."""
    monkeypatch.setattr(rates, "MAX_BUCKETS", 2)
    found = Rates(1, lambda: 0.0)

    assert [found.take(who) for who in "aabc"] == [0, 1, 0, 0]
    assert found.take("c") == 1
    assert found.take("a") == 0


def test_every_answer_is_sealed(world: ApiWorld) -> None:
    """SEED A1: also errors: nothing is sniffed, framed, cached or run."""
    for path in ("/ping", "/v1/events", "/v1/events/9", "/nowhere", "/openapi.json"):
        headers = world.client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "Access-Control-Allow-Origin" not in headers


# --- tokens -------------------------------------------------------------------


def _bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_every_route_needs_a_token_where_others_connect(guarded: ApiWorld) -> None:
    """SEED A1: but those that tell whether it lives; a new route is no exception."""
    secret = guarded.log.create_token("ann", "read")
    for rule in guarded.app.url_map.iter_rules():
        path = str(rule).replace("<identifier>", "1").replace("<name>", "x")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            is_open = path in ("/ping", "/livez", "/readyz")
            response = guarded.client.open(path, method=method)
            assert (response.status_code == 401) is not is_open, path
            assert guarded.client.head(path).status_code != 200 or is_open
            if method == "GET":
                continue
            refused = guarded.client.open(path, method=method, headers=_bearer(secret))
            assert refused.status_code == 403, (method, path)
    assert _kept(guarded) == 1


def test_a_token_opens_what_its_role_may(guarded: ApiWorld) -> None:
    """And the audit trail names it."""
    reader = _bearer(guarded.log.create_token("ann", "read"))
    operator = _bearer(guarded.log.create_token("bob", "operate"))

    assert guarded.client.get("/v1/failures", headers=reader).status_code == 200
    assert guarded.client.delete("/v1/failures/1", headers=reader).status_code == 403
    done = guarded.client.post("/v1/failures/1/retry", headers=operator)
    assert done.status_code == 200

    table = guarded.log.database.tables.audit.c
    with guarded.log.database.read() as connection:
        assert connection.scalar(sa.select(table.who)) == "bob"


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer x", "Basic YTpi", "Bearer é"])
def test_what_is_no_token_opens_nothing(guarded: ApiWorld, given: str) -> None:
    """Nor does a revoked one, whose name stays taken."""
    secret = guarded.log.create_token("ann", "operate")
    guarded.log.revoke_token("ann")

    for value in (given, f"Bearer {secret}", f"bearer {secret}", secret):
        response = guarded.client.get("/v1/events", headers={"Authorization": value})
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(errors.UsageError, match="another name"):
        guarded.log.create_token("ann", "read")
    with pytest.raises(errors.NotFound):
        guarded.log.revoke_token("ann")


def test_a_wrong_token_opens_nothing_on_loopback_either(world: ApiWorld) -> None:
    """Who sends one means to be somebody."""
    reader = _bearer(world.log.create_token("ann", "read"))

    assert world.client.get("/v1/events", headers=_bearer("x")).status_code == 401
    assert world.client.delete("/v1/failures/1", headers=reader).status_code == 403


def test_a_token_is_not_kept(guarded: ApiWorld) -> None:
    """Only what it hashes to; whoever reads the database has no token."""
    secret = guarded.log.create_token("ann", "read")

    with guarded.log.database.read() as connection:
        row = connection.execute(sa.select(guarded.log.database.tables.tokens)).one()
    assert secret not in repr(tuple(row))
    assert len(secret) > 40
    assert secret != guarded.log.create_token("bob", "read")


@pytest.mark.parametrize("name", ["", "a b", "api@loopback", "-x", "x" * 65, "é"])
def test_a_token_has_a_plain_name(guarded: ApiWorld, name: str) -> None:
    """It is in the audit trail: nobody passes for somebody else."""
    with pytest.raises(errors.UsageError, match="letters"):
        guarded.log.create_token(name, "read")


# --- once ---------------------------------------------------------------------


def _once(world: ApiWorld, path: str, key: str, **how: Any) -> Any:
    return world.client.post(path, headers={"Idempotency-Key": key}, **how)


def test_a_request_with_a_key_is_done_once(world: ApiWorld) -> None:
    """Whoever lost the answer asks again, and has the same one."""
    first = _once(world, "/v1/failures/1/retry", "k1")
    again = _once(world, "/v1/failures/1/retry", "k1")

    assert (first.status_code, first.json) == (again.status_code, again.json)
    assert first.json["acknowledged"] is True
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(world.calls()) == 1


def test_a_key_means_one_request(world: ApiWorld) -> None:
    """With another body, path or query it is refused, and nothing is done."""
    _once(world, "/v1/failures/discard", "k1", json={"ids": [1]})

    for path, body in (
        ("/v1/failures/discard", {"ids": [2]}),
        ("/v1/failures/retry", {"ids": [1]}),
        ("/v1/failures/discard?x=1", {"ids": [1]}),
    ):
        assert _once(world, path, "k1", json=body).status_code == 422
    assert _once(world, "/v1/failures/3/retry", "a b").status_code == 422
    assert _once(world, "/v1/failures/3/retry", "").status_code == 422
    assert _kept(world) == 2


def test_two_at_once_with_a_key_are_one(world: ApiWorld) -> None:
    """The second is told to wait; the handler is called once."""
    gate, answers = threading.Event(), []
    slow = world.log.retry_failure

    def waiting(*given: Any, **named: Any) -> Any:
        gate.wait(250)
        return slow(*given, **named)

    world.log.retry_failure = waiting  # type: ignore[method-assign]

    def ask() -> None:
        answers.append(_once(world, "/v1/failures/1/retry", "k1").status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    while not _requests(world):
        pass
    second = _once(world, "/v1/failures/1/retry", "k1").status_code
    gate.set()
    thread.join()

    assert (answers, second) == ([200], 409)
    assert len(world.calls()) == 1


def _requests(world: ApiWorld) -> int:
    table = world.log.database.tables.requests
    with world.log.database.read() as connection:
        query = sa.select(sa.func.count()).select_from(table)
        return connection.scalar(query) or 0


def test_a_key_is_forgotten_after_a_day(world: ApiWorld) -> None:
    """Answers are not kept for ever."""
    _once(world, "/v1/failures/1/retry", "k1")
    later = world.log.now() + timedelta(hours=25)
    world.log.now = lambda: later  # type: ignore[method-assign]

    assert _once(world, "/v1/failures/1/retry", "k1").status_code == 404


def test_what_the_server_could_not_do_may_be_tried_again(
    world: ApiWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of ours is not kept as the answer."""

    def broken(*_: Any, **__: Any) -> Any:
        msg = "SELECT secret FROM kappa_log_tokens at /srv/app/log.py"
        raise RuntimeError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(world.log, "retry_failure", broken)
        failed = _once(world, "/v1/failures/1/retry", "k1")
        assert failed.status_code == 500
        assert failed.json["message"] == "internal error; the server's log says more"
        assert "SELECT" not in failed.text
        assert "Traceback" not in failed.text

    assert _once(world, "/v1/failures/1/retry", "k1").status_code == 200


# --- silence ------------------------------------------------------------------


def _kinds(kind: type[KappaLogError]) -> Iterator[type[KappaLogError]]:
    for found in kind.__subclasses__():
        yield found
        yield from _kinds(found)


def test_every_error_has_a_status() -> None:
    """By itself or by its nearest parent, so that nothing is forgotten."""
    assert storage.DatabaseMissing in set(_kinds(KappaLogError))
    for kind in _kinds(KappaLogError):
        if kind.__module__.startswith("kappa_log"):
            assert any(parent in STATUSES for parent in kind.__mro__), kind
            error = kind.__new__(kind)
            assert 400 <= status_of(error) <= 503


def test_a_request_gives_its_connection_back(world: ApiWorld) -> None:
    """SEED A24: also one that failed, on whichever side."""
    world.script({"do": "raise", "message": "no"})
    pool = world.log.database.engine.pool
    assert isinstance(pool, QueuePool)

    def asked(method: str, path: str) -> tuple[int, int]:
        status = world.client.open(path, method=method).status_code
        return status, pool.checkedout()

    assert asked("GET", "/v1/failures") == (200, 0)
    assert asked("GET", "/v1/failures/99") == (404, 0)
    assert asked("POST", "/v1/failures/1/retry") == (422, 0)
    execute(world.log, "ALTER TABLE kappa_log_events RENAME TO gone")
    assert asked("GET", "/v1/events") == (500, 0)


def test_a_database_that_fails_is_not_quoted(world: ApiWorld) -> None:
    """SEED A4: neither its statements nor its files are anybody's business."""
    execute(world.log, "ALTER TABLE kappa_log_failures RENAME TO gone")

    response = world.client.get("/v1/failures")

    assert response.status_code == 500
    for word in ("kappa_log_failures", "SELECT", "no such", str(world.folder)):
        assert word not in response.text


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[Errno 2] No such file: '/etc/shop/x.json'", "…/x.json'"),
        ("see https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("a/b or 1/2", "a/b or 1/2"),
        ('File "/srv/app/handlers.py", line 3', '…/handlers.py", line 3'),
    ],
)
def test_messages_lose_their_folders(said: str, told: str) -> None:
    """What a handler says is passed on, without the places of the machine."""
    assert told in public(said)
    assert "/srv" not in public(said)
    assert "/etc" not in public(said)
