"""Columns: settling, storing and loading values of each kind."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log.columns import (
    FAST_NAMES,
    FAST_TESTS,
    Column,
    Unsettled,
    check_text,
    column,
)
from kappa_log.errors import RegistrationError


class Color(Enum):
    """Values are text: they are what is stored."""

    RED = "r"
    BLUE = "b"


class Level(IntEnum):
    """Values are no text: names are stored."""

    LOW = 1
    HIGH = 2


class Line(msgspec.Struct):
    """Something for a JSON column."""

    product: str
    tags: set[str] = set()


class Access(Flag):
    """Combinations have no one name."""

    READ = 1
    WRITE = 2


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
decimals = st.decimals(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [Decimal(text) for text in ("-0", "-0.00", "0E+3", "1E+3", "1E-7", "1.10", "12E2")]
)
offsets = st.integers(-86_399, 86_399).map(lambda s: timezone(timedelta(seconds=s)))
moments = st.datetimes(
    datetime(2, 1, 1),  # noqa: DTZ001 - hypothesis wants the bounds without a zone
    datetime(9998, 1, 1),  # noqa: DTZ001
    timezones=offsets | st.just(UTC),
)
VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers(-(2**63), 2**63 - 1)),
    (float, st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 2**70)),
    (Decimal, decimals | st.integers()),
    (str, texts),
    (bool, st.booleans()),
    (bytes, st.binary() | st.binary().map(bytearray)),
    (date, st.dates()),
    (datetime, moments),
    (Color, st.sampled_from(Color)),
    (Level, st.sampled_from(Level)),
    (list[int], st.lists(st.integers())),
    (dict[str, float], st.dictionaries(texts, st.floats(-1e9, 1e9))),
    (dict[int, str], st.dictionaries(st.integers(), texts)),
    (tuple[str, ...], st.lists(texts).map(tuple)),
    (set[str], st.sets(texts)),
    (Line, st.builds(Line, texts, st.sets(texts, max_size=3))),
    (list[Line], st.lists(st.builds(Line, texts), max_size=3)),
    (list[Decimal], st.lists(decimals, max_size=3)),
    (
        Any,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text("aä\0", max_size=3),
            lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
            max_leaves=5,
        ),
    ),
]


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right and repr(left) == repr(right)


@pytest.mark.parametrize(("annotation", "values"), VALUES)
@given(data=st.data())
def test_a_settled_value_is_what_the_table_gives_back(
    annotation: Any, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    """Settling is idempotent, and storing then loading a settled value keeps it."""
    value = data.draw(values)
    found = column("c", annotation)

    settled = found.settled(value)

    assert _same(found.settled(settled), settled)
    assert _same(found.loaded(found.stored(settled)), settled)
    assert settled == value or annotation in (Any, float)


def test_negative_zero_is_zero() -> None:
    """SQLite keeps it as 0, so rows would differ before and after they are read."""
    assert repr(column("c", float).settled(-0.0)) == "0.0"
    assert repr(column("c", Decimal).settled(Decimal("-0.0"))) == "Decimal('0.0')"


@pytest.mark.parametrize(
    ("annotation", "values"), [(a, v) for a, v in VALUES if a is not Any]
)
@given(data=st.data())
def test_the_fast_test_passes_settled_values_alone(
    annotation: Any, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    """What it lets through unchecked is what checking would give back."""
    found = column("c", annotation)
    test = FAST_TESTS.get(found.kind)
    if test is None:
        return
    passes = eval(f"lambda v: {test}", dict(FAST_NAMES))  # noqa: S307 - our own source
    value = data.draw(values)

    if passes(value):
        assert _same(found.settled(value), value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [(float, -0.0), (float, 1), (int, True), (datetime, datetime(2024, 1, 1)),  # noqa: DTZ001
     (date, datetime(2024, 1, 1, tzinfo=UTC)), (str, "\0"), (int, 2**63),
     (float, math.nan), (float, -math.inf), (bytes, bytearray(b"x")), (bool, 1)],
)  # fmt: skip
def test_the_fast_test_never_passes_what_must_be_looked_at(
    annotation: Any, value: Any
) -> None:
    """Else a state in memory would differ from the state that was read back."""
    test = FAST_TESTS[column("c", annotation).kind]

    assert not eval(f"lambda v: {test}", dict(FAST_NAMES))(value)  # noqa: S307


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (int, 2**63, "is outside 64 bits"),
        (int, -(2**63) - 1, "is outside 64 bits"),
        (int, True, "is bool, not int"),
        (int, 1.0, "is float, not int"),
        (int, None, "is None but its type int is not"),
        (float, math.nan, "is nan, which SQL and JSON cannot hold"),
        (float, math.inf, "is inf"),
        (float, 10**400, "too large for a double"),
        (float, "1", "is str, not float"),
        (Decimal, Decimal("NaN"), "is NaN"),
        (Decimal, Decimal("Infinity"), "is Infinity"),
        (Decimal, Decimal("1E+2000"), "more than 1000 digits"),
        (Decimal, 1.5, "is float, not Decimal"),
        (str, "a\0b", "NUL"),
        (str, "\ud800", "lone surrogate"),
        (str, 5, "is int, not str"),
        (bool, 1, "is int, not bool"),
        (bytes, "x", "is str, not bytes"),
        (date, datetime(2024, 1, 1, tzinfo=UTC), "is datetime, not date"),
        (datetime, date(2024, 1, 1), "is date, not datetime"),
        (datetime, datetime(2024, 1, 1), "has no zone"),  # noqa: DTZ001
        (
            datetime,
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
            "outside",
        ),
        (Color, "r", "is str, not Color"),
        (Color, Level.LOW, "is Level, not Color"),
        (Access, Access.READ | Access.WRITE, "no member of Access"),
        (list[int], ["x"], "does not fit its type"),
        (list[float], [math.nan], "cannot be written as JSON"),
        (Any, object(), "cannot be written as JSON"),
        (Any, {"a": math.inf}, "cannot be written as JSON"),
        (Any, ["\ud800"], "cannot be written as JSON"),
        pytest.param(Any, 10**5000, "cannot be written as JSON", id="5000-digits"),
    ],
)
def test_what_a_column_cannot_hold_is_refused_by_name(
    annotation: Any, value: Any, message: str
) -> None:
    """Never rounded, cut or turned into something near."""
    with pytest.raises(Unsettled, match=f"field 'total' .*{message}"):
        column("total", annotation).settled(value)


def test_a_json_value_that_contains_itself_is_refused() -> None:
    """It has no end to be written."""
    loop: list[Any] = []
    loop.append(loop)

    with pytest.raises(Unsettled, match="cannot be written as JSON"):
        column("c", Any).settled(loop)


@pytest.mark.parametrize(
    "annotation",
    [int | None, str | None, list[str] | None, Color | None, Line | None, None | date],
)
def test_none_of_a_nullable_column_is_null(annotation: Any) -> None:
    """In JSON columns too: NULL, so that SQL's IS NULL finds it."""
    found = column("c", annotation)

    assert found.nullable
    assert found.settled(None) is None
    assert found.stored(None) is None
    assert found.loaded(None) is None


