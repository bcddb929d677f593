"""Codec: what is strict JSON, and what is not."""

from __future__ import annotations

import json
import time
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log.codec import (
    MAX_DEPTH,
    MAX_ID_BYTES,
    Decoded,
    check_id,
    decode,
    decode_json,
)
from kappa_log.errors import DecodeError


def _short(value: object) -> str:
    return repr(value)[:20]


ACCEPTED: list[tuple[bytes, object]] = [
    (b"{}", {}),
    (b"[]", []),
    (b"null", None),
    (b"true", True),
    (b'""', ""),
    (b"0", 0),
    (b"-0", 0),
    (b"1.0", 1.0),
    (b"1E5", 100000.0),
    (b"1e-400", 0.0),
    (b' \t{ "a" : 1 }\r', {"a": 1}),
    (b"18446744073709551616", 2**64),
    (b"-9007199254740993", -(2**53) - 1),
    (b"1" * 4300, int("1" * 4300)),
    (b'"\\u0000"', "\0"),
    (b'"\\ud83d\\ude00"', "\U0001f600"),
    ('"\U0001f600"'.encode(), "\U0001f600"),
    (b'"\\/"', "/"),
    (
        b'{"a":{"a":1},"b":[{"a":1},{"a":2}]}',
        {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]},
    ),
    (b'{"a":"\\":"}', {"a": '":'}),
    (b'{"":1}', {"": 1}),
]


@pytest.mark.parametrize(("value", "payload"), ACCEPTED, ids=_short)
def test_strict_json_is_decoded_and_its_text_kept(
    value: bytes, payload: object
) -> None:
    """The text is the received bytes, the payload what they say, to the last digit.

    SEED H13.
    """
    decoded = decode_json(value)

    assert decoded.text == value.decode()
    assert decoded.payload == payload
    assert type(decoded.payload) is type(payload)
    assert decoded.raw is None


