"""A shop on Kafka: a topic, a folder with configuration and handlers, and a log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import sqlalchemy as sa

from kappa_log import Event, KappaLog
from kappa_log.kafka.consume import ConsumeReport
from support.kafka_process import wait_for
from support.readers import connect
from support.stops import Stop

END_SECONDS = 8
"""How long a process may take to end: five seconds are promised, machines are busy."""

HASTE = {"fetch.wait.max.ms": 10}
"""An end of a partition is told when a fetch has waited for more, in vain."""

QUICK = {
    "session.timeout.ms": 2000,
    "heartbeat.interval.ms": 300,
    "max.poll.interval.ms": 2000,
    "topic.metadata.refresh.interval.ms": 300,
    "reconnect.backoff.max.ms": 300,
}
"""Settings under which a consumer that does not poll is thrown out after 2 s."""

HANDLERS = """
import time
from pathlib import Path

from kappa_log import Handler, ack

CALLS = []
WANTED = {}

class Orders(Handler):
    def consume(self, payload, metadata):
        CALLS.append(metadata)
        found = payload if isinstance(payload, dict) else {}
        match WANTED.get(found.get("do"), found.get("do")):
            case "skip":
                return None
            case "raise":
                raise ValueError("no such order")
            case "sleep":
                Path(__file__).with_name("sleeps").touch()
                time.sleep(60)
        return ack(found.get("id"), None)
"""

_NUMBERS = count(1)


class Broker(Protocol):
    """Where the topic is: a real broker or a mock."""

    @property
    def bootstrap(self) -> str:
        """Its address."""


class Shop:
    """A folder whose configuration has a listener on one topic.

    Args:
        broker: Where the topic is.
        topic: Its name; nothing looks whether it is there.
        url: The log's database; its tables are made when the log is opened.
        folder: Where configuration and handlers are written.
    """

    def __init__(self, broker: Broker, topic: str, url: str, folder: Path) -> None:
        self.topic = topic
        self.url = url
        self.folder = folder
        self.group = f"g-{topic}"
        self._bootstrap = broker.bootstrap
        self._module = f"topic_handlers_{next(_NUMBERS)}"
        self._app: KappaLog | None = None
        (folder / f"{self._module}.py").write_text(HANDLERS)
        self.configure()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the log."""
        self.close()

    def close(self) -> None:
        """Close the log; it is opened again when it is asked for."""
        if self._app is not None:
            self._app.close()
            self._app = None

    def configure(
        self,
        *listeners: dict[str, Any],
        kafka: dict[str, Any] | None = None,
        **sections: dict[str, Any],
    ) -> None:
        """Write the configuration; the log is opened anew.

        Args:
            listeners: What is special about each listener; one that is not if none.
            kafka: Settings of librdkafka; None takes the address out.
            sections: All other sections.
        """
        self.close()
        (self.folder / "kappa_log.toml").write_text(
            _section("[database]", {"url": self.url})
            + _section(
                "[kafka]",
                {"bootstrap.servers": self._bootstrap} | HASTE | (kafka or {}),
            )
            + "".join(
                _section("[[listeners]]", self._listener() | listener)
                for listener in listeners or ({},)
            )
            + "".join(_section(f"[{n}]", values) for n, values in sections.items())
        )

    @property
    def app(self) -> KappaLog:
        """The log."""
        if self._app is None:
            self._app = KappaLog.open(self.folder)
            self._app.create_database()
        return self._app

    @property
    def calls(self) -> list[Any]:
        """The metadata of each record that the handler was given.

        None while another thread is still importing it.
        """
        found: list[Any] = getattr(sys.modules.get(self._module), "CALLS", [])
        return found

    def want(self, **changed: str) -> None:
        """Let the handler do something else with what wants to be skipped or raised."""
        sys.modules[self._module].WANTED.update(changed)

    def consume(self, **how: Any) -> ConsumeReport:
        """Read all there is; return the report of the only listener."""
        (report,) = self.app.consume(**({"until_end": True} | how))
        return report

    def running(self, work: str = "consume", **how: Any) -> Running:
        """Consume in a thread of this process, until the end of the block."""
        return Running(self.app, work, how)

    def started(self, *arguments: str) -> Command:
        """Start `kappa-log` in a process of its own, in this folder."""
        self.close()
        return Command(self.folder, *arguments)

    def events(self, **chosen: Any) -> list[Event]:
        """Return the log's events by position."""
        return self.app.events(limit=10_000, oldest_first=True, **chosen)

    def ids(self) -> list[str | None]:
        """Return whom the events are about, by position."""
        return [event.entity_id for event in self.events()]

    def offsets(self) -> dict[tuple[str, int], int]:
        """Return what is read next of each topic's partition, by SQL."""
        table = self.app.database.tables.offsets
        query = sa.select(table.c.topic, table.c.partition, table.c.next_offset)
        with self.app.database.read() as connection:
            return {(t, p): offset for t, p, offset in connection.execute(query)}

    def _listener(self) -> dict[str, Any]:
        return {
            "topic": self.topic,
            "group_id": self.group,
            "handler": f"{self._module}:Orders",
            "max_retries": 0,
        }


