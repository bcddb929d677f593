"""SQL projections: what may be declared, and that SQL folds as Python does."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kappa_log import Event, make_event, projection, sql_projection
from kappa_log.errors import ProjectionError, RegistrationError
from kappa_log.events import EventPage
from kappa_log.sqlfold import SqlProjection
from kappa_log.state import FLOAT_SHARE

START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Facts:
    """What the SQL below comes to."""

    events: int = 0
    known: int = 0
    total: int | None = None
    big: int | None = None
    share: float | None = None
    cash: Decimal | None = None
    least: str | None = None
    latest: datetime | None = None
    label: str | None = None
    flag: bool | None = None
    body: Any = None
    day: date | None = None


@projection(topics=["things"], version=1, key=lambda e: e.payload["who"])
def by_python(state: Facts | None, event: Event) -> Facts:
    """Fold as a person would write it."""
    s, p = state or Facts(), event.payload
    n, texts = p["n"], [text for text in (s.least, p["s"]) if text is not None]
    cash = None if p["c"] is None else Decimal(p["c"])
    assert event.event_time is not None
    return Facts(
        events=s.events + 1,
        known=s.known + (n is not None),
        total=s.total if n is None else (s.total or 0) + n,
        big=s.big if n is None or n < 0 else max(n, n if s.big is None else s.big),
        share=s.share if p["x"] is None else (s.share or 0.0) + p["x"],
        cash=s.cash if cash is None else (s.cash or Decimal("0.00")) + cash,
        least=min(texts, default=None),
        latest=max(event.event_time, s.latest or event.event_time),
        label=p["s"],
        flag=n > 0 if n is not None else s.flag,
        body=p["b"],
        day=min(event.event_time.date(), s.day or event.event_time.date()),
    )


BY_SQL = {
    "events": "count(*)",
    "known": "count(payload->>'n')",
    "total": "sum((payload->>'n')::BIGINT)",
    "big": "max((payload->>'n')::BIGINT) FILTER (WHERE (payload->>'n')::BIGINT >= 0)",
    "share": "sum((payload->>'x')::DOUBLE)",
    "cash": "sum((payload->>'c')::DECIMAL(18, 2))",
    "least": "min(payload->>'s')",
    "latest": "max(event_time)",
    "label": "last(payload->>'s')",
    "flag": "last((payload->>'n')::INT8 > 0) FILTER (WHERE payload->>'n' IS NOT NULL)",
    "body": "last(payload->'b')",
    "day": "min(event_time::DATE)",
}


def declared(key: Any = "payload->>'who'", **columns: str) -> SqlProjection:
    """Return an SQL projection with some columns."""
    return sql_projection(
        name="by_sql", version=1, topics=["things"], key=key, columns=columns
    )


by_sql = declared(**BY_SQL)

_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3)
payloads = st.fixed_dictionaries(
    {
        "who": st.sampled_from(["ada", "bob", "çim", None]),
        "n": st.none() | st.integers(-(2**40), 2**40),
        "x": st.none() | st.floats(-1e6, 1e6, allow_nan=False),
        "c": st.none() | st.decimals(-999, 999, places=2).map(str),
        "s": st.none() | _text,
        "b": st.recursive(st.none() | st.booleans() | _text, st.lists, max_leaves=3),
    }
)


def page_of(payloads: list[Any], first: int = 1) -> EventPage:
    """Return a page of events with these payloads."""
    count = len(payloads)
    times = [START + timedelta(hours=(p["n"] or 0) % 60) for p in payloads]
    return EventPage(
        {
            "position": list(range(first, first + count)),
            "entity_id": [None] * count,
            "payload_text": [json.dumps(p) for p in payloads],
            "event_time": times,
        }
    )


def folded(fold: SqlProjection, page: EventPage) -> dict[Any, Any]:
    """Return key → state after a page."""
    folding = fold.folding()
    folding.apply(page)
    return {key: state for key, (state, _) in folding.drain().items()}


def assert_same(sql: dict[Any, Any], python: dict[Any, Facts]) -> None:
    """Compare all columns exactly, but sums of floats by the rule for them."""
    assert sql.keys() == python.keys()
    for key, wanted in python.items():
        found = sql[key]
        magnitude = getattr(found, by_sql.state_shape.magnitudes["share"]) or 0.0
        for name in BY_SQL:
            a, b = getattr(found, name), getattr(wanted, name)
            if name == "share" and a is not None and b is not None:
                assert abs(a - b) <= FLOAT_SHARE * magnitude
            else:
                assert a == b, (key, name)


@settings(max_examples=30)
@given(events=st.lists(payloads, max_size=30), data=st.data())
def test_sql_folds_as_python_does_in_any_batches(
    events: list[Any], data: st.DataObject
) -> None:
    """One fold of all, and live batches that begin with stored rows: the same rows."""
    cuts = data.draw(st.lists(st.integers(0, len(events)), max_size=3).map(sorted))
    folding = by_python.folding()
    folding.apply(page_of(events))
    python = folding.states

    stored: dict[Any, Any] = {}

    def load(keys: Collection[Any]) -> dict[Any, Any]:
        return {key: stored[key] for key in keys if key in stored}

    whole, pages = by_sql.folding(), by_sql.folding()
    whole.apply(page_of(events))
    unkeyed = 0
    for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        page = page_of(events[start:end], start + 1)
        live = by_sql.folding(load)
        live.apply(page)
        stored.update({key: state for key, (state, _) in live.drain().items()})
        unkeyed += live.unkeyed
        pages.apply(page)

    assert_same({key: s for key, (s, _) in whole.drain().items()}, python)
    assert_same({key: s for key, (s, _) in pages.drain().items()}, python)
    assert_same(stored, python)
    assert (whole.events, whole.unkeyed) == (len(events), folding.unkeyed)
    assert unkeyed == folding.unkeyed


def test_only_some_keys_are_folded() -> None:
    """As a replay with a start wants it; unlike the others, they are counted."""
    events = [{"who": w, "n": 1, "x": 1, "c": "1", "s": w, "b": 0} for w in "aabcb"]
    folding = by_sql.folding(only={"a", "c", "d"})

    folding.apply(page_of(events))

    assert {key: s.events for key, (s, _) in folding.drain().items()} == {
        "a": 2,
        "c": 1,
    }
    assert folding.events == 3
    assert {key for key, _ in by_sql.keyed(page_of(events))[0]} == {"a", "b", "c"}


def test_calling_it_folds_one_event() -> None:
    """A test of a projection needs nothing else, as with Python's."""
    counts = declared(n="count(*)", last="last(payload->>'x')")

    state = counts(counts(None, make_event(1, {"x": 1})), make_event(2, {"x": "b"}))

    assert (state.n, state.last) == (2, "b")


