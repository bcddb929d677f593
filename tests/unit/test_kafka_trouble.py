"""Trouble that may pass: tried again less and less often, and told once."""

from __future__ import annotations

import pytest

from kappa_log.errors import DatabaseBusy
from kappa_log.kafka import trouble
from kappa_log.kafka.trouble import LONGEST_WAIT, Trouble


class Clock:
    """A clock that is moved by hand, and no chance."""

    now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    def uniform(self, _: float, longest: float) -> float:
        """Return what is the most that chance may choose."""
        return longest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still; and waits that are as long as they may be."""
    found = Clock()
    monkeypatch.setattr(trouble, "time", found)
    monkeypatch.setattr(trouble, "random", found)
    return found


def test_each_wait_is_longer_than_the_last(clock: Clock) -> None:
    """Up to a bound; and the first one after all went well is short again."""
    found = Trouble(lambda _: None)

    def waited() -> float:
        found.came(DatabaseBusy("locked"))
        start = clock.now
        while found.is_waiting:
            clock.now += 0.01
        return clock.now - start

    waits = [waited() for _ in range(10)]

    assert waits == sorted(waits)
    assert waits[0] < 0.2
    assert waits[-1] == pytest.approx(LONGEST_WAIT, abs=0.02)
    found.is_over()
    assert waited() == pytest.approx(waits[0], abs=0.02)


def test_the_same_is_not_told_again_for_a_minute(clock: Clock) -> None:
    """However often it comes; what changed in between is told."""
    told: list[str] = []
    found = Trouble(told.append)

    for seconds in (0, 1, 58, 2):
        clock.now += seconds
        found.came(DatabaseBusy("locked"))
    found.say("other")
    found.say("other")

    assert told == ["locked; trying again", "locked; trying again", "other"]


def test_that_it_works_again_is_told_once(clock: Clock) -> None:
    """And only if something was wrong; then the same trouble is news again."""
    told: list[str] = []
    found = Trouble(told.append)

    found.is_over()
    found.came(DatabaseBusy("locked"))
    found.is_over()
    found.is_over()
    found.came(DatabaseBusy("locked"))

    assert clock.now == 1000.0
    assert told == [
        "locked; trying again",
        "works again; going on",
        "locked; trying again",
    ]
