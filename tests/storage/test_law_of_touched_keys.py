"""The law of replay, held against a plain loop over the list of events.

At H, a touched key's row equals a full rebuild's; any other key has its live row plus
its events in (C, H]; nothing is counted twice. See `support.worlds` for the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import event as note

from kappa_log import Event, KappaLog, ProjectionError, projection
from kappa_log.errors import AlreadyRunning
from support.logs import Clock, open_log, set_bounds
from support.worlds import (
    CASES,
    NEW,
    OLD,
    Case,
    Chunk,
    Trail,
    World,
    fold,
)

pytestmark = pytest.mark.usefixtures("uncovered")


@pytest.fixture
def apps(database_url: str, tmp_path: Path) -> Any:
    """One log a batch size, all over one database that each example empties."""
    made = {n: open_log(database_url, tmp_path, batch_size=n) for n in (1, 3, 2000)}
    yield made
    for app in made.values():
        app.close()


def examples(many: int) -> Callable[[Callable[[World], None]], Callable[..., None]]:
    """Run a test on random cases; PostgreSQL takes fewer in the same time."""

    def decorate(test: Callable[[World], None]) -> Callable[..., None]:
        def run(
            apps: dict[int, KappaLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            def on(case: Case) -> None:
                bounds(monkeypatch, case)
                test(World(apps, tmp_path, case))

            on.__name__ = on.__qualname__ = test.__name__
            law = settings(
                max_examples=many if apps[1].database.is_sqlite else many // 4,
                suppress_health_check=list(HealthCheck),
                # Shrinking replays hundreds of logs; the printed case is small enough.
                phases=(Phase.explicit, Phase.reuse, Phase.generate),
                report_multiple_bugs=False,
            )(given(case=CASES)(on))
            law()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__module__ = test.__module__
        return run

    return decorate


def bounds(patch: pytest.MonkeyPatch, case: Case) -> None:
    """Make batches as small as a case says."""
    set_bounds(
        page_events=case.page_events,
        flush_seconds=case.flush_seconds,
        patch=patch,
        MAX_STATES=case.max_states,
        MAX_INDEXED_ENTITIES=case.max_indexed,
    )


@examples(50)
def test_replay_with_a_start_obeys_the_law_of_touched_keys(world: World) -> None:
    """Touched keys equal a full rebuild, others their live row and what came since."""
    case, model = world.case, world.model
    world.play(case.before, case.live_moves)
    world.live()
    assert world.rows() == model.rebuilt(OLD)
    live = len(model.events)
    world.play(case.between)
    head = len(model.events)
    new = world.change()
    request, start = world.start()
    plan = world.app.plan_replay(world.name, **request)

    done = world.replay(**request)
    world.live()

    if start is None or start > head:
        note("nothing to do")
        assert (plan.nothing, done.outcome) == (True, "nothing")
        assert world.rows() == model.rebuilt(OLD)
        return
    touched = model.touched(start, head)
    note("some keys are not touched" if model.keys() - touched else "all are touched")
    assert (done.outcome, done.keys, plan.keys) == ("promoted", *2 * [len(touched)])
    assert (plan.from_position, plan.head) == (start, head)
    assert plan.events == model.count(live, touched)
    assert world.rows() == model.replayed(OLD, new, live, touched)
    assert world.status().unkeyed == model.unkeyed()
    assert world.status().mixed is not None
    roles = [build.role for build in world.app.projection(world.name).builds]
    assert roles == ["retired", "live"]
    if not case.is_changed:
        assert world.app.verify(names=[world.name]).findings == []


@examples(24)
def test_full_replay_equals_one_fold_of_all_events(world: World) -> None:
    """Rows do not depend on pages, writes, memory or on what comes in meanwhile."""
    case, model = world.case, world.model
    world.play([*case.before, *case.between], case.live_moves)
    new = world.change()
    plan = world.app.plan_replay(world.name)
    assert plan.events == model.count(len(model.events))

    done = world.replay()

    assert done.outcome == "promoted"
    assert world.rows() == model.rebuilt(new, done.to_position)
    world.live()
    assert world.rows() == model.rebuilt(new)
    assert world.status().unkeyed == model.unkeyed()
    assert world.app.verify(names=[world.name]).findings == []


@examples(24)
def test_live_folding_in_pieces_equals_one_fold(world: World) -> None:
    """Each run goes on where the last one ended, whatever memory it had."""
    case, model = world.case, world.model
    for chunk, moves in zip(
        [*case.before, *case.between], case.live_moves * 2, strict=False
    ):
        world.take(chunk)
        if moves:
            world.live()
            assert world.rows() == model.rebuilt(OLD)
            assert world.status().unkeyed == model.unkeyed()


@examples(24)
def test_until_builds_the_state_of_the_positions_before(world: World) -> None:
    """A past state holds all below the first position at or after the time."""
    case, model = world.case, world.model
    world.play([*case.before, *case.between])
    kind = "event-time" if case.start[0] == "event-time" else "recorded"
    world.case = replace(case, start=(kind, case.start[1]))
    request, first = world.start()
    end = len(model.events) if first is None else first - 1

    request["until"] = request.pop("since")
    plan = world.app.plan_replay(world.name, **request)
    done = world.app.replay(world.name, **request)

    assert plan.events == model.count(end)
    assert (done.outcome, done.promoted, done.to_position) == ("side", False, end)
    assert world.rows(done.build) == model.rebuilt(OLD, end)
    assert world.app.projection(world.name).live is None


# --- interrupts ---------------------------------------------------------------


class Interruption:
    """Raises at the n-th time that the clock is read or progress is shown."""

    def __init__(self, clock: Clock) -> None:
        """Never raise until told to."""
        self._clock = clock
        self._left = 0
        self._error: type[BaseException] = RuntimeError
        self.came = False
        """Whether it raised in the last block."""

    @contextmanager
    def after(self, ticks: int, error: type[BaseException]) -> Iterator[None]:
        """Raise after so many ticks of the block, which ends there, quietly."""
        self._left, self._error, self.came = ticks, error, False
        with suppress(error):
            yield
        self._left = 0

    def tick(self, _: object = None) -> None:
        """Count, and raise."""
        self._left -= 1
        if self._left == 0:
            self.came = True
            raise self._error

    def __call__(self) -> datetime:
        """Tell the time: the engine asks for it in the midst of its transactions."""
        self.tick()
        return self._clock()


STEADY: list[Chunk] = [
    (
        0,
        1,
        [
            {
                "id": who,
                "type": "t",
                "at": None,
                "n": n % 5,
                "op": op,
                "many": [n, n + 1],
            }
            for n, (who, op) in enumerate(
                zip(whose, ["add", "note", "add", "drop"] * 3, strict=True),
                start=base,
            )
        ],
    )
    for base, whose in ((0, "zbczbdacbzea"), (3, "abcabdacbdea"), (6, "abcabcacbcea"))
]
"""Position 11 is the first of e, and z has none after 10."""

PLAIN = Case(
    key=None,
    has_groups=False,
    before=[],
    between=[],
    meanwhile=[],
    live_moves=[False] * 6,
    live_keeps_up=False,
    is_changed=True,
    start=("from_position", 25),
    page_events=7,
    flush_seconds=0.0,
    max_states=2,
    max_indexed=500,
    batch_size=2000,
)


@pytest.fixture
def steady(apps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a log of 36 events; its live build is at position 24, by older code."""
    bounds(monkeypatch, PLAIN)
    world = World(apps, tmp_path, PLAIN)
    for chunk in STEADY[:2]:
        world.take(chunk)
    return world


