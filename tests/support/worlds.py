"""Random logs, and a model of what projections must make of them.

The oracle is the loop in `fold`: it shares reducers and key functions with the engine,
as it must, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from kappa_log import Event, KappaLog, Projection, ReplayReport, make_event, projection
from kappa_log.fold import Registry
from kappa_log.status import BuildStatus
from support.logs import START, Clock, append

# --- folds and keys whose rows show every error of order, repetition or loss -----


@dataclass(frozen=True, slots=True)
class Trail:
    """What an entity saw, in order: two events swapped make another trail."""

    seen: int = 0
    trail: int = 0
    share: float = 0.0
    money: Decimal = Decimal(0)
    latest: list[int] = field(default_factory=list)
    note: str | None = None
    at: datetime | None = None
    is_odd: bool = False


def trail_fold(factor: int, drop: str) -> Callable[[Trail | None, Event], Trail | None]:
    """Return a fold; another factor or another word for drop is another fold."""

    def fold(state: Trail | None, event: Event) -> Trail | None:
        n, op = event.payload["n"], event.payload["op"]
        if op == drop:
            return None
        old = state or Trail()
        return Trail(
            seen=old.seen + 1,
            trail=(old.trail * factor + n) % 1_000_003,
            share=old.share / 3 + n,
            money=old.money + Decimal(n) / 10,
            latest=[*old.latest[-2:], n],
            note=f"{op}ö{n}" if op == "note" else old.note,
            at=event.event_time or old.at,
            is_odd=not old.is_odd,
        )

    return fold


OLD, NEW = trail_fold(31, "drop"), trail_fold(37, "forget")


def by_type(event: Event) -> str | None:
    """Return one key, or none."""
    return event.event_type


def by_number(event: Event) -> int:
    """Return a key that is no text."""
    return int(event.payload["n"]) - 2


def by_pair(event: Event) -> tuple[str, bool, date] | None:
    """Return a key of several columns, or none."""
    if event.entity_id is None:
        return None
    return event.entity_id, event.payload["n"] % 2 == 0, date(2024, 1, 1)


def by_many(event: Event) -> list[str] | None:
    """Return several keys with repeats, an empty list, or None."""
    if event.payload["n"] == 0:
        return None
    return [f"k{n % 4}" for n in event.payload["many"]]


def by_bytes(event: Event) -> list[tuple[bytes, int]]:
    """Return several keys of several columns."""
    return [(b"\0" * n, -n) for n in event.payload["many"]]


KEYS = [None, by_type, by_number, by_pair, by_many, by_bytes]


def keys_of(key: Any, event: Event) -> list[Any]:
    """Return the keys of an event, each once."""
    found = event.entity_id if key is None else key(event)
    listed = found if isinstance(found, list) else [found]
    return [k for k in dict.fromkeys(listed) if k is not None]


# --- the oracle ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """An event as the test knows it, without asking the engine."""

    event: Event
    lane: tuple[str, str]
    recorded: datetime

    @property
    def position(self) -> int:
        """Its place in the log."""
        return self.event.position


States = dict[Any, Trail | None]


def fold(
    reducer: Any,
    pairs: Iterable[tuple[Any, Event]],
    states: States | None = None,
) -> States:
    """Fold pairs one after the other: the plain loop that everything must equal."""
    found = dict(states or {})
    for key, event in pairs:
        found[key] = reducer(found.get(key), event)
    return {key: state for key, state in found.items() if state is not None}


class Model:
    """All events of a log, and what a projection must make of them."""

    def __init__(self, key: Any, lanes: set[tuple[str, str]]) -> None:
        """Begin empty."""
        self.key = key
        self.lanes = lanes
        self.events: list[Kept] = []

    def pairs(self, after: int = 0, upto: int | None = None) -> list[tuple[Any, Event]]:
        """Return (key, event) of the projection's events in (after, upto]."""
        end = len(self.events) if upto is None else upto
        return [
            (key, kept.event)
            for kept in self.events[after:end]
            if kept.lane in self.lanes
            for key in keys_of(self.key, kept.event)
        ]

    def unkeyed(self) -> int:
        """Return how many of the projection's events have no key."""
        mine = [kept for kept in self.events if kept.lane in self.lanes]
        return sum(not keys_of(self.key, kept.event) for kept in mine)

    def keys(self) -> set[Any]:
        """Return all keys that ever had an event."""
        return {key for key, _ in self.pairs()}

    def count(self, upto: int, only: set[Any] | None = None) -> int:
        """Return how many events of the projection up to a position have such keys."""
        return sum(
            only is None or not only.isdisjoint(keys_of(self.key, kept.event))
            for kept in self.events[:upto]
            if kept.lane in self.lanes
        )

    def rebuilt(self, reducer: Any, upto: int | None = None) -> States:
        """Return what a full rebuild makes."""
        return fold(reducer, self.pairs(upto=upto))

    def touched(self, start: int, head: int) -> set[Any]:
        """Return the keys of the projection's events in [start, head]."""
        return {key for key, _ in self.pairs(start - 1, head)}

    def replayed(self, old: Any, new: Any, live: int, touched: set[Any]) -> States:
        """Return what the law says: touched keys anew, others on top of live rows."""
        rows = self.rebuilt(old, live)
        untouched = {key: state for key, state in rows.items() if key not in touched}
        again = [
            (key, event)
            for key, event in self.pairs()
            if key in touched or event.position > live
        ]
        return fold(new, again, untouched)


