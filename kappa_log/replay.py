"""Replay: fold a range of the log into a new build, compare, promote.

The live build is never touched: a shadow is filled beside it, compared with it at one
position in one snapshot, folded on to the head and swapped in, in one transaction.
Each step commits what it did with where it is, so a killed replay resumes there.

With a start, the law at the head of its beginning: a touched key's row equals a full
rebuild's, any other row is the live row with its events since; nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from kappa_log.cursor import spans
from kappa_log.errors import (
    AlreadyRunning,
    DatabaseBusy,
    NotFound,
    ProjectionError,
    StaleCode,
    UsageError,
)
from kappa_log.events import ORIGIN, Position
from kappa_log.fold import Projection, Registry
from kappa_log.project import (
    PAGE_EVENTS,
    Clock,
    OnProgress,
    Runner,
    check_groups,
    reader_of,
)
from kappa_log.storage import builds, diff, log, replays, views
from kappa_log.storage.builds import Build, Mixed
from kappa_log.storage.database import Database
from kappa_log.storage.diff import Diff
from kappa_log.storage.replays import ReplayRow

Kind = Literal["full", "since", "until"]
By = Literal["recorded", "event-time"]

COMPARE_ATTEMPTS = 5
"""How often the live build may move on while it is being compared."""

SWAP_ATTEMPTS = 5
"""How often a swap that readers block is tried again."""


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
    reason: str | None = None

    @property
    def has_start(self) -> bool:
        """Whether only keys touched since a start are refolded."""
        return not (self.since is self.from_position is self.from_offset is None)


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
    """Keys touched by a replay with a start."""
    live_build: int | None
    live_cursor: Position | None
    nothing: bool = False
    """The start is past the head."""


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay did."""

    id: int | None
    projection: str
    version: int
    build: int | None
    kind: Kind
    events: int
    keys: int
    seconds: float
    events_per_second: float
    from_position: Position
    to_position: Position
    added: int | None
    removed: int | None
    changed: int | None
    promoted: bool
    outcome: str
    """promoted, kept, refused, side or nothing."""
    diff: Diff | None
    note: str | None = None


class Swap(msgspec.Struct, frozen=True):
    """Which builds changed places."""

    projection: str
    live: int
    retired: int
    behind: int
    """Events that the new live build is behind the head."""


