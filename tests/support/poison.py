"""A log whose handler fails on demand, read as from a topic, without a broker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.decide import Portion
from kappa_log.ingest import Committed, ingest_batch
from kappa_log.listeners import Listener
from kappa_log.records import Lane, Record
from kappa_log.storage import ledger

HANDLERS = """
import os
import signal
import sys
import time
from pathlib import Path

import sqlalchemy as sa

from kappa_log import Handler, ack

HERE = Path(__file__).parent
CALLS = []
HOOKS = []
DURING = {}
TOLD = []

def during(n):
    act = DURING.pop(n if n in DURING else None, None)
    if act is not None:
        act()

class Orders(Handler):
    def start(self):
        HOOKS.append("start")

    def stop(self):
        HOOKS.append("stop")

    def consume(self, payload, metadata):
        CALLS.append((payload.get("n"), metadata.retry_count))
        during(payload.get("n"))
        match payload.get("do"):
            case "raise" if not (HERE / "fixed").exists():
                raise ValueError("no such order")
            case "skip":
                return None
            case "naive":
                return ack(payload["n"], "2024-01-01T00:00:00")
            case "slow":
                time.sleep(0.005)
        return ack(payload.get("n"), None)

class Told(Orders):
    def entity_id(self, payload):
        return f"entity-{payload['n']}"

    def event_time(self, payload):
        return "2024-05-05T00:00:00Z"

class Willing(Orders):
    def retry_consume(self, event, metadata, exception):
        CALLS.append((event.payload["n"], metadata.retry_count, str(exception)))
        return metadata.retry_count < event.payload["tries"]

class Around(Orders):
    def around_consume(self, payload, metadata, proceed):
        CALLS.append(("around", metadata.retry_count))
        return proceed(payload)

class Asking(Orders):
    def retry_consume(self, event, metadata, exception):
        metadata.connection.execute(sa.text("INSERT INTO seen VALUES (99)"))
        return False

class Writing(Orders):
    kept = None

    def consume(self, payload, metadata):
        n = payload["n"]
        during(n)
        TOLD[:] = [metadata]
        if payload.get("do") == "no effect":
            return ack(n, None)
        connection = metadata.connection
        if payload.get("do") == "kept":
            connection = Writing.kept
        Writing.kept = Writing.kept or connection
        connection.execute(sa.text("INSERT INTO seen (n) VALUES (:n)"), {"n": n})
        for statement in payload.get("sql", []):
            if payload.get("swallow"):
                try:
                    connection.execute(sa.text(statement))
                except Exception:
                    pass
            else:
                connection.execute(sa.text(statement))
        if "call" in payload:
            getattr(connection, payload["call"])
        to_kill = payload.get("do") == "kill" and not (HERE / "fixed").exists()
        if to_kill or (HERE / "killing").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().consume(payload, metadata)

class Dying(Writing):
    def consume(self, payload, metadata):
        if payload.get("do") != "die":
            return super().consume(payload, metadata)
        try:
            inner = metadata.connection._connection
        except Exception:
            if payload.get("swallow"):
                return ack(payload["n"], None)
            raise
        inner.execute(sa.text("INSERT INTO seen (n) VALUES (:n)"), payload)
        # Nobody should, but Python lets whoever looks for it.
        inner.connection.driver_connection.rollback()
        return ack(payload["n"], None)