# --- random logs --------------------------------------------------------------

LANES = [("a", "g1"), ("b", "g1"), ("other", "g1"), ("a", "g2")]

OBJECTS = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["ada", "bob", "ö", "", None]),
        "type": st.sampled_from(["t", "u", None]),
        "at": st.none() | st.integers(0, 20),
        "n": st.integers(0, 4),
        "op": st.sampled_from(["add", "add", "add", "note", "drop", "forget"]),
        "many": st.lists(st.integers(0, 5), max_size=4),
    }
)

Chunk = tuple[int, int, list[dict[str, Any]]]
"""Lane, minutes that the clock moves on, objects."""

CHUNKS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(-2, 3), st.lists(OBJECTS, min_size=1, max_size=7)
    ),
    min_size=1,
    max_size=6,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One random log and one random replay of it."""

    key: Any
    has_groups: bool
    before: list[Chunk]
    """Chunks before the live build's last move before the replay."""
    between: list[Chunk]
    """Chunks that only the replay has seen."""
    meanwhile: list[Chunk]
    """Chunks that come in while it runs."""
    live_moves: list[bool]
    """After which chunks before the last the live build moves too."""
    live_keeps_up: bool
    is_changed: bool
    start: tuple[str, int]
    page_events: int
    flush_seconds: float
    max_states: int
    max_indexed: int
    batch_size: int


CASES = st.builds(
    Case,
    key=st.sampled_from(KEYS),
    has_groups=st.booleans(),
    before=st.one_of(st.just([]), CHUNKS),
    between=st.one_of(st.just([]), CHUNKS),
    meanwhile=st.one_of(st.just([]), CHUNKS),
    live_moves=st.lists(st.booleans(), min_size=6, max_size=6),
    live_keeps_up=st.booleans(),
    is_changed=st.booleans(),
    start=st.tuples(
        st.sampled_from(["from_position", "recorded", "event-time", "from_offset"]),
        st.integers(0, 24),
    ),
    page_events=st.sampled_from([1, 2, 3, 7, 10_000]),
    flush_seconds=st.sampled_from([0.0, 1000.0]),
    max_states=st.sampled_from([1, 2, 500_000]),
    max_indexed=st.sampled_from([0, 500]),
    batch_size=st.sampled_from([1, 3, 2000]),
)


