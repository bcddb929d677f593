"""Cursor: how far a build is, and in which steps it goes on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from kappa_log.cursor import Lag, lag, spans

NOW = datetime(2024, 1, 1, tzinfo=UTC)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 50))
def test_spans_cover_each_position_once(after: int, upto: int, size: int) -> None:
    """In order, none twice, none left out, none larger than asked."""
    found = list(spans(after, upto, size))

    covered = [n for low, high in found for n in range(low + 1, high + 1)]
    assert covered == list(range(after + 1, upto + 1))
    assert all(0 < high - low <= size for low, high in found)


def test_lag_is_counted_in_events_and_seconds() -> None:
    """The seconds are since the first event that waits."""
    waiting = NOW - timedelta(seconds=90)

    assert lag(7, 10, waiting, NOW) == Lag(3, 90.0)


def test_there_is_no_lag_at_the_head() -> None:
    """Nothing waits, so nothing is late."""
    assert lag(10, 10, None, NOW) == Lag(0, 0.0)
    assert lag(10, 10, NOW, NOW) == Lag(0, 0.0)


def test_a_clock_that_went_back_makes_no_negative_lag() -> None:
    """Events may be recorded later than this machine's clock says."""
    assert lag(7, 10, NOW + timedelta(hours=1), NOW) == Lag(3, 0.0)
