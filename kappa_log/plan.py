"""Plan: what a replay request comes to, found out before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from kappa_log.config import OnError
from kappa_log.errors import ProjectionNotFound, UsageError
from kappa_log.events import ORIGIN, Position
from kappa_log.fold import Projection, Registry
from kappa_log.project import Filling, OnProgress, Runner, check_groups
from kappa_log.readers import EventSource, pages, reader_of
from kappa_log.storage import builds, log, parked
from kappa_log.storage.builds import Build
from kappa_log.storage.database import Database

Kind = Literal["full", "since", "until"]
By = Literal["recorded", "event-time"]
From = Literal["sql", "archive"]


class ReplayRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to replay, as it was asked."""

    since: datetime | None = None
    from_position: Position | None = None
    from_offset: tuple[str, int, int] | None = None
    by: By = "recorded"
    until: datetime | None = None
    promote: bool = True
    max_changed: str | None = None
    """``100`` rows or ``5%`` of the live rows."""
    on_error: OnError = "stop"
    """Whether a fold that raises parks its key in the build, or stops the replay."""
    reason: str | None = None
    source: From = "sql"
    """Where events are read as far as they are there."""

    @property
    def has_start(self) -> bool:
        """Whether only keys touched since a start are refolded."""
        starts = (self.since, self.from_position, self.from_offset)
        return any(start is not None for start in starts)


class ReplayPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a request comes to, before anything is written."""

    projection: str
    version: int
    kind: Kind
    description: str
    from_position: Position
    """First position concerned; 1 for a full replay."""
    head: Position
    """Last position concerned."""
    events: int
    """Events to fold: of all keys, or of those touched."""
    keys: int | None
    """Keys touched by a replay with a start; those parked in the live build count."""
    live_build: int | None
    live_cursor: Position | None
    nothing: bool = False
    """The start is past the head."""
    archive: str | None = None
    """Where the archive is that events are read from; None reads the database alone."""
    archive_end: Position | None = None
    """Last position that is read from it; later ones come from the database."""

    def read_from(self, source: EventSource | None) -> ReplayPlan:
        """Return the same plan with where its events are read."""
        if source is None:
            return self
        return msgspec.structs.replace(
            self, archive=source.url, archive_end=min(source.end, self.head)
        )


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What replays work with."""

    database: Database
    registry: Registry
    clock: Callable[[], datetime]
    """For the times of rows about replays; folds never see it."""
    who: str
    """Whom the audit trail names."""
    on_plan: Callable[[ReplayPlan], None] | None = None
    on_start: Callable[[int], None] | None = None
    """Called with a replay's id once it can be resumed."""
    on_progress: OnProgress | None = None
    open_archive: Callable[[], EventSource] | None = None
    """Opens the archive of this log, for replays that read it."""
    source: EventSource | None = None
    """Where events are read; None is the database."""

    def runner(
        self,
        build: Build,
        fold: Projection,
        on_error: OnError = "stop",
        filling: Filling | None = None,
    ) -> Runner:
        """Return a runner that folds a build on from its cursor."""
        return Runner(
            self.database,
            build,
            fold,
            self.clock,
            filling=filling,
            on_error=on_error,
            source=self.source,
        )

    @contextlib.contextmanager
    def reading(self, source: From) -> Iterator[Context]:
        """Give the same context with a source open, and close it afterwards.

        Raises:
            ArchiveError: The archive cannot be read, or is of another log.
        """
        if source == "sql":
            yield self
            return
        assert self.open_archive is not None, "nobody said how an archive is opened"
        with contextlib.closing(self.open_archive()) as opened:
            yield msgspec.structs.replace(self, source=opened)

    def head(self) -> int:
        """Return the position of the head."""
        with self.database.read() as connection:
            return log.head(connection, self.database).position


