"""Writer: one batch at a time written beside the polling, so polling never stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Writer(Generic[T]):
    """Runs one piece of work at a time in a thread of its own.

    The thread is a daemon: a database that hangs cannot keep the process from ending,
    and what it had open rolls back with its connection.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Tell whether there is work whose outcome was not asked for yet."""
        return self._thread is not None

    def begin(self, work: Callable[[], T]) -> None:
        """Start a piece of work."""
        assert self._thread is None, "the outcome of the last work was not asked for"
        self._result = self._error = None

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                self._error = error

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the work; tell whether it came."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def outcome(self) -> T:
        """Return what the ended work returned, or raise what it raised."""
        assert self._thread is not None
        assert not self._thread.is_alive()
        self._thread = None
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result
