"""kappa_log.testing: users' handlers and folds on the code that runs them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from kappa_log import Handler, KappaLog, Projection, ack, make_event, projection
from kappa_log.errors import ConfigError, ProjectionError, UsageError
from kappa_log.testing import given, process_message, temporary_log
from projections.customer_totals import customer_totals
from projections.customer_totals_sql import customer_totals_sql
from projections.daily_revenue import daily_revenue
from projections.orders import orders
from projections.product_sales import product_sales
from support.logs import rows

NOON = datetime(2026, 2, 1, 12, tzinfo=UTC)


class Orders(Handler):
    """Acknowledges orders; some are skipped, and some raise."""

    started = 0

    @override
    def start(self) -> None:
        Orders.started += 1

    @override
    def consume(self, payload: Any, metadata: Any) -> object:
        """Decide by what the payload says."""
        if payload is None or payload.get("skip"):
            return None
        if payload.get("boom"):
            msg = "no such order"
            raise ValueError(msg)
        return ack(payload["id"], NOON, metadata.topic)


def test_a_message_goes_the_whole_way_into_a_log() -> None:
    """SEED L15: synchronously, through the real path; what became of it is told."""
    done = process_message(Orders, {"id": 5}, key="k", headers={"h": "v"}, timestamp=7)

    assert done.outcome == "acked"
    assert done.failure is None
    event = done.event
    assert event is not None
    assert (event.position, event.entity_id, event.event_time) == (1, "5", NOON)
    assert (event.topic, event.group_id) == ("test-topic", "test-group")
    assert (event.key, event.headers, event.timestamp) == (b"k", [("h", b"v")], 7)
    assert event.payload_text == '{"id":5}'
    assert event.event_type == "test-topic"


def test_skips_failures_and_tombstones_are_told() -> None:
    """SEED H5, F8: as the log has them, with the handler's own error."""
    skipped = process_message(Orders(), '{"skip": true}')
    failed = process_message(Orders, b'{"boom": 1}')
    broken = process_message(Orders, b"{")

    assert (skipped.outcome, skipped.event) == ("skipped", None)
    assert process_message(Orders, None).outcome == "skipped"
    assert failed.outcome == broken.outcome == "failed"
    assert failed.failure is not None
    assert (failed.failure.error_class, failed.failure.error_message) == (
        "ValueError",
        "no such order",
    )
    assert broken.failure is not None
    assert broken.failure.error_class == "DecodeError"


def test_messages_of_one_log_know_of_each_other() -> None:
    """SEED H6: a duplicate calls no handler; who has a failed key's next one waits."""
    with temporary_log() as log:
        first = process_message(Orders, {"id": 1}, log=log)
        again = process_message(Orders, {"id": 1}, log=log)
        process_message(Orders, {"boom": 1}, key="k", log=log)
        behind = process_message(Orders, {"id": 2}, key="k", log=log)

        assert [first.outcome, again.outcome] == ["acked", "duplicate"]
        assert (behind.outcome, behind.event) == ("parked", None)
        assert log.verify().ok


def test_a_function_and_other_decoders_are_taken() -> None:
    """And the ack may leave to CloudEvents what these say of themselves."""
    ce = {"ce_id": "1", "ce_source": "s", "ce_type": "t", "ce_specversion": "1.0"}
    time = {"ce_time": "2026-02-01T12:00:00Z"}

    done = process_message(
        lambda payload, _: ack(payload["data"]["id"], None),
        {"id": 3},
        headers=ce | time,
        decoder="cloudevents",
        dedupe="header:ce_id",
    )

    assert done.event is not None
    assert (done.event.entity_id, done.event.event_type) == ("3", "t")
    assert done.event.event_time == NOON
    assert done.event.raw == b'{"id":3}'


def test_what_around_consume_makes_of_bytes_is_kept() -> None:
    """SEED H21: one payload for consume, the log and the folds; the bytes stay."""

    class Upper(Handler):
        @override
        def around_consume(self, payload: Any, metadata: Any, proceed: Any) -> object:
            return proceed({"text": payload.decode().upper()})

        @override
        def consume(self, payload: Any, metadata: Any) -> object:
            return ack(payload["text"], None)

    made = process_message(Upper, b"ada", decoder="bytes")
    plain = process_message(
        lambda p, _: ack(p.decode("latin-1"), None), b"\xff", decoder="bytes"
    )

    assert made.event is not None
    assert plain.event is not None
    assert (made.event.payload, made.event.raw) == ({"text": "ADA"}, b"ada")
    assert (plain.event.payload, plain.event.raw) == ("/w==", b"\xff")
    assert plain.event.entity_id == "ÿ"

    class Passing(Upper):
        @override
        def around_consume(self, payload: Any, metadata: Any, proceed: Any) -> object:
            return proceed(object())

        @override
        def consume(self, payload: Any, metadata: Any) -> object:
            return None if metadata.key else ack("x", None)

    skipped = process_message(Passing, b"ada", key="k", decoder="bytes")
    assert skipped.outcome == "skipped"
    assert process_message(Passing, b"ada", decoder="bytes").outcome == "failed"


CE = {"ce_id": "1", "ce_source": "s", "ce_type": "t", "ce_specversion": "1.0"}
FORMATS = [
    ("json", b'{"id": 5}', {}, {"id": 5}),
    ("bytes", b'{"id": 5}', {}, b'{"id": 5}'),
    ("cloudevents", b'{"id": 5}', CE, {"id": 5}),
]


