"""Notices: what is told of records, batches and folds, in old order (SEED §6)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import kappa_log
from kappa_log import Event, KappaLog, Notice, Projection, UsageError, projection
from kappa_log.records import Record
from kappa_log.telemetry import notices, tracing
from kappa_log.telemetry.metrics import ProcessMetrics
from support.kinds import on_both
from support.poison import Poisoned

OF_OLD = {
    "checksum", "listener_id", "group_id", "topic", "handler", "key", "partition",
    "offset", "retry_count", "headers",
}  # fmt: skip
"""Keys that each payload had (SEED I2)."""

CHECK, ACTION = "event_already_exists_check", "event_action"
ACKED, SKIPPED = "event_acknowledged", "event_skipped"
AGAIN, AROUND = "event_already_consumed", "around_consume"
SEED = (CHECK, ACTION, ACKED, SKIPPED, AGAIN, AROUND)


@pytest.fixture
def orders(url: str, tmp_path: Path) -> Iterator[Poisoned]:
    """Give a log whose handler fails on demand."""
    with Poisoned(url, tmp_path, more="max_retries = 1") as found:
        yield found


@pytest.fixture
def told() -> Iterator[list[Notice]]:
    """Give all that is told of records, in order."""
    found: list[Notice] = []
    with kappa_log.subscribe("*", found.append):
        yield found


def names(told: list[Notice], offset: int) -> list[str]:
    """Return what was told of the record at an offset, of the names of old."""
    return [
        n.name for n in told if n.name in SEED and n.payload.get("offset") == offset
    ]


BOOM = {"n": 3, "do": "raise"}


@on_both
def test_each_outcome_is_told_in_the_order_of_old(
    orders: Poisoned, told: list[Notice]
) -> None:
    """SEED I3 (ack), I4 (duplicate), I5 (skip, failure), I6 (to be retried)."""
    good = {"n": 1}
    orders.read(("a", good), ("a", good), ("b", {"n": 2, "do": "skip"}), ("c", b"{"))
    assert names(told, 0) == [CHECK, ACTION, ACKED, AROUND]
    assert names(told, 1) == [CHECK, AGAIN, AROUND]
    assert names(told, 2) == [CHECK, ACTION, SKIPPED, AROUND]
    assert names(told, 3) == [CHECK, ACTION, SKIPPED, AROUND]

    orders.read(("d", BOOM), attempt=0)
    assert names(told, 4) == [CHECK, ACTION, AROUND]

    del told[:]
    orders.read(("d", BOOM), attempt=1)
    assert names(told, 4) == [CHECK, ACTION, SKIPPED, AROUND]


@on_both
def test_an_error_is_told_then_its_next_attempt_then_the_batch(
    orders: Poisoned, told: list[Notice]
) -> None:
    """SEED P14: when it is tried again is told before the wait, not after it."""
    orders.read(("d", BOOM), attempt=0)
    orders.fix()
    orders.read(("d", BOOM), attempt=1)

    assert [n.name for n in told] == [
        *(CHECK, ACTION, "record_retried", AROUND),
        *(CHECK, ACTION, ACKED, AROUND, "batch_committed"),
    ]


def test_a_batch_is_told_with_where_it_was(
    orders: Poisoned, told: list[Notice]
) -> None:
    """SEED P9: listener, partition, and how many records of it became what."""
    orders.read(("a", {"n": 1}), ("b", {"n": 2, "do": "skip"}), partition=3)

    (lane,) = told[-1].payload["lanes"]
    assert told[-1].name == "batch_committed"
    assert (lane["topic"], lane["partition"]) == ("orders", 3)
    assert (lane["listener_id"], lane["group_id"]) == ("billing-orders", "billing")
    assert (lane["counts"]["acked"], lane["counts"]["skipped"]) == (1, 1)


def test_each_payload_has_the_keys_of_old(orders: Poisoned, told: list[Notice]) -> None:
    """SEED I2: checksum and metadata; of what raised, the exception too."""
    orders.read(("a", {"n": 1}))
    orders.read(("d", BOOM), attempt=0)

    for notice in told:
        if notice.name in SEED:
            assert notice.payload.keys() >= OF_OLD
    (around,) = [n for n in told if n.name == AROUND and n.payload["offset"] == 0]
    assert around.payload["handler"] == f"{orders.module}:Orders"
    assert around.payload["key"] == b"a"
    assert around.payload["retry_count"] == 0
    assert around.duration > 0
    (acked,) = [n for n in told if n.name == ACKED]
    assert acked.payload["position"] == 1
    raised = {
        n.name: n.payload.get("exception") for n in told if n.payload.get("offset")
    }
    error = ["ValueError", "no such order"]
    assert raised == {
        CHECK: None,
        ACTION: error,
        "record_retried": error,
        AROUND: error,
    }


def test_an_error_does_not_stay_in_what_is_told_later(
    orders: Poisoned, told: list[Notice]
) -> None:
    """SEED F15: the old system kept the first attempt's exception in the metadata."""
    orders.read(("d", BOOM), attempt=0)
    del told[:]
    orders.fix()
    orders.read(("d", BOOM), attempt=1)

    assert [n.name for n in told if "exception" in n.payload] == []
    assert names(told, 0) == [CHECK, ACTION, ACKED, AROUND]
    assert [n.payload["retry_count"] for n in told if n.name == AROUND] == [1]


