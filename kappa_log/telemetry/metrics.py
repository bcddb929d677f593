"""Metrics of this process: what it did since it started, for Prometheus.

Counted from notices, and only once somebody asks for them. Labels name topics,
partitions, projections and outcomes: never keys, entities or the text of errors.
"""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kappa_log.telemetry import notices
from kappa_log.telemetry.notices import Notice

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets of a batch's transaction."""

_PARTITION = ("topic", "partition")


class ProcessMetrics:
    """Counters of this process, from now on."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._appended = self._counter(
            "events_appended", "Events that this process appended.", "topic"
        )
        self._records = self._counter(
            "process_records", "Records, by what became of them.", "topic", "outcome"
        )
        self._retries = self._counter(
            "process_retries", "Records that are tried again in place.", "topic"
        )
        self._errors = self._counter(
            "process_failures", "Failures that this process kept.", "topic"
        )
        self._append_seconds = Histogram(
            "kappa_log_append_duration_seconds",
            "Time of a batch's transaction.",
            registry=self.registry,
            buckets=SECONDS,
        )
        self._lag = self._gauge(
            "consumer_lag_records", "Offsets behind the end.", *_PARTITION
        )
        self._age = self._gauge(
            "consumer_lag_seconds",
            "Age of the last record read, 0 at the end.",
            *_PARTITION,
        )
        self._folded = self._counter(
            "projection_events", "Events that this process folded.", "projection"
        )
        self._heartbeat = self._gauge(
            "projection_heartbeat_timestamp_seconds",
            "When this process last saw to a projection.",
            "projection",
        )
        self._subscriptions = [
            notices.subscribe("batch_committed", self._batch),
            notices.subscribe("partition_read", self._partition),
            notices.subscribe("projection_folded", self._fold),
            notices.subscribe("projection_seen_to", self._beat),
        ]

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(f"kappa_log_{name}", said, labels, registry=self.registry)

    def _gauge(self, name: str, said: str, *labels: str) -> Gauge:
        return Gauge(f"kappa_log_{name}", said, labels, registry=self.registry)

    def _batch(self, notice: Notice) -> None:
        self._append_seconds.observe(notice.duration / 1000)
        for lane in notice.payload["lanes"]:
            topic = lane["topic"]
            for outcome, count in lane["counts"].items():
                if count:
                    self._records.labels(topic, outcome).inc(count)
            self._appended.labels(topic).inc(lane["counts"]["acked"])
            self._errors.labels(topic).inc(lane["counts"]["failed"])
            if lane["stopped"]:
                self._retries.labels(topic).inc()

    def _partition(self, notice: Notice) -> None:
        facts = notice.payload
        where = facts["topic"], str(facts["partition"])
        if facts["behind"] is not None:
            self._lag.labels(*where).set(facts["behind"])
        if facts["seconds"] is not None:
            self._age.labels(*where).set(facts["seconds"])

    def _fold(self, notice: Notice) -> None:
        self._folded.labels(notice.payload["projection"]).inc(notice.payload["events"])

    def _beat(self, notice: Notice) -> None:
        self._heartbeat.labels(notice.payload["projection"]).set_to_current_time()

    def stop(self) -> None:
        """Count no more."""
        for subscription in self._subscriptions:
            subscription.cancel()


_lock = threading.Lock()
_ours: list[ProcessMetrics] = []


def process_metrics() -> ProcessMetrics:
    """Return the metrics of this process; counting begins when first asked."""
    with _lock:
        if not _ours:
            _ours.append(ProcessMetrics())
        return _ours[0]
