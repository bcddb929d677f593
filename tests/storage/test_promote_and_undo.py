"""Promote and undo: what readers see, what is refused, and what is kept.

Whatever happens in a swap, users read the old rows or the new ones; whatever is
refused leaves the old build live and names the way on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import kappa_log.storage.views
from kappa_log import (
    Event,
    KappaLog,
    Projection,
    ProjectionError,
    UsageError,
    projection,
)
from kappa_log.errors import DatabaseBusy, NotFound, StaleCode
from kappa_log.fold import Registry
from kappa_log.storage.diff import RowDiff
from support.logs import (
    append,
    build_tables,
    execute,
    open_log,
    rows,
    set_bounds,
)
from support.readers import Reader, connect

VIEW = "kappa_log_view_stamps"


@dataclass(frozen=True, slots=True)
class Stamp:
    """A row that says which release made it, and of how many events."""

    release: int
    seen: int


@dataclass(frozen=True, slots=True)
class LongStamp:
    """The same with one more column, and in another order."""

    label: str
    release: int
    seen: int


def stamps(
    release: int, *, long: bool = False, name: str = "stamps", key: Any = None
) -> Projection:
    """Return a release of a projection: all of its rows differ from any other's."""

    def fold(state: Stamp | None, _: Event) -> Stamp | None:
        return Stamp(release, state.seen + 1 if state else 1)

    def long_fold(state: LongStamp | None, _: Event) -> LongStamp | None:
        return LongStamp(f"r{release}", release, state.seen + 1 if state else 1)

    chosen: Any = long_fold if long else fold
    return projection(topics=["things"], version=release, name=name, key=key)(chosen)


class Shop:
    """A log of things, whose code is exchanged as releases go by."""

    def __init__(self, app: KappaLog, folder: Path) -> None:
        """Begin with 20 rows of two events."""
        self.app = app
        self._file = folder / "things.jsonl"
        self._made = 0
        self.take(40)

    def take(self, number: int) -> None:
        """Ingest so many events, of 20 entities in turn."""
        made = range(self._made, self._made + number)
        self._made += number
        append(self.app, self._file, [{"id": f"e{n % 20:02}", "n": n} for n in made])

    def knows(self, *code: Projection) -> None:
        """Register this code and no other."""
        self.app.__dict__["registry"] = Registry(code)

    def release(self, *code: Projection, **request: Any) -> Any:
        """Register code and replay the projection of the first."""
        self.knows(*code)
        return self.app.replay(code[0].name, **request)

    def seen(self) -> tuple[int, int]:
        """Return which release users see, and of how many events."""
        found = rows(self.app, "stamps")
        (release,) = {row["release"] for row in found}
        return release, sum(row["seen"] for row in found)

    def roles(self, name: str = "stamps") -> list[str]:
        """Return the roles of all builds by number."""
        return [build.role for build in self.app.projection(name).builds]


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Any:
    """Open a shop whose first release is live."""
    with open_log(database_url, tmp_path) as app:
        made = Shop(app, tmp_path)
        made.knows(stamps(1))
        app.project()
        yield made


# --- what readers see ---------------------------------------------------------


class Answers:
    """What a reader saw, judged answer by answer."""

    def __init__(self) -> None:
        """Begin with the first release."""
        self.all: list[tuple[int, int]] = [(1, 0)]

    def judge(self, found: list[tuple[int, int]]) -> None:
        """Check that an answer is whole, and no older than the one before."""
        releases = {release for release, _ in found}
        assert len(releases) == 1, f"a mix of releases {releases}"
        assert len(found) == 20
        before, answer = self.all[-1], (releases.pop(), sum(seen for _, seen in found))
        assert answer[0] >= before[0], f"{answer} after {before}"
        assert answer[1] >= before[1], f"{answer} after {before}"
        self.all.append(answer)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("changes_columns", [False, True], ids=["same", "changing"])
