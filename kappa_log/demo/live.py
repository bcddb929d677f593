"""Live: the shop goes on, and the terminal shows how the log follows, until Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from kappa_log.app import KappaLog
from kappa_log.demo import place, shop
from kappa_log.demo.screen import Rows, Screen
from kappa_log.demo.stream import Pace, Stream
from kappa_log.errors import KappaLogError
from kappa_log.storage.ledger import Counts

REDRAW_SECONDS = 0.25

PACE = Pace(10, 0.25)
"""About 40 records a second: fast enough for a shop, slow enough to read."""

CYCLE = 500
"""In each so many events, something is broken and something comes twice."""

SHOWN = 6
"""Events in view."""


def follow(
    app: KappaLog,
    screen: Screen,
    happenings: Iterator[shop.Happening],
    before: Counts,
) -> None:
    """Let the shop go on and the log follow, until Ctrl-C; a second one forces.

    Args:
        app: The log; its settings lead to the broker.
        screen: Where to show it.
        happenings: What happens in the shop from now on.
        before: What became of the records before.
    """
    screen.heading("The shop goes on; Ctrl-C closes it")
    records = shop.records(happenings, CYCLE)
    with (
        _until_interrupt() as stop,
        Stream(app, records, PACE, before) as stream,
        screen.live() as show,
    ):
        board = Board(app, stream)
        while not stream.wait(REDRAW_SECONDS):
            show(*board.look())
            if stop.is_set():
                stream.close()
        show(*board.look())
    screen.say(f"Closed, at position {app.head().position:,}.")


@contextmanager
def _until_interrupt() -> Iterator[threading.Event]:
    """Give what the first Ctrl-C sets; the next one interrupts, as it did before."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Board:
    """What is shown of a stream: its rates and counts, projections, last events."""

    def __init__(self, app: KappaLog, stream: Stream) -> None:
        self._app = app
        self._stream = stream
        self._tables: list[Rows] = []
        # Of three seconds: when, and how many records and events there were.
        self._seen: deque[tuple[float, int, int]] = deque(maxlen=12)

    def look(self) -> tuple[list[Rows], list[str], str]:
        """Return tables, notes below them, and the first table as a line."""
        traffic, line = self._traffic()
        notes = list(self._stream.notices)
        try:
            self._tables = [self._projections(), self._events()]
            notes = [*self._failure(), *notes]
        except KappaLogError as error:
            # Commands in another terminal may hold the log just now; later not.
            if not error.retryable:
                raise
            notes = [str(error)]
        return [traffic, *self._tables], notes, line

    def _traffic(self) -> tuple[Rows, str]:
        counts = self._stream.counts
        records_rate, events_rate = self._rates(counts)
        records, events = f"{counts.seen:,}", f"{counts.acked:,}"
        behind = f"{max(self._stream.behind, 0):,}"
        ends = (f"{counts.skipped:,}", f"{counts.duplicate:,}", f"{counts.failed:,}")
        table = Rows(
            [(records, records_rate, events, events_rate, behind, *ends)],
            (
                *("records", "/s", "events", "/s", "behind"),
                *("skipped", "duplicate", "failed"),
            ),
            right="01234567",
        )
        return table, (
            f"{records} records ({records_rate}/s), {events} events ({events_rate}/s), "
            f"{behind} behind, {ends[1]} duplicate, {ends[2]} failed"
        )

    def _rates(self, counts: Counts) -> tuple[str, str]:
        """Return how many records and events there were a second, lately."""
        self._seen.append((time.monotonic(), counts.seen, counts.acked))
        (began, *old), (now, *new) = self._seen[0], self._seen[-1]
        seconds = max(now - began, REDRAW_SECONDS)
        records, events = (b - a for a, b in zip(old, new, strict=True))
        return f"{records / seconds:,.0f}", f"{events / seconds:,.0f}"

    def _projections(self) -> Rows:
        return Rows(
            [
                (
                    found.name,
                    f"{live.rows:,}",
                    f"{live.cursor:,}",
                    f"{found.lag.events if found.lag else 0:,}",
                    f"{live.number}",
                    f"{live.version}",
                )
                for found in map(self._app.projection, place.NAMES)
                if (live := found.live) is not None
            ],
            ("projection", "rows", "position", "behind", "build", "version"),
            right="12345",
        )

    def _events(self) -> Rows:
        return Rows(
            [
                (
                    f"{event.position:,}",
                    f"{event.event_time:%F %T}",
                    event.entity_id or "",
                    event.event_type or "",
                )
                for event in reversed(self._app.events(limit=SHOWN))
            ],
            ("position", "time", "entity", "type"),
            right="0",
        )

    def _failure(self) -> Iterator[str]:
        for last in self._app.failures(limit=1):
            where = f"partition {last.partition}, offset {last.offset:,}"
            yield f"Failed last: {where}: {last.error_class}: {last.error_message}"