@on_both
def test_what_is_kept_or_waits_is_told_in_our_names(
    orders: Poisoned, told: list[Notice]
) -> None:
    """A failure had no name of its own (SEED F18)."""
    orders.read(("a", BOOM), ("a", {"n": 4}))
    orders.fix()
    orders.app.retry_failure(orders.id_of(0))

    ours = [n for n in told if n.name.startswith(("record_", "batch_", "failure_"))]
    assert [n.name for n in ours] == [
        "record_failed",
        "record_parked",
        "batch_committed",
        "batch_committed",
        "failure_settled",
        "batch_committed",
        "failure_settled",
    ]
    assert ours[0].payload["exception"] == ["ValueError", "no such order"]
    assert ours[2].payload["counts"]["failed"] == 1
    (failure,) = ours[2].payload["failures"]
    assert (failure["offset"], failure["error_class"]) == (0, "ValueError")
    assert [ours[i].payload["outcome"] for i in (4, 6)] == ["acked", "acked"]
    assert names(told, 0)[-4:] == [CHECK, ACTION, ACKED, AROUND]


def test_nothing_is_told_of_a_batch_that_rolls_back(
    orders: Poisoned, told: list[Notice]
) -> None:
    """But for the calls that were made: what is acknowledged is in the log."""
    taken = orders.portion([("a", {"n": 1})])
    orders.move_to(0)
    with orders.app.database.write() as connection:
        connection.exec_driver_sql("UPDATE kappa_log_offsets SET epoch = epoch + 1")

    with pytest.raises(kappa_log.StorageError):
        orders.take(taken)

    assert [n.name for n in told] == [CHECK, ACTION]


def test_a_second_pass_is_told_too(orders: Poisoned, told: list[Notice]) -> None:
    """What is kept at the very coordinates is a duplicate, or a failure still."""
    records: list[Any] = [("a", {"n": 1}), ("b", BOOM), ("c", {"n": 4, "do": "skip"})]
    orders.read(*records)
    del told[:]
    orders.move_to(0)
    with orders.app.database.write() as connection:
        connection.execute(
            orders.app.database.tables.offsets.update().values(next_offset=0)
        )

    orders.read(*records)

    assert names(told, 0) == [CHECK, AGAIN, AROUND]
    assert names(told, 1) == [CHECK, SKIPPED, AROUND]
    assert names(told, 2) == [CHECK, ACTION, SKIPPED, AROUND]
    assert "record_failed" not in [n.name for n in told]