STARTS = pytest.mark.parametrize(
    "request_", [{}, {"from_position": 20}], ids=["full", "start"]
)


@STARTS
def test_replay_resumed_after_an_interrupt_anywhere_equals_one_without(
    steady: World, request_: dict[str, Any]
) -> None:
    """Whatever step an interrupt hits, resuming ends with the same rows, once."""
    names = [f"r{n}" for n in range(1, 60)]
    for name in names:
        prepared(steady, name)
        steady.live()
    steady.take(STEADY[2])
    expected = steady.model.replayed(OLD, NEW, 24, touched(steady, request_))
    interruption = Interruption(steady.clock)
    steady.app._clock = interruption  # noqa: SLF001
    for step, name in enumerate(names, start=1):
        prepared(steady, name)
        steady.app.registry.add(steady.code(NEW, 2))
        error = KeyboardInterrupt if step % 2 else RuntimeError
        with interruption.after(step, error):
            steady.app.replay(name, on_progress=interruption.tick, **request_)
        if not interruption.came:
            break
        where = f"interrupted at step {step}"
        assert steady.rows() in (steady.model.rebuilt(OLD, 24), expected), where
        go_on(steady, request_)
        assert not steady.app.replays(name, unfinished=True), where
        assert steady.rows() == expected, where
        roles = [build.role for build in steady.app.projection(name).builds]
        assert roles == ["retired", "live"], where
    assert 10 < step < len(names)
    assert steady.rows() == expected