@pytest.mark.parametrize(("decoder", "value", "headers", "wanted"), FORMATS)
def test_consume_gets_what_the_format_decoded(
    decoder: str, value: bytes, headers: dict[str, str], wanted: object
) -> None:
    """SEED H19, P15: by way of around_consume, with the same metadata; no text."""
    around: list[Any] = []
    got: list[Any] = []

    class Noting(Handler):
        @override
        def around_consume(self, payload: Any, metadata: Any, proceed: Any) -> object:
            around.extend((payload, metadata))
            return proceed(payload)

        @override
        def consume(self, payload: Any, metadata: Any) -> object:
            got.extend((payload, metadata))
            return ack("a", None)

    done = process_message(
        Noting, value, key="k", headers=headers, decoder=decoder, dedupe="offset"
    )

    assert done.outcome == "acked"
    (payload, metadata) = got
    assert (payload["data"] if decoder == "cloudevents" else payload) == wanted
    assert around == got
    assert around[1] is metadata
    assert (metadata.key, metadata.topic, metadata.offset) == (b"k", "test-topic", 0)
    assert [name for name, _ in metadata.headers] == list(headers)


def test_a_handler_that_cannot_work_is_told_before_anything(tmp_path: Path) -> None:
    """As `consume` and `doctor` would."""
    with pytest.raises(ConfigError, match="has no method consume"):
        process_message(Handler, {})
    with pytest.raises(
        UsageError, match="there is no listener 'nobody'; there are: no"
    ):
        process_message("nobody", {})

    (tmp_path / "kappa_log.toml").write_text(
        '[[listeners]]\ntopic = "a"\ngroup_id = "g"\nhandler = "kit_handlers:f"\n'
        'dedupe = "offset"\n'
    )
    (tmp_path / "kit_handlers.py").write_text(
        "from kappa_log import ack\n\ndef f(payload, metadata):\n"
        "    return ack(metadata.listener_id, None)\n"
    )
    with temporary_log(folder=tmp_path) as log:
        first = process_message("g-a", {}, log=log)
        assert process_message("g-a", {}, log=log).outcome == "acked"
    assert first.event is not None
    assert (first.event.entity_id, first.event.topic) == ("g-a", "a")


# --- folds -------------------------------------------------------------------


def _shop() -> list[Any]:
    """Return events of a shop, as the examples fold them."""
    lines = [{"product": "mug", "quantity": 2, "cents": 1_250}]
    purchase = {"quantity": 1, "amount": 9.5}
    happened = [
        ("order_placed", "o-1", {"customer": "c", "lines": lines}),
        ("order_paid", "o-1", {"cents": 2_500}),
        ("order_placed", "o-2", {"customer": "d", "lines": lines}),
        ("order_expired", "o-2", {}),
        ("purchase", "c", purchase),
        ("purchase", "c", purchase),
        ("purchase", None, purchase),
    ]
    return [
        make_event(n, payload, entity_id=entity, event_type=kind, event_time=NOON)
        for n, (kind, entity, payload) in enumerate(happened, 1)
    ]


@pytest.mark.parametrize(
    "fold",
    [customer_totals, customer_totals_sql, daily_revenue, orders, product_sales],
    ids=lambda fold: fold.name,
)
def test_a_fold_in_memory_makes_the_rows_of_a_log(fold: Projection) -> None:
    """Typed payloads, Enums, dates, several keys: what users see is what they get."""
    only = [
        e
        for e in _shop()
        if (e.event_type == "purchase") == (fold.topics == ("cdnow",))
    ]
    by_id = {str(event.position): event for event in only}

    def decide(_: Any, metadata: Any) -> object:
        event = by_id[metadata.key.decode()]
        return ack(event.entity_id, event.event_time, event.event_type)

    with temporary_log(fold) as log:
        for event in only:
            process_message(
                decide,
                event.payload,
                key=str(event.position),
                topic=fold.topics[0],
                dedupe="offset",
                log=log,
            )
        log.project()
        expected = rows(log, fold.name)
        again = given(log.events(oldest_first=True)).fold(fold)

    assert expected
    assert given(only).fold(fold).rows() == again.rows() == expected


@projection(topics=["sums"], groups=["g"], version=1)
def sums(state: int | None, event: Any) -> int | None:
    """Add numbers up; zero takes the row away."""
    return None if event.payload == 0 else (state or 0) + event.payload


def test_a_fold_s_states_keys_and_counts_can_be_looked_at() -> None:
    """Events of other topics are left out, as in a log; plain payloads will do."""
    folded = given(
        [
            make_event(payload=2, entity_id="a"),
            make_event(payload=3, entity_id="a", topic="sums", group_id="g"),
            make_event(payload=9, entity_id="a", topic="others"),
            make_event(payload=9, entity_id="a", group_id="others"),
            make_event(payload=1, entity_id="b"),
            make_event(payload=0, entity_id="b"),
            7,
        ]
    ).fold(sums)

    assert folded.rows() == [{"entity_id": "a", "value": 5}]
    assert (folded.state("a"), folded.state("b"), folded.keys()) == (5, None, ["a"])
    assert (folded.events, folded.unkeyed) == (5, 1)


def test_a_fold_that_fails_names_its_event() -> None:
    """The error is the one that a replay would stop with."""
    with pytest.raises(
        ProjectionError, match="'sums' failed on the event at position 2"
    ):
        given(
            [
                make_event(payload=1, entity_id="a"),
                make_event(payload="x", entity_id="a"),
            ]
        ).fold(sums)


def test_a_log_with_another_prefix_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration's prefix counts, also in tests."""
    monkeypatch.setenv("KAPPA_LOG__DATABASE__PREFIX", "other_")

    with temporary_log(folder=tmp_path) as log:
        assert isinstance(log, KappaLog)
        assert log.head().position == 0
        assert log.database.prefix == "other_"
