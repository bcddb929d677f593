"""Parked keys: a fold that raises stops its key, exactly there, and nothing else.

The row of a key is the fold of its events below the position that it is parked at,
whatever batches, interruptions and races there were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typing_extensions import override

from kappa_log import Event, KappaLog, ProjectionError, UsageError
from kappa_log.config import OnError
from kappa_log.errors import (
    ArchiveMissing,
    DatabaseUnavailable,
    LostRace,
    NotFound,
    StaleCode,
)
from kappa_log.events import EventPage
from kappa_log.fold import Folding
from support.logs import Clock, append, execute, open_log, set_bounds
from support.tallies import Made, folded, knows, parked, stands, sums, tallies

_NUMBERS = count(1)


@pytest.fixture
def empty(database_url: str, tmp_path: Path) -> Iterator[KappaLog]:
    """Give an empty log."""
    with open_log(database_url, tmp_path) as app:
        yield app


def made(*texts: str) -> Made:
    """Return events from texts: ``a1`` is good, ``a2!`` is bad, ``a3?`` is late."""
    return [
        {"id": t[0], "n": int(t[1:].rstrip("!?")), "bad": "!" in t, "late": "?" in t}
        for t in texts
    ]


def take(app: KappaLog, folder: Path, events: Made, topic: str = "tally") -> None:
    """Take events into the log; numbered, so that none is another's duplicate."""
    numbered = [one | {"number": next(_NUMBERS)} for one in events]
    append(app, folder / topic, numbered, topic=topic)


LOG = made("a1", "b1", "a2!", "b2", "a3", "c1!", "b3", "a4", "c2")


@pytest.fixture
def broken(empty: KappaLog, tmp_path: Path) -> KappaLog:
    """Give a log with two parked keys of three."""
    app = knows(empty, tallies("tally"))
    take(app, tmp_path, LOG)
    (done,) = app.project()
    assert (done.parked, done.newly_parked, done.to_position) == (2, 2, 9)
    return app


@pytest.fixture
def mended(broken: KappaLog) -> KappaLog:
    """Give the same with mended code, declared compatible."""
    app = knows(broken, tallies("tally", broken=False))
    assert app.compatible("tally") == ["code"]
    return app


# --- the law ------------------------------------------------------------------

ONE = st.builds(
    lambda key, n, fate: {"id": key, "n": n, "bad": fate == 1, "late": fate == 2},
    st.sampled_from("abc"),
    st.integers(1, 9),
    st.integers(0, 9),
)


