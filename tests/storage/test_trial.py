"""Trials: a dry run tells what a retry would come to, and leaves no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kappa_log import failures as retries
from kappa_log.errors import UsageError
from support.poison import Poisoned, bad


@pytest.fixture
def world(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Poisoned]:
    """Give an empty log whose handler fails on demand, and writes."""
    monkeypatch.syspath_prepend(tmp_path)
    with Poisoned(database_url, tmp_path, "Writing") as found:
        found.make_effects()
        yield found


def told(world: Poisoned, **chosen: Any) -> list[tuple[int, str]]:
    """Return what a dry run says of each failure, by id."""
    done = world.app.retry_failures(dry_run=True, **chosen)
    return [(trial.id, trial.outcome) for trial in done.trials]


def traces(world: Poisoned) -> list[Any]:
    """Return all that a retry may change."""
    return [
        world.app.failures(limit=1000),
        world.app.events(limit=1000),
        world.effects(),
        *(world.rows(table, "id") for table in ("audit", "checkpoints", "duplicates")),
    ]


def test_a_dry_run_walks_each_key_up_to_its_first_error(world: Poisoned) -> None:
    """As the retry does after it, whose outcomes it tells; and it changes nothing."""
    world.read(
        ("a", bad(1)),
        ("a", bad(2, do="skip")),
        ("a", b"{bad"),
        ("a", {"n": 4}),
        ("b", {"n": 5, "do": "raise"}),
        (None, b"{worse"),
    )
    world.fix()
    before = traces(world)

    done = world.app.retry_failures(dry_run=True)

    assert [(t.id, t.outcome, t.behind) for t in done.trials] == [
        (1, "acked", None),
        (2, "skipped", None),
        (3, "failed", None),
        (4, "waits", 3),
        (5, "acked", None),
        (6, "failed", None),
    ]
    assert done.trials[2].error_class == "DecodeError"
    assert "JSON" in (done.trials[2].error_message or "")
    assert (done.matched, done.untried) == (6, 0)
    assert traces(world) == before
    real = world.app.retry_failures()
    counted = ("acked", "skipped", "duplicate", "failed", "stopped_keys")
    assert [getattr(done, n) for n in counted] == [getattr(real, n) for n in counted]
    world.check()


def test_what_is_asked_for_is_tried_after_what_it_waits_for(world: Poisoned) -> None:
    """One of a key needs those before it, and those behind it follow, as in a retry."""
    world.read(("a", bad(1)), ("a", bad(2)), ("a", bad(3)))
    assert told(world, ids=(2,)) == [(1, "failed"), (2, "waits"), (3, "waits")]
    assert world.app.try_failure(2).behind == 1
    world.fix()

    assert told(world, ids=(2,)) == [(1, "acked"), (2, "acked"), (3, "acked")]
    world.calls.clear()
    assert world.app.try_failure(2).outcome == "acked"
    assert [n for n, _ in world.calls] == [1, 2]
    assert world.failed() == [(0, False), (1, True), (2, True)]


def test_handlers_see_what_their_key_wrote_and_nobody_else_ever_does(
    world: Poisoned,
) -> None:
    """A record may need what the handler of the one before it wrote."""
    needs = "INSERT INTO seen SELECT n + 100 FROM seen WHERE n = 1"
    world.read(("a", bad(1)), ("a", bad(2, sql=[needs, "SELECT 1/count(*) FROM seen"])))
    world.fix()
    during: list[int] = []
    world.during_call(lambda: during.extend(world.effects()), 2)

    assert told(world) == [(1, "acked"), (2, "acked")]

    assert during == []
    assert world.effects() == []


def test_a_duplicate_says_what_it_repeats(world: Poisoned) -> None:
    """An event of the log, or a failure that would become one first."""
    world.read(("a", bad(1)), ("b", bad(1)), ("c", bad(2)))
    world.fix()

    first, second, third = world.app.retry_failures(dry_run=True).trials

    assert (first.outcome, third.outcome) == ("acked", "acked")
    assert (second.outcome, second.repeats, second.position) == ("duplicate", 1, None)
    world.app.retry_failures(ids=(3,))
    world.app.retry_failures(ids=(1,))
    tried = world.app.try_failure(2)
    assert (tried.outcome, tried.position, tried.repeats) == ("duplicate", 2, None)


def test_a_dry_run_is_bounded(world: Poisoned, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at so many, calls no more handlers, and counts the others."""
    monkeypatch.setattr(retries, "MAX_TRIALS", 3)
    world.read(*(("a", bad(n)) for n in range(2)), *((None, bad(n)) for n in (2, 3)))
    world.read(*(("a", bad(n)) for n in range(4, 9)))
    world.fix()
    world.calls.clear()

    done = world.app.retry_failures(dry_run=True)

    assert [trial.id for trial in done.trials] == [1, 2, 5]
    assert len(world.calls) == 3
    assert (done.matched, done.untried) == (9, 6)
    assert world.app.retry_failures(dry_run=True, ids=(1, 9)).untried == 1
    with pytest.raises(UsageError, match="3 or more of its key come before it"):
        world.app.try_failure(9)


def test_a_handler_that_ends_the_transaction_is_tried_without_it(
    world: Poisoned,
) -> None:
    """As in a retry: it fails then, and what its key wrote before still goes."""
    world.configure("Dying")
    world.read(("a", bad(1)), ("a", {"n": 2, "do": "die"}), ("a", {"n": 3}))
    world.fix()

    assert told(world) == [(1, "acked"), (2, "failed"), (3, "waits")]

    assert world.effects() == []
    assert world.app.retry_failures().acked == 1
    assert world.failed() == [(1, False), (2, True)]


def test_what_goes_while_it_is_tried_is_told_as_gone(world: Poisoned) -> None:
    """A dry run takes no right to a failure: another one may retry it meanwhile."""
    world.configure("Orders")
    world.read((None, bad(1)), (None, bad(2)))
    world.fix()
    world.during_call(lambda: world.app.discard_failure(2), 1)

    assert told(world) == [(1, "acked"), (2, "gone")]


def test_a_trial_starts_and_stops_its_handler(world: Poisoned) -> None:
    """What it prepares there, consume needs here too; nobody else is started."""
    world.configure("Orders")
    world.read((None, bad(1)), (None, bad(2)))
    world.hooks.clear()

    assert [outcome for _, outcome in told(world)] == ["failed", "failed"]

    assert world.hooks == ["start", "stop"]
