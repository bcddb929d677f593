"""A process that has imported everything, and forks workers; none is left behind.

A worker is at work after milliseconds, where a new interpreter imports for a second.
Over one socket come tasks, each with the worker's own end of another socket, which is
all that `live` and whoever started it talk by.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Self

from support import untraced

Live = Callable[[socket.socket, dict[str, Any]], None]
"""Does a task and ends the process."""


class Forks:
    """Forks workers; all are gone at the end of the block, and with this process."""

    def __init__(self, module: str) -> None:
        """Start it; it imports a module of `support`, whose `live` is for workers."""
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            code = (
                f"from support.forks import serve; from {module} import live; "
                f"serve({number}, live)"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=untraced(),
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
            )

    def fork(self, task: dict[str, Any]) -> tuple[int, socket.socket]:
        """Start a worker at a task; return its number, and our end of its socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid: int = self._ask(task, [theirs.fileno()])["pid"]
        return pid, ours

    def code_of(self, pid: int) -> int:
        """Wait for a worker's end; return its exit code."""
        found: int = self._ask({"wait": pid}, [])["code"]
        return found

    def close(self) -> None:
        """End it with all its workers."""
        self._control.close()
        self._process.wait()

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        answer: dict[str, Any] = json.loads(self._control.recv(1 << 16))
        return answer

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all its workers."""
        self.close()


def serve(descriptor: int, live: Live) -> None:
    """Fork a worker for each task, until nobody is at the other end."""
    # One that comes while a worker is still being forked waits until it is unblocked.
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
                live(socket.socket(fileno=descriptors[0]), request)
            os.close(descriptors[0])
            children.add(pid)
            answer = {"pid": pid}
        control.sendall(json.dumps(answer).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
