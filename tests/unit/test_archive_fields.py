"""Typed columns of payload fields: what becomes a value, and what becomes NULL."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any

import pytest

from kappa_log.archive.fields import KINDS, Extractor, parse_column


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        ("int", [1, "1", 1.5, 2**63, True, None], [1, *[None] * 5]),
        ("float", [1.5, 2, "x", None], [1.5, 2.0, None, None]),
        ("decimal", [1, "2.50", [], None], ["1", "2.50", None, None]),
        ("str", ["ü", 1, None], ["ü", None, None]),
        ("bool", [True, 1, None], [True, None, None]),
        ("bytes", ["aGk=", "?", None], [b"hi", None, None]),
        ("date", ["2024-02-03", "later", None], [date(2024, 2, 3), None, None]),
        (
            "datetime",
            ["2024-01-01T01:00:00+01:00", "2024-01-01T00:00:00", 5],
            [datetime(2024, 1, 1, tzinfo=UTC), None, None],
        ),
        ("json", [{"a": [1, None]}, "x", None], ['{"a":[1,null]}', '"x"', None]),
    ],
)
def test_values_of_the_type_are_kept_and_others_counted(
    kind: str, given: list[Any], wanted: list[Any]
) -> None:
    """Nothing is guessed: a text is no number, a time without zone no instant."""
    column = parse_column(f"t.a.b:{kind}", ["t"])
    payloads = [json.dumps({"a": {"b": value}}).encode() for value in given]

    found = Extractor([column])
    (array,) = found.arrays(["t"] * len(given), payloads)

    assert array.type == KINDS[kind][1]
    assert array.to_pylist() == wanted
    nulls = sum(w is None and g is not None for g, w in zip(given, wanted, strict=True))
    assert found.nulls == ({"t.a.b": nulls} if nulls else {})


def test_other_topics_and_payloads_without_the_field_are_null() -> None:
    """And not counted: nothing was there."""
    found = Extractor([parse_column("a.b.c:int", ["a", "a.b", "x"])])

    (array,) = found.arrays(
        ["a.b", "a", "a.b", "a.b", "a.b"],
        [b'{"c":1}', b'{"c":2}', b"[3]", None, b'{"d":4}'],
    )

    assert (array.to_pylist(), found.nulls) == ([1, None, None, None, None], {})


def test_a_decimal_keeps_the_digits_of_its_text() -> None:
    """A float beside it stays a float."""
    columns = [parse_column(f"t.{c}", ["t"]) for c in ("x:decimal", "y:double")]
    payload = b'{"x": 0.1000000000000000000001, "y": 0.5}'

    exact, plain = Extractor(columns).arrays(["t"], [payload])

    assert exact.to_pylist() == ["0.1000000000000000000001"]
    assert plain.to_pylist() == [0.5]
