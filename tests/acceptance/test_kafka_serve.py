"""run --serve: one process consumes, folds and answers HTTP; one signal ends it all."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kappa_log.cli import run
from support.api import ask
from support.topics import QUICK, Command, Shop

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker

PARTITIONS = 4

VIEWS = '''
"""A projection that waits while it is told to."""

import time
from pathlib import Path

from kappa_log import projection

HOLD = Path(__file__).with_name("hold")


@projection(topics=["{topic}"], version=1)
def totals(state: int | None, event) -> int | None:
    """Count the events of an entity."""
    while HOLD.exists():
        time.sleep(0.01)
    return (state or 0) + 1
'''


@contextmanager
def shop_of(broker: RealBroker, url: str, folder: Path) -> Iterator[Shop]:
    """Give a shop with a projection, on a new topic."""
    topic = broker.new_topic(PARTITIONS)
    module = f"views_{topic.replace('-', '_')}"
    (folder / f"{module}.py").write_text(VIEWS.format(topic=topic))
    with Shop(broker, topic, url, folder) as shop:
        shop.configure(kafka=QUICK, projections={"modules": [module]})
        shop.app.create_database()
        yield shop


def serving(shop: Shop, *options: str) -> Command:
    """Start it on a free port."""
    return shop.started("run", "--serve", "--port", "0", "--json", *options)


def address(command: Command) -> str:
    """Return where it listens, once it has said so."""
    command.wait_for(lambda: command.out.endswith("\n"), "its address")
    url: str = json.loads(command.out)["url"]
    return url


def totals(url: str) -> int:
    """Return how many events are folded; none before there is a build."""
    (found,) = ask(f"{url}/v1/projections")
    if found["live"] is None:
        return 0
    rows = ask(f"{url}/v1/projections/totals/rows?limit=500")
    return sum(row["value"] for row in rows)


@contextmanager
def producing(broker: RealBroker, topic: str) -> Iterator[list[int]]:
    """Produce orders while the block goes on; give their numbers."""
    stop, numbers = threading.Event(), list[int]()
    following = count()

    def produce() -> None:
        while not stop.wait(0.02):
            some = [next(following) for _ in range(8)]
            made = [(b'{"id":%d,"n":%d}' % (n % 50, n), None, n % 4) for n in some]
            broker.produce(topic, made)
            numbers.extend(some)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield numbers
    finally:
        stop.set()
        thread.join()


def test_a_replay_from_an_offset_is_asked_for_by_http_while_records_come(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """One process does all three: nothing is lost or counted twice.

    SIGTERM ends it. The address is the first line of data, and the report the last one.
    """
    with (
        shop_of(kafka_broker, database_url, tmp_path) as shop,
        serving(shop) as command,
    ):
        url = address(command)
        with producing(kafka_broker, shop.topic) as numbers:
            command.wait_for(lambda: totals(url) > 200, "some rows")
            at = {"topic": shop.topic, "partition": 1, "offset": 5}
            begun = ask(
                f"{url}/v1/replays", "POST", projection="totals", from_offset=at
            )
            replay = f"{url}/v1/replays/{begun['id']}"
            command.wait_for(lambda: ask(replay)["state"] != "running", "the replay")
            assert ask(replay)["outcome"] == "promoted", ask(replay)
            folded = totals(url)
            command.wait_for(
                lambda: totals(url) > folded, "the promoted build to go on"
            )
        command.wait_for(lambda: totals(url) == len(numbers), "all rows")

        assert ask(f"{url}/readyz")["ready"]
        assert command.interrupt(signal.SIGTERM) == 0
        report = json.loads(command.out.splitlines()[-1])
        assert report["counts"]["acked"] == len(numbers)
        assert shop.app.verify(names=["totals"]).ok


def test_a_signal_ends_it_whatever_folds(
    kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path
) -> None:
    """Live folding and a replay that was asked for hang: neither keeps the process."""
    with shop_of(kafka_broker, sqlite_url, tmp_path) as shop:
        (tmp_path / "hold").touch()
        kafka_broker.produce(shop.topic, [(b'{"id":1}',)])
        with serving(shop) as command:
            url = address(command)
            command.wait_for(lambda: ask(f"{url}/v1/events"), "an event")
            begun = ask(f"{url}/v1/replays", "POST", projection="totals")
            assert ask(f"{url}/v1/replays/{begun['id']}")["state"] == "running"

            assert command.interrupt() == 130
        (tmp_path / "hold").unlink()
        assert shop.app.resume(begun["id"]).events == 1


def test_it_refuses_what_serve_refuses(
    kafka_broker: RealBroker,
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is read; and what consuming refuses ends the server, too."""
    monkeypatch.chdir(tmp_path)
    with shop_of(kafka_broker, sqlite_url, tmp_path) as shop:

        def typed(*arguments: str) -> tuple[int, str]:
            code = run(("run", *arguments))
            return code, capsys.readouterr().err

        code, said = typed("--serve", "--host", "0.0.0.0", "--port", "0")  # noqa: S104
        assert (code, "kappa-log token create NAME" in said) == (2, True)
        code, said = typed("--port", "1")
        assert (code, "--host and --port are for --serve" in said) == (2, True)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, said = typed("--serve", "--port", str(port))
            assert (code, f"port {port}" in said) == (2, True)
        shop.configure({"handler": "nowhere:Orders"})
        code, said = typed("--serve", "--port", "0")
        assert (code, "nowhere" in said) == (78, True)
        assert "serve" not in {thread.name for thread in threading.enumerate()}
