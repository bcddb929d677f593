"""Typed columns of payload fields: what becomes a value, and what becomes NULL."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime
from typing import Any

import pytest

from kappa_log.archive.fields import KINDS, Extractor, parse_column
from kappa_log.archive.presence import Presence, told
from kappa_log.errors import UsageError


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


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("orders.n:doubl", "timestamp, timestamptz, numeric; did you mean double?"),
        ("orders.n:enum", "type 'enum' is none of int, "),
        ("order.n:int", "no topic 'order'; did you mean orders?"),
        ("shop.ride.n:int", "no topic 'shop.ride'; did you mean shop.rides?"),
        ("x.n:int", "no topic 'x'; there are: orders, shop.rides"),
        ("orders.n", "is not TOPIC.FIELD:TYPE"),
        ("orders.n:", "is not TOPIC.FIELD:TYPE"),
        ("orders.:int", "is not TOPIC.FIELD:TYPE"),
        ("orders:int", "is not TOPIC.FIELD:TYPE"),
    ],
)
def test_what_is_wrong_in_a_declaration_is_named(declared: str, said: str) -> None:
    """The topic, the type or the form: each with what was meant."""
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_column(declared, ["orders", "shop.rides"])


def test_a_field_that_no_payload_has_is_told_with_what_was_meant() -> None:
    """One that is null is there; events of other topics and erased ones say nothing."""
    declared = ("t.amont:int", "t.a.z:int", "t.here:int", "t.late:int", "other.x:int")
    presence = Presence([parse_column(text, ["t", "other"]) for text in declared])

    first = '{"amount":1,"here":null,"a":{"b":2}}'
    presence.look(
        ["t", "t", "x", "t", "other"],
        [first, '{"late":3}', '{"amont":1}', "[4]", None],
    )

    nested, typo = presence.absent()
    assert (typo.column, typo.events, typo.near) == ("t.amont", 3, "amount")
    assert (nested.column, nested.near) == ("t.a.z", "a.b")
    assert nested.there == ["a", "a.b", "amount", "here", "late"]
    (_, said) = told([nested, typo])
    assert said.startswith("column t.amont: none of the 3 events of 't'")
    assert said.endswith("; did you mean amount?")