def test_none_in_a_column_of_any_json_is_json_null() -> None:
    """Its type does not tell NULL from null, so the column is never NULL."""
    found = column("c", Any)

    assert not found.nullable
    assert found.stored(found.settled(None)) == "null"
    assert found.loaded("null") is None


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (int, "int"),
        (int | None, "int"),
        (float, "float"),
        (Decimal, "decimal"),
        (str, "str"),
        (bool, "bool"),
        (bytes, "bytes"),
        (date, "date"),
        (datetime, "datetime"),
        (Color, "enum"),
        (StrEnum("S", ["A"]), "enum"),
        (int | str, "json"),
        (int | str | None, "json"),
        (list[int], "json"),
        (Any, "json"),
    ],
)
def test_the_annotation_chooses_the_kind(annotation: Any, kind: str) -> None:
    """One kind a type; anything else is JSON."""
    assert column("c", annotation).kind == kind


@pytest.mark.parametrize(
    ("member", "stored"),
    [(Color.RED, "r"), (Level.HIGH, "HIGH"), (Access.READ, "READ")],
)
def test_an_enum_is_stored_as_text(member: Enum, stored: str) -> None:
    """By its value where all values are text, else by its name."""
    found = column("c", type(member))

    assert found.stored(member) == stored
    assert found.loaded(stored) is member


def test_an_enum_whose_value_no_column_holds_is_refused() -> None:
    """Before it is written."""
    odd = Enum("odd", {"NUL": "\0"})

    with pytest.raises(Unsettled, match="NUL"):
        column("c", odd).settled(odd["NUL"])


def test_json_is_written_in_one_order() -> None:
    """Equal values are equal text, whatever order they were made in."""
    found = column("c", Any)

    assert found.stored({"b": 1, "a": {"d", "c"}}) == '{"a":["c","d"],"b":1}'


@pytest.mark.parametrize(
    ("name", "annotation", "message"),
    [
        ("a" * 64, int, "longer than 63 bytes"),
        ("ä" * 32, int, "longer than 63 bytes"),
        ("c", set[dict[str, int]] | list[str], "no type that JSON can hold"),
    ],
)
def test_a_column_that_cannot_be_is_refused_when_declared(
    name: str, annotation: Any, message: str
) -> None:
    """At registration, not at the first event."""
    with pytest.raises(RegistrationError, match=message):
        column(name, annotation)


class Pair(NamedTuple):
    """A tuple in JSON."""

    left: int
    right: int


def test_a_named_tuple_inside_json_comes_back_as_one() -> None:
    """The declared type decides what is read."""
    found: Column = column("c", list[Pair])

    assert found.loaded(found.stored([Pair(1, 2)])) == [Pair(1, 2)]


@given(texts)
def test_text_that_both_databases_hold_passes(text: str) -> None:
    """It is given back as it is."""
    assert check_text(text) is text
