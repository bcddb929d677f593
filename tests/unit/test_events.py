"""Events: instants as microseconds, pages that load columns late."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log.errors import VerificationError
from kappa_log.events import (
    EventPage,
    from_micros,
    in_utc,
    kept_instant,
    make_event,
    to_micros,
)

offsets = st.integers(-86_399, 86_399).map(lambda s: timezone(timedelta(seconds=s)))


@given(st.datetimes(timezones=st.just(UTC)))
def test_an_instant_survives_as_microseconds(moment: datetime) -> None:
    """Not one microsecond is lost between the years 1 and 9999."""
    assert from_micros(to_micros(moment)) == moment


@given(st.datetimes(timezones=offsets))
def test_an_instant_is_read_back_or_refused(moment: datetime) -> None:
    """What is accepted can be read again, at the edges of the calendar too."""
    try:
        micros = to_micros(moment)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert from_micros(micros) == moment

    assert not refusal or "outside the years 1 to 9999" in refusal


def test_an_instant_that_nobody_can_have_recorded_is_damage() -> None:
    """It was written past this package; an error names it, and how to find it."""
    with pytest.raises(VerificationError, match=r"the time 9+ µs .*kappa-log verify"):
        kept_instant(999_999_999_999_999_999)


@given(st.datetimes(timezones=offsets), st.datetimes(timezones=offsets))
def test_microseconds_order_as_instants_do(left: datetime, right: datetime) -> None:
    """Whatever the zones."""
    try:
        pair = to_micros(left), to_micros(right)
    except ValueError:
        return
    assert (pair[0] < pair[1]) == (left < right)


@pytest.mark.parametrize(
    "text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
)
def test_an_instant_outside_the_calendar_is_refused(text: str) -> None:
    """It could be stored, and then never be read."""
    with pytest.raises(ValueError, match="outside the years 1 to 9999"):
        to_micros(datetime.fromisoformat(text))


def test_a_naive_time_is_refused_with_what_to_write() -> None:
    """Without a zone it is no instant; nobody guesses one."""
    with pytest.raises(ValueError, match=r"has no zone.*2024-01-01T00:00:00\+00:00"):
        to_micros(datetime(2024, 1, 1))  # noqa: DTZ001


def test_in_utc_gives_the_same_instant_in_utc() -> None:
    """The zone is UTC itself, so equal instants are equal in every way."""
    moment = datetime(
        2024, 1, 1, 5, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))
    )

    assert in_utc(moment) == moment
    assert in_utc(moment).tzinfo is UTC


def test_a_column_that_nobody_reads_is_never_loaded() -> None:
    """A page asks for a column once, when the first event is asked for it."""
    asked: list[str] = []

    def load(name: str) -> Sequence[Any]:
        asked.append(name)
        return ["a", "b"]

    page = EventPage({"position": [1, 2]}, load)

    assert page.column("position") == [1, 2]
    assert page.column("topic") == page.column("topic") == ["a", "b"]
    assert asked == ["topic"]


def test_a_page_in_parts_is_the_same_events() -> None:
    """A column that a part asks for is loaded once, for the whole page."""
    asked: list[str] = []

    def load(name: str) -> Sequence[Any]:
        asked.append(name)
        return [*"abcde"]

    def join(start: int, stop: int) -> bytes:
        return json.dumps([*range(start, stop)]).encode()

    page = EventPage({"position": [*range(1, 6)]}, load, join)
    parts = list(page.parts(2))

    assert [part.column("position") for part in parts] == [[1, 2], [3, 4], [5]]
    assert [part.column("topic") for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert asked == ["topic"]
    assert [json.loads(part.joined_payloads()) for part in parts] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    assert list(page.parts(5)) == [page]


def test_a_column_that_does_not_exist_is_an_attribute_error() -> None:
    """So that hasattr and getattr on events work as everywhere."""
    with pytest.raises(AttributeError, match="nonsense"):
        EventPage({}).column("nonsense")


def test_make_event_gives_each_column_a_plain_default() -> None:
    """A fold's test says what matters and nothing else."""
    event = make_event(
        3, {"a": 1}, entity_id="ada", event_type="order", headers=[("h", b"1")]
    )

    assert (event.position, event.entity_id, event.payload) == (3, "ada", {"a": 1})
    assert (event.topic, event.group_id) == ("test-topic", "test-group")
    assert (event.source_id, event.partition, event.offset) == (1, 0, 2)
    assert (event.key, event.timestamp, event.raw) == (None, None, None)
    assert (event.event_type, event.event_version) == ("order", None)
    assert event.headers == [("h", b"1")]
    assert (event.event_time, event.checksum, event.payload_text) == (None, None, None)
    assert event.recorded_at.year == 1970
    assert event.message_id.endswith("3")
    assert repr(event) == "Event(position=3, entity_id='ada', payload={'a': 1})"


def test_make_event_refuses_an_unknown_column() -> None:
    """A typo in a test is told, with the columns there are."""
    with pytest.raises(TypeError, match=r"no column 'event_typ'.*event_type"):
        make_event(event_typ="x")