def prepared(world: World, name: str) -> None:
    """Go over to another projection, of the old code."""
    world.name = name
    world.knows(world.code(OLD, 1))


def touched(world: World, request: dict[str, Any]) -> set[Any]:
    """Return the keys that a replay folds anew."""
    return world.model.touched(request.get("from_position", 1), len(world.model.events))


def go_on(world: World, request: dict[str, Any]) -> None:
    """Resume what was interrupted, or begin anew if nothing was begun."""
    left = world.app.replays(world.name, unfinished=True)
    if not left:
        begun = world.app.replays(world.name)
        if begun:
            assert begun[0].outcome == "promoted", "it raised, yet it ended"
            return
        world.app.replay(world.name, **request)
        return
    with pytest.raises(AlreadyRunning, match=f"--resume {left[0].id}.*--cancel"):
        world.app.replay(world.name, **request)
    world.app.resume(left[0].id)


@STARTS
def test_replay_interrupted_again_and_again_gets_to_its_end(
    steady: World, request_: dict[str, Any]
) -> None:
    """Each resume begins where the last one ended, not from the beginning."""
    prepared(steady, "patient")
    steady.live()
    steady.take(STEADY[2])
    expected = steady.model.replayed(OLD, NEW, 24, touched(steady, request_))
    steady.app.registry.add(steady.code(NEW, 2))
    interruption = Interruption(steady.clock)
    steady.app._clock = interruption  # noqa: SLF001
    with interruption.after(6, KeyboardInterrupt):
        steady.app.replay("patient", on_progress=interruption.tick, **request_)

    resumes = 0
    while interruption.came:
        resumes += 1
        assert resumes < 40, "forty resumes did not end it"
        (left,) = steady.app.replays("patient", unfinished=True)
        with interruption.after(7, KeyboardInterrupt):
            steady.app.resume(left.id, on_progress=interruption.tick)

    assert resumes > 1
    assert steady.rows() == expected


def test_live_folding_interrupted_anywhere_equals_one_run(steady: World) -> None:
    """An interrupt of live folding loses and doubles nothing."""
    steady.take(STEADY[2])
    interruption = Interruption(steady.clock)
    steady.app._clock = interruption  # noqa: SLF001
    for step in range(1, 40):
        prepared(steady, f"l{step}")
        error = KeyboardInterrupt if step % 2 else RuntimeError
        with interruption.after(step, error):
            steady.app.project([steady.name], on_progress=interruption.tick)
        if not interruption.came:
            break
        steady.live()
        where = f"interrupted at step {step}"
        assert steady.rows() == steady.model.rebuilt(OLD), where
    assert 8 < step < 39
    assert steady.rows() == steady.model.rebuilt(OLD)


def test_all_before_a_failing_event_is_written(
    apps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold that fails is found first though a key fails later in the same page."""
    bounds(monkeypatch, replace(PLAIN, page_events=100))
    world = World(apps, tmp_path, PLAIN)
    world.take(STEADY[0])

    def key(event: Event) -> str:
        assert event.position != 9, "no key"
        return event.entity_id or ""

    def failing(state: Trail | None, event: Event) -> Trail | None:
        assert event.position != 5, "no fold"
        return OLD(state, event)

    code = projection(name="failing", version=1, topics=["a"], key=key)(failing)
    world.knows(code)
    world.name = "failing"

    with pytest.raises(ProjectionError) as found:
        world.app.project([world.name], on_error="stop")

    assert found.value.position == 5
    assert world.status().cursor == 4
    pairs = [(kept.event.entity_id, kept.event) for kept in world.model.events[:4]]
    assert world.rows() == fold(OLD, pairs)