def test_a_row_is_the_fold_below_its_park_position_whatever_the_batches(
    empty: KappaLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And mended, declared compatible and retried it is what a fresh fold makes."""

    @settings(
        max_examples=20 if empty.database.is_sqlite else 6,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )
    @given(
        chunks=st.lists(st.lists(ONE, min_size=1, max_size=7), min_size=1, max_size=3),
        page_events=st.sampled_from([1, 2, 3, 1000]),
        flush_seconds=st.sampled_from([0.0, 1000.0]),
        max_states=st.sampled_from([1, 1000]),
        kind=st.sampled_from(["mutable", "frozen", "key"]),
        stop_after=st.integers(1, 9),
    )
    def law(
        chunks: list[Made],
        page_events: int,
        flush_seconds: float,
        max_states: int,
        kind: str,
        stop_after: int,
    ) -> None:
        set_bounds(
            page_events=page_events,
            flush_seconds=flush_seconds,
            patch=monkeypatch,
            MAX_STATES=max_states,
        )
        empty.reset_database()
        name = f"law{next(_NUMBERS)}"
        how: dict[str, Any] = {"frozen": kind == "frozen"}
        if kind == "key":
            how["key"] = _entity
        app = knows(empty, tallies(name, **how))
        seen: Made = []
        for chunk in chunks:
            take(app, tmp_path, chunk, name)
            seen += chunk
            interrupt(app, stop_after)
            app.project()
            assert sums(app, name) == folded(seen, broken=True)
            assert stands(app, name) == parked(seen)
        waiting = {one.key: one.waiting for one in app.parked(name)}
        assert waiting == {
            key: sum(one["id"] == key for one in seen[position - 1 :])
            for key, position in parked(seen).items()
        }
        assert app.verify(names=[name]).findings == []

        fixed = knows(app, tallies(name, broken=False, **how))
        fixed.compatible(name)
        done = fixed.retry_parked(name)

        assert (done.folded, done.failed) == (len(parked(seen)), 0)
        assert stands(fixed, name) == {}
        assert sums(fixed, name) == folded(seen, broken=False)
        assert fixed.verify(names=[name]).findings == []

    law()


def _entity(event: Event) -> str:
    return event.entity_id or ""


class _Interrupted(Exception):
    """Folding is interrupted here."""


def interrupt(app: KappaLog, pages: int) -> None:
    """Fold so many pages, then end in the midst of it."""
    left = [pages]

    def tick(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise _Interrupted

    with suppress(_Interrupted):
        app.project(on_progress=tick)


# --- what parks and what stops ------------------------------------------------


def test_a_key_that_cannot_be_made_stops_and_what_was_parked_before_it_is_kept(
    empty: KappaLog, tmp_path: Path
) -> None:
    """No key is known, so none can wait; all before that event is written."""

    def key(event: Event) -> str:
        assert event.position != 8, "no key"
        return event.entity_id or ""

    app = knows(empty, tallies("tally", key=key))
    take(app, tmp_path, LOG)

    for _ in range(2):
        with pytest.raises(
            ProjectionError, match=r"(?s)position 8: its key.*stands at 7"
        ):
            app.project()

    assert stands(app, "tally") == {"a": 3, "c": 6}
    assert sums(app, "tally") == folded(LOG[:7], broken=True)


def test_stop_is_an_option_and_a_setting(empty: KappaLog, tmp_path: Path) -> None:
    """Then the projection stops before the event, and nothing is parked."""
    app = knows(empty, tallies("tally"))
    take(app, tmp_path, LOG)
    stopping = app.config.projections.model_copy(update={"on_error": "stop"})
    config = app.config.model_copy(update={"projections": stopping})
    setting = knows(app, *app.registry)
    setting.config = config

    stop: OnError = "stop"
    for asked, on_error in ((app, stop), (setting, None)):
        with pytest.raises(ProjectionError, match=r"position 3 for key 'a'"):
            asked.project(on_error=on_error)

    assert app.projection("tally").live.cursor == 2  # type: ignore[union-attr]
    assert stands(app, "tally") == {}
    (done,) = setting.project(on_error="park")
    assert (done.newly_parked, done.to_position) == (2, 9)
    assert "the fold failed for 2 keys more" in (done.notice or "")
    assert app.project()[0].notice is None


@pytest.mark.parametrize("frozen", [True, False])
def test_a_fold_that_fails_for_too_many_keys_stops(
    empty: KappaLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, frozen: bool
) -> None:
    """As many as may be are parked; the next one stops the projection at its event."""
    set_bounds(
        page_events=7,
        flush_seconds=1000.0,
        patch=monkeypatch,
        MAX_PARKED_KEYS=20,
        MAX_NEW_PARKED=5,
    )
    app = knows(empty, tallies("tally", frozen=frozen))
    storm: Made = [{"id": f"k{n}", "n": 1, "bad": True} for n in range(50)]
    take(app, tmp_path, [*made("a1"), *storm])

    for _ in range(2):
        with pytest.raises(
            ProjectionError, match=r"position 22.*20 keys are parked already.*at 21"
        ):
            app.project()

    assert len(app.parked("tally")) == 20
    assert sums(app, "tally") == {"a": 1}
    done = knows(app, tallies("tally", broken=False, frozen=frozen))
    done.compatible("tally")
    assert done.retry_parked("tally").folded == 20
    done.project()
    assert len(sums(done, "tally")) == 51


@pytest.mark.parametrize("error", [DatabaseUnavailable, ArchiveMissing])
def test_a_store_that_goes_while_an_event_is_read_parks_nothing(
    error: type[Exception],
) -> None:
    """Columns load when the fold first asks for them: that is no error of its own."""

    def away(_: str) -> Any:
        raise error

    code = tallies("tally")
    page = EventPage({"position": [1], "entity_id": ["a"], "payload_text": ["1"]}, away)
    asking = type(code)(
        lambda _, event: event.topic,
        name="asking",
        version=1,
        topics=("t",),
        groups=None,
        key=None,
        key_type=None,
        payload=None,
        upcast={},
    )
    folding = Folding(asking, most_parked=10)

    with pytest.raises(error):
        folding.apply(page)

    assert folding.parked == {}


# --- retry --------------------------------------------------------------------


def everything(app: KappaLog) -> list[Any]:
    """Return all that a retry may change."""
    return [
        list(app.rows("tally")),
        app.parked("tally"),
        app.projection("tally").live,
        execute(app, "UPDATE kappa_log_audit SET who = who"),
    ]


def test_a_dry_run_tells_what_would_come_of_it_and_writes_nothing(
    broken: KappaLog, mended: KappaLog
) -> None:
    """Of each key: how many events, up to where, or the error again."""
    before = everything(mended)

    done = mended.retry_parked("tally", dry_run=True)

    told = {one.key: (one.outcome, one.events, one.position) for one in done.keys}
    assert told == {"a": ("folded", 3, 8), "c": ("folded", 2, 9)}
    assert everything(mended) == before
    broken.compatible("tally")
    again = broken.retry_parked("tally", ["c"], dry_run=True)
    assert [(one.key, one.outcome, one.error) for one in again.keys] == [
        ("c", "failed", "ValueError: bad 1")
    ]
    assert stands(mended, "tally") == {"a": 3, "c": 6}


def test_a_key_that_fails_again_is_parked_where_it_failed_now(
    broken: KappaLog, tmp_path: Path
) -> None:
    """Its row goes on up to there; attempts, error and time are those of the retry."""
    take(broken, tmp_path, made("a5", "a6!", "a7"))
    broken.project()
    clock = Clock()
    app = knows(broken, _half_mended("tally"), clock=clock)
    app.compatible("tally")

    done = app.retry_parked("tally", ["a"], reason="half mended")

    assert [(one.outcome, one.events, one.position) for one in done.keys] == [
        ("failed", 4, 11)
    ]
    assert sums(app, "tally") == {"a": 1 + 2 + 3 + 4 + 5, "b": 6}
    first, second = app.parked("tally")
    assert (second.key, second.position, second.attempts) == ("a", 11, 2)
    assert (second.error_message, second.last_at) == ("bad 6", clock.now)
    assert second.waiting == 2
    assert (first.key, first.attempts) == ("c", 1)
    assert app.verify(names=["tally"]).findings == []
    fixed = knows(app, tallies("tally", broken=False))
    fixed.compatible("tally")
    assert fixed.retry_parked("tally").folded == 2
    whole = [*LOG, *made("a5", "a6!", "a7")]
    assert sums(fixed, "tally") == folded(whole, broken=False)


def _half_mended(name: str) -> Any:
    """Return a fold that still fails, on the bad events of large n."""
    whole, code = tallies(name, broken=False), tallies(name)

    def half(state: Any, event: Event) -> Any:
        fold = code if event.payload["n"] > 5 else whole
        return fold.reducer(state, event)

    half.__annotations__["return"] = whole.reducer.__annotations__["return"]
    half.__globals__.update(whole.reducer.__globals__ | globals())
    return type(code)(
        half,
        name=name,
        version=1,
        topics=(name,),
        groups=None,
        key=None,
        key_type=None,
        payload=None,
        upcast={},
    )


def test_a_retry_needs_the_code_of_the_build(broken: KappaLog) -> None:
    """A mended fold is other code; the message says both ways on."""
    app = knows(broken, tallies("tally", broken=False))

    with pytest.raises(StaleCode, match=r"compatible tally.*retry tally --all"):
        app.retry_parked("tally")

    assert "retry tally --all" in (app.project()[0].waiting or "")
    with pytest.raises(NotFound, match="parked key of tally build 1 'b' not found"):
        broken.retry_parked("tally", ["b"])
    assert broken.retry_parked("tally", []).keys == []
    assert stands(app, "tally") == {"a": 3, "c": 6}
    assert app.replay("tally").promoted
    assert sums(app, "tally") == folded(LOG, broken=False)
    assert stands(app, "tally") == {}


def _five(event: Event) -> tuple[str, int, bool, bytes, date]:
    n = event.payload["n"]
    return event.entity_id or "", -n, n > 1, bytes([255, n]), date(2026, 1, n)


def test_keys_of_all_types_are_parked_and_typed(
    empty: KappaLog, tmp_path: Path
) -> None:
    """They come back from the table as they were, and from a person's text."""
    app = knows(empty, tallies("tally", key=_five))
    take(app, tmp_path, made("a1!", "b2!", "c3"))
    app.project()
    assert [one.key for one in app.parked("tally")] == [
        "a/-1/false/ff01/2026-01-01",
        "b/-2/true/ff02/2026-01-02",
    ]
    take(app, tmp_path, made("a1", "b2"))
    (done,) = app.project()
    assert (done.parked, done.newly_parked) == (2, 0)

    fixed = knows(app, tallies("tally", key=_five, broken=False))
    fixed.compatible("tally")

    assert fixed.retry_parked("tally", ["b/-2/true/ff02/2026-01-02"]).folded == 1
    assert [row["n"] for row in fixed.rows("tally")] == [4, 3]
    assert [one.key[0] for one in fixed.parked("tally")] == ["a"]
    with pytest.raises(UsageError, match="has not the 5 parts"):
        fixed.retry_parked("tally", ["b"])


def test_a_live_runner_that_remembers_a_key_as_parked_loses_to_its_retry(
    mended: KappaLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would pass the events that came since, which nobody would fold."""
    set_bounds(page_events=1, flush_seconds=0.0, patch=monkeypatch)
    more = made("a5", "b4", "a6", "c3")
    take(mended, tmp_path, more)
    retried: list[Any] = []

    def retry(_: object) -> None:
        if not retried:
            retried.append(mended.retry_parked("tally", ["a"]))

    (done,) = mended.project(on_progress=retry)

    assert retried[0].folded == 1
    assert done.to_position == len(LOG) + 4
    assert stands(mended, "tally") == {"c": 6}
    whole = [one for one in [*LOG, *more] if one["id"] != "c"]
    assert sums(mended, "tally") == folded(whole, broken=False)
    assert mended.verify(names=["tally"]).findings == []


class Meddler(Clock):
    """A clock that does something when it is first read after being armed."""

    def __init__(self) -> None:
        """Do nothing until armed."""
        super().__init__()
        self.act: Callable[[], Any] | None = None

    @override
    def __call__(self) -> datetime:
        """Do it, and return the time."""
        act, self.act = self.act, None
        if act is not None:
            act()
        return super().__call__()


def test_what_came_while_a_retry_was_tried_is_folded_under_the_lock(
    mended: KappaLog, tmp_path: Path
) -> None:
    """Live folding may pass between the trial and the lock."""
    clock = Meddler()
    app = knows(mended, *mended.registry, clock=clock)
    more = made("a5", "c3", "b4")

    def meanwhile() -> None:
        take(mended, tmp_path, more)
        mended.project()

    clock.act = meanwhile
    done = app.retry_parked("tally")

    assert {one.key: one.events for one in done.keys} == {"a": 4, "c": 3}
    assert sums(app, "tally") == folded([*LOG, *more], broken=False)
    assert app.verify(names=["tally"]).findings == []


def test_of_two_retries_at_once_one_wins(mended: KappaLog) -> None:
    """The other finds the keys changed, says so, and changes nothing."""
    clock = Meddler()
    app = knows(mended, *mended.registry, clock=clock)
    clock.act = lambda: mended.retry_parked("tally", ["a"])

    done = app.retry_parked("tally")

    assert {one.key: one.outcome for one in done.keys} == {"a": "lost", "c": "folded"}
    assert sums(app, "tally") == folded(LOG, broken=False)
    execute(app, "DELETE FROM kappa_log_parked_keys")
    again = knows(mended, tallies("tally"))
    again.compatible("tally")
    take(again, Path(str(app.config.folder)), made("d1!", "d2"))
    again.project()
    app.compatible("tally")
    clock.act = lambda: mended.retry_parked("tally")
    with pytest.raises(LostRace, match="retried by somebody else"):
        app.retry_parked("tally")
    assert sums(app, "tally")["d"] == 3


def test_a_retry_of_a_build_that_is_retired_meanwhile_changes_nothing(
    mended: KappaLog,
) -> None:
    """Its rows are of no use any more, and the new live build has its own."""
    clock = Meddler()
    app = knows(mended, *mended.registry, clock=clock)
    clock.act = lambda: mended.replay("tally")

    with pytest.raises(LostRace, match="is not live any more"):
        app.retry_parked("tally")

    assert sums(app, "tally", 1) == folded(LOG, broken=True)
    assert sums(app, "tally", 2) == folded(LOG, broken=False)


# --- replay -------------------------------------------------------------------


def test_a_replay_stops_unless_it_is_told_to_park_and_is_not_promoted_then(
    broken: KappaLog, tmp_path: Path
) -> None:
    """A swap must not lose events; the shadow is there to be looked at."""
    with pytest.raises(ProjectionError, match="position 3 for key 'a'"):
        broken.replay("tally")
    broken.cancel(broken.replays()[0].id)

    with pytest.raises(UsageError, match="2 parked keys, the first of them 'a' at"):
        broken.replay("tally", on_error="park")

    (kept,) = broken.replays(limit=1)
    assert kept.outcome == "kept"
    build = kept.build
    assert stands(broken, "tally", build) == {"a": 3, "c": 6}
    assert sums(broken, "tally", build) == folded(LOG, broken=True)
    take(broken, tmp_path, made("b9!"))
    with pytest.raises(UsageError, match=rf"3 parked keys.*drop tally {build}"):
        broken.promote("tally")
    assert [b.role for b in broken.projection("tally").builds] == ["live", "shadow"]
    broken.drop_build("tally", build or 0)
    done = broken.replay("tally", on_error="park", promote=False)
    assert (done.outcome, done.parked) == ("kept", 3)
    assert execute(broken, "DELETE FROM kappa_log_parked_keys WHERE build_id = 0") == 0


@pytest.mark.parametrize("page_events", [2, 1000])
def test_a_replay_with_a_start_folds_parked_keys_from_their_first_event(
    broken: KappaLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page_events: int,
) -> None:
    """Their rows lack events, so they are not taken over; also after a resumption."""
    set_bounds(page_events=page_events, flush_seconds=0.0, patch=monkeypatch)
    take(broken, tmp_path, made("b9"))
    app = knows(broken, tallies("tally", broken=False))
    plan = app.plan_replay("tally", from_position=10)
    assert (plan.keys, plan.events) == (3, 9)
    assert "1 key, and 2 parked keys" in plan.description

    def stop(_: object) -> None:
        raise _Interrupted

    with pytest.raises(_Interrupted):
        app.replay("tally", from_position=10, on_progress=stop)
    (left,) = app.replays(unfinished=True)
    done = app.resume(left.id)

    assert (done.outcome, done.keys, done.parked) == ("promoted", 3, 0)
    assert stands(app, "tally") == {}
    whole = [*LOG, *made("b9")]
    assert sums(app, "tally") == folded(whole, broken=False)
    assert app.verify(names=["tally"]).findings == []


def test_a_replay_with_a_start_parks_what_still_fails(broken: KappaLog) -> None:
    """At the event that the refold says, whether or not it was parked before."""
    with pytest.raises(UsageError, match="2 parked keys"):
        broken.replay("tally", from_position=9, on_error="park")

    build = broken.replays()[0].build
    assert stands(broken, "tally", build) == {"a": 3, "c": 6}
    assert sums(broken, "tally", build) == folded(LOG, broken=True)


def test_undo_goes_back_to_parked_keys_only_when_told(broken: KappaLog) -> None:
    """They lack events, which is to be behind."""
    fixed = knows(broken, tallies("tally", broken=False))
    assert fixed.replay("tally").promoted

    with pytest.raises(UsageError, match=r"2 parked keys.*--behind"):
        broken.undo("tally")
    assert sums(fixed, "tally") == folded(LOG, broken=False)

    assert broken.undo("tally", behind=True).live == 1
    assert stands(broken, "tally") == {"a": 3, "c": 6}


# --- looking ------------------------------------------------------------------


def test_a_parked_row_is_explained_up_to_its_error(broken: KappaLog) -> None:
    """By whatever code: the events are there, and so is what went wrong."""
    steps = list(broken.explain("tally", "a"))

    assert [step.event.position for step in steps] == [1, 3]
    assert [step.error for step in steps] == [None, "ValueError: bad 2"]
    assert [step.state for step in steps] == 2 * [{"n": 1, "seen": [1]}]


def test_verify_folds_a_parked_key_below_its_park_position(broken: KappaLog) -> None:
    """It finds a row that is wrong there, and says that keys are parked."""
    report = broken.verify(names=["tally"])

    assert report.findings == []
    assert any("2 parked keys" in limit for limit in report.limits)
    execute(broken, "UPDATE kappa_log_build_tally_1 SET n = 7 WHERE entity_id = 'a'")
    (found,) = broken.verify(names=["tally"]).findings
    assert "the row of key 'a'" in found.message


def test_what_waits_behind_keys_of_a_function_is_counted_if_it_is_not_far(
    empty: KappaLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is read for it, by code that may have been changed since."""
    app = knows(empty, tallies("tally", key=_entity))
    take(app, tmp_path, LOG)
    app.project()

    def failing(event: Event) -> str:
        raise LookupError(event)

    other = knows(app, tallies("tally", key=failing))

    assert [one.waiting for one in app.parked("tally")] == [3, 2]
    assert [one.waiting for one in other.parked("tally")] == [None, None]
    monkeypatch.setattr("kappa_log.parked.MAX_COUNTED", 5)
    assert [one.waiting for one in app.parked("tally")] == [None, None]
    nobody = knows(app)
    assert [one.waiting for one in nobody.parked("tally", limit=1)] == [None]


def test_the_error_of_a_parked_key_is_kept(broken: KappaLog) -> None:
    """Where in whose code, once; what no column holds is told by the engine."""
    first = broken.parked("tally", limit=1)[0]

    assert (first.key, first.error_class, first.error_message) == (
        "a", "ValueError", "bad 2",
    )  # fmt: skip
    lines = "\n".join(first.error_backtrace)
    assert "tallies.py" in lines
    assert "kappa_log" not in lines
    assert (first.attempts, first.waiting) == (1, 3)
    status = json.dumps([broken.projection("tally").live.parked])  # type: ignore[union-attr]
    assert status == "[2]"
