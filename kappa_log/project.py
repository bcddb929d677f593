"""Project: fold what is past a build's cursor, rows and cursor in one transaction.

`Runner` is the heart of live folding and of replay alike. It reads pages, folds them
into states in memory and writes what changed from time to time. A crash costs what
was folded since the last write, and never a lost or doubled event: the cursor moves
with the rows, by compare-and-set.

A fold that raises parks its key, or stops the runner before that event. A parked key's
row is the fold of its events below its park position, whatever the size of pages and
writes; its later events stay in the log, and all other keys go on. Rows, cursor and
parked keys are written together. Who retries a parked key changes its row beside the
runners and so begins a new epoch of the build: a runner of the old one finds that when
it moves the cursor, and drops what it remembers. An error for which no key is known (in
a key function, an upcaster, a payload) always stops.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.config import OnError
from kappa_log.errors import (
    CursorConflict,
    KappaLogError,
    ProjectionError,
    RegistrationError,
    StaleCode,
    StorageError,
)
from kappa_log.events import ORIGIN, EventPage, Position
from kappa_log.fold import Folding, Projection, Registry
from kappa_log.readers import EventSource, pages, reader_of
from kappa_log.storage import builds, log, parked
from kappa_log.storage.builds import Build
from kappa_log.storage.database import ConstraintViolated, Database
from kappa_log.storage.rows import RowStore
from kappa_log.storage.views import point_view
from kappa_log.telemetry import notices, tracing

Clock = Callable[[], datetime]

GC_THRESHOLDS = (50_000, 20, 100)
"""Folding makes much short-lived garbage and no cycles. Python's default of 700 would
walk all states in memory again and again (measured: half of the time of a replay)."""

FLUSH_SECONDS = 5.0
"""How much folding a kill may cost. Writing more often costs more than it saves."""

MAX_STATES = 500_000
"""States that live folding keeps in memory between writes; replay keeps all."""

MAX_PARKED_KEYS = 10_000
"""Keys of a build that may be parked. A fold that fails for more of them is wrong for
all, and its projection stops."""

MAX_NEW_PARKED = 1_000
"""Keys parked since the last write: their errors are in memory until the next one."""


class FoldProgress(msgspec.Struct, frozen=True):
    """How far a fold is."""

    projection: str
    cursor: Position
    target: Position
    events: int
    phase: str


OnProgress = Callable[[FoldProgress], None]


class ProjectReport(msgspec.Struct, frozen=True):
    """What one run of live folding did for one projection."""

    projection: str
    build: int
    version: int
    events: int
    unkeyed: int
    from_position: Position
    to_position: Position
    rows_changed: int
    seconds: float
    parked: int = 0
    """Keys that are parked now."""
    newly_parked: int = 0
    """Those of them that this run parked."""
    waiting: str | None = None
    """Why the build waits at its cursor; None if it does not."""

    @property
    def notice(self) -> str | None:
        """What people should know who did not ask; None if there is nothing."""
        if not self.newly_parked:
            return self.waiting
        keys = "1 key" if self.newly_parked == 1 else f"{self.newly_parked:,} keys"
        return (
            f"projection '{self.projection}': the fold failed for {keys} more, which "
            f"wait up to position {self.to_position:,}; all others go on. See: "
            f"kappa-log projections parked {self.projection}"
        )


class Filling(msgspec.Struct, frozen=True):
    """What a runner that fills a replay's build does otherwise.

    Every state stays in memory, and the build's shard cursors move along.
    """

    only: Collection[Any] | None = None
    """Keys to fold; None folds all. Then the progress is that of the shards alone:
    the build's cursor says what the other rows hold."""
    start: Position | None = None
    """Where folding begins with ``only``."""