class Planner:
    """Resolves requests against the log as it is now; writes nothing."""

    def __init__(self, context: Context) -> None:
        self._database = context.database
        self._registry = context.registry

    def plan(
        self, name: str, request: ReplayRequest
    ) -> tuple[ReplayPlan, set[Any] | None]:
        """Return the plan, and with a start the keys that events since then touch.

        Raises:
            ProjectionNotFound: No such projection is registered.
            UsageError: The request contradicts itself, or needs a full replay.
        """
        fold = self._registered(name)
        _check_request(request)
        with self._database.read() as connection:
            check_groups(connection, self._database, fold)
            live = builds.in_role(connection, self._database, name, "live")
            head = log.head(connection, self._database).position
            if request.has_start:
                start, said = self._start_of(connection, request, fold)
            elif request.until is not None:
                start, said = self._first(connection, request.until, request.by)
            else:
                start, said = 1, ""
        common = {
            "projection": name,
            "version": fold.version,
            "live_build": live.number if live else None,
            "live_cursor": live.cursor if live else None,
        }
        if request.has_start:
            return self._since(fold, live, (start, said), head, common)
        if request.until is not None:
            last = head if start is None else start - 1
            events = self._count(fold, last)
            description = (
                f"until {said} = positions 1 to {last:,}, {_many(events, 'event')}"
            )
            return ReplayPlan(
                kind="until",
                description=description,
                from_position=1,
                head=last,
                events=events,
                keys=None,
                **common,  # type: ignore[arg-type]
            ), None
        events = self._count(fold, head)
        return ReplayPlan(
            kind="full",
            description=(
                f"all of the log: positions 1 to {head:,}, {_many(events, 'event')}"
            ),
            from_position=1,
            head=head,
            events=events,
            keys=None,
            **common,  # type: ignore[arg-type]
        ), None

    def _registered(self, name: str) -> Projection:
        if name in self._registry.names:
            return self._registry.latest(name)
        with self._database.read() as connection:
            is_built = bool(builds.of(connection, self._database, name))
        hint = (
            "It has builds: restore its code, or drop all of it: kappa-log projections "
            f"drop {name} --all"
        )
        raise ProjectionNotFound(name, self._registry.names, hint if is_built else "")

    def _since(
        self,
        fold: Projection,
        live: Build | None,
        resolved: tuple[Position | None, str],
        head: Position,
        common: dict[str, Any],
    ) -> tuple[ReplayPlan, set[Any]]:
        start, said = resolved
        if live is None:
            msg = (
                f"'{fold.name}' has no live build to start from; a full replay is "
                f"needed: kappa-log replay {fold.name}"
            )
            raise UsageError(msg)
        changed = live.fingerprints.differing(fold.fingerprints)
        if "routing" in changed or "state" in changed:
            msg = (
                f"which rows '{fold.name}' has (topics, groups, key or columns) "
                "changed "
                f"since {live.label}, so its rows cannot be taken over; a full "
                f"replay is needed: kappa-log replay {fold.name}"
            )
            raise UsageError(msg)
        if start is None or start > head:
            return ReplayPlan(
                kind="since",
                description=(
                    f"{said} is past the head, position {head:,}: nothing to do"
                ),
                from_position=head + 1,
                head=head,
                events=0,
                keys=0,
                nothing=True,
                **common,
            ), set()
        touched, since_events = self.touched(fold, start, head)
        with self._database.read() as connection:
            stopped = parked.positions(connection, self._database, live).keys()
        refolded = touched.union(stopped)
        more = len(refolded) - len(touched)
        events = self._count(fold, live.cursor, refolded)
        also = f", and {_many(more, 'parked key')}" if more else ""
        description = (
            f"{said} = position {start:,}: {_many(since_events, 'event')} since touch "
            f"{_many(len(touched), 'key')}{also}, whose "
            f"{_many(events, 'event')} are folded again"
        )
        return ReplayPlan(
            kind="since",
            description=description,
            from_position=start,
            head=head,
            events=events,
            keys=len(refolded),
            **common,
        ), touched

    def _start_of(
        self, connection: sa.Connection, request: ReplayRequest, fold: Projection
    ) -> tuple[Position | None, str]:
        if request.since is not None:
            return self._first(connection, request.since, request.by)
        if request.from_offset is not None:
            topic, partition, offset = request.from_offset
            if topic not in fold.topics:
                msg = (
                    f"'{fold.name}' does not read topic '{topic}'; it reads "
                    f"{', '.join(fold.topics)}"
                )
                raise UsageError(msg)
            found = log.first_from_offset(
                connection, self._database, topic, partition, offset, fold.groups
            )
            return found, f"offset {topic}:{partition}:{offset}"
        assert request.from_position is not None
        return request.from_position, f"position {request.from_position:,}"

    def _first(
        self, connection: sa.Connection, moment: datetime, by: By
    ) -> tuple[Position | None, str]:
        find = log.first_recorded if by == "recorded" else log.first_happened
        shown = moment.isoformat().replace("+00:00", "Z")
        said = f"{'recorded' if by == 'recorded' else 'event time'} ≥ {shown}"
        return find(connection, self._database, moment), said

    def touched(
        self, fold: Projection, start: Position, head: Position
    ) -> tuple[set[Any], int]:
        """Return the keys of matching events in [start, head], and their number."""
        reader = reader_of(self._database, fold)
        keys: set[Any] = set()
        events = 0
        for _, page in pages(reader, fold, start - 1, head):
            events += len(page.column("position"))
            if fold.key is None:
                keys.update(page.column("entity_id"))
            else:
                keys.update(key for key, _ in fold.keyed(page)[0])
        keys.discard(None)
        return keys, events

    def _count(
        self, fold: Projection, upto: Position, only: set[Any] | None = None
    ) -> int:
        """Return how many events up to a position the fold will meet."""
        matching = (upto, fold.topics, fold.groups)
        with self._database.read() as connection:
            if only is None:
                return log.count(connection, self._database, *matching)
            if fold.key is None:
                return log.count_of_entities(
                    connection, self._database, *matching, only
                )
        reader = reader_of(self._database, fold)
        return sum(
            len({event.position for _, event in fold.keyed(page, only)[0]})
            for _, page in pages(reader, fold, ORIGIN, upto)
        )


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def allowed_changes(limit: str, live_rows: int) -> int:
    """Return how many rows ``100`` or ``5%`` allow to differ.

    Raises:
        UsageError: It is neither.
    """
    number, percent = (limit[:-1], True) if limit.endswith("%") else (limit, False)
    try:
        value = float(number) if percent else int(number)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        msg = f"--max-changed {limit!r} is neither a number of rows nor a share like 5%"
        raise UsageError(msg)
    return int(live_rows * value / 100) if percent else int(value)


def _check_request(request: ReplayRequest) -> None:
    starts = (request.since, request.from_position, request.from_offset)
    given = sum(start is not None for start in starts)
    if given > 1:
        msg = "give one start: --since, --from-position or --from-offset"
        raise UsageError(msg)
    if given and request.until is not None:
        msg = "--until builds a past state from the beginning and takes no start"
        raise UsageError(msg)
    if request.from_position is not None and request.from_position < 1:
        msg = f"--from-position {request.from_position}: positions begin at 1"
        raise UsageError(msg)
    for moment in (request.since, request.until):
        if moment is not None and moment.utcoffset() is None:
            msg = (
                f"time {moment.isoformat()} has no zone; give an offset, for instance "
                "+00:00"
            )
            raise UsageError(msg)
    if request.max_changed is not None:
        allowed_changes(request.max_changed, 0)
