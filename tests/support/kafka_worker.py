"""Consumers in processes of their own, to be killed, paused or told to stop.

A *nest* has imported everything and forks a worker for each task that comes over its
socket, so a worker is at work after a few milliseconds. With each task comes another
socket, on which the worker talks, a line of JSON each time; when nobody is at its other
end any more, the worker ends:

    {"said": "paused"}      it stops itself next, by SIGSTOP
    {"notice": "…"}         what `consume` tells people
    {"result": {…}}         what came of it, or the error; none if it was killed

SIGTERM ends it in peace, whenever it comes.

A task may set a *trap*: the point and the pass of it where the worker kills or stops
itself. Traps, and the faults that a test plants to see them found, wrap functions of
the engine in this process; the engine knows nothing of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kappa_log import (
    Event,
    Handler,
    KappaLog,
    KappaLogError,
    Metadata,
    ack,
    ingest,
    projection,
)
from kappa_log.config import load_config
from kappa_log.errors import Fenced
from kappa_log.kafka import client, consume
from kappa_log.storage import builds, ledger, log, rows
from support.logs import set_bounds

GROUP = "chaos"

# --- what is consumed -------------------------------------------------------------


class Picky(Handler):
    """Keeps, skips or fails a record as the record itself wants it."""

    def consume(self, payload: Any, metadata: Metadata) -> object:
        """Do what the payload says; a tombstone is kept."""
        if payload is None:
            return ack(None, None, "tombstone")
        if payload["do"] == "fail":
            msg = f"offset {metadata.offset} wants to fail"
            raise ValueError(msg)
        if payload["do"] == "skip":
            return None
        return ack(payload["who"], None, "kept")


@dataclass(frozen=True, slots=True)
class Trail:
    """What somebody did; the trail is another one if two events swap."""

    seen: int = 0
    trail: int = 0


def follow(state: Trail | None, number: int) -> Trail:
    """Return the state after one more event."""
    old = state or Trail()
    return Trail(old.seen + 1, (old.trail * 31 + number) % 1_000_003)


def trails(topic: str) -> Any:
    """Return a projection of everybody's trail over one topic."""

    @projection(topics=[topic], version=1, name="trails")
    def fold(state: Trail | None, event: Event) -> Trail | None:
        return follow(state, event.payload["number"])

    return fold


class Buyer(Handler):
    """Keeps CDNOW's purchases."""

    def consume(self, payload: Any, metadata: Metadata) -> object:
        """Keep a purchase of a customer."""
        return ack(payload["customer_id"], payload["time"], payload["type"])


@dataclass(frozen=True, slots=True)
class Customer:
    """What a customer bought, and in which order."""

    orders: int = 0
    cds: int = 0
    cents: int = 0
    trail: int = 0


def bought(state: Customer | None, purchase: Any) -> Customer:
    """Return the state after one more purchase."""
    old = state or Customer()
    return Customer(
        old.orders + 1,
        old.cds + purchase["quantity"],
        old.cents + round(purchase["amount"] * 100),
        (old.trail * 31 + int(purchase["purchase_id"][1:])) % 1_000_003,
    )


def customers(topic: str) -> Any:
    """Return a projection of CDNOW's customers over one topic."""

    @projection(topics=[topic], version=1, name="customers")
    def fold(state: Customer | None, event: Event) -> Customer | None:
        return bought(state, event.payload)

    return fold


PROJECTIONS = {"trails": trails, "customers": customers}

# --- the nest ---------------------------------------------------------------------


def nest(descriptor: int) -> None:
    """Fork a worker for each task, until nobody is at the other end."""
    # One that comes while a worker is still being forked waits for its handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    control = socket.socket(fileno=descriptor)
    children: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not data:
            break
        request = json.loads(data)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], 0)
            children.discard(pid)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if not pid:
                control.close()
                _live(socket.socket(fileno=descriptors[0]), request)
            os.close(descriptors[0])
            children.add(pid)
            answer = {"pid": pid}
        control.sendall(json.dumps(answer).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)


class Talk:
    """The worker's end of its socket."""

    def __init__(self, channel: socket.socket) -> None:
        """Watch, in a thread, whether somebody listens."""
        self._channel = channel
        self._lock = threading.Lock()
        self.stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, **what: Any) -> None:
        """Send a line."""
        with self._lock:
            self._channel.sendall(json.dumps(what).encode() + b"\n")

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            self._channel.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)