def test_keys_may_be_of_several_parts_and_types() -> None:
    """Each is a column of its own kind."""
    counts = declared(["event_time::DATE", "(payload->>'n')::INT"], n="count(*)")
    folding = counts.folding()

    folding.apply(page_of([{"n": 1}, {"n": 1}, {"n": None}]))

    assert list(folding.drain()) == [(date(2024, 1, 1), 1)]
    assert folding.unkeyed == 1
    assert [c.name for c in counts.key_shape.columns] == ["key_1", "key_2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("avg(position)", "is not one of sum, count, min, max, last"),
        ("sum(position) + 1", "is not one of"),
        ("position", "is not one of"),
        ("sum(DISTINCT position)", "DISTINCT"),
        ("last(topic ORDER BY topic)", "ORDER BY"),
        ("sum(position), 1", "more than one expression"),
        ("sum(position) FROM events", "more than one expression"),
        ("sum(position); SELECT 1", "more than one expression"),
        ("sum(sum(position))", "takes many events"),
        ("sum((SELECT 1))", "a subquery"),
        ("sum(position) OVER ()", "is not one of"),
        ("max(now())", "not the same whenever it is asked"),
        ("max(current_date)", "not the same whenever it is asked"),
        ("sum(random())", "not the same whenever it is asked"),
        ("sum(nope)", '"nope" not found'),
        ("sum(topic)", "No function matches"),
        ("sum(?)", "a parameter"),
        ("max(*)", "takes one expression"),
        ("last([position])", "which no column holds"),
        ("max(event_time::TIMESTAMP)", "say ::TIMESTAMPTZ"),
        ("min(payload->'x')", "JSON has no min"),
        ("count(*) FILTER (WHERE 1)", "takes a condition"),
        ("sum(", "syntax error"),
        ("", "no SQL expression"),
        (None, "no SQL expression"),
    ],
)
def test_what_cannot_be_merged_is_refused_when_it_is_declared(
    text: Any, said: str
) -> None:
    """Not at the first event, and not silently."""
    with pytest.raises(RegistrationError) as caught:
        declared(n=text)

    assert said in str(caught.value)
    assert "projection 'by_sql'" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": {}}, "columns= is empty"),
        ({"columns": {"a b": "count(*)"}}, "no name for a column"),
        ({"columns": {"class": "count(*)"}}, "no name for a column"),
        ({"columns": {"_position": "count(*)"}}, "no name for a column"),
        ({"columns": {"n": "count(*)", "N": "count(*)"}}, "differ in case alone"),
        ({"columns": {"entity_id": "count(*)"}}, "both a key and a field"),
        ({"key": "(payload->>'x')::DOUBLE"}, "cannot be a key"),
        ({"key": "count(*)"}, "takes many events"),
        ({"key": []}, "empty list"),
        ({"name": "No"}, "does not match"),
    ],
)
def test_other_mistakes_are_refused_too(options: dict[str, Any], said: str) -> None:
    """With the same words as for Python's projections where they have them."""
    whole = {"name": "n", "version": 1, "topics": ["t"], "columns": {"n": "count(*)"}}

    with pytest.raises(RegistrationError, match=said):
        sql_projection(**(whole | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "payload", "said"),
    [
        ("sum((payload->>'v')::BIGINT)", "x", "Could not convert string 'x'"),
        ("sum((payload->>'v')::HUGEINT)", 2**62, "field 'n' is outside 64 bits"),
        ("max((payload->>'v')::DOUBLE)", "NaN", "no finite number"),
        ("last(payload->>'v')", "a\0b", "NUL"),
        ("max((payload->>'v')::DATE)", "12000-01-01", "years 1 to 9999"),
    ],
)
def test_the_first_event_that_cannot_be_folded_is_named(
    column: str, payload: Any, said: str
) -> None:
    """Among hundreds of a batch: position and reason, as a Python fold would say."""
    fold = declared("payload->>'k'", n=column)
    fine = {"k": "a", "v": None}
    bad = {"k": "b", "v": payload}
    events = [*[fine] * 70, bad, *[fine] * 50, bad, bad, *[fine] * 9]

    with pytest.raises(ProjectionError, match=said) as caught:
        folded(fold, page_of([p | {"n": None} for p in events]))

    assert caught.value.position == (122 if said.startswith("field") else 71)