class Running:
    """A consumer in a thread; it is stopped at the end of the block."""

    def __init__(self, app: KappaLog, work: str, how: dict[str, Any]) -> None:
        """Start it."""
        self.notices: list[str] = []
        self.reports: list[ConsumeReport] = []
        self._stop = Stop()
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self.reports = getattr(app, work)(
                    stop=self._stop, on_notice=self.notices.append, **how
                )
            except BaseException as error:  # noqa: BLE001 - raised by the test's thread
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def told(self, *words: str) -> int:
        """Return how many notices have one of these words."""
        return sum(any(word in notice for word in words) for notice in self.notices)

    def wait_for(self, fact: Callable[[], object], name: str) -> None:
        """Wait until something is true, or it has ended."""
        try:
            wait_for(lambda: fact() or not self._thread.is_alive(), name)
        except TimeoutError as error:
            error.add_note(f"it told: {self.notices}")
            raise
        self._raise()
        assert fact(), f"it ended before {name}: {self.notices}"

    def end(self) -> None:
        """Stop it, if it has not ended; raise what it raised."""
        self._stop.set()
        self._thread.join(END_SECONDS)
        assert not self._thread.is_alive(), f"it did not stop: {self.notices}"
        self._raise()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it; what the block raised counts more than what it raised."""
        if error is None:
            self.end()
        else:
            with suppress(Exception):
                self.end()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class Command:
    """`kappa-log` in a process of its own, as somebody typed it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        """Start it."""
        number = next(_NUMBERS)
        self._files = [folder / f"{number}.{name}" for name in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kappa_log", *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={n: v for n, v in os.environ.items() if n != "COLUMNS"},
            )

    @property
    def out(self) -> str:
        """What it wrote to stdout so far."""
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return self._files[1].read_text()

    def wait_for(self, fact: Callable[[], object], name: str) -> None:
        """Wait until something is true, be it for a moment."""
        was_true = False

        def is_over() -> bool:
            nonlocal was_true
            has_ended = self._process.poll() is not None
            was_true = bool(fact())
            return was_true or has_ended

        wait_for(is_over, name)
        assert was_true, f"it ended before {name}: {self.out}{self.err}"

    def wait_until_told(self, words: str) -> None:
        """Wait until it says something."""
        self.wait_for(lambda: words in self.err, f"it to say {words!r}")

    def wait_until_open(self, name: str) -> None:
        """Wait until it has opened a file, or a ``socket``; give it time to use it."""
        folder = Path(f"/proc/{self._process.pid}/fd")

        def is_open() -> bool:
            with suppress(FileNotFoundError):
                return any(name in str(file.readlink()) for file in folder.iterdir())
            return False

        self.wait_for(is_open, f"it to open {name}")
        time.sleep(0.3)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self, seconds: float = END_SECONDS) -> int:
        """Wait for its end; return its exit code, or fail if it takes longer."""
        code = self._process.wait(seconds)
        assert "Traceback" not in self.err, self.err
        return code

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Send a signal; return its exit code, or fail if it does not end soon."""
        self.send(number)
        return self.end()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind."""
        self._process.kill()
        self._process.wait()


@contextmanager
def held(url: str) -> Iterator[None]:
    """Hold what every writer needs, as another process may that writes for long."""
    with closing(connect(url)) as connection:
        if url.startswith("sqlite"):
            connection.execute("BEGIN IMMEDIATE")
        else:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM kappa_log_head FOR UPDATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


@contextmanager
def cut_off(url: str) -> Iterator[None]:
    """Cut every connection to a PostgreSQL database, again and again."""
    name = sa.make_url(url).database
    ended = threading.Event()

    def cut() -> None:
        with closing(connect(url.replace(f"/{name}", "/postgres"))) as connection:
            while not ended.is_set():
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = %s",
                    [name],
                )
                time.sleep(0.01)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        yield
    finally:
        ended.set()
        cutter.join()


def _section(title: str, values: dict[str, Any]) -> str:
    lines = [f"{json.dumps(name)} = {_toml(value)}" for name, value in values.items()]
    return "\n".join([title, *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(n))} = {_toml(v)}" for n, v in value.items())
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(value)
