"""What became of a world: read by users' means, and compared with what was produced."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.storage import lists, log
from support.history import Cursor, History, Outcome, Page, Place, Produced, Row, check
from support.kafka_worker import Trail, follow

if TYPE_CHECKING:
    from support.kafka_world import World

# --- readers ----------------------------------------------------------------------


def page_of(app: KappaLog, after: int, limit: int, entity: str | None = None) -> Page:
    """Return a page of events as users get it, and the head with it."""
    with app.database.read() as connection:
        head = log.head(connection, app.database).position
        found = lists.events(
            connection,
            app.database,
            lists.EventFilter(after=after, entity_id=entity),
            limit=limit,
            oldest_first=True,
        )
    return Page(head, tuple((event.position, event.payload_text) for event in found))


def read(app: KappaLog, name: str, limit: int, entity: str | None = None) -> Cursor:
    """Return what a reader is given that reads to the end, page by page."""
    pages: list[Page] = []
    while (page := page_of(app, _last(pages), limit, entity)).seen:
        pages.append(page)
    return Cursor(name, tuple(pages), wants=_wanting(entity))


class Following:
    """A reader that reads on, in a thread, while the log grows."""

    def __init__(self, app: KappaLog) -> None:
        """Begin in `with`."""
        self._app = app
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._pages: list[Page] = []
        self._error: BaseException | None = None

    @property
    def cursor(self) -> Cursor:
        """What it was given."""
        return Cursor("while it went on", tuple(self._pages))

    def __enter__(self) -> Self:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and raise what went wrong in the thread."""
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.02):
                page = page_of(self._app, _last(self._pages), 40)
                if page.seen:
                    self._pages.append(page)
        except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
            self._error = error


def _last(pages: list[Page]) -> int:
    return pages[-1].seen[-1][0] if pages else 0


def _wanting(entity: str | None) -> Callable[[Row], bool]:
    def wants(row: Row) -> bool:
        if entity is None:
            return True
        return row.payload is not None and json.loads(row.payload)["who"] == entity

    return wants


# --- judgement --------------------------------------------------------------------


def faults(world: World, *cursors: Cursor) -> list[str]:
    """Return all that is wrong, in words; nothing if the promises were kept."""
    readers = [
        *cursors,
        read(world.app, "small pages", 7),
        read(world.app, "one person", 50, "w1"),
    ]
    return list(_Judgement(world).all(readers))


