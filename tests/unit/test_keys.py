"""Keys: their types, their columns, their shards."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log.columns import Unsettled
from kappa_log.errors import RegistrationError
from kappa_log.events import Event
from kappa_log.keys import SHARDS, key_shape, shard_of


def _undeclared(event: Event):  # type: ignore[no-untyped-def]
    return event.position


def _number(event: Event) -> int:
    return event.position


def _maybe(event: Event) -> date | None:
    del event
    return None


def _pair(event: Event) -> tuple[str, int]:
    return str(event.entity_id), event.position


def _several(event: Event) -> list[tuple[date, bytes]] | None:
    del event
    return None


@pytest.mark.parametrize(
    ("function", "key_type", "names", "types", "many"),
    [
        (None, None, ["entity_id"], (str,), False),
        (None, int, ["entity_id"], (str,), False),
        (_undeclared, None, ["key"], (str,), False),
        (_undeclared, int, ["key"], (int,), False),
        (_number, None, ["key"], (int,), False),
        (_number, bool, ["key"], (bool,), False),
        (_maybe, None, ["key"], (date,), False),
        (_pair, None, ["key_1", "key_2"], (str, int), False),
        (_several, None, ["key_1", "key_2"], (date, bytes), True),
        (_undeclared, list[str], ["key"], (str,), True),
        (_undeclared, tuple[int], ["key_1"], (int,), False),
    ],
)
def test_a_key_is_declared_by_annotation_or_key_type(
    function: Any, key_type: Any, names: list[str], types: tuple[type, ...], many: bool
) -> None:
    """key_type= wins; without either it is str."""
    shape = key_shape(function, key_type)

    assert [c.name for c in shape.columns] == names
    assert shape.types == types
    assert shape.many is many


@pytest.mark.parametrize(
    "declared",
    [
        *(float, dict, list, tuple, Any, datetime, list[float], list[list[str]]),
        *(tuple[int, ...], tuple[str, None], tuple[()], tuple[tuple[int, int], str]),
        int | str,
    ],
)
def test_a_type_that_is_no_key_is_refused_when_declared(declared: Any) -> None:
    """Floats have no equality to lean on; the rest have no column."""
    with pytest.raises(RegistrationError, match="none of str, int, bool, bytes, date"):
        key_shape(_undeclared, declared)


@pytest.mark.parametrize(
    ("declared", "key", "message"),
    [
        (str, 5, "is int, not str"),
        (str, "a\0", "NUL"),
        (str, "\ud800", "lone surrogate"),
        (str, "ä" * 513, "has 1026 bytes; at most 1024"),
        (bytes, b"x" * 1025, "has 1025 bytes"),
        (int, True, "is bool, not int"),
        (int, 1.0, "is float, not int"),
        (int, 2**63, "outside 64 bits"),
        (bool, 1, "is int, not bool"),
        (date, datetime(2024, 1, 1, tzinfo=UTC), "is datetime, not date"),
        (date, "2024-01-01", "is str, not date"),
        (tuple[str, int], ("a", "b"), "is str, not int"),
        (tuple[str, int], ("a",), "not a tuple of"),
        (tuple[str, int], ["a", 1], "not a tuple of"),
        (tuple[str, int], "a", "not a tuple of"),
        (tuple[str, int], ("a", None), "is NoneType, not int"),
        (tuple[str, str], ("a" * 600, "b" * 600), "has 1200 bytes"),
    ],
)
def test_a_key_of_another_type_or_size_is_refused(
    declared: Any, key: Any, message: str
) -> None:
    """Rows of one table have keys of one type, which both databases can index."""
    with pytest.raises(Unsettled, match=message):
        key_shape(_undeclared, declared).check(key)


texts = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=20
)
KEYS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, texts),
    (int, st.integers(-(2**63), 2**63 - 1)),
    (bool, st.booleans()),
    (bytes, st.binary(max_size=20)),
    (date, st.dates()),
    (tuple[str, int], st.tuples(texts, st.integers(-9, 9))),
    (tuple[int], st.tuples(st.integers(-9, 9))),
    (tuple[bytes, date, bool], st.tuples(st.binary(), st.dates(), st.booleans())),
]


def _typed(key: Any) -> str:
    parts = key if isinstance(key, tuple) else (key,)
    return "/".join(p.hex() if isinstance(p, bytes) else str(p) for p in parts)


@pytest.mark.parametrize(("declared", "keys"), KEYS)
@given(data=st.data())
def test_a_key_comes_back_from_its_row_and_from_what_a_person_typed(
    declared: Any, keys: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    """Equal and of the same type, so memory and table agree on rows."""
    shape = key_shape(_undeclared, declared)
    key = data.draw(keys)

    assert shape.check(key) == key
    again = shape.build(shape.values(key))
    assert repr(again) == repr(key)
    assert repr(shape.parse(_typed(key))) == repr(key)
    assert len(shape.values(key)) == len(shape.columns)


@pytest.mark.parametrize(
    ("declared", "text", "message"),
    [
        (int, "x", "'x' is no int"),
        (bool, "yes", "'yes' is no bool"),
        (bytes, "zz", "'zz' is no bytes"),
        (date, "2024-02-30", "is no date"),
        (tuple[str, int], "a", "has not the 2 parts"),
        (tuple[str, int], "a/b/c", "has not the 2 parts"),
        (str, "a" * 2000, "has 2000 bytes"),
    ],
)
def test_a_typed_key_of_another_form_is_refused(
    declared: Any, text: str, message: str
) -> None:
    """The message says which form was wanted."""
    with pytest.raises(Unsettled, match=message):
        key_shape(_undeclared, declared).parse(text)


@pytest.mark.parametrize(
    ("key", "shard"),
    [("07592", 19), (7592, 42), (True, 7), (b"07592", 12), (("a", 1), 26)],
)
def test_a_shard_is_the_same_in_each_process(key: Any, shard: int) -> None:
    """It depends on type and value alone, never on Python's hash seed."""
    assert shard_of(key) == shard


def test_keys_spread_over_all_shards() -> None:
    """No shard gets a lot more work than others."""
    found = Counter(shard_of(f"customer-{n}") for n in range(6400))

    assert set(found) == set(range(SHARDS))
    assert max(found.values()) < 200
