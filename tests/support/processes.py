"""Processes that work on a log beside the test, and can be killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from support import untraced

HERE = Path(__file__).parent


class Worker:
    """A `worker.py` at work; it is killed at the end of the block at the latest."""

    def __init__(self, **task: Any) -> None:
        """Start it, and wait until it begins."""
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), json.dumps(task)],
            env=untraced(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.wait_for("ready")

    def wait_for(self, word: str) -> None:
        """Wait until it says something."""
        line = self._line()
        assert line == word, f"the worker said {line!r}, not {word!r}"

    def go_on(self) -> None:
        """Let it go on after it paused."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for its end and return what came of it."""
        found: dict[str, Any] = json.loads(self._line())
        assert self._process.wait() == 0
        return found

    def watch(self, steps: int) -> None:
        """Wait until it has shown progress so many times, or has ended."""
        assert self._process.stdout is not None
        for _ in range(steps):
            if self._process.stdout.readline().strip() != "progress":
                return

    def died(self) -> int:
        """Wait for its end and return its code."""
        return self._process.wait()

    def kill(self) -> bool:
        """Kill it where it stands; tell whether it was still at work."""
        self._process.kill()
        return self._process.wait() == -signal.SIGKILL

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"the worker died with code {self._process.wait()}"
        return line
