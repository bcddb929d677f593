"""Consumers in processes of their own, to be killed, paused or told to stop.

A *nest* forks a worker for each task (see `forks`). The worker talks on its socket, a
line of JSON each time; when nobody is at the other end any more, it ends:

    {"said": "paused"}      it stops itself next, by SIGSTOP
    {"notice": "…"}         what `consume` tells people
    {"result": {…}}         what came of it, or the error; none if it was killed

SIGTERM ends it in peace, whenever it comes; SIGUSR1 has it print where its threads are.

A task may set a trap, or plant a fault: see `kafka_traps`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from typing_extensions import override

from kappa_log import (
    Event,
    Handler,
    KappaLog,
    KappaLogError,
    Metadata,
    Projection,
    ack,
    projection,
)
from kappa_log.config import load_config
from support.kafka_traps import FAULTS, Trap, counting_fences
from support.logs import set_bounds
from support.stops import Stop

# --- what is consumed -------------------------------------------------------------


class Picky(Handler):
    """Keeps, skips or fails a record as the record itself wants it."""

    @override
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


def trails(topic: str) -> Projection:
    """Return a projection of everybody's trail over one topic."""

    @projection(topics=[topic], version=1, name="trails")
    def fold(state: Trail | None, event: Event) -> Trail | None:
        return follow(state, event.payload["number"])

    return fold


class Buyer(Handler):
    """Keeps CDNOW's purchases."""

    @override
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


def customers(topic: str) -> Projection:
    """Return a projection of CDNOW's customers over one topic."""

    @projection(topics=[topic], version=1, name="customers")
    def fold(state: Customer | None, event: Event) -> Customer | None:
        return bought(state, event.payload)

    return fold


PROJECTIONS = {"trails": trails, "customers": customers}

# --- the worker -------------------------------------------------------------------


class Talk:
    """The worker's end of its socket."""

    def __init__(self, channel: socket.socket) -> None:
        """Watch, in a thread, whether somebody listens."""
        self._channel = channel
        self._lock = threading.Lock()
        self.stop = Stop()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, **what: Any) -> None:
        """Send a line."""
        with self._lock:
            self._channel.sendall(json.dumps(what).encode() + b"\n")

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            self._channel.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)


def live(channel: socket.socket, task: dict[str, Any]) -> None:
    """Do a task and end the process."""
    try:
        talk = Talk(channel)
        faulthandler.register(signal.SIGUSR1)
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
        FAULTS[task["fault"]](app)
    if "trap" in task:
        Trap(app, lambda: talk.say(said="paused"), **task["trap"])
    fenced = counting_fences()
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
