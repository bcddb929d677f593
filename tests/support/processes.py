"""Processes that work on a log beside the test, and can be killed."""

from __future__ import annotations

import atexit
import json
import os
import signal
from functools import cache
from typing import Any, Self

from support.forks import Forks


@cache
def _forks() -> Forks:
    """Return where workers come from; it ends with this process."""
    found = Forks("support.worker")
    atexit.register(found.close)
    return found


class Worker:
    """A process at a task of `worker`; it is killed at the end of the block."""

    def __init__(self, **task: Any) -> None:
        """Start it, and wait until it begins."""
        self._code: int | None = None
        self._pid, self._channel = _forks().fork(task)
        self._lines = self._channel.makefile("r")
        self.wait_for("ready")

    def wait_for(self, word: str) -> None:
        """Wait until it says something."""
        line = self._line()
        assert line == word, f"the worker said {line!r}, not {word!r}"

    def go_on(self) -> None:
        """Let it go on after it paused."""
        self._channel.sendall(b"\n")

    def result(self) -> dict[str, Any]:
        """Wait for its end and return what came of it."""
        found: dict[str, Any] = json.loads(self._line())
        assert self.died() == 0
        return found

    def watch(self, steps: int) -> None:
        """Wait until it has shown progress so many times, or has ended."""
        for _ in range(steps):
            if self._read() != "progress":
                return

    def died(self) -> int:
        """Wait for its end and return its code."""
        if self._code is None:
            self._code = _forks().code_of(self._pid)
        return self._code

    def kill(self) -> bool:
        """Kill it where it stands; tell whether it was still at work."""
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)
        return self.died() == -signal.SIGKILL

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind."""
        self.kill()
        self._lines.close()
        self._channel.close()

    def _line(self) -> str:
        line = self._read()
        assert line, f"the worker died with code {self.died()}"
        return line

    def _read(self) -> str:
        try:
            return self._lines.readline().strip()
        except ConnectionResetError:
            # It was killed before it read all that it was sent.
            return ""
