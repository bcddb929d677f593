"""Rates: how often somebody may ask; who asks more often is told when to come again.

Each who has a bucket that holds what may be asked in a second, and fills at the rate.
The buckets are this process's own: two servers of one log allow twice as much.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

TOKEN_RATE = 100.0
"""Requests a second of each token, where the configuration says nothing."""

MAX_BUCKETS = 10_000
"""Buckets that are kept; the one that was not asked for longest is forgotten, full."""


class Rates:
    """The buckets of one server.

    Args:
        per_second: Requests a second; that many may also come at once, at least one.
        clock: Seconds that never go back.
    """

    def __init__(
        self, per_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = per_second
        self._size = max(1.0, per_second)
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """What was left, and when, by who asks."""

    def take(self, who: str) -> float:
        """Take one request; return 0, or the seconds until there is one to take."""
        now = self._clock()
        with self._lock:
            left, then = self._buckets.pop(who, (self._size, now))
            left = min(self._size, left + (now - then) * self._rate)
            may = left >= 1
            self._buckets[who] = (left - 1 if may else left, now)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        return 0.0 if may else (1 - left) / self._rate