class Runner:
    """Folds the log into one build.

    Args:
        database: The log.
        build: What to fill; its cursor is where folding begins.
        projection: Its code.
        clock: For updated_at alone; rows never depend on it.
        filling: For the filling of a replay's build; None folds a complete one on.
        on_error: Whether a fold that raises parks its key, or stops.
        source: Where events are read, if not from the database.
    """

    def __init__(  # noqa: PLR0913 - each is a part of one folding, by its name
        self,
        database: Database,
        build: Build,
        projection: Projection,
        clock: Clock,
        *,
        filling: Filling | None = None,
        on_error: OnError = "stop",
        source: EventSource | None = None,
    ) -> None:
        self._database = database
        self._build = build
        self._projection = projection
        self._clock = clock
        self._is_filling = filling is not None
        self._only = None if filling is None else filling.only
        self._parks = on_error == "park"
        self._is_careful = projection.state_shape.is_immutable
        self._store = RowStore(database, build, projection)
        self._reader = reader_of(database, projection, self._only, source)
        start = None if filling is None else filling.start
        self.cursor = build.cursor if start is None else start
        """Last position whose rows are written."""
        self.events = 0
        """Matching events folded and written."""
        self.unkeyed = 0
        self.rows_changed = 0
        self.newly_parked = 0
        self.seconds = 0.0
        """From the first read to the last row written."""
        self._counted = (0, 0)
        self._folding: Folding
        self._forget()

    def run(
        self,
        upto: Position,
        *,
        phase: str = "project",
        on_progress: OnProgress | None = None,
    ) -> None:
        """Fold up to a position, inclusive, and write.

        Raises:
            ProjectionError: The fold failed on an event, and its key may not be parked
                or is not known; all before it is written.
            CursorConflict: Another runner moved the build; memory is dropped.
        """
        started = time.perf_counter()
        thresholds = gc.get_threshold()
        gc.set_threshold(*GC_THRESHOLDS)
        try:
            self._run_carefully(upto, phase, on_progress)
        except ProjectionError as error:
            # Keys and payloads of a page are made before any of it is folded, so a
            # fold may fail on an event before this one: then that is the first error.
            first = self._first_error(error, phase, on_progress)
            raise first from first.__cause__
        except (KeyboardInterrupt, StorageError):
            self._forget()
            raise
        finally:
            gc.set_threshold(*thresholds)
            self.seconds += time.perf_counter() - started

    def _first_error(
        self, first: ProjectionError, phase: str, on_progress: OnProgress | None
    ) -> ProjectionError:
        """Write all before the first event that fails, and return its error."""
        while True:
            # The failed fold may have spoiled states in memory. Those in the table
            # are good: from them to the event before the failure is a clean run.
            self._forget()
            try:
                self._run_carefully(first.position - 1, phase, on_progress)
            except ProjectionError as error:
                earlier = error
            else:
                return first
            assert earlier.position < first.position, "the same span failed again"
            first = earlier

    def fold_within(self, connection: sa.Connection, upto: Position) -> None:
        """Fold up to a position inside the caller's write transaction.

        For the few events that are left when a build is promoted. If the
        transaction fails this runner must not be used again.
        """
        if self._parks and not self._is_careful:
            self._is_careful = True
            self._forget()
        self._read_parked(connection)
        found = pages(self._reader, self._projection, self.cursor, upto, connection)
        for _, page in found:
            self._folding.apply(page)
        self._folding.complete()
        self._write(connection, upto)

    def _run_carefully(
        self, upto: Position, phase: str, on_progress: OnProgress | None
    ) -> None:
        """As `_run`; if a fold fails whose states it may have spoiled, once more.

        A fold can change a state in its place and then raise. To keep what each state
        was before each event costs much more than folding does, so that is done only
        once a fold has failed; states that cannot be changed never need it.
        """
        try:
            self._run(upto, phase, on_progress)
        except ProjectionError as error:
            if error.key is None or not self._parks or self._is_careful:
                raise
        else:
            return
        self._is_careful = True
        self._forget()
        self._run(upto, phase, on_progress)

    def _run(self, upto: Position, phase: str, on_progress: OnProgress | None) -> None:
        tracer = tracing.tracer()
        found = pages(self._reader, self._projection, self.cursor, upto)
        with contextlib.closing(found):
            while self.cursor < upto:
                with tracing.folding(
                    tracer, self._projection.name, self._build.number
                ) as span:
                    self._run_to_write(found, upto, phase, on_progress, span)

    def _run_to_write(
        self,
        found: Iterator[tuple[Position, EventPage]],
        upto: Position,
        phase: str,
        on_progress: OnProgress | None,
        span: tracing.Traced,
    ) -> None:
        """Fold pages until there is enough to write, and write it."""
        started = time.monotonic()
        first, events = self.cursor, self.events
        for until, page in found:
            self._read_parked()
            self._folding.apply(page)
            if span.is_wanted:
                span.saw(page.column("headers"))
            is_due = time.monotonic() - started >= FLUSH_SECONDS
            is_written = is_due or self._is_large or until == upto
            if is_written:
                self._folding.complete()
                with self._database.write() as connection:
                    changed = self._write(connection, until)
                self._remember(until)
                span.wrote(first + 1, until, self.events - events)
                self._tell(first, events, changed, phase, started)
            if on_progress is not None:
                on_progress(
                    FoldProgress(
                        self._projection.name,
                        until,
                        upto,
                        self.events + self._folding.events - self._counted[0],
                        phase,
                    )
                )
            if is_written:
                return

    @property
    def _is_large(self) -> bool:
        """Whether too much is in memory for waiting any longer."""
        folding = self._folding
        has_states = not self._is_filling and len(folding) > MAX_STATES
        return has_states or len(folding.new_parked) > MAX_NEW_PARKED

    def _tell(
        self, first: Position, events: int, changed: int, phase: str, started: float
    ) -> None:
        """Tell subscribers that rows and cursor were written."""
        if notices.is_heard("projection_folded"):
            notices.tell(
                "projection_folded",
                {
                    "projection": self._projection.name,
                    "build": self._build.number,
                    "phase": phase,
                    "from_position": first,
                    "to_position": self.cursor,
                    "events": self.events - events,
                    "rows_changed": changed,
                },
                seconds=time.monotonic() - started,
            )

    def _write(self, connection: sa.Connection, until: Position) -> int:
        """Write what was folded up to a position; return how many rows changed."""
        check_groups(connection, self._database, self._projection)
        # The cursor first: who finds it moved has written nothing, and waits for
        # nobody's rows.
        if self._is_filling:
            builds.move_shards(
                connection, self._database, self._build, self.cursor, until
            )
        if self._only is None:
            builds.move_cursor(
                connection,
                self._database,
                self._build,
                builds.Move(
                    self.cursor, until, self._folding.unkeyed - self._counted[1]
                ),
                self._clock(),
            )
        new = self._folding.new_parked
        parked.park(connection, self._database, self._build, new, self._clock())
        self.newly_parked += len(new)
        rows = self._folding.drain_rows()
        self._store.save(connection, rows, is_empty=self._is_empty)
        changed = len(rows.kept) + len(rows.gone)
        self.rows_changed += changed
        return changed

    def _remember(self, until: Position) -> None:
        folding = self._folding
        self.cursor = until
        self._is_empty = False
        self.events += folding.events - self._counted[0]
        self.unkeyed += folding.unkeyed - self._counted[1]
        self._counted = (folding.events, folding.unkeyed)
        if not self._is_filling and len(folding) > MAX_STATES:
            self._forget()

    def _forget(self) -> None:
        """Drop what is in memory; stored rows are read again as they are needed."""
        self._is_empty = self.cursor == ORIGIN and self._only is None
        self._counted = (0, 0)
        self._has_parked = False
        is_fresh = self.cursor == ORIGIN
        # Without care the first failure ends this folding, and the next has it.
        most = MAX_PARKED_KEYS if self._parks and self._is_careful else 0
        if self._is_filling or is_fresh:
            self._folding = self._projection.folding(only=self._only, most_parked=most)
            if not is_fresh:
                with self._database.read() as connection:
                    self._folding.adopt(
                        self._store.load_all(connection)
                        if self._only is None
                        else self._store.load(connection, self._only)
                    )
        else:
            self._folding = self._projection.folding(self._load, self._only, most)

    def _read_parked(self, connection: sa.Connection | None = None) -> None:
        """Read which keys are parked, once for as long as memory is kept."""
        if self._has_parked:
            return
        if connection is None:
            with self._database.read() as own:
                self._read_parked(own)
            return
        self._folding.parked = parked.positions(connection, self._database, self._build)
        self._has_parked = True

    def _load(self, keys: Collection[Any]) -> dict[Any, Any]:
        with self._database.read() as connection:
            return self._store.load(connection, keys)


