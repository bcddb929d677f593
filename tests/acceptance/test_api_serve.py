"""kappa-log serve, token and init-events-api: as users run them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.api import ask

ORDERS = "".join(f'{{"id":"e{n % 7}","n":{n}}}\n' for n in range(3000))

SLOW = '''
"""A fold that waits while it is told to, so that it can be killed."""

import time
from pathlib import Path

from kappa_log import projection


@projection(topics=["orders"], version=1)
def slow(state: int | None, event) -> int | None:
    """Count."""
    while Path("hold").exists():
        time.sleep(0.01)
    return (state or 0) + 1
'''


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder until it ends."""
    return subprocess.run(
        [sys.executable, "-m", "kappa_log", *arguments],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the server on a free port; give its address and its process."""
    with subprocess.Popen(
        [sys.executable, "-m", "kappa_log", "serve", "--port", "0", *options],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Give a folder with an empty log, and a projection that is slow."""
    (tmp_path / "projections").mkdir()
    (tmp_path / "projections" / "slow.py").write_text(SLOW)
    assert run(tmp_path, "db", "create").returncode == 0
    return tmp_path


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the address of a server that several tests share."""
    folder = tmp_path_factory.mktemp("served")
    assert run(folder, "db", "create").returncode == 0
    with served(folder) as (url, _):
        yield url


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_it_serves_until_it_is_told_to_stop(
    place: Path, number: signal.Signals, code: int
) -> None:
    """The address is the only line of data; it ends at once and says nothing."""
    with served(place) as (url, process):
        assert url.startswith("http://127.0.0.1:")
        assert ask(url + "/v1/events") == []
        with urllib.request.urlopen(url + "/ping") as answer:  # noqa: S310
            assert answer.read() == b"PONG"
            assert answer.headers["Server"] is None
        process.send_signal(number)

        out, err = process.communicate(timeout=120)

    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err


def test_the_access_log_is_a_line_a_request(place: Path) -> None:
    """What was asked, by whom, and what came of it; a path cannot forge a line.

    SEED A25, A26.
    """
    with served(place, "--access-log") as (url, process):
        ask(url + "/v1/events?topic=a%0Ab&limit=5")
        with pytest.raises(urllib.error.HTTPError):
            ask(url + "/v1/events/%1b%5b31m%0a")
        process.terminate()
        _, err = process.communicate(timeout=120)

    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]

    assert [(line["status"], line["who"]) for line in lines] == [
        (200, "api@loopback"),
        (404, "api@loopback"),
    ]
    assert lines[0]["path"] == "/v1/events?topic=a%0Ab&limit=5"
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("GET /v1/events HTTP/1.1\r\nX: {}\r\n\r\n".format("x" * 16_400), 431),
        ("POST /v1/verify HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 413),
        ("GET /v1/events HTTP/1.1\r\nnonsense\r\n\r\n", 400),
        ("POST /v1/verify HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n", 501),
    ],
)
def test_what_is_refused_unread_is_an_error_like_any_other(
    reached: str, sent: str, code: int
) -> None:
    """Nothing that a client gets has another form, or tells by whom it is served."""
    host, port = reached.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as client:
        client.sendall(sent.encode())
        with client.makefile("rb") as answer:
            status, head = answer.readline(), {}
            while line := answer.readline().strip().decode():
                name, _, value = line.partition(": ")
                head[name] = value
            body = json.loads(answer.read())

    assert int(status.split()[1]) == body["status"] == code
    assert (body["error"], body["type"][:22]) == (True, "urn:kappa-log:problem:")
    assert head["Content-Type"] == "application/json"
    assert head["X-Content-Type-Options"] == "nosniff"
    assert "waitress" not in str((head, body))


def test_others_are_not_served_without_tokens(place: Path) -> None:
    """It says what to do, and starts nothing."""
    for host in ("0.0.0.0", "::", "192.0.2.1"):  # noqa: S104 - it must refuse
        done = run(place, "serve", "--host", host, "--port", "0")
        assert done.returncode == 2
        assert "kappa-log token create NAME" in done.stderr
        assert done.stdout == ""


def test_a_port_that_is_taken_is_named(place: Path) -> None:
    """And not taken from whoever has it."""
    with served(place) as (url, _):
        port = url.rpartition(":")[2]
        done = run(place, "serve", "--port", port)

        assert done.returncode == 2
        assert f"port {port}" in done.stderr
        assert ask(url + "/livez") == {"alive": True}


def test_tokens_are_made_listed_and_revoked(place: Path) -> None:
    """The secret is shown once."""
    made = run(place, "token", "create", "ann", "--role", "read")
    secret = made.stdout.strip()
    assert (made.returncode, secret[:3]) == (0, "kl_")
    other = run(place, "token", "create", "bob", "--role", "operate", "--json")
    assert set(json.loads(other.stdout)) == {"name", "role", "token"}

    listed = run(place, "token", "list")
    assert secret not in listed.stdout + listed.stderr
    assert run(place, "token", "revoke", "ann").returncode == 0

    rows = [
        json.loads(line)
        for line in run(place, "token", "list", "--json").stdout.splitlines()
    ]
    assert [(r["name"], r["role"], r["revoked_at"] is None) for r in rows] == [
        ("ann", "read", False),
        ("bob", "operate", True),
    ]
    assert run(place, "token", "revoke", "ann").returncode == 2
    assert run(place, "token", "create", "ann", "--role", "read").returncode == 2
    assert run(place, "token", "create", "eve", "--role", "admin").returncode == 2


def test_no_tokens_says_what_to_type(place: Path) -> None:
    """As every list does."""
    done = run(place, "token", "list")

    assert (done.returncode, done.stdout) == (0, "")
    assert "token create" in done.stderr


def test_an_application_for_other_servers(place: Path) -> None:
    """SEED A24, K8: wsgi.py is written once; it answers nothing without a token."""
    first, again = run(place, "init-events-api"), run(place, "init-events-api")
    assert (first.stdout.split()[0], again.stdout.split()[0]) == ("create", "exists")

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import wsgi; c = wsgi.app.test_client(); "
                "print(c.get('/ping').text, c.get('/v1/events').status_code)"
            ),
        ],
        cwd=place,
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["PONG", "401"]


def test_a_replay_survives_the_server(place: Path) -> None:
    """Killed in the middle, it is a row that another server goes on with."""
    (place / "orders.jsonl").write_text(ORDERS)
    assert (
        run(
            place, "ingest", "orders.jsonl", "--topic", "orders", "--entity-id", "id"
        ).returncode
        == 0
    )
    (place / "hold").touch()
    with served(place) as (url, process):
        begun = ask(url + "/v1/replays", "POST", projection="slow")
        process.kill()
    (place / "hold").unlink()
    with served(place) as (url, _):
        replay = f"{url}/v1/replays/{begun['id']}"
        assert ask(replay)["state"] == "unfinished"
        ask(replay + "/resume", "POST")
        while (found := ask(replay))["state"] == "running":
            pass
        assert (found["outcome"], found["error"]) == ("promoted", None)
        rows = ask(url + "/v1/projections/slow/rows")

    assert sum(row["value"] for row in rows) == 3000
