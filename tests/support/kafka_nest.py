"""A nest of workers, as a test uses it: they start at once, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from support.forks import Forks
from support.kafka_process import wait_for

SECONDS = 60
"""How long a worker may be silent."""


class Nest(Forks):
    """Forks workers of `kafka_worker`."""

    def __init__(self) -> None:
        """Start it; it imports everything while the test prepares."""
        super().__init__("support.kafka_worker")

    def start(self, **task: Any) -> Worker:
        """Start a worker at a task."""
        return Worker(self, *self.fork(task))


class Worker:
    """A process that does one task."""

    def __init__(self, nest: Nest, pid: int, channel: socket.socket) -> None:
        """Use a process that was just forked."""
        self.pid = pid
        self.notices: list[str] = []
        self._heard = 0
        self._nest = nest
        self._channel = channel
        self._lines = channel.makefile("r")
        self._result: dict[str, Any] | None = None
        self._code: int | None = None
        channel.settimeout(SECONDS)

    def wait_until_paused(self) -> None:
        """Wait until it stands still at its trap."""
        while "said" not in (said := self._next()):
            assert said, f"it ended with code {self._code}"
            assert "result" not in said, said
        stat = Path(f"/proc/{self.pid}/stat")
        wait_for(
            lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a stop"
        )

    def hear(self, words: str) -> None:
        """Wait until it tells people something, after what was heard before."""
        while True:
            for notice in self.notices[self._heard :]:
                self._heard += 1
                if words in notice:
                    return
            assert self._next(), f"it ended with code {self._code}"

    def wake(self) -> None:
        """Let it go on after it paused."""
        self.signal(signal.SIGCONT)

    def result(self) -> dict[str, Any]:
        """Wait for its end, and return what came of it."""
        self._wait()
        assert self._result is not None, f"it died with code {self._code}"
        return self._result

    def was_killed(self) -> bool:
        """Wait for its end; tell whether that was a kill, by a signal or a timer."""
        self._wait()
        kills = (-signal.SIGKILL, -signal.SIGALRM)
        assert self._result or self._code in kills, f"code {self._code}"
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
        while self._next():
            pass
        self._bury()

    def _bury(self) -> None:
        if self._code is None:
            self._code = self._nest.code_of(self.pid)
            self._lines.close()
            self._channel.close()

    def _next(self) -> dict[str, Any]:
        """Return the next thing that it says; nothing when it says no more."""
        if self._code is not None:
            return {}
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = ""
        except TimeoutError as error:
            self._ask_where_it_is()
            message = f"worker {self.pid} said nothing for {SECONDS} s; see stderr"
            raise AssertionError(message) from error
        found: dict[str, Any] = json.loads(line) if line else {}
        if "notice" in found:
            self.notices.append(found["notice"])
        self._result = found.get("result", self._result)
        return found

    def _ask_where_it_is(self) -> None:
        """Have its threads' places printed, then end it."""
        self.signal(signal.SIGUSR1)
        time.sleep(1)
        self.signal(signal.SIGKILL)
        self._bury()