def project(
    database: Database,
    registry: Registry,
    name: str,
    clock: Clock,
    on_progress: OnProgress | None = None,
    on_error: OnError = "park",
) -> ProjectReport:
    """Bring a projection's live build up to the head, making it if there is none.

    Raises:
        ProjectionNotFound: No such projection is registered and none has a build.
        ProjectionError: The fold failed and may not park the key, or no key is known;
            all before that event is written.
    """
    newly_parked = 0
    while True:
        build = live_build(database, registry, name, clock)
        fold = registry.made_by(name, build.fingerprints)
        with database.read() as connection:
            waiting = parked.count(connection, database, build)
            if fold is None:
                why = stale(registry, build, waiting)
                _tell_of(build, build.cursor, str(why))
                return _waiting(build, waiting, why)
            check_groups(connection, database, fold)
            head = log.head(connection, database).position
        runner = Runner(database, build, fold, clock, on_error=on_error)
        try:
            runner.run(head, on_progress=on_progress)
        except CursorConflict:
            # Somebody else folds this build, retried its parked keys, or promoted
            # another: look again.
            newly_parked += runner.newly_parked
            continue
        except StorageError:
            if _is_live(database, build):
                raise
            # Its table was dropped: two others were promoted meanwhile.
            continue
        except ProjectionError as error:
            raise _with_remedy(error, build, runner.cursor, on_error) from error
        _tell_of(build, runner.cursor, None)
        return ProjectReport(
            projection=name,
            build=build.number,
            version=build.version,
            events=runner.events,
            unkeyed=runner.unkeyed,
            from_position=build.cursor,
            to_position=runner.cursor,
            rows_changed=runner.rows_changed,
            seconds=runner.seconds,
            parked=waiting + runner.newly_parked,
            newly_parked=newly_parked + runner.newly_parked,
        )


