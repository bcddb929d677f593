"""Records: what identifies a message, and how fields are framed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log.errors import ConfigError, DecodeError
from kappa_log.records import (
    Identity,
    Lane,
    Record,
    check_dedupe,
    checksum,
    decode_headers,
    encode_headers,
    field,
    text_field,
)

LANE = Lane("file:a", "orders", "billing", 0)

OTHERS = {
    "source": Lane("file:b", "orders", "billing", 0),
    "topic": Lane("file:a", "refunds", "billing", 0),
    "group": Lane("file:a", "orders", "shipping", 0),
    "partition": Lane("file:a", "orders", "billing", 1),
}

RECORD = Record(5, b"v", b"k", (("id", b"1"),))
CHANGED = {
    "offset": Record(6, b"v", b"k", (("id", b"1"),)),
    "value": Record(5, b"w", b"k", (("id", b"1"),)),
    "key": Record(5, b"v", b"l", (("id", b"1"),)),
    "header": Record(5, b"v", b"k", (("id", b"2"),)),
}

# Mode → what tells two messages apart.
MATTERS = {
    "payload": {"topic", "group", "value"},
    "key+payload": {"topic", "group", "value", "key"},
    "header:id": {"topic", "group", "header"},
    "offset": {"topic", "group", "source", "partition", "offset"},
}


@pytest.mark.parametrize("mode", MATTERS)
def test_a_mode_looks_at_what_it_names_and_nothing_else(mode: str) -> None:
    """SEED H7: each mode drops what its name promises, of one topic and group alone."""
    here = Identity(mode, LANE).of(RECORD)

    differ = {
        name for name, lane in OTHERS.items() if Identity(mode, lane).of(RECORD) != here
    } | {
        name
        for name, other in CHANGED.items()
        if Identity(mode, LANE).of(other) != here
    }

    assert differ == MATTERS[mode]
    assert len(here) == 16


def test_modes_never_share_an_identity() -> None:
    """What one mode let in cannot hide what another would."""
    ids = [Identity(mode, LANE).of(RECORD) for mode in MATTERS]

    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("mode", MATTERS)
def test_a_tombstone_is_known_by_its_coordinates(mode: str) -> None:
    """All tombstones have one payload, so the payload cannot tell them apart.

    SEED H12.
    """
    identity = Identity(mode, LANE)
    gone = Record(5, None)

    assert identity.of(gone) == identity.of_coordinates(5)
    assert identity.of(gone) != identity.of(Record(6, None))
    assert identity.of(gone) != Identity("payload", LANE).of(Record(5, b""))


def test_a_null_key_is_not_an_empty_key() -> None:
    """Kafka tells them apart, so do we."""
    identity = Identity("key+payload", LANE)

    assert identity.of(Record(1, b"v", None)) != identity.of(Record(1, b"v", b""))


@pytest.mark.parametrize("headers", [(), (("other", b"1"),), (("id", None),)])
def test_a_record_without_its_header_has_no_identity(
    headers: tuple[tuple[str, bytes | None], ...],
) -> None:
    """It becomes a Failure: guessing would lose messages."""
    with pytest.raises(DecodeError, match="no header 'id'"):
        Identity("header:id", LANE).of(Record(1, b"v", headers=headers))


def test_of_several_headers_of_one_name_the_last_counts() -> None:
    """As with most readers of headers."""
    identity = Identity("header:id", LANE)
    twice = Record(1, b"v", headers=(("id", b"1"), ("id", b"2")))

    assert identity.of(twice) == identity.of(Record(1, b"v", headers=(("id", b"2"),)))


@pytest.mark.parametrize("mode", ["", "header", "header:", "Payload", "none"])
def test_an_unknown_mode_is_refused_with_those_there_are(mode: str) -> None:
    """The message lists what can be written."""
    with pytest.raises(
        ConfigError, match=r"payload, offset, key\+payload or header:NAME"
    ):
        check_dedupe(mode)


@given(
    st.lists(st.none() | st.binary(max_size=6), max_size=4),
    st.lists(st.none() | st.binary(max_size=6), max_size=4),
)
def test_differently_split_fields_never_collide(
    left: list[bytes | None], right: list[bytes | None]
) -> None:
    """("ab", "c"), ("a", "bc"), ("abc",) and NULLs are all told apart."""
    joined = [b"".join(map(field, parts)) for parts in (left, right)]

    assert (joined[0] == joined[1]) == (left == right)


@given(
    st.text(max_size=3), st.text(max_size=3), st.text(max_size=3), st.text(max_size=3)
)
def test_topic_and_group_are_not_run_together(a: str, b: str, c: str, d: str) -> None:
    """Topic "ab" of group "c" is not topic "a" of group "bc"."""
    ids = [Identity("payload", Lane("s", t, g)).of(RECORD) for t, g in ((a, b), (c, d))]

    assert (ids[0] == ids[1]) == ((a, b) == (c, d))


def test_a_text_is_framed_as_utf8_and_none_differs_from_empty() -> None:
    """Length is that of the bytes."""
    assert text_field("ä") == b"\2\0\0\0\xc3\xa4"
    assert text_field(None) != text_field("")


def test_a_checksum_is_of_the_received_bytes() -> None:
    """SEED H8 to H11: 128 bits in hex; a tombstone has none; 1.0 and 1 differ."""
    assert checksum(None) is None
    assert len(checksum(b"") or "") == 32
    assert checksum(b"1") != checksum(b"1.0")


@given(st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5))))
def test_headers_come_back_as_they_were(
    headers: list[tuple[str, bytes | None]],
) -> None:
    """Order, repeats, NULL and binary values are kept."""
    assert decode_headers(encode_headers(tuple(headers))) == headers