class World:
    """A fresh log with its model, for one random case."""

    def __init__(self, apps: dict[int, KappaLog], folder: Path, case: Case) -> None:
        """Empty the log and give it the old code."""
        self.app = apps[case.batch_size]
        self.case = case
        self.name = f"p{next(_NUMBERS)}"
        self.folder = folder / self.name
        self.folder.mkdir()
        self.clock = Clock()
        self.app._clock = self.clock  # noqa: SLF001 - one log serves many examples
        self.app.reset_database()
        self.model = Model(case.key, set(LANES[:2]))
        self.old = self.code(OLD, 1)
        self.knows(self.old)

    def knows(self, *code: Projection) -> None:
        """Register this code and no other."""
        self.app.__dict__["registry"] = Registry(code)

    def code(self, reducer: Any, version: int) -> Projection:
        """Return the projection of this case with one of the folds."""
        return projection(
            name=self.name,
            version=version,
            topics=["a", "b"],
            groups=["g1"] if self.case.has_groups else None,
            key=self.case.key,
        )(reducer)

    def take(self, chunk: Chunk) -> None:
        """Ingest a chunk, and note in the model what must come of it."""
        number, minutes, objects = chunk
        lane = LANES[number if self.case.has_groups else number % 3]
        self.clock.move(minutes)
        before = [kept.recorded for kept in self.model.events[-1:]]
        recorded = max([self.clock.now, *before])
        position = len(self.model.events)
        whole = []
        for found in objects:
            position += 1
            at = None if found["at"] is None else START + timedelta(hours=found["at"])
            text = None if at is None else at.isoformat()
            whole.append(found | {"at": text, "unique": position})
            kept = make_event(
                position,
                whole[-1],
                entity_id=found["id"],
                event_type=found["type"],
                event_time=at,
            )
            self.model.events.append(Kept(kept, lane, recorded))
        topic, group = lane
        done = append(
            self.app, self.folder / f"{topic}-{group}", whole, topic=topic, group=group
        )
        assert done.counts.acked == len(objects)
        assert done.head == position

    def play(self, chunks: Iterable[Chunk], live_moves: Iterable[bool] = ()) -> None:
        """Ingest chunks; before some of them the live build moves to the head."""
        for chunk, moves in zip_longest(chunks, live_moves):
            if chunk is not None:
                if moves:
                    self.live()
                self.take(chunk)

    def live(self) -> None:
        """Move the live build to the head."""
        self.app.project([self.name])

    def change(self) -> Any:
        """Register the new fold if the case has one; return the fold of replays."""
        if not self.case.is_changed:
            return OLD
        self.app.registry.add(self.code(NEW, 2))
        return NEW

    def replay(self, **request: Any) -> ReplayReport:
        """Replay while the case's chunks come in; take what is left of them after."""
        waiting = list(self.case.meanwhile)

        def meanwhile(_: object) -> None:
            if waiting:
                self.take(waiting.pop(0))
                if self.case.live_keeps_up:
                    self.live()

        done = self.app.replay(self.name, on_progress=meanwhile, **request)
        self.play(waiting)
        return done

    def status(self) -> BuildStatus:
        """Return the live build."""
        found = self.app.projection(self.name).live
        assert found is not None
        return found

    def rows(self, build: int | None = None) -> States:
        """Return the rows that users see, as key → state."""
        fields = set(Trail.__dataclass_fields__)
        found: States = {}
        for row in self.app.rows(self.name, build=build):
            parts = tuple(v for name, v in row.items() if name not in fields)
            key = parts[0] if len(parts) == 1 else parts
            found[key] = Trail(**{n: v for n, v in row.items() if n in fields})
        return found

    def start(self) -> tuple[dict[str, Any], int | None]:
        """Return the request for a start, and the position that it means."""
        kind, number = self.case.start
        events = self.model.events
        if kind == "from_position":
            return {"from_position": number + 1}, number + 1
        if kind == "recorded":
            moment = START + timedelta(minutes=number - 4)
            later = [kept.position for kept in events if kept.recorded >= moment]
            return {"since": moment}, min(later, default=None)
        if kind == "event-time":
            moment = START + timedelta(hours=number)
            later = [
                kept.position
                for kept in events
                if kept.event.event_time is not None and kept.event.event_time >= moment
            ]
            return {"since": moment, "by": "event-time"}, min(later, default=None)
        mine = [k.position for k in events if k.lane == ("a", "g1")]
        found = mine[number:]
        return {"from_offset": ("a", 0, number)}, min(found, default=None)


_NUMBERS = count(1)
