"""A topic, a log and consumers between them; and all that can be wrong at the end.

The test produces, and remembers what was acknowledged. Workers consume and meet with
accidents. `World.faults` then compares what was produced with the log, its ledger, its
projection and what readers were given on the way, and names everything that differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from shutil import copy
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import sqlalchemy as sa

import kappa_log
from kappa_log import KappaLog
from kappa_log.config import load_config
from kappa_log.events import Event
from kappa_log.storage import lists, log
from kappa_log.storage.database import sqlite_module
from support.history import Cursor, History, Outcome, Page, Place, Produced, Row, check
from support.kafka_broker import RealBroker
from support.kafka_process import wait_for
from support.kafka_worker import GROUP, Trail, follow, trails

SECONDS = 60
"""How long anything may take at the most."""

STATIC = {"group.instance.id": "w", "session.timeout.ms": 10_000}
"""A member that comes back under its name, at once, however its process ended."""

DYNAMIC = {"session.timeout.ms": 1000, "heartbeat.interval.ms": 200}
"""A killed member is missed after a second."""

# --- processes --------------------------------------------------------------------


class Nest:
    """Forks workers; all are gone at the end of the block."""

    def __init__(self) -> None:
        """Start it; it imports everything while the test prepares."""
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        paths = [str(Path(kappa_log.__file__).parents[1]), str(Path(__file__).parents[1])]
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from support.kafka_worker import nest; nest({number})",
                ],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
            )

    def start(self, **task: Any) -> Worker:
        """Start a worker at a task."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._ask(task, [theirs.fileno()])["pid"]
        return Worker(self, pid, ours)

    def code_of(self, pid: int) -> int:
        """Wait for a worker's end; return its exit code."""
        found: int = self._ask({"wait": pid}, [])["code"]
        return found

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        answer: dict[str, Any] = json.loads(self._control.recv(1 << 16))
        return answer

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all its workers."""
        self._control.close()
        self._process.wait()


class Worker:
    """A process that does one task."""

    def __init__(self, nest: Nest, pid: int, channel: socket.socket) -> None:
        """Use a process that was just forked."""
        self.pid = pid
        self.notices: list[str] = []
        self._nest = nest
        self._channel = channel
        self._lines = channel.makefile("r")
        self._result: dict[str, Any] | None = None
        self._code: int | None = None
        channel.settimeout(SECONDS)

    def wait_until_paused(self) -> None:
        """Wait until it stands still at its trap."""
        assert self._next() == {"said": "paused"}, f"it ended: {self._result}"
        stat = Path(f"/proc/{self.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a stop")

    def result(self) -> dict[str, Any]:
        """Wait for its end, and return what came of it."""
        self._wait()
        assert self._result is not None, f"it died with code {self._code}"
        return self._result

    def was_killed(self) -> bool:
        """Wait for its end; tell whether that was SIGKILL."""
        self._wait()
        assert self._result or self._code == -signal.SIGKILL, f"code {self._code}"
        return self._result is None

    def has_ended(self) -> bool:
        """Tell whether it has ended, without waiting."""
        if self._code is None:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "Z"
        return True

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self.signal(signal.SIGKILL)
        self._wait()

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it is gone."""
        if self._code is None:
            os.kill(self.pid, number)

    def _wait(self) -> None:
        while self._next() is not None:
            pass
        if self._code is None:
            self._code = self._nest.code_of(self.pid)
            self._lines.close()
            self._channel.close()

    def _next(self) -> dict[str, Any] | None:
        """Return the next thing that it says; None when it says no more."""
        while self._code is None:
            try:
                line = self._lines.readline()
            except ConnectionResetError:
                line = ""
            found: dict[str, Any] = json.loads(line) if line else {}
            if "notice" in found:
                self.notices.append(found["notice"])
            elif "result" in found:
                self._result = found["result"]
            else:
                return found or None
        return None


# --- records ----------------------------------------------------------------------


def outcome_of(value: bytes | None) -> str:
    """Return what becomes of a record that is none of a message seen before."""
    if value is None:
        return "kept"
    try:
        wanted = json.loads(value)["do"]
    except ValueError:
        return "fail"
    return {"keep": "kept"}.get(wanted, wanted)


def made_records(
    chance: random.Random, partitions: int, number: int
) -> list[tuple[bytes | None, bytes, int]]:
    """Return values, keys and partitions: some skip, some fail, some come again."""
    found: list[tuple[bytes | None, bytes, int]] = []
    for index in range(number):
        who = chance.randrange(20)
        at = (b"k%d" % who, who % partitions)
        luck = chance.random()
        if luck < 0.05 and found:
            value, *at_first = chance.choice(found)
            is_kept = value is not None and outcome_of(value) == "kept"
            elsewhere = at_first[0], chance.randrange(partitions)
            found.append((value, *(elsewhere if is_kept else at_first)))
        elif luck < 0.08:
            found.append((b'{"number": %d, broken' % index, *at))
        elif luck < 0.1:
            found.append((None, *at))
        else:
            do = "fail" if luck < 0.14 else "skip" if luck < 0.18 else "keep"
            value = json.dumps({"who": f"w{who}", "number": index, "do": do}).encode()
            found.append((value, *at))
    return found