@pytest.mark.parametrize("key", ["x" * 1025, "a\0b"])
def test_a_key_that_no_index_holds_is_named(key: str) -> None:
    """By position: no row can be written for it on either database."""
    page = page_of([{"who": "a", "n": None}, {"who": key, "n": None}])
    fold = declared(n="count(*)")

    with pytest.raises(ProjectionError, match="its key") as caught:
        folded(fold, page)
    assert caught.value.position == 2
    with pytest.raises(ProjectionError, match="its key") as caught:
        fold.keyed(page)
    assert caught.value.position == 2


@pytest.mark.parametrize(
    ("column", "needed"),
    [
        ("sum((payload->>'n')::BIGINT)", False),
        ("last(payload->'a'->>'b')", False),
        ("count(*) FILTER (WHERE Payload->>'n' IS NOT NULL)", False),
        ("min(json_extract_string(payload, '$.n'))", False),
        ("count(*)", False),
        ("last(payload)", True),
        ("max(strlen(payload::VARCHAR) + (payload->>'n')::INT)", True),
        ("count(*) FILTER (WHERE payload IS NOT NULL)", True),
        ("last(payload.n)", True),
    ],
)
def test_a_payload_that_is_only_looked_into_stays_text(
    column: str, needed: bool
) -> None:
    """DuckDB would parse it to make JSON of it, and once more to look."""
    assert declared(n=column).needs_json == needed


def test_fingerprints_are_those_of_the_texts() -> None:
    """What changes rows changes one; blanks around a text do not."""
    same = declared(n=" count(*) ").fingerprints
    other = declared(n="count(topic)").fingerprints
    keyed = declared("topic", n="count(*)").fingerprints

    assert declared(n="count(*)").fingerprints == same
    assert same.differing(other) == ["code"]
    assert same.differing(keyed) == ["routing"]
