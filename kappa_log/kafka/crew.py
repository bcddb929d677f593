"""Crew: several listeners of one process, each in a thread; one end for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kappa_log.kafka.consume import (
    CLOSE_SECONDS,
    STOP_SECONDS,
    ConsumeReport,
    Consumption,
)

_TICK_SECONDS = 0.1


class _Member:
    """One listener at work."""

    def __init__(self, consumption: Consumption, stop: threading.Event) -> None:
        self.id = consumption.id
        self.report: ConsumeReport | None = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.report = consumption.run(stop)
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                self.error = error

        # A daemon: what hangs in a client's or a driver's call cannot keep us.
        self.thread = threading.Thread(target=run, name=self.id, daemon=True)
        self.thread.start()


def work(
    consumptions: Sequence[Consumption],
    stop: threading.Event,
    on_notice: Callable[[str], None],
) -> list[ConsumeReport]:
    """Run listeners until each is at its end, one fails, or all are told to stop.

    Whoever is told to stop ends its batch or lets it roll back, within five seconds.

    Returns:
        The reports, in the order of the listeners; one that did not end in time has
        none.

    Raises:
        KappaLogError: What the first listener that failed raised; the others were
            stopped.
    """
    together = threading.Event()
    crew = [_Member(consumption, together) for consumption in consumptions]
    try:
        while _at_work(crew) and not _failed(crew) and not stop.is_set():
            stop.wait(_TICK_SECONDS)
    finally:
        together.set()
        end = time.monotonic() + STOP_SECONDS + CLOSE_SECONDS + 0.5
        for member in crew:
            member.thread.join(max(0.0, end - time.monotonic()))
    for member in _failed(crew):
        assert member.error is not None
        raise member.error
    for member in _at_work(crew):
        on_notice(f"{member.id} did not end in time: its last batch rolls back")
    return [member.report for member in crew if member.report is not None]


def _at_work(crew: Sequence[_Member]) -> list[_Member]:
    return [member for member in crew if member.thread.is_alive()]


def _failed(crew: Sequence[_Member]) -> list[_Member]:
    return [member for member in crew if member.error is not None]
