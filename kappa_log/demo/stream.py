"""Stream: a till that produces, and the log that consumes and folds, side by side.

The embedded broker keeps about 10,000 records a partition and forgets older ones, so
the till never is far ahead of the log. And since partitions keep no order between
them, it sends what happened in about ten days, and goes on when the log has all of
that: January is in the log before February, and what the demo prints about it is the
same in every run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
from typing_extensions import override

from kappa_log.app import KappaLog
from kappa_log.demo.place import NAMES
from kappa_log.demo.shop import Record
from kappa_log.kafka.consume import ConsumeProgress
from kappa_log.kafka.produce import Sink
from kappa_log.storage.ledger import Counts

TOPIC = "orders"

AHEAD = 4_000
"""Most records that the till is ahead of the log."""

CLOSING_SECONDS = 2.0
"""How long the log may take to fold the last records of a till that was closed."""

_LOOK_SECONDS = 0.01


class Pace(NamedTuple):
    """How fast the till sends."""

    records: int
    """So many at a time,"""
    pause: float
    """and then nothing for so many seconds."""


class Stream:
    """Records on their way from the till into the log's projections.

    Args:
        app: The log; its settings lead to the broker.
        records: What the till sends; may go on for ever.
        pace: How fast.
        before: What became of the records before these.
    """

    def __init__(
        self,
        app: KappaLog,
        records: Iterable[Record],
        pace: Pace,
        before: Counts | None = None,
    ) -> None:
        self.counts = before or Counts()
        """What became of all records so far."""
        self.notices: deque[str] = deque(maxlen=1)
        """What the log had to say last."""
        self._app = app
        self._records = records
        self._pace = pace
        self._before = self.counts
        self._sink = Sink(app.config, TOPIC)
        self._closing = threading.Event()
        self._close_by = float("inf")
        self._stop = threading.Event()
        self._till = _Worker(self._produce)
        self._log = _Worker(self._consume)

    @property
    def behind(self) -> int:
        """Records that are in the topic and not in the log yet."""
        return self._before.seen + self._sink.acknowledged - self.counts.seen

    def wait(self, seconds: float) -> bool:
        """Wait, and tell whether the till is done and the log has folded all of it.

        Raises:
            KappaLogError: The till or the log failed.
        """
        time.sleep(seconds)
        for worker in (self._till, self._log):
            if worker.error is not None:
                raise worker.error
        if time.monotonic() > self._close_by:
            return True
        return not self._till.is_alive() and self.behind <= 0 and self._is_folded()

    def close(self) -> None:
        """Let the till send no more; the log has a moment to take in what it sent."""
        if not self._closing.is_set():
            self._closing.set()
            self._close_by = time.monotonic() + CLOSING_SECONDS

    def __enter__(self) -> Self:
        """Start both."""
        self._till.start()
        self._log.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End both, after the batch at hand; who interrupts does not want to wait."""
        self._closing.set()
        self._stop.set()
        if kind is not KeyboardInterrupt:
            self._till.join()
            self._log.join()

    # --- the till -------------------------------------------------------------

    def _produce(self) -> None:
        days = ""
        for number, record in enumerate(self._records, 1):
            if record.days != days:
                self._send_all(ahead=0)
                days = record.days
            self._sink.send(record.value.encode(), record.key.encode())
            if number % self._pace.records == 0:
                self._send_all(ahead=AHEAD)
                self._closing.wait(self._pace.pause)
            if self._closing.is_set():
                break
        self._sink.flush()

    def _send_all(self, *, ahead: int) -> None:
        """Wait until all is in the topic, and the log at most so many behind."""
        self._sink.flush()
        while self.behind > ahead and not self._closing.is_set():
            time.sleep(_LOOK_SECONDS)

    # --- the log --------------------------------------------------------------

    def _consume(self) -> None:
        # The topic comes to be with its first record.
        while not (self._sink.acknowledged or self._stop.is_set()):
            time.sleep(_LOOK_SECONDS)
        self._app.run(
            stop=self._stop, on_notice=self.notices.append, on_progress=self._took
        )

    def _is_folded(self) -> bool:
        lags = [self._app.projection(name).lag for name in NAMES]
        return all(lag is not None and lag.events == 0 for lag in lags)

    def _took(self, progress: ConsumeProgress) -> None:
        counts = msgspec.structs.replace(self._before)
        counts.add(progress.counts)
        self.counts = counts


class _Worker(threading.Thread):
    """A thread whose error is raised where it is awaited."""

    def __init__(self, work: Callable[[], None]) -> None:
        # A daemon: who interrupts twice is not kept waiting.
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._work = work

    @override
    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            self.error = error