def _tell_of(build: Build, cursor: Position, waiting: str | None) -> None:
    """Tell subscribers that a live build was seen to."""
    if notices.is_heard("projection_seen_to"):
        facts = {"projection": build.projection, "cursor": cursor, "waiting": waiting}
        notices.tell("projection_seen_to", facts)


def _is_live(database: Database, build: Build) -> bool:
    with database.read() as connection:
        live = builds.in_role(connection, database, build.projection, "live")
    return live is not None and live.number == build.number


def live_build(
    database: Database, registry: Registry, name: str, clock: Clock
) -> Build:
    """Return the live build of a projection; the first one is made, empty."""
    with database.read() as connection:
        build = builds.in_role(connection, database, name, "live")
    if build is not None:
        return build
    fold = registry.latest(name)
    try:
        with database.write() as connection:
            check_groups(connection, database, fold)
            build = builds.create(
                connection, database, fold, builds.NewBuild(role="live"), clock()
            )
            point_view(connection, database, build, None)
    except ConstraintViolated:
        # Another process made it at the same moment.
        with database.read() as connection:
            build = builds.in_role(connection, database, name, "live")
        if build is None:
            raise
    return build


def check_groups(
    connection: sa.Connection, database: Database, fold: Projection
) -> None:
    """Raise RegistrationError if the log knows a topic of the fold under two groups.

    The log holds an event per topic and group: both would be folded.
    """
    if fold.groups is not None:
        return
    for topic, groups in log.groups_of(connection, database, fold.topics).items():
        if len(groups) > 1:
            names = ", ".join(f"'{group}'" for group in groups)
            msg = (
                f"projection '{fold.name}' reads topic '{topic}', which the log holds "
                f"under the groups {names}: each event would be folded "
                f"{len(groups)} times. Say which: groups=[{groups[0]!r}]"
            )
            raise RegistrationError(msg)


def stale(registry: Registry, build: Build, parked_keys: int = 0) -> StaleCode:
    """Return the error that says how a build's code differs from what is registered.

    Args:
        registry: What is registered.
        build: Whose code is not.
        parked_keys: How many keys of it are parked: the remedy for those, too.
    """
    known = build.projection in registry.names
    if not known:
        parts: list[str] = []
        why = "its code is not registered any more"
    else:
        latest = registry.latest(build.projection)
        parts = build.fingerprints.differing(latest.fingerprints)
        what = ", ".join(parts)
        why = (
            f"it was made by version {build.version}, and of version "
            f"{latest.version}, now registered, these differ: {what}"
        )
    can_declare = known and "routing" not in parts and "state" not in parts
    also = (
        ", or if the rows would be the same: "
        f"kappa-log projections compatible {build.projection}"
        if can_declare
        else ""
    )
    keys = (
        f", and then for its parked keys ({parked_keys:,}): "
        f"kappa-log projections retry {build.projection} --all"
        if can_declare and parked_keys
        else ""
    )
    run = (
        f"Run: kappa-log replay {build.projection}{also}{keys}"
        if known
        else "Restore it, or drop all of the projection: kappa-log projections drop "
        f"{build.projection} --all"
    )
    msg = f"{build.label} waits at position {build.cursor}: {why}. {run}"
    return StaleCode(build.projection, build.number, parts, msg)


def _waiting(build: Build, parked_keys: int, why: KappaLogError) -> ProjectReport:
    return ProjectReport(
        projection=build.projection,
        build=build.number,
        version=build.version,
        events=0,
        unkeyed=0,
        from_position=build.cursor,
        to_position=build.cursor,
        rows_changed=0,
        seconds=0.0,
        parked=parked_keys,
        waiting=str(why),
    )


def _with_remedy(
    error: ProjectionError, build: Build, cursor: Position, on_error: OnError
) -> ProjectionError:
    may_park = error.key is not None and on_error == "stop"
    other = (
        f"; or let this key wait: kappa-log project {build.projection} --on-error park"
        if may_park
        else ""
    )
    remedy = (
        f"Its cursor (build {build.number}) stands at {cursor}, all before is written; "
        f"fix the fold, then run: kappa-log replay {build.projection}{other}"
    )
    return ProjectionError(
        error.projection, error.position, error.reason, key=error.key, remedy=remedy
    )