def _live(channel: socket.socket, task: dict[str, Any]) -> None:
    """Do a task and end the process."""
    try:
        talk = Talk(channel)
        signal.signal(signal.SIGTERM, lambda *_: talk.stop.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            result = _do(task, talk)
        except KappaLogError as error:
            result = {"error": type(error).__name__, "message": str(error)}
        except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
            result = {"error": "crash", "message": traceback.format_exc()}
        talk.say(result=result)
    finally:
        sys.stdout.flush()
        os._exit(0)


# --- one task ---------------------------------------------------------------------


def _do(task: dict[str, Any], talk: Talk) -> dict[str, Any]:
    skew = timedelta(seconds=task.get("skew", 0))
    app = KappaLog(
        config=load_config(Path(task["folder"]), task["config"]),
        projections=[PROJECTIONS[task["projection"]](task["topic"])],
        clock=lambda: datetime.now(UTC) + skew,
    )
    if "fault" in task:
        FAULTS[task["fault"]]()
    if "trap" in task:
        Trap(app, talk, **task["trap"])
    fenced = _counting_fences()
    with app:
        result = WORK[task["work"]](app, task, talk)
    return result | {"fenced": len(fenced)}


def _consume(app: KappaLog, task: dict[str, Any], talk: Talk) -> dict[str, Any]:
    reports = app.consume(
        stop=talk.stop,
        until_end=task.get("until_end", False),
        accept_gap=task.get("accept_gap", False),
        on_notice=lambda notice: talk.say(notice=notice),
    )
    return {"seen": sum(report.counts.seen for report in reports)}


def _run(app: KappaLog, _: dict[str, Any], talk: Talk) -> dict[str, Any]:
    app.run(stop=talk.stop, on_notice=lambda notice: talk.say(notice=notice))
    return {}


def _project(app: KappaLog, _: dict[str, Any], __: Talk) -> dict[str, Any]:
    set_bounds(page_events=20, flush_seconds=0.0)
    (done,) = app.project()
    return {"to": done.to_position}


def _follow(app: KappaLog, _: dict[str, Any], talk: Talk) -> dict[str, Any]:
    app.follow(stop=talk.stop)
    return {}


def _create(app: KappaLog, _: dict[str, Any], __: Talk) -> dict[str, Any]:
    return {"is_new": app.create_database()}


WORK = {
    "consume": _consume,
    "run": _run,
    "project": _project,
    "follow": _follow,
    "create": _create,
}


def _counting_fences() -> list[Fenced]:
    """Return a list that each refusal to a fenced writer is put on."""
    found: list[Fenced] = []
    advance = ledger.advance

    def counted(*given: Any) -> None:
        try:
            advance(*given)
        except Fenced as error:
            found.append(error)
            raise

    _replace(ledger, "advance", counted)
    return found


# --- traps ------------------------------------------------------------------------


class Trap:
    """Kills or stops this process at the n-th pass of a point.

    Args:
        app: The log that it works on.
        talk: To say that it pauses.
        point: K0 to K9.
        at: Which pass.
        seed: Chooses among the places that a point has, unless one is given.
        place: Number of the place.
        act: ``kill``, or ``pause``.
    """

    def __init__(
        self,
        app: KappaLog,
        talk: Talk,
        *,
        point: str,
        at: int,
        seed: int = 0,
        place: int | None = None,
        act: str = "kill",
    ) -> None:
        self._left = at
        self._talk = talk
        self._act = act
        self._chance = random.Random(f"{point} {seed}")
        self._dialect = app.database.engine.dialect
        self._engine = app.database.engine
        self._is_writing = False
        places: list[Callable[[], None]] = getattr(self, point.lower())()
        (self._chance.choice(places) if place is None else places[place])()

    def k0(self) -> list[Callable[[], None]]:
        """After poll, before BEGIN."""
        return [
            lambda: self._before(consume, "ingest_batch"),
            lambda: self._after(ingest, "decide"),
        ]

    def k1(self) -> list[Callable[[], None]]:
        """After BEGIN, before or after the first statement."""
        return [
            lambda: self._before(ledger, "advance"),
            lambda: self._after(ledger, "advance"),
        ]

    def k2(self) -> list[Callable[[], None]]:
        """After the first row of a batch."""
        insert = log.insert_rows

        def first_row(connection: Any, table: Any, names: Any, rows: Any) -> None:
            given = list(rows)
            if self._left == 1 and given:
                insert(connection, table, names, given[:1])
            self._pass()
            insert(connection, table, names, given)

        return [lambda: _replace(log, "insert_rows", first_row)]

    def k3(self) -> list[Callable[[], None]]:
        """After the last row, before a checkpoint."""
        return [lambda: self._before(ledger, "write_checkpoint")]

    def k4(self) -> list[Callable[[], None]]:
        """After the checkpoints, before COMMIT."""
        return [
            lambda: self._before(log, "move_head"),
            lambda: self._around_commit(ledger, "advance", before=self._pass),
        ]

    def k5(self) -> list[Callable[[], None]]:
        """During COMMIT, from a thread beside it."""
        is_time = threading.Event()
        took: list[float] = [0.001]

        def wait() -> None:
            is_time.wait()
            end = time.perf_counter() + self._chance.uniform(0, 1.5 * max(took))
            while time.perf_counter() < end:
                pass
            self._spring()

        def commit(inner: Callable[[Any], None], connection: Any) -> None:
            self._left -= 1
            if self._left == 0:
                is_time.set()
            begun = time.perf_counter()
            inner(connection)
            took.append(time.perf_counter() - begun)

        def place() -> None:
            threading.Thread(target=wait, daemon=True).start()
            self._around_commit(ledger, "advance", instead=commit)

        return [place]

    def k6(self) -> list[Callable[[], None]]:
        """After COMMIT, before Kafka's own commit, and right after that."""
        trap = self

        class Consumer(client.Consumer):
            def commit(self, *given: Any, **named: Any) -> Any:
                trap._left = min(trap._left, 2)  # noqa: SLF001 - it is about once a second
                trap._pass()  # noqa: SLF001
                return super().commit(*given, **named)

        return [
            lambda: self._around_commit(ledger, "advance", after=self._pass),
            lambda: self._after(consume, "ingest_batch"),
            lambda: _replace(client, "Consumer", Consumer),
        ]

    def k7(self) -> list[Callable[[], None]]:
        """While rows and cursor of a projection are written."""
        return [
            lambda: self._before(rows.RowStore, "save"),
            lambda: self._after(rows.RowStore, "save"),
            lambda: self._before(builds, "move_cursor"),
            lambda: self._around_commit(rows.RowStore, "save", before=self._pass),
        ]

    def k9(self) -> list[Callable[[], None]]:
        """During a migration, between two statements."""

        def place() -> None:
            sa.event.listen(
                self._engine, "after_cursor_execute", lambda *_: self._pass()
            )

        return [place]

    def _before(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def trapped(*given: Any, **named: Any) -> Any:
            self._pass()
            return inner(*given, **named)

        _replace(owner, name, trapped)

    def _after(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def trapped(*given: Any, **named: Any) -> Any:
            result = inner(*given, **named)
            self._pass()
            return result

        _replace(owner, name, trapped)

    def _around_commit(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        instead: Callable[..., None] = lambda inner, connection: inner(connection),
    ) -> None:
        """Act at the commits of transactions that called a function."""
        marked = getattr(owner, name)
        inner = self._dialect.do_commit

        @functools.wraps(marked)
        def marking(*given: Any, **named: Any) -> Any:
            self._is_writing = True
            return marked(*given, **named)

        def do_commit(connection: Any) -> None:
            if not self._is_writing:
                inner(connection)
                return
            self._is_writing = False
            before()
            instead(inner, connection)
            after()

        _replace(owner, name, marking)
        _replace(self._dialect, "do_commit", do_commit)

    def _pass(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._spring()

    def _spring(self) -> None:
        is_kill = self._act == "kill"
        if not is_kill:
            self._talk.say(said="paused")
        os.kill(os.getpid(), signal.SIGKILL if is_kill else signal.SIGSTOP)
        # Another thread may be the one that the signal reaches first.
        time.sleep(60 if is_kill else 0.1)


# --- planted faults ---------------------------------------------------------------


def _offsets_first() -> None:
    """Commit the offsets before the events: a kill in between loses these."""
    advance = ledger.advance

    def planted(connection: Any, database: Any, *more: Any) -> None:
        advance(connection, database, *more)
        driver = connection.connection.driver_connection
        driver.commit()
        if database.is_sqlite:
            driver.execute("BEGIN IMMEDIATE")

    _replace(ledger, "advance", planted)


def _no_offsets() -> None:
    """Append without moving the offsets: all comes again after a kill."""
    _replace(ledger, "advance", lambda *_: None)


def _cursor_first() -> None:
    """Commit a projection's cursor before its rows: a kill in between loses these."""
    save = rows.RowStore.save

    def planted(
        store: Any, connection: Any, changed: Any, **named: Any
    ) -> None:
        driver = connection.connection.driver_connection
        driver.commit()
        if connection.dialect.name == "sqlite":
            driver.execute("BEGIN IMMEDIATE")
        save(store, connection, changed, **named)

    _replace(rows.RowStore, "save", planted)


def _no_fence() -> None:
    """Move the offsets, whoever they belong to by now."""

    def planted(  # noqa: PLR0913 - it stands for another function
        connection: Any, database: Any, lane: Any, held: Any, reached: Any, now: Any
    ) -> None:
        table = database.tables.offsets
        connection.execute(
            table.update()
            .where(
                table.c.source_id == held.source_id,
                table.c.partition == lane.partition,
            )
            .values(next_offset=reached.next_offset, updated_at=now)
        )

    _replace(ledger, "advance", planted)


FAULTS = {
    "offsets first": _offsets_first,
    "no offsets": _no_offsets,
    "no fence": _no_fence,
    "cursor first": _cursor_first,
}


def _replace(owner: Any, name: str, by: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} to wrap"
    setattr(owner, name, by)