class Replayer:
    """Plans, runs, resumes and undoes replays over one database.

    Args:
        database: The log.
        registry: The registered projections; replay builds the highest version.
        clock: For the times of rows about replays; folds never see it.
        who: Whom the audit trail names.
        on_plan: Called with the plan before anything is written.
        on_progress: Called as folding goes on.
        on_start: Called with the replay's id once it can be resumed.
    """

    def __init__(
        self,
        database: Database,
        registry: Registry,
        clock: Clock,
        *,
        who: str,
        on_plan: Callable[[ReplayPlan], None] | None = None,
        on_progress: OnProgress | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> None:
        self._database = database
        self._registry = registry
        self._clock = clock
        self._who = who
        self._on_plan = on_plan or (lambda _: None)
        self._on_progress = on_progress
        self._on_start = on_start or (lambda _: None)

    def plan(self, name: str, request: ReplayRequest) -> ReplayPlan:
        """Return what a request comes to; nothing is written.

        Raises:
            ProjectionNotFound: No such projection is registered.
            UsageError: The request contradicts itself, or needs a full replay.
        """
        return self._plan(name, request)[0]

    def replay(self, name: str, request: ReplayRequest) -> ReplayReport:
        """Replay one projection.

        Raises:
            AlreadyRunning: Another process replays it, or a killed one left a replay
                that must be resumed or cancelled first.
            ProjectionError: The fold failed; the replay can be resumed or cancelled.
        """
        with self._running(name):
            self._refuse_unfinished(name)
            plan, touched = self._plan(name, request)
            self._on_plan(plan)
            if plan.nothing:
                return _nothing(plan)
            row = self._start(plan, request, touched)
            return self._run(row, touched)

    def resume(self, identifier: int) -> ReplayReport:
        """Go on with a replay that was killed or interrupted.

        Raises:
            NotFound: No such replay.
            UsageError: It ended already.
            StaleCode: The registered code is not that which it began with.
        """
        row = self._unfinished(identifier)
        with self._running(row.projection):
            return self._run(self._unfinished(identifier), None)

    def cancel(self, identifier: int) -> ReplayRow:
        """End a replay that does not run, and drop what it built."""
        row = self._unfinished(identifier)
        with self._running(row.projection), self._database.write() as connection:
            if row.build is not None:
                self._drop_if_there(connection, row.projection, row.build)
            self._end(connection, row, "cancelled", None)
            return replays.get(connection, self._database, identifier)

    def promote(
        self, name: str, *, max_changed: str | None, reason: str | None
    ) -> ReplayReport:
        """Promote the newest shadow that a replay kept.

        Raises:
            NotFound: There is none.
        """
        with self._running(name):
            self._refuse_unfinished(name)
            with self._database.write() as connection:
                shadows = [
                    build
                    for build in builds.of(connection, self._database, name)
                    if build.role == "shadow"
                ]
                if not shadows:
                    raise NotFound(
                        "shadow build of",
                        name,
                        f"Make one: kappa-log replay {name} --no-promote",
                    )
                row = next(
                    r
                    for r in replays.listed(connection, self._database, projection=name)
                    if r.build == shadows[-1].number
                )
                self._code_of(row, shadows[-1])
                request = row.request | {
                    "promote": True,
                    "max_changed": max_changed,
                    "reason": reason,
                }
                replays.update(
                    connection,
                    self._database,
                    row.id,
                    now=self._clock(),
                    phase="compare",
                    outcome=None,
                    request=request,
                )
                row = replays.get(connection, self._database, row.id)
            return self._run(row, None)

    def undo(self, name: str, *, behind: bool, reason: str | None) -> Swap:
        """Make the retired build the live one again, caught up by its own code.

        Raises:
            NotFound: There is no retired build.
            UsageError: Its code is not registered, and ``behind`` was not said.
        """
        with self._running(name):
            with self._database.read() as connection:
                retired = builds.in_role(connection, self._database, name, "retired")
                head = log.head(connection, self._database).position
            if retired is None:
                raise NotFound("retired build of", name, "There is nothing to undo")
            fold = self._registry.made_by(name, retired.fingerprints)
            if fold is None and not behind and retired.cursor < head:
                msg = (
                    f"{retired.label} (version {retired.version}) is "
                    f"{head - retired.cursor} events behind and its code is not "
                    "registered, so it cannot catch up. Register that version again, "
                    "or swap all the same with --behind; nothing was changed"
                )
                raise UsageError(msg)
            if fold is not None:
                self._catch_up(retired, fold, "undo")
            return self._swap(name, retired.number, fold, "undo", reason)

    # --- planning -----------------------------------------------------------

    def _plan(
        self, name: str, request: ReplayRequest
    ) -> tuple[ReplayPlan, set[Any] | None]:
        fold = self._registry.latest(name)
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
            return self._plan_since(request, fold, live, start, head, said, common)
        if request.until is not None:
            last = head if start is None else start - 1
            events = self._count(fold, last)
            description = f"until {said} = positions 1 to {last:,}, {events:,} events"
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
            description=f"all of the log: positions 1 to {head:,}, {events:,} events",
            from_position=1,
            head=head,
            events=events,
            keys=None,
            **common,  # type: ignore[arg-type]
        ), None

    def _plan_since(
        self,
        request: ReplayRequest,
        fold: Projection,
        live: Build | None,
        start: Position | None,
        head: Position,
        said: str,
        common: dict[str, Any],
    ) -> tuple[ReplayPlan, set[Any]]:
        if live is None:
            msg = (
                f"'{fold.name}' has no live build to start from; a full replay is "
                f"needed: kappa-log replay {fold.name}"
            )
            raise UsageError(msg)
        if live.fingerprints.routing != fold.fingerprints.routing:
            msg = (
                f"which rows '{fold.name}' has (topics, groups, key or columns) changed "
                f"since {live.label}, so its rows cannot be taken over; a full replay "
                f"is needed: kappa-log replay {fold.name}"
            )
            raise UsageError(msg)
        if start is None or start > head:
            return ReplayPlan(
                kind="since",
                description=f"{said} is past the head, position {head:,}: nothing to do",
                from_position=head + 1,
                head=head,
                events=0,
                keys=0,
                nothing=True,
                **common,
            ), set()
        touched, since_events = self._touched(fold, start, head)
        events = self._count(fold, live.cursor, touched)
        description = (
            f"{said} = position {start:,}: {since_events:,} events since touch "
            f"{len(touched):,} keys, whose {events:,} events are folded again"
        )
        return ReplayPlan(
            kind="since",
            description=description,
            from_position=start,
            head=head,
            events=events,
            keys=len(touched),
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

    def _touched(
        self, fold: Projection, start: Position, head: Position
    ) -> tuple[set[Any], int]:
        """Return the keys of matching events in [start, head], and their number."""
        reader = reader_of(self._database, fold)
        keys: set[Any] = set()
        events = 0
        for after, until in spans(start - 1, head, PAGE_EVENTS):
            page = reader.page(after, until)
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
        with self._database.read() as connection:
            if only is None or fold.key is None:
                return log.count(
                    connection,
                    self._database,
                    upto,
                    fold.topics,
                    fold.groups,
                    entities=only,
                )
        reader = reader_of(self._database, fold)
        pages = (reader.page(a, b) for a, b in spans(ORIGIN, upto, PAGE_EVENTS))
        return sum(len({e.position for _, e in fold.keyed(p, only)[0]}) for p in pages)

    # --- running ------------------------------------------------------------

    def _running(self, name: str) -> Any:
        return self._database.lock(
            f"replay-{name}",
            f"another process replays '{name}' now; wait for it, or see: "
            "kappa-log replay --list. Nothing was changed",
        )

    def _refuse_unfinished(self, name: str) -> None:
        with self._database.read() as connection:
            left = replays.listed(
                connection, self._database, projection=name, unfinished=True
            )
        if left:
            row = left[0]
            msg = (
                f"replay {row.id} of '{name}' was interrupted while it did "
                f"'{row.phase}'. Go on: kappa-log replay --resume {row.id}; or drop "
                f"it: kappa-log replay --cancel {row.id}"
            )
            raise AlreadyRunning(msg)

    def _unfinished(self, identifier: int) -> ReplayRow:
        with self._database.read() as connection:
            row = replays.get(connection, self._database, identifier)
        if row.outcome is not None:
            msg = f"replay {identifier} of '{row.projection}' has ended: {row.outcome}"
            raise UsageError(msg)
        return row

    def _start(
        self, plan: ReplayPlan, request: ReplayRequest, touched: set[Any] | None
    ) -> ReplayRow:
        """Make the shadow, and the row that makes the replay durable."""
        fold = self._registry.latest(plan.projection)
        now = self._clock()
        with self._database.write(snapshot=True) as connection:
            shadow = self._new_build(connection, fold, plan, touched, now)
            row = replays.start(
                connection,
                self._database,
                projection=plan.projection,
                phase="refold" if plan.kind == "since" else "fill",
                request=msgspec.to_builtins(request),
                plan=msgspec.to_builtins(plan),
                build=shadow.number,
                reason=request.reason,
                now=now,
            )
            replays.write_audit(
                connection,
                self._database,
                who=self._who,
                action="replay",
                subject=plan.projection,
                detail=msgspec.to_builtins(plan),
                reason=request.reason,
                now=now,
            )
        self._on_start(row.id)
        return row

    def _new_build(
        self,
        connection: sa.Connection,
        fold: Projection,
        plan: ReplayPlan,
        touched: set[Any] | None,
        now: datetime,
    ) -> Build:
        if touched is None:
            role = "side" if plan.kind == "until" else "shadow"
            return builds.create(
                connection, self._database, fold, role=role, now=now, sharded=True
            )
        live = builds.in_role(connection, self._database, fold.name, "live")
        assert live is not None, (
            "a replay with a start was planned without a live build"
        )
        shadow = builds.create(
            connection,
            self._database,
            fold,
            role="shadow",
            now=now,
            cursor=live.cursor,
            mixed=Mixed(live.number, plan.from_position, plan.head),
            sharded=True,
        )
        builds.copy_rows(connection, self._database, live, shadow)
        builds.RowStore(self._database, shadow, fold).delete(connection, touched)
        return shadow

    def _run(self, row: ReplayRow, touched: set[Any] | None) -> ReplayReport:
        """Do what a replay has still to do, step by step."""
        with self._database.read() as connection:
            assert row.build is not None
            shadow = builds.get(connection, self._database, row.projection, row.build)
        self._on_start(row.id)
        fold = self._code_of(row, shadow)
        steps = _Steps(self, row, shadow, fold, touched)
        try:
            return steps.run()
        except ProjectionError as error:
            remedy = (
                f"The live build was not changed. Fix the fold and drop this replay "
                f"(kappa-log replay --cancel {row.id}), then replay again"
            )
            raise ProjectionError(
                error.projection,
                error.position,
                error.reason,
                key=error.key,
                remedy=remedy,
            ) from error

    def _code_of(self, row: ReplayRow, shadow: Build) -> Projection:
        fold = self._registry.made_by(row.projection, shadow.fingerprints)
        if fold is not None:
            return fold
        parts = (
            shadow.fingerprints.differing(
                self._registry.latest(row.projection).fingerprints
            )
            if row.projection in self._registry.names
            else ["code"]
        )
        msg = (
            f"replay {row.id} of '{row.projection}' began with other code than is "
            f"registered now ({', '.join(parts)} changed), so its rows would be a mix. "
            f"Drop it: kappa-log replay --cancel {row.id}; then replay again"
        )
        raise StaleCode(row.projection, shadow.number, parts, msg)

    def _catch_up(self, build: Build, fold: Projection, phase: str) -> Runner:
        """Fold a build on until at most a page is left."""
        runner = Runner(self._database, build, fold, self._clock)
        while True:
            with self._database.read() as connection:
                head = log.head(connection, self._database).position
            if head == runner.cursor:
                return runner
            runner.run(head, phase=phase, on_progress=self._on_progress)
            if head - runner.cursor <= PAGE_EVENTS:
                return runner

    def _swap(
        self,
        name: str,
        number: int,
        fold: Projection | None,
        action: str,
        reason: str | None,
    ) -> Swap:
        """Make a build the live one: fold the rest, swap the view, retire the old."""
        attempt = 0
        while True:
            attempt += 1
            try:
                with self._database.write() as connection:
                    return self._swap_within(
                        connection, name, number, fold, action, reason
                    )
            except DatabaseBusy as error:
                if attempt >= SWAP_ATTEMPTS:
                    msg = (
                        f"readers kept the view of '{name}' busy {SWAP_ATTEMPTS} times; the "
                        f"old build is still live. Try again: kappa-log projections {action} {name}"
                    )
                    raise DatabaseBusy(msg) from error

    def _swap_within(
        self,
        connection: sa.Connection,
        name: str,
        number: int,
        fold: Projection | None,
        action: str,
        reason: str | None,
    ) -> Swap:
        database, now = self._database, self._clock()
        views.limit_waiting(connection, database)
        old = builds.in_role(connection, database, name, "live")
        if old is not None:
            builds.lock_cursor(connection, database, old)
        new = builds.get(connection, database, name, number)
        head = log.head(connection, database).position
        if fold is not None and new.cursor < head:
            Runner(database, new, fold, self._clock).fold_within(connection, head)
        retired = builds.in_role(connection, database, name, "retired")
        if retired is not None and retired.number != number:
            builds.drop(connection, database, retired)
        builds.set_role(connection, database, new, "shadow", now)
        if old is not None:
            builds.set_role(connection, database, old, "retired", now)
        builds.set_role(connection, database, new, "live", now)
        views.point_view(connection, database, new, old)
        new = builds.get(connection, database, name, number)
        replays.write_audit(
            connection,
            database,
            who=self._who,
            action=action,
            subject=name,
            detail={"live": number, "retired": old.number if old else None},
            reason=reason,
            now=now,
        )
        return Swap(name, number, old.number if old else 0, head - new.cursor)

    def _end(
        self,
        connection: sa.Connection,
        row: ReplayRow,
        outcome: str,
        progress: dict[str, Any] | None,
    ) -> None:
        changes: dict[str, Any] = {"phase": "done", "outcome": outcome}
        if progress is not None:
            changes["progress"] = progress
        replays.update(connection, self._database, row.id, now=self._clock(), **changes)

    def _drop_if_there(self, connection: sa.Connection, name: str, number: int) -> None:
        for build in builds.of(connection, self._database, name):
            if build.number == number and build.role in ("shadow", "side"):
                builds.drop(connection, self._database, build)


class _Steps:
    """The steps of one replay, each of which leaves the next one's name behind."""

    def __init__(
        self,
        replayer: Replayer,
        row: ReplayRow,
        shadow: Build,
        fold: Projection,
        touched: set[Any] | None,
    ) -> None:
        self._replayer = replayer
        self._database = replayer._database
        self._row = row
        self._shadow = shadow
        self._fold = fold
        self._touched = touched
        self._plan = msgspec.convert(row.plan, ReplayPlan)
        self._request = msgspec.convert(row.request, ReplayRequest)
        self._progress: dict[str, Any] = {"events": 0, "seconds": 0.0} | row.progress

    def run(self) -> ReplayReport:
        phase = self._row.phase
        if phase == "refold":
            self._refold()
            phase = self._leave("compare")
        if phase == "fill":
            self._fill()
            phase = self._leave("compare")
        if self._plan.kind == "until":
            return self._finish("side")
        if phase == "compare":
            self._compare()
            phase = self._leave("catch-up")
        self._catch_up()
        if not self._request.promote:
            return self._finish("kept")
        refusal = self._refusal()
        if refusal:
            return self._finish("refused", refusal)
        self._replayer._swap(
            self._plan.projection,
            self._shadow.number,
            self._fold,
            "promote",
            self._request.reason,
        )
        return self._finish("promoted")

    def _fill(self) -> None:
        """Fold from ORIGIN to the live cursor, or to the end where there is none."""
        target = self._plan.head
        live = self._live()
        if self._plan.kind == "full" and live is not None:
            target = max(live.cursor, self._shadow.cursor)
        self._fold_to(target, "fill", keep_all=True, sharded=True)

    def _refold(self) -> None:
        """Fold the touched keys' events up to where the live rows were taken."""
        if self._touched is None:
            self._touched, _ = self._replayer._touched(
                self._fold, self._plan.from_position, self._plan.head
            )
        with self._database.read() as connection:
            start = builds.shard_cursor(connection, self._database, self._shadow)
        runner = Runner(
            self._database,
            self._shadow,
            self._fold,
            self._replayer._clock,
            keep_all=True,
            only=self._touched,
            start=start,
            sharded=True,
        )
        self._account(runner, self._shadow.cursor, "refold")

    def _compare(self) -> None:
        """Take the diff with both builds at one position, in one snapshot."""
        for attempt in range(COMPARE_ATTEMPTS + 1):
            live = self._live()
            if live is None or live.cursor < self._shadow.cursor:
                # Nothing to compare with, or it was compared before it fell behind.
                return
            self._fold_to(live.cursor, "compare")
            is_last = attempt == COMPARE_ATTEMPTS
            opened = self._database.write() if is_last else self._database.read()
            with opened as connection:
                live = self._live(connection)
                shadow = self._again(connection)
                if is_last and live is not None and live.cursor > shadow.cursor:
                    builds.lock_cursor(connection, self._database, live)
                    live = self._live(connection)
                    assert live is not None
                    runner = Runner(
                        self._database, shadow, self._fold, self._replayer._clock
                    )
                    runner.fold_within(connection, live.cursor)
                    shadow = self._again(connection)
                if live is not None and live.cursor == shadow.cursor:
                    found = diff.compare(connection, self._database, live, shadow)
                    self._progress["diff"] = msgspec.to_builtins(found)
                    break
        self._reread()

    def _catch_up(self) -> None:
        self._reread()
        runner = self._replayer._catch_up(self._shadow, self._fold, "catch-up")
        self._count(runner)
        self._reread()

    def _fold_to(self, target: Position, phase: str, **options: Any) -> None:
        runner = Runner(
            self._database,
            self._shadow,
            self._fold,
            self._replayer._clock,
            **options,
        )
        self._account(runner, target, phase)
        self._reread()

    def _account(self, runner: Runner, target: Position, phase: str) -> None:
        runner.run(target, phase=phase, on_progress=self._replayer._on_progress)
        self._count(runner)

    def _count(self, runner: Runner) -> None:
        self._progress["events"] += runner.events
        self._progress["seconds"] += runner.seconds

    def _refusal(self) -> str | None:
        limit, found = self._request.max_changed, self._diff()
        if limit is None or found is None:
            return None
        allowed = allowed_changes(limit, found.old_rows)
        if found.total <= allowed:
            return None
        return (
            f"{found.total:,} rows differ, more than --max-changed {limit} allows "
            f"({allowed:,}); build {self._shadow.number} is kept as a shadow. Look: "
            f"kappa-log projections diff {self._plan.projection}; promote it all the "
            f"same: kappa-log projections promote {self._plan.projection}"
        )

    def _finish(self, outcome: str, note: str | None = None) -> ReplayReport:
        with self._database.write() as connection:
            shadow = self._again(connection)
            rows = builds.count_rows(connection, self._database, shadow)
            self._replayer._end(connection, self._row, outcome, self._progress)
        found = self._diff()
        seconds, events = self._progress["seconds"], self._progress["events"]
        keys = self._plan.keys if self._plan.keys is not None else rows
        return ReplayReport(
            id=self._row.id,
            projection=self._plan.projection,
            version=shadow.version,
            build=shadow.number,
            kind=self._plan.kind,
            events=events,
            keys=keys,
            seconds=round(seconds, 6),
            events_per_second=round(events / seconds, 1) if seconds else 0.0,
            from_position=self._plan.from_position,
            to_position=shadow.cursor,
            added=found.added if found else None,
            removed=found.removed if found else None,
            changed=found.changed if found else None,
            promoted=outcome == "promoted",
            outcome=outcome,
            diff=found,
            note=note,
        )

    def _leave(self, phase: str) -> str:
        """Commit that a step is done and which one is next."""
        with self._database.write() as connection:
            if phase == "compare":
                builds.drop_shards(connection, self._database, self._shadow)
            replays.update(
                connection,
                self._database,
                self._row.id,
                now=self._replayer._clock(),
                phase=phase,
                progress=self._progress,
            )
        return phase

    def _diff(self) -> Diff | None:
        found = self._progress.get("diff")
        return None if found is None else msgspec.convert(found, Diff)

    def _live(self, connection: sa.Connection | None = None) -> Build | None:
        if connection is None:
            with self._database.read() as own:
                return self._live(own)
        return builds.in_role(connection, self._database, self._plan.projection, "live")

    def _again(self, connection: sa.Connection) -> Build:
        return builds.get(
            connection, self._database, self._plan.projection, self._shadow.number
        )

    def _reread(self) -> None:
        with self._database.read() as connection:
            self._shadow = self._again(connection)


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
            msg = f"time {moment.isoformat()} has no zone; give an offset, for instance +00:00"
            raise UsageError(msg)
    if request.max_changed is not None:
        allowed_changes(request.max_changed, 0)


def _nothing(plan: ReplayPlan) -> ReplayReport:
    return ReplayReport(
        id=None,
        projection=plan.projection,
        version=plan.version,
        build=None,
        kind=plan.kind,
        events=0,
        keys=0,
        seconds=0.0,
        events_per_second=0.0,
        from_position=plan.from_position,
        to_position=plan.head,
        added=0,
        removed=0,
        changed=0,
        promoted=False,
        outcome="nothing",
        diff=None,
        note=plan.description,
    )
