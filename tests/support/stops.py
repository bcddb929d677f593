"""A request to stop that a signal handler may set."""

from __future__ import annotations

import threading

from typing_extensions import override


class Stop(threading.Event):
    """Fails whoever waits on it.

    A handler that interrupts a wait on an event in its own thread, and sets that very
    event, can wait for ever: both need the event's one lock.
    """

    @override
    def wait(self, timeout: float | None = None) -> bool:
        """Refuse to wait."""
        msg = "somebody waits on an event that signal handlers set"
        raise AssertionError(msg)