def test_a_reader_sees_the_old_rows_or_the_new_and_never_an_error(
    shop: Shop,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    changes_columns: bool,
) -> None:
    """Each answer is of one release, and no later answer is of fewer events."""
    set_bounds(page_events=7, flush_seconds=0.0, patch=monkeypatch)
    answers = Answers()

    def take_more(progress: Any) -> None:
        # So that there is something to catch up, and then for the swap itself to
        # fold, which readers have seen.
        shop.take(1 if progress.phase == "fill" else 3)
        if progress.phase == "catch-up":
            shop.app.project()

    query = f"SELECT release, seen FROM {VIEW}"
    old = stamps(1)
    with Reader(database_url, query, answers.judge) as reader:
        for release in range(2, 10):
            long = changes_columns and release % 2 == 0
            code = stamps(release, long=long), old
            done = shop.release(*code, on_progress=take_more)
            assert done.outcome == "promoted"
            assert done.to_position == shop.app.head().position
            old = code[0]
            reader.wait_for(3)
            if release % 3 == 0:
                shop.take(5)
                shop.app.project()

    assert len({release for release, _ in answers.all}) > 5
    assert shop.seen()[0] == 9
    assert shop.roles() == ["retired", "live"]


def test_a_reader_that_holds_the_view_makes_the_swap_give_way(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old build stays live, and the command that the message names works later."""
    if shop.app.database.is_sqlite:
        # SQLite's readers hold nothing: see the test below.
        return
    monkeypatch.setattr(kappa_log.storage.views, "SWAP_SECONDS", 0.2)
    reader = connect(shop.app.database.url.render_as_string(hide_password=False))
    reader.execute("BEGIN")
    assert len(reader.execute(f"SELECT * FROM {VIEW}").fetchall()) == 20

    with pytest.raises(
        DatabaseBusy, match=r"old build is still live.*projections promote"
    ):
        shop.release(stamps(2))

    assert shop.seen() == (1, 40)
    assert shop.roles() == ["live", "shadow"]
    assert {
        release for release, _ in reader.execute(f"SELECT release, seen FROM {VIEW}")
    } == {1}
    reader.execute("COMMIT")
    reader.close()
    assert shop.app.promote("stamps").outcome == "promoted"
    assert shop.seen() == (2, 40)


def test_a_reader_that_holds_a_snapshot_goes_on_reading_it(
    shop: Shop, database_url: str
) -> None:
    """On SQLite a transaction that began before the swap keeps its rows after it."""
    if not shop.app.database.is_sqlite:
        return
    reader = connect(database_url)
    reader.execute("BEGIN")
    before = reader.execute(f"SELECT * FROM {VIEW}").fetchall()

    assert shop.release(stamps(2, long=True)).outcome == "promoted"

    assert reader.execute(f"SELECT * FROM {VIEW}").fetchall() == before
    reader.execute("COMMIT")
    assert len(reader.execute(f"SELECT label FROM {VIEW}").fetchall()) == 20
    reader.close()


# --- users' views -------------------------------------------------------------


def test_a_view_of_the_users_refuses_a_swap_that_changes_columns(shop: Shop) -> None:
    """It is named, nothing changes, and once it is gone the shadow is promoted."""
    execute(shop.app, f"CREATE VIEW mine AS SELECT release FROM {VIEW}")

    with pytest.raises(UsageError, match="mine") as found:
        shop.release(stamps(2, long=True))

    assert "not changed" in str(found.value)
    assert shop.seen() == (1, 40)
    execute(shop.app, "DROP VIEW mine")
    assert shop.app.promote("stamps").outcome == "promoted"
    assert shop.seen() == (2, 40)


def test_a_view_of_the_users_goes_on_where_columns_stay(
    shop: Shop, database_url: str
) -> None:
    """It shows the new rows without being made again."""
    execute(shop.app, f"CREATE VIEW mine AS SELECT DISTINCT release FROM {VIEW}")

    assert shop.release(stamps(2)).outcome == "promoted"

    reader = connect(database_url)
    assert reader.execute("SELECT release FROM mine").fetchall() == [(2,)]
    reader.close()


def test_a_view_of_another_projection_is_no_view_of_the_users(shop: Shop) -> None:
    """Names that begin alike are two names."""
    other = stamps(1, name="stamps_by_day")
    shop.knows(stamps(1), other)
    shop.app.project()

    assert shop.release(stamps(2, long=True), other).outcome == "promoted"


# --- undo ---------------------------------------------------------------------


def test_undo_brings_the_old_build_back_caught_up(shop: Shop) -> None:
    """It has folded what came since by its own code; undone twice is done."""
    shop.release(stamps(2, long=True))
    shop.take(25)
    shop.knows(stamps(1), stamps(2, long=True))

    swap = shop.app.undo("stamps", reason="wrong totals")

    assert (swap.live, swap.retired, swap.behind) == (1, 2, 0)
    assert shop.seen() == (1, 65)
    assert shop.roles() == ["live", "retired"]
    shop.take(5)
    shop.app.project()
    assert shop.seen() == (1, 70)
    assert shop.app.undo("stamps").live == 2
    assert shop.seen() == (2, 70)
    assert shop.app.verify(names=["stamps"]).findings == []


def test_undo_without_the_old_code_says_how_far_behind_it_is(shop: Shop) -> None:
    """Only who accepts the old rows gets them, and they wait at their cursor."""
    shop.release(stamps(2))
    shop.take(7)

    with pytest.raises(UsageError, match=r"7 events behind.*--behind; nothing was"):
        shop.app.undo("stamps")

    assert shop.roles() == ["retired", "live"]
    swap = shop.app.undo("stamps", behind=True)
    assert (swap.live, swap.behind) == (1, 7)
    assert shop.seen() == (1, 40)
    (report,) = shop.app.project()
    assert report.waiting is not None
    assert shop.seen() == (1, 40)


def test_undo_without_the_old_code_needs_none_where_nothing_came_since(
    shop: Shop,
) -> None:
    """A retired build at the head is whole as it is."""
    shop.release(stamps(2))

    assert shop.app.undo("stamps").behind == 0

    assert shop.seen() == (1, 40)


def test_nothing_to_undo_is_said(shop: Shop) -> None:
    """A first live build has no build to go back to."""
    with pytest.raises(NotFound, match="nothing to undo"):
        shop.app.undo("stamps")


def test_one_retired_build_is_kept(shop: Shop) -> None:
    """Older ones go with their tables, and their numbers are not used again."""
    for release in (2, 3, 4):
        shop.release(stamps(release))

    builds = shop.app.projection("stamps").builds
    assert [(b.number, b.role) for b in builds] == [(3, "retired"), (4, "live")]
    assert build_tables(shop.app) == [
        "kappa_log_build_stamps_3",
        "kappa_log_build_stamps_4",
    ]


# --- live code ----------------------------------------------------------------


def test_changed_code_waits_until_it_is_declared_compatible(shop: Shop) -> None:
    """Then it folds on; for a change of rows or columns there is no such way."""

    def same_fold(state: Stamp | None, _: Event) -> Stamp | None:
        return Stamp(1, 1 + (state.seen if state else 0))

    same = projection(topics=["things"], version=1, name="stamps")(same_fold)
    shop.knows(same)
    shop.take(3)
    (waiting,) = shop.app.project()
    assert waiting.waiting is not None
    assert "kappa-log replay stamps" in waiting.waiting
    assert shop.seen() == (1, 40)

    assert shop.app.compatible("stamps", reason="the same sum") == ["code"]

    (report,) = shop.app.project()
    assert report.waiting is None
    assert shop.seen() == (1, 43)
    for other in (stamps(2, long=True), stamps(2, key=lambda event: event.entity_id)):
        shop.knows(other)
        with pytest.raises(UsageError, match="cannot be declared compatible"):
            shop.app.compatible("stamps")


def test_old_code_folds_the_live_build_on_until_the_new_one_is_promoted(
    shop: Shop,
) -> None:
    """A newer version beside it changes nothing for readers until it is replayed."""
    shop.knows(stamps(1), stamps(2))
    shop.take(10)
    shop.app.project()
    assert shop.seen() == (1, 50)

    done = shop.app.replay("stamps", promote=False)
    shop.take(10)
    shop.app.project()

    assert (done.outcome, done.promoted) == ("kept", False)
    assert shop.seen() == (1, 60)
    assert shop.app.promote("stamps").outcome == "promoted"
    assert shop.seen() == (2, 60)


# --- diff and limits ----------------------------------------------------------


def partly_changed() -> Projection:
    """Return a second version of `stamps(1)` that changes three rows, removes one."""

    def fold(state: Stamp | None, event: Event) -> Stamp | None:
        if event.entity_id == "e19":
            return None
        extra = 100 if event.entity_id in ("e00", "e01", "e02") else 0
        return Stamp(1 + extra, (state.seen if state else 0) + 1)

    return projection(topics=["things"], version=2, name="stamps")(fold)


def test_the_diff_counts_rows_and_shows_examples(shop: Shop) -> None:
    """What changed is shown before and after, without the columns that did not."""
    execute(shop.app, "DELETE FROM kappa_log_build_stamps_1 WHERE entity_id = 'e05'")

    done = shop.release(partly_changed(), promote=False)

    assert (done.added, done.removed, done.changed) == (1, 1, 3)
    assert done.diff is not None
    assert (done.diff.old_rows, done.diff.new_rows) == (19, 19)
    changes: dict[str, tuple[Any, Any]] = {
        e.key["entity_id"]: (e.before, e.after) for e in done.diff.examples
    }
    assert changes == {
        "e05": (None, {"release": 1, "seen": 2}),
        "e19": ({"release": 1, "seen": 2}, None),
        "e00": ({"release": 1}, {"release": 101}),
        "e01": ({"release": 1}, {"release": 101}),
        "e02": ({"release": 1}, {"release": 101}),
    }
    assert shop.app.diff("stamps") == done.diff
    assert isinstance(done.diff.examples[0], RowDiff)


def test_the_diff_is_taken_at_the_live_cursor_and_not_at_the_head(shop: Shop) -> None:
    """Events that the live build has not seen are no differences."""
    shop.take(20)

    done = shop.release(partly_changed())

    assert (done.added, done.removed, done.changed) == (0, 1, 3)
    assert done.diff is not None
    assert done.diff.position == 40
    assert done.to_position == 60


def test_the_diff_names_columns_that_only_one_build_has(shop: Shop) -> None:
    """They are no changes of each row."""
    done = shop.release(stamps(1, long=True, name="stamps"), promote=False)

    assert done.diff is not None
    assert (done.added, done.removed, done.changed) == (0, 0, 0)
    assert (done.diff.columns_added, done.diff.columns_removed) == (["label"], [])


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [("3", "refused"), ("19.9%", "refused"), ("4", "promoted"), ("20%", "promoted")],
)
def test_max_changed_refuses_a_surprising_promote(
    shop: Shop, limit: str, outcome: str
) -> None:
    """Four of twenty rows differ; what was refused is kept to be looked at."""
    done = shop.release(partly_changed(), max_changed=limit)

    assert done.outcome == outcome
    if outcome == "promoted":
        assert shop.roles() == ["retired", "live"]
        return
    assert done.note is not None
    assert "4 rows differ" in done.note
    assert not done.promoted
    assert shop.seen() == (1, 40)
    assert shop.roles() == ["live", "shadow"]
    assert shop.app.promote("stamps", max_changed="0").outcome == "refused"
    assert shop.app.promote("stamps").outcome == "promoted"
    assert shop.roles() == ["retired", "live"]


def test_a_max_changed_that_is_no_number_is_refused_at_once(shop: Shop) -> None:
    """Nothing is built, and nothing is left to be resumed."""
    limits = ["many", "-1", "5 %%", "nan%", "1.5", ""]
    for limit in limits:
        with pytest.raises(UsageError, match="--max-changed"):
            shop.release(stamps(2), max_changed=limit)
    assert shop.roles() == ["live"]
    shop.release(stamps(2), promote=False)

    for limit in limits:
        with pytest.raises(UsageError, match="--max-changed"):
            shop.app.promote("stamps", max_changed=limit)

    assert shop.app.replays(unfinished=True) == []
    assert shop.app.promote("stamps").outcome == "promoted"


# --- what is not promoted -----------------------------------------------------


def test_a_past_state_is_never_promoted(shop: Shop) -> None:
    """A side build stays beside the live one until it is dropped."""
    first = shop.app.event(1).recorded_at
    shop.knows(stamps(1))

    done = shop.app.replay("stamps", until=first + timedelta(days=1))

    assert (done.outcome, done.promoted, done.to_position) == ("side", False, 40)
    with pytest.raises(NotFound, match="shadow build of stamps"):
        shop.app.promote("stamps")
    assert shop.roles() == ["live", "side"]
    assert shop.release(stamps(2)).outcome == "promoted"
    assert shop.roles() == ["retired", "side", "live"]
    shop.app.drop_build("stamps", 2)
    assert shop.roles() == ["retired", "live"]
    assert len(build_tables(shop.app)) == 2
    with pytest.raises(UsageError, match="live"):
        shop.app.drop_build("stamps", 3)


def stopping(phase: str) -> Callable[[Any], None]:
    """Return a callback that interrupts a replay in a phase."""

    def on_progress(progress: Any) -> None:
        if progress.phase == phase:
            raise KeyboardInterrupt

    return on_progress


def test_a_replay_is_not_resumed_by_other_code(shop: Shop) -> None:
    """Its rows would be a mix; it can be cancelled, or resumed by its own code."""
    with pytest.raises(KeyboardInterrupt):
        shop.release(stamps(2), on_progress=stopping("fill"))
    (left,) = shop.app.replays(unfinished=True)
    assert shop.app.interrupted_replay == left.id
    shop.knows(stamps(3))

    with pytest.raises(StaleCode, match=f"--cancel {left.id}") as found:
        shop.app.resume(left.id)

    assert found.value.parts == ["code"]
    assert shop.seen() == (1, 40)
    shop.knows(stamps(2))
    assert shop.app.resume(left.id).outcome == "promoted"
    with pytest.raises(UsageError, match="has ended: promoted"):
        shop.app.resume(left.id)
    with pytest.raises(UsageError, match="has ended: promoted"):
        shop.app.cancel(left.id)


def test_a_kept_shadow_is_not_promoted_by_other_code(shop: Shop) -> None:
    """It must catch up, and only its own code can."""
    shop.release(stamps(2), promote=False)
    shop.knows(stamps(3))

    with pytest.raises(StaleCode):
        shop.app.promote("stamps")

    assert shop.app.replays(unfinished=True) == []
    assert shop.seen() == (1, 40)


def test_a_fold_that_fails_leaves_the_live_build_alone(shop: Shop) -> None:
    """The message says so; cancelled and mended, the next replay passes."""

    def failing(_: Stamp | None, event: Event) -> Stamp | None:
        if event.position == 33:
            raise ArithmeticError
        return Stamp(2, 1)

    code = projection(topics=["things"], version=2, name="stamps")(failing)
    with pytest.raises(
        ProjectionError, match=r"position 33.*live build was not changed"
    ):
        shop.release(code)

    assert shop.seen() == (1, 40)
    (left,) = shop.app.replays(unfinished=True)
    shop.app.cancel(left.id)
    assert shop.roles() == ["live"]
    assert shop.release(stamps(2)).outcome == "promoted"


def test_a_live_build_made_while_the_first_replay_runs_is_retired(
    database_url: str, tmp_path: Path
) -> None:
    """Who comes first is no matter: the replay's build is live in the end."""
    with open_log(database_url, tmp_path) as app:
        shop = Shop(app, tmp_path)
        done = shop.release(stamps(1), on_progress=lambda _: app.project())

        assert done.outcome == "promoted"
        assert shop.seen() == (1, 40)
        assert shop.roles() == ["live", "retired"]


def test_a_replay_with_a_start_needs_the_live_routing(shop: Shop) -> None:
    """Rows of other keys or columns cannot be taken over; a full replay can be."""
    for other in (
        stamps(2, long=True),
        stamps(2, key=lambda event: event.entity_id),
    ):
        with pytest.raises(UsageError, match="full replay"):
            shop.release(other, from_position=30)
    assert shop.roles() == ["live"]
    shop.app.drop_database()
    shop.app.create_database()
    with pytest.raises(UsageError, match=r"no live build.*full replay"):
        shop.release(stamps(1), from_position=1)
