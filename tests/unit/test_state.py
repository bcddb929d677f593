"""State: types laid out as columns, and how states settle into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log.columns import Unsettled
from kappa_log.errors import RegistrationError
from kappa_log.state import StateShape


class Color(Enum):
    """A kind without a fast test."""

    RED = "r"


@dataclass(frozen=True, slots=True)
class Data:
    """Kinds with a fast test only."""

    count: int = 0
    total: float = 0.0
    name: str | None = None
    seen: datetime | None = None


@dataclass
class Mutable:
    """A fold may change it in place and return it."""

    count: int = 0


class Struct(msgspec.Struct):
    """Kinds with and without a fast test."""

    day: date
    price: Decimal
    color: Color
    tags: list[str]


class Tuple(NamedTuple):
    """A tuple with names."""

    flag: bool
    body: bytes


SHAPES: list[tuple[Any, list[str], list[str]]] = [
    (Data, ["count", "total", "name", "seen"], ["int", "float", "str", "datetime"]),
    (Mutable, ["count"], ["int"]),
    (Struct, ["day", "price", "color", "tags"], ["date", "decimal", "enum", "json"]),
    (Tuple, ["flag", "body"], ["bool", "bytes"]),
    (int, ["value"], ["int"]),
    (str, ["value"], ["str"]),
    (dict[str, int], ["value"], ["json"]),
    (Any, ["value"], ["json"]),
]


@pytest.mark.parametrize(("state_type", "names", "kinds"), SHAPES)
def test_each_field_is_a_column(
    state_type: Any, names: list[str], kinds: list[str]
) -> None:
    """In the order of the fields; any other type is one column."""
    shape = StateShape(state_type)

    assert [c.name for c in shape.columns] == names
    assert [c.kind for c in shape.columns] == kinds
    assert shape.is_single is (names == ["value"])


texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5
)
zones = st.sampled_from([UTC, timezone.utc, timezone(timedelta(hours=5.5))])  # noqa: UP017
STATES: dict[Any, st.SearchStrategy[Any]] = {
    Data: st.builds(
        Data,
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9),
        st.none() | texts,
        st.none()
        | st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=zones),  # noqa: DTZ001
    ),
    Mutable: st.builds(Mutable, st.integers(-9, 9)),
    Struct: st.builds(
        Struct,
        st.dates(),
        st.decimals(allow_nan=False, allow_infinity=False),
        st.just(Color.RED),
        st.lists(texts, max_size=3),
    ),
    Tuple: st.builds(Tuple, st.booleans(), st.binary(max_size=5)),
    int: st.integers(-9, 9),
    dict[str, int]: st.dictionaries(texts, st.integers(), max_size=3),
}


@pytest.mark.parametrize("state_type", STATES)
@given(data=st.data())
def test_a_settled_state_is_what_its_row_gives_back(
    state_type: Any, data: st.DataObject
) -> None:
    """So rows cannot depend on when a batch happened to be written."""
    shape = StateShape(state_type)
    state = data.draw(STATES[state_type])

    settled = shape.settle(state)
    again = shape.build(shape.values(settled))

    assert repr(again) == repr(settled)
    assert type(again) is type(settled)
    assert repr(shape.settle(settled)) == repr(settled)
    assert (shape.fields(settled) or {}).keys() == {c.name for c in shape.columns}


def test_a_settled_state_comes_back_as_the_same_object() -> None:
    """The common case costs a few comparisons and no copy."""
    shape = StateShape(Data)
    state = Data(1, 2.5, "a", datetime(2024, 1, 1, tzinfo=UTC))

    assert shape.settle(state) is state
    assert shape.settle(Data(1, 2, "a")) == Data(1, 2.0, "a")


def test_no_state_has_no_fields() -> None:
    """A deleted row is shown as none."""
    assert StateShape(Data).fields(None) is None


class Sub(Mutable):
    """A subclass has what the row has not."""


@pytest.mark.parametrize(
    ("state_type", "state", "message"),
    [
        (Data, 5, "is int, not Data"),
        (Data, {"count": 1}, "is dict, not Data"),
        (Mutable, Sub(1), "is Sub, not Mutable"),
        (Data, Data(count=2**63), "field 'count' .* outside 64 bits"),
        (Data, Data(total=float("nan")), "field 'total' is nan"),
        (Data, Data(name="a\0"), "field 'name' contains a NUL"),
        (Data, Data(count=None), "field 'count' is None but its type int is not"),  # type: ignore[arg-type]
        (Tuple, (True, b"x"), "is tuple, not Tuple"),
        (int, "5", "field 'value' is str, not int"),
        (dict[str, int], {"a": "b"}, "field 'value' does not fit its type"),
    ],
)
def test_a_state_that_no_row_holds_is_refused(
    state_type: Any, state: Any, message: str
) -> None:
    """By the field that does not fit."""
    with pytest.raises(Unsettled, match=message):
        StateShape(state_type).settle(state)


@dataclass
class NoInit:
    """A field that no row could set."""

    a: int
    b: int = field(init=False, default=0)


@dataclass
class Unresolved:
    """A type that is not there when the program runs."""

    a: "NotImported"  # type: ignore[name-defined]  # noqa: F821, UP037


class Nothing(msgspec.Struct):
    """Without fields there is no row."""


def _with(*names: str) -> Callable[[], Any]:
    return lambda: make_dataclass("Made", [(name, int) for name in names])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoInit, "NoInit.b has init=False"),
        (lambda: Unresolved, "field types of Unresolved cannot be resolved"),
        (lambda: Nothing, "Nothing has no fields"),
        (_with("total", "Total"), "'total' and 'Total' differ in case alone"),
        (_with("_position"), "'_position'"),
        (_with("xmin"), "column 'xmin'"),
        (_with("Ctid"), "column 'Ctid'"),
        (_with("a" * 64), "longer than 63 bytes"),
        (lambda: set[dict[str, int]] | list[str], "no type that JSON can hold"),
    ],
)
def test_a_type_that_cannot_be_a_table_is_refused_when_declared(
    make: Callable[[], Any], message: str
) -> None:
    """On both databases alike: PostgreSQL's own columns are taken on SQLite too."""
    with pytest.raises(RegistrationError, match=message):
        StateShape(make())


def test_quoted_words_of_sql_are_good_names() -> None:
    """Names are quoted wherever they are used."""
    shape = StateShape(_with("order", "select", "table", "rowid")())

    assert len(shape.columns) == 4