"""

LISTENER = """
[[listeners]]
topic = "orders"
group_id = "billing"
handler = {handler}
{more}
"""

_NUMBERS = count(1)


class Poisoned:
    """A log, its handlers, and where the reading of each partition stands.

    Args:
        url: The log's database.
        folder: Where configuration and handlers are; made once, used by processes.
        handler: Class of the handler.
        more: Other lines of the listener's section.
    """

    def __init__(
        self, url: str, folder: Path, handler: str = "Orders", more: str = ""
    ) -> None:
        self.url = url
        self.folder = folder
        self._app: KappaLog | None = None
        self.module = f"poison_handlers_{next(_NUMBERS)}"
        (folder / f"{self.module}.py").write_text(HANDLERS)
        self.configure(handler, more)
        self.app.create_database()

    def configure(self, handler: str = "Orders", more: str = "") -> None:
        """Write the configuration anew; ``handler`` may be empty for no listener."""
        text = f"[database]\nurl = {json.dumps(self.url)}\n"
        if handler:
            name = json.dumps(f"{self.module}:{handler}")
            text += LISTENER.format(handler=name, more=more)
        (self.folder / "kappa_log.toml").write_text(text)
        self.close()
        self._held: dict[int, ledger.Assignment] = {}
        self._listener: Listener | None = None

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

    @property
    def app(self) -> KappaLog:
        """The log."""
        if self._app is None:
            self._app = KappaLog.open(self.folder)
        return self._app

    @property
    def listener(self) -> Listener:
        """Who decides."""
        if self._listener is None:
            self._listener = self.app.listener("orders")
        return self._listener

    @property
    def calls(self) -> list[Any]:
        """What each call of the handler noted."""
        found: list[Any] = sys.modules[self.module].CALLS
        return found

    @property
    def told(self) -> Any:
        """The metadata of the last call of `Writing`."""
        return sys.modules[self.module].TOLD[0]

    @property
    def hooks(self) -> list[str]:
        """The calls of start and stop."""
        found: list[str] = sys.modules[self.module].HOOKS
        return found

    def during_call(self, act: Callable[[], object], n: int | None = None) -> None:
        """Do something once, while the handler decides: about ``n``, or the next."""
        _ = self.listener
        sys.modules[self.module].DURING[n] = act

    def fix(self) -> None:
        """Let the handler take what it raised on."""
        (self.folder / "fixed").touch()

    def lane(self, partition: int = 0) -> Lane:
        """Return the lane of a partition."""
        return Lane("kafka:test", "orders", "billing", partition)

    def held(self, partition: int = 0) -> ledger.Assignment:
        """Return where a partition stands; taken at the first use."""
        if partition not in self._held:
            with self.app.database.write() as connection:
                self._held[partition] = ledger.assign(
                    connection,
                    self.app.database,
                    self.lane(partition),
                    ledger.Reader("payload", None),
                    self.app.now(),
                )
        return self._held[partition]

    def move_to(self, offset: int, partition: int = 0) -> None:
        """Read on from another offset, to which SQL was moved."""
        self._held[partition] = self.held(partition).moved(offset)

    def portion(
        self,
        found: Iterable[tuple[str | None, dict[str, Any] | bytes]],
        partition: int = 0,
        attempt: int | None = 0,
        offset: int | None = None,
    ) -> Portion:
        """Return keys and payloads as the next records of a partition."""
        held = self.held(partition)
        first = held.next_offset if offset is None else offset
        records = [
            Record(
                number,
                value if isinstance(value, bytes) else json.dumps(value).encode(),
                None if key is None else key.encode(),
            )
            for number, (key, value) in enumerate(found, first)
        ]
        end = first + len(records)
        return Portion(
            self.lane(partition), held, self.listener, records, end, attempt=attempt
        )

    def take(self, *portions: Portion) -> Committed:
        """Commit a batch; what comes next follows it."""
        done = ingest_batch(self.app.database, portions, self.app.now)
        for portion in portions:
            stopped = done.stopped.get(portion.lane)
            end = portion.to_offset if stopped is None else stopped.offset
            self._held[portion.lane.partition] = portion.held.moved(end)
        return done

    def read(
        self,
        *found: tuple[str | None, dict[str, Any] | bytes],
        partition: int = 0,
        attempt: int | None = None,
    ) -> Committed:
        """Commit keys and payloads as the next records of a partition."""
        return self.take(self.portion(found, partition, attempt))

    # --- what is there --------------------------------------------------------

    def order(self, key: str | None = None) -> list[int]:
        """Return the offsets of a key's events, or of all, by position."""
        wanted = None if key is None else key.encode()
        return [
            event.offset
            for event in self.app.events(limit=100_000, oldest_first=True)
            if key is None or event.key == wanted
        ]

    def failed(self) -> list[tuple[int, bool]]:
        """Return offset and whether it waits of each failure, by offset."""
        found = self.app.failures(limit=100_000)
        return sorted((failure.offset, failure.parked) for failure in found)

    def id_of(self, offset: int) -> int:
        """Return the id of the failure at an offset."""
        (found,) = [f.id for f in self.app.failures(limit=10_000) if f.offset == offset]
        return found

    def rows(self, table: str, *columns: str) -> list[Any]:
        """Return columns of one of the log's tables, in the order they were written."""
        found = getattr(self.app.database.tables, table)
        query = sa.select(*(found.c[name] for name in columns))
        with self.app.database.read() as connection:
            return [
                tuple(row) for row in connection.execute(query.order_by(found.c.id))
            ]

    def check(self) -> None:
        """Fail unless the log is whole."""
        report = self.app.verify()
        assert report.ok, report.findings

    # --- effects --------------------------------------------------------------

    def make_effects(self, column: str = "n INTEGER") -> None:
        """Make the table that `Writing` writes to."""
        with self.app.database.write() as connection:
            connection.execute(sa.text(f"CREATE TABLE seen ({column})"))

    def effects(self) -> list[int]:
        """Return what is in that table, in order."""
        with self.app.database.read() as connection:
            return list(connection.scalars(sa.text("SELECT n FROM seen ORDER BY n")))

    def entities(self) -> list[int]:
        """Return whom the events are about, in order."""
        events = self.app.events(limit=100_000)
        return sorted(int(event.entity_id or -1) for event in events)

    # --- processes ------------------------------------------------------------

    def process(self, work: str, **given: Any) -> subprocess.Popen[str]:
        """Start a process that runs lines of code with the log as ``app``."""
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS + work, str(self.folder), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


PROCESS = """
import json
import os
import signal
import sys
from pathlib import Path

import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.errors import KappaLogError

app = KappaLog.open(Path(sys.argv[1]))
given = json.loads(sys.argv[2])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

"""


def bad(n: int, **more: Any) -> dict[str, Any]:
    """Return a payload that fails until the handler is fixed."""
    return {"do": "raise", "n": n} | more
