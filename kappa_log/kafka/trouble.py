"""Trouble that may pass: waited out with growing pauses, told, and not repeated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from kappa_log.errors import KappaLogError

FIRST_WAIT = 0.1
"""Seconds until the first new try; each later one waits twice as long."""

LONGEST_WAIT = 5.0

SAY_AGAIN_SECONDS = 60.0
"""How long the same words are not repeated."""


class Trouble:
    """What is wrong just now, and when to try again."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: dict[str, float] = {}
        self._wait = FIRST_WAIT
        self._until = 0.0
        self._is_on = False

    @property
    def is_waiting(self) -> bool:
        """Tell whether it is too early to try again."""
        return time.monotonic() < self._until

    def came(self, error: KappaLogError) -> None:
        """Note an error; the next try waits longer than the last."""
        self._is_on = True
        self.say(f"{error}; trying again")
        # Jitter: processes that lost one database do not come back all at once.
        self.wait(random.uniform(self._wait / 2, self._wait))  # noqa: S311
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def wait(self, seconds: float) -> None:
        """Let nothing be tried for a while."""
        self._until = time.monotonic() + seconds

    def is_over(self) -> None:
        """Note that it works again."""
        if self._is_on:
            self._tell("works again; going on")
            self._told.clear()
        self._is_on = False
        self._wait = FIRST_WAIT

    def say(self, message: str, about: str | None = None) -> None:
        """Tell what happens, and nothing about the same again for a minute.

        Args:
            message: What happens.
            about: What it is about, where the words may change; else the words count.
        """
        about = about or message
        now = time.monotonic()
        self._told = {
            told: at for told, at in self._told.items() if now - at < SAY_AGAIN_SECONDS
        }
        if about not in self._told:
            self._told[about] = now
            self._tell(message)
