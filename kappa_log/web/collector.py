"""What the log counts, for Prometheus: read from the database when it asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from typing_extensions import override

import kappa_log
from kappa_log.app import KappaLog
from kappa_log.telemetry.metrics import process_metrics


def registry_of(log: KappaLog) -> CollectorRegistry:
    """Return what is told of a log, and of this process.

    A registry of its own: nothing of the process's other libraries is told.
    """
    registry = CollectorRegistry()
    registry.register(LogCollector(log))
    registry.register(process_metrics().registry)
    return registry


class LogCollector(Collector):
    """What the log counts, read when it is asked for."""

    def __init__(self, log: KappaLog) -> None:
        self._log = log

    @override
    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        head = self._log.head()
        yield _gauge("head_position", "Last position of the log.", head.position)
        failures = _labelled(
            "failures", "Failures that are kept: failed themselves, or parked.", "state"
        )
        for state, count in self._log.failure_states().items():
            failures.add_metric([state], count)
        yield failures
        seen = CounterMetricFamily(
            "kappa_log_records",
            "Records, by what became of them.",
            labels=["fate"],
        )
        counts = self._log.seen()
        for fate in counts.__struct_fields__:
            seen.add_metric([fate], getattr(counts, fate))
        yield seen
        yield from self._cursors()
        version = _labelled("build_info", "Version of kappa_log.", "version")
        version.add_metric([kappa_log.__version__], 1)
        yield version

    def _cursors(self) -> Iterator[Metric]:
        cursor = _labelled(
            "projection_position", "Cursor of a live build.", "projection"
        )
        events = _labelled(
            "projection_lag_events", "Events past the cursor.", "projection"
        )
        seconds = _labelled(
            "projection_lag_seconds", "Age of the first of them.", "projection"
        )
        parked = _labelled(
            "projection_parked_keys", "Keys whose fold raised.", "projection"
        )
        for found in self._log.cursors():
            parked.add_metric([found.projection], found.parked)
            cursor.add_metric([found.projection], found.cursor)
            events.add_metric([found.projection], found.lag.events)
            seconds.add_metric([found.projection], found.lag.seconds)
        yield from (cursor, events, seconds, parked)


def _gauge(name: str, said: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kappa_log_{name}", said, value=value)


def _labelled(name: str, said: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kappa_log_{name}", said, labels=[label])