REFUSED = [
    (b"", "empty"),
    (b" ", "empty"),
    (b"nul", "truncated"),
    (b"NaN", "invalid character"),
    (b"Infinity", "invalid character"),
    (b"-Infinity", "invalid"),
    (b"1e400", "out of range"),
    (b'{"a":-1e400}', "out of range"),
    (b"1" * 5000, "out of range"),
    (b"01", "invalid number"),
    (b"1.", "invalid number"),
    (b".5", "invalid character"),
    (b"+1", "invalid character"),
    (b"1 2", "trailing characters"),
    (b'{"a":1}{"a":2}', "trailing characters"),
    (b"[1,]", "trailing comma"),
    (b"{'a':1}", "keys must be strings"),
    (b'"\t"', "invalid character"),
    (b'"\\x"', "invalid escape"),
    (b"\x00", "invalid character"),
    (b"\xff\x00", "not UTF-8: byte 0"),
    (b'"\xc0\x80"', "not UTF-8: byte 1"),
    (b'"\xed\xa0\x80"', "not UTF-8: byte 1"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    ('{"a":1}'.encode("utf-16"), "not UTF-8: byte 0"),
    ('{"a":1}'.encode("utf-16-le"), "malformed"),
    (b'{"a":1,"a":2}', "duplicate key 'a'"),
    (b'{"a" :1,"a":2}', "duplicate key 'a'"),
    (b'{"a"\n:1,"a":2}', "duplicate key 'a'"),
    (b'{"a":1,"\\u0061":2}', "duplicate key 'a'"),
    (b'{"":1,"":1}', "duplicate key ''"),
    (b'[{"b":{"a":1,"a":1}}]', "duplicate key 'a'"),
    (b'"\\ud800"', "lone surrogate"),
    (b'"\\udc00"', "lone surrogate"),
    (b'"\\ud800\\u0041"', "lone surrogate"),
    (b'"\\udc00\\ud800"', "lone surrogate"),
    (b'{"\\ud800":1}', "lone surrogate"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=_short)
def test_all_else_is_refused_and_said(value: bytes, message: str) -> None:
    """What two readers could read differently never becomes a payload."""
    with pytest.raises(DecodeError, match=message):
        decode_json(value)


@pytest.mark.parametrize("shape", ["[]", '{"a":}', '[{"a":}]'])
@pytest.mark.parametrize("levels", [MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1])
def test_nesting_ends_at_512_levels(shape: str, levels: int) -> None:
    """The limit is exact, in lists and objects alike."""
    openers = {"[]": ["["], '{"a":}': ['{"a":'], '[{"a":}]': ["[", '{"a":']}[shape]
    chosen = [openers[n % len(openers)] for n in range(levels)]
    closers = ["]" if opener == "[" else "}" for opener in reversed(chosen)]
    value = ("".join(chosen) + "1" + "".join(closers)).encode()

    if levels <= MAX_DEPTH:
        assert decode_json(value).text == value.decode()
    else:
        with pytest.raises(DecodeError, match="more than 512 levels"):
            decode_json(value)


@pytest.mark.parametrize("levels", [5_000, 100_000])
def test_nesting_beyond_any_stack_is_refused(levels: int) -> None:
    """Nothing recurses so deep that the process would end."""
    with pytest.raises(DecodeError, match="more than 512 levels"):
        decode_json(b"[" * levels + b"]" * levels)


def test_brackets_in_strings_and_side_by_side_are_no_nesting() -> None:
    """Only levels count."""
    value = json.dumps(["[" * 600, [[]] * 600, '\\"[{' * 300]).encode()

    assert decode_json(value).payload[0] == "[" * 600


def test_hostile_text_takes_no_quadratic_time() -> None:
    """A megabyte of an unfinished string is refused as fast as any other."""
    started = time.perf_counter()

    with pytest.raises(DecodeError):
        decode_json(b"[" * 513 + b'"' + b'\\"' * 500_000)

    assert time.perf_counter() - started < 5


@given(st.binary())
def test_no_bytes_raise_anything_but_decode_error(value: bytes) -> None:
    """SEED H14: whatever a producer sends is an event or a Failure, never a crash."""
    try:
        decoded = decode_json(value)
    except DecodeError:
        return
    assert (decoded.text or "").encode() == value


# --- the law: the same as the standard library, made strict -------------------

_spaces = st.sampled_from(["", "", "", " ", "\n", "\t", "\r", "  "])
_strings = st.one_of(
    st.text(max_size=4).map(json.dumps),
    st.text(max_size=4).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.sampled_from(
        ['"\\ud800"', '"\\udfff"', '"\\ud83d\\ude00"', '"\\u0061"', '"a"', '"\\":"']
    ),
)
_scalars = st.one_of(
    st.sampled_from(["null", "true", "false", "-0", "1e5", "1e400", "NaN", "Infinity"]),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    _strings,
)


@st.composite
def _containers(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    items = draw(st.lists(inner, max_size=4))
    if draw(st.booleans()):
        return "[" + ",".join(draw(_spaces) + i + draw(_spaces) for i in items) + "]"
    keys = st.one_of(st.sampled_from(['"a"', '"b"', '"\\u0061"']), _strings)
    pairs = [
        draw(_spaces) + draw(keys) + draw(_spaces) + ":" + draw(_spaces) + item
        for item in items
    ]
    return "{" + ",".join(pairs) + "}"


json_texts = st.recursive(_scalars, _containers, max_leaves=12)


class _NotStrict(ValueError):
    pass


def _oracle(text: str) -> Any:
    """Return what the standard library reads, strictly, or raise ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise _NotStrict
        return dict(pairs)

    def refuse(_: str) -> NoReturn:
        raise _NotStrict

    def finite(digits: str) -> float:
        if abs(found := float(digits)) == float("inf"):
            raise _NotStrict
        return found

    value = json.loads(
        text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite
    )
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


@given(json_texts)
def test_it_agrees_with_a_strict_standard_library(text: str) -> None:
    """The fast way accepts the same texts as the slow one, and reads the same."""
    try:
        expected = _oracle(text)
    except ValueError:
        with pytest.raises(DecodeError):
            decode_json(text.encode())
        return

    assert repr(decode_json(text.encode()).payload) == repr(expected)


# --- decoders and identifiers -------------------------------------------------


def test_a_tombstone_needs_no_decoder() -> None:
    """No value means no payload, which is no error."""
    assert decode(decode_json, None) == Decoded(None, None, None)


@pytest.mark.parametrize(
    "value",
    [None, "", "a", "a" * MAX_ID_BYTES, "ä" * (MAX_ID_BYTES // 2), "\U0001f600" * 256],
)
def test_an_identifier_of_1024_bytes_is_taken(value: str | None) -> None:
    """Bytes count, not characters."""
    check_id("entity_id", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a" * (MAX_ID_BYTES + 1), "has 1025 bytes; at most 1024"),
        ("\U0001f600" * 257, "has 1028 bytes; at most 1024"),
        ("a\0", "NUL"),
        ("\0" + "a" * 2000, "NUL"),
        ("\ud800", "lone surrogate"),
        ("ok\udfff", "lone surrogate"),
    ],
)
def test_an_identifier_that_no_index_takes_is_refused(value: str, message: str) -> None:
    """Both databases refuse the same, before one of them does at the insert."""
    with pytest.raises(DecodeError, match=f"entity_id.*{message}"):
        check_id("entity_id", value)