class _Judgement:
    """Compares what a world's log holds at the end with what was produced."""

    def __init__(self, world: World) -> None:
        """Read all of it once."""
        self._world = world
        self._tables = world.app.database.tables
        table = self._tables.events
        self._rows: dict[int, Row] = {}
        self._entities: list[tuple[str | None, Row]] = []
        for place, position, payload, entity in self._placed(
            table, "position", "payload", "entity_id"
        ):
            self._rows[position] = Row(position, place, payload)
            self._entities.append((entity, self._rows[position]))
        self._committed = [
            produced
            for produced in world.sent
            if produced.outcome is Outcome.COMMITTED
            and produced.place not in world.deleted
        ]

    def all(self, cursors: list[Cursor]) -> Iterator[str]:
        """Yield what is wrong."""
        yield from self._world.errors
        yield from (f"{f.fault}: {f.where}" for f in check(self._history(cursors)))
        yield from self._misplaced()
        yield from self._misrepeated()
        yield from self._miscounted()
        yield from self._mistimed()
        yield from self._misfolded()
        found = self._world.app.verify(names=["trails"]).findings
        yield from (finding.message for finding in found)

    def _history(self, cursors: list[Cursor]) -> History:
        skipped = {p.place for p in self._committed if p.place and _kind(p) == "skip"}
        beside = {
            row[0]
            for table in (self._tables.duplicates, self._tables.failures)
            for row in self._placed(table)
        }
        return History(
            produced=self._world.sent,
            rows=self._rows.values(),
            checkpoints=self._world.offsets(),
            cursors=cursors,
            elsewhere=beside | skipped | self._world.deleted,
        )

    def _misplaced(self) -> Iterator[str]:
        """Find records that became something else than they should, or twice so."""
        failures, duplicates = (
            Counter(row[0] for row in self._placed(table))
            for table in (self._tables.failures, self._tables.duplicates)
        )
        for place, times in (failures + duplicates).items():
            if times > 1:
                yield f"{place} is kept {times} times beside the log"
        kept = {row.place for row in self._rows.values()} | set(duplicates)
        for kind, found in (("fail", set(failures)), ("keep", kept)):
            wanted = {p.place for p in self._committed if p.place and _kind(p) == kind}
            yield from (f"{place} is not in {kind!r}" for place in wanted - found)
            yield from (f"{place} is in {kind!r}" for place in found - wanted)

    def _misrepeated(self) -> Iterator[str]:
        """Find duplicates of what they do not repeat."""
        payloads = {produced.place: produced.payload for produced in self._committed}
        for place, repeats in self._placed(self._tables.duplicates, "repeats"):
            row = self._rows[repeats]
            if row.place == place or row.payload != payloads.get(place):
                yield f"{place} does not repeat position {repeats}"

    def _miscounted(self) -> Iterator[str]:
        """Find partitions not read to their end, or whose ledger says else."""
        offsets = self._world.offsets()
        counts = ("acked", "skipped", "duplicate", "failed", "parked")
        ledger: dict[tuple[str, int], list[Any]] = {}
        for place, *row in self._placed(
            self._tables.checkpoints, "id", "from_offset", "to_offset", *counts
        ):
            ledger.setdefault(place[:2], []).append(row)
        for lane, end in self._world.ends().items():
            where = f"partition {lane[1]}"
            if offsets.get(lane) != end:
                yield f"{where} is read to {offsets.get(lane)} of {end}"
            rows = sorted(ledger.get(lane, []))
            for before, after in pairwise(rows):
                if before[2] != after[1]:
                    yield f"{where}: the ledger has a hole at {before[2]}"
            there = Counter(
                _kind(p) for p in self._committed if p.place and p.place[:2] == lane
            )
            told = [sum(row[n] for row in rows) for n in range(3, 3 + len(counts))]
            if [told[1], told[3], sum(told)] != [
                there["skip"],
                there["fail"],
                there.total(),
            ]:
                yield f"{where}: the ledger has {told} of {counts}, not {there}"

    def _mistimed(self) -> Iterator[str]:
        """Find positions at which the time goes back."""
        table = self._tables.events
        times = self._world.select(
            sa.select(table.c.position, table.c.recorded_at).order_by(table.c.position)
        )
        for before, after in pairwise(times):
            if after.recorded_at < before.recorded_at:
                yield f"position {after.position} was recorded before the one before"

    def _misfolded(self) -> Iterator[str]:
        """Find rows of the projection that are not the fold of the log."""
        states: dict[str, Trail] = {}
        for who, row in self._entities:
            if who is not None and row.payload is not None:
                states[who] = follow(states.get(who), json.loads(row.payload)["number"])
        wanted = [{"entity_id": who} | asdict(states[who]) for who in sorted(states)]
        if list(self._world.app.rows("trails")) != wanted:
            yield "the projection is not the fold of the log"

    def _placed(self, table: sa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield the places of a table's rows, and some of their columns, in order."""
        sources = self._tables.sources
        offset = "offset" if "offset" in table.c else "to_offset"
        query = sa.select(
            sources.c.name, *(table.c[c] for c in ("partition", offset, *columns))
        )
        order = next(iter(table.primary_key))
        for source, partition, number, *more in self._world.select(
            query.join_from(table, sources).order_by(order)
        ):
            yield Place(topic_id_of(source), partition, number), *more


def topic_id_of(source: str) -> str:
    """Return the id of the topic that a source is."""
    return source.partition("/")[2]


def kind_of(value: str | None) -> str:
    """Return what becomes of a record whose message the log does not have yet."""
    if value is None:
        return "keep"
    try:
        return str(json.loads(value)["do"])
    except ValueError:
        return "fail"


def _kind(produced: Produced) -> str:
    assert not isinstance(produced.payload, bytes)
    return kind_of(produced.payload)
