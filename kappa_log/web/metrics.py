"""/metrics: what a monitoring system asks for, read from the log when it asks."""

from __future__ import annotations

from collections.abc import Iterator

from apiflask import APIBlueprint
from flask import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from typing_extensions import override

import kappa_log
from kappa_log.app import KappaLog
from kappa_log.web import spec
from kappa_log.web.log import log

api = APIBlueprint("metrics", __name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@api.get("/metrics")
@api.doc(
    **spec.operation("metrics", spec.text("text/plain", "kappa_log_head_position 4117"))
)
def metrics() -> Response:
    """Return what is counted, for Prometheus."""
    # A registry of its own: nothing of the process's other libraries is told.
    registry = CollectorRegistry()
    registry.register(LogCollector(log()))
    return Response(generate_latest(registry), content_type=CONTENT_TYPE)


class LogCollector(Collector):
    """What the log counts, read when it is asked for."""

    def __init__(self, log: KappaLog) -> None:
        self._log = log

    @override
    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        head = self._log.head()
        yield _gauge("head_position", "Last position of the log.", head.position)
        failures = self._log.count_failures()
        yield _gauge("failures", "Failures that are kept, parked ones too.", failures)
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
        version = _labelled("info", "Version of kappa_log.", "version")
        version.add_metric([kappa_log.__version__], 1)
        yield version

    def _cursors(self) -> Iterator[Metric]:
        cursor = _labelled("cursor_position", "Cursor of a live build.", "projection")
        events = _labelled("lag_events", "Events past the cursor.", "projection")
        seconds = _labelled("lag_seconds", "Age of the first of them.", "projection")
        parked = _labelled("parked_keys", "Keys whose fold raised.", "projection")
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