def test_a_subscriber_that_raises_breaks_nothing_and_is_told_once(
    orders: Poisoned, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever watches must not stop what is watched."""

    def broken(_: Notice) -> None:
        msg = "out of order"
        raise ValueError(msg)

    with (
        caplog.at_level(logging.ERROR, "kappa_log"),
        kappa_log.subscribe("db_checkpoint.event_*", broken),
    ):
        orders.read(("a", {"n": 1}), ("b", {"n": 2}))

    assert orders.order() == [0, 1]
    assert len(caplog.records) == 1
    assert "ValueError('out of order')" in caplog.text
    orders.check()


def test_a_subscription_is_for_what_its_pattern_says_until_it_ends() -> None:
    """SEED I1, L17: a name that nothing has is a typo, and is told."""
    found: list[str] = []
    subscription = kappa_log.subscribe("record_*", lambda n: found.append(n.name))
    try:
        notices.tell("record_failed", {})
        notices.tell("batch_committed", {})
        assert notices.records_are_heard()
    finally:
        subscription.cancel()
    subscription.cancel()
    notices.tell("record_failed", {})

    assert found == ["record_failed"]
    assert not notices.records_are_heard()
    with pytest.raises(UsageError, match="there are: event_already_exists_check"):
        kappa_log.subscribe("event_acked", print)


def test_a_subscriber_may_change_what_it_is_given() -> None:
    """SEED I7: it is its own, not the next one's."""
    found: list[Any] = []
    with (
        kappa_log.subscribe("record_failed", lambda n: n.payload.clear()),
        kappa_log.subscribe("record_failed", lambda n: found.append(n.payload)),
    ):
        notices.tell("record_failed", {"offset": 1})

    assert found == [{"offset": 1}]


# --- folds, spans, metrics -------------------------------------------------------


@projection(topics=["orders"], version=1)
def counted(state: int | None, _: Event) -> int:
    """Count the events of an entity."""
    return (state or 0) + 1


def folded(orders: Poisoned, *folds: Projection) -> None:
    """Fold the log into views."""
    with KappaLog(config=orders.app.config, projections=folds) as app:
        app.project()


def test_a_fold_is_told_with_what_it_wrote(
    orders: Poisoned, told: list[Notice]
) -> None:
    """From where to where, and how many rows."""
    orders.read(("a", {"n": 1}), ("a", {"n": 2}))

    folded(orders, counted)

    (fold,) = [n.payload for n in told if n.name == "projection_folded"]
    assert fold == {
        "projection": "counted",
        "build": 1,
        "phase": "project",
        "from_position": 0,
        "to_position": 2,
        "events": 2,
        "rows_changed": 2,
    }


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@on_both
def test_spans_link_record_event_and_fold_to_their_producer(
    orders: Poisoned, spans: InMemorySpanExporter
) -> None:
    """Whoever looks at the producer's trace finds all that became of its message."""
    portion = orders.portion(
        [("a", {"n": 1}), ("b", {"n": 2, "do": "raise"})], attempt=None
    )
    headers = (("traceparent", PARENT.encode()), ("other", b"x"))
    first = portion.records[0]
    portion.records[0] = Record(first.offset, first.value, first.key, headers)

    orders.take(portion)
    folded(orders, counted)

    good, bad, commit, fold = spans.get_finished_spans()
    for span in (good, commit, fold):
        (link,) = span.links
        assert f"{link.context.trace_id:032x}" == PARENT[3:35]
        assert f"{link.context.span_id:016x}" == PARENT[36:52]
    assert (good.name, good.kind) == ("process orders", trace.SpanKind.CONSUMER)
    assert dict(good.attributes or {}) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "orders",
        "messaging.destination.partition.id": "0",
        "messaging.consumer.group.name": "billing",
        "messaging.kafka.offset": 0,
        "kappa_log.source": "kafka:test",
    }
    assert good.status.is_unset
    assert bad.links == ()
    assert (bad.attributes or {})["error.type"] == "ValueError"
    assert not bad.status.is_ok
    assert [e.name for e in bad.events] == ["exception"]
    assert (commit.attributes or {})[tracing.LAST] == 1
    assert (fold.name, (fold.attributes or {})[tracing.EVENTS]) == ("fold counted", 1)


def test_without_a_provider_there_is_no_tracer() -> None:
    """Then nothing is read, made or measured."""
    assert tracing.tracer() is None
    assert tracing.links_of([[("traceparent", b"nonsense")], []]) == []


def test_metrics_count_what_this_process_did(orders: Poisoned) -> None:
    """Under the names that the README gives."""
    metrics = ProcessMetrics()
    try:
        orders.read(("a", {"n": 1}), ("b", BOOM), ("c", {"n": 4, "do": "skip"}))
        folded(orders, counted)
        notices.tell(
            "partition_read",
            {"topic": "orders", "partition": 0, "behind": 7, "seconds": 1.5},
        )
    finally:
        metrics.stop()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"kappa_log_{name}", labels)

    assert value("events_appended_total", topic="orders") == 1
    assert value("process_records_total", topic="orders", outcome="skipped") == 1
    assert value("process_failures_total", topic="orders") == 1
    assert value("append_duration_seconds_count") == 1
    assert value("consumer_lag_records", topic="orders", partition="0") == 7
    assert value("consumer_lag_seconds", topic="orders", partition="0") == 1.5
    assert value("projection_events_total", projection="counted") == 1
    beat = value("projection_heartbeat_timestamp_seconds", projection="counted")
    assert beat is not None
    assert beat > 0
    assert (
        json.dumps(
            [sample for m in metrics.registry.collect() for sample in m.samples],
            default=str,
        ).count("no such order")
        == 0
    )
