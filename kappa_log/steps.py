"""Steps: fill or refold a shadow, compare it, catch up, swap.

Each step commits what it did together with the name of the next one, so a killed
replay goes on where it was. The swap commits with the end of the replay.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import DatabaseBusy, ProjectionError, StorageError, UsageError
from kappa_log.events import Position
from kappa_log.fold import Projection
from kappa_log.plan import (
    Context,
    Kind,
    Planner,
    ReplayPlan,
    ReplayRequest,
    allowed_changes,
)
from kappa_log.project import Filling, Runner
from kappa_log.storage import builds, diff, parked, replays
from kappa_log.storage.builds import Build
from kappa_log.storage.diff import Diff
from kappa_log.storage.replays import Failure, ReplayRow
from kappa_log.storage.rows import count_rows
from kappa_log.swap import Swapper, catch_up

COMPARE_ATTEMPTS = 5
"""How often the live build may move on while it is being compared."""


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
    parked: int = 0
    """Keys of the build that are parked; with any it is not promoted."""
    outcome: str
    """promoted, kept, refused, side or nothing."""
    diff: Diff | None
    note: str | None = None


class Steps:
    """The steps of one replay, each of which leaves the next one's name behind."""

    def __init__(
        self,
        context: Context,
        row: ReplayRow,
        shadow: Build,
        fold: Projection,
        touched: set[Any] | None,
    ) -> None:
        self._context = context
        self._database = context.database
        self._row = row
        self._shadow = shadow
        self._fold = fold
        self._touched = touched
        self._plan = msgspec.convert(row.plan, ReplayPlan)
        self._request = msgspec.convert(row.request, ReplayRequest)
        self._progress: dict[str, Any] = {
            "events": 0,
            "seconds": 0.0,
            "parked": [],
        } | row.progress
        self._progress.pop("failure", None)
        self.has_ended = False
        """Whether it has an outcome, whatever comes afterwards."""

    def run(self) -> ReplayReport:
        """Do what is left to do, and return what the replay did."""
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
        self._swap()
        return self._report("promoted")

    def note_failure(self, error: ProjectionError) -> None:
        """Keep for whoever looks later that the last attempt failed in the fold."""
        failure = Failure(position=error.position, reason=error.reason)
        # If that cannot be kept, the fold's own error still is what to tell.
        with contextlib.suppress(StorageError), self._database.write() as connection:
            replays.update(
                connection,
                self._database,
                self._row.id,
                now=self._context.clock(),
                progress=self._progress | {"failure": msgspec.to_builtins(failure)},
            )

    def _swap(self) -> None:
        swapper = Swapper(
            context=self._context,
            projection=self._plan.projection,
            number=self._shadow.number,
            fold=self._fold,
            action="promote",
            reason=self._request.reason,
            on_error=self._request.on_error,
            then=lambda connection: self._end(connection, "promoted"),
        )
        try:
            swapper.run()
        except (DatabaseBusy, UsageError):
            # Readers, users' views or parked keys are in the way: all but the swap is
            # done, and the message says how to go on from there.
            self._finish("kept")
            raise
        self.has_ended = True

    def _fill(self) -> None:
        """Fold from ORIGIN to the live cursor, or to the end where there is none."""
        target = self._plan.head
        live = self._live()
        if self._plan.kind == "full" and live is not None:
            target = max(live.cursor, self._shadow.cursor)
        self._fold_to(target, "fill", Filling())

    def _refold(self) -> None:
        """Fold the touched keys' events up to where the live rows were taken."""
        if self._touched is None:
            touched, _ = Planner(self._context).touched(
                self._fold, self._plan.from_position, self._plan.head
            )
            stopped = parked.keys_of(self._shadow, self._progress["parked"])
            self._touched = touched.union(stopped)
        with self._database.read() as connection:
            start = builds.shard_cursor(connection, self._database, self._shadow)
        filling = Filling(self._touched, start)
        runner = self._context.runner(
            self._shadow, self._fold, self._request.on_error, filling
        )
        self._account(runner, self._shadow.cursor, "refold")

    def _compare(self) -> None:
        """Take the diff with both builds at one position, in one snapshot.

        The live build may move on between folding to it and looking: then again.
        A last attempt holds its cursor, so that it cannot.
        """
        for _ in range(COMPARE_ATTEMPTS):
            live = self._live()
            if live is None or live.cursor < self._shadow.cursor:
                # Nothing to compare with, or it was compared before it fell behind.
                return
            self._fold_to(live.cursor, "compare")
            with self._database.read() as connection:
                if self._diff_within(connection):
                    return
        with self._database.write() as connection:
            live = self._live(connection)
            assert live is not None, "the live build vanished under the replay's lock"
            held = builds.lock_cursor(connection, self._database, live)
            assert held is not None
            runner = self._context.runner(
                self._again(connection), self._fold, self._request.on_error
            )
            runner.fold_within(connection, held)
            self._diff_within(connection)
        self._reread()

    def _diff_within(self, connection: sa.Connection) -> bool:
        """Take the diff if both builds are at one position; tell whether they are."""
        live, shadow = self._live(connection), self._again(connection)
        if live is None or live.cursor != shadow.cursor:
            return False
        found = diff.compare(connection, self._database, live, shadow)
        self._progress["diff"] = msgspec.to_builtins(found)
        return True

    def _catch_up(self) -> None:
        self._reread()
        on_error = self._request.on_error
        runner = catch_up(self._context, self._shadow, self._fold, "catch-up", on_error)
        self._count(runner)
        self._reread()

    def _fold_to(
        self, target: Position, phase: str, filling: Filling | None = None
    ) -> None:
        runner = self._context.runner(
            self._shadow, self._fold, self._request.on_error, filling
        )
        self._account(runner, target, phase)
        self._reread()

    def _account(self, runner: Runner, target: Position, phase: str) -> None:
        runner.run(target, phase=phase, on_progress=self._context.on_progress)
        self._count(runner)

    def _count(self, runner: Runner) -> None:
        self._progress["events"] += runner.events
        self._progress["seconds"] += runner.seconds

    def _refusal(self) -> str | None:
        limit, found, live = self._request.max_changed, self._diff(), self._live()
        if limit is None or live is None:
            return None
        if found is None or found.old_build != live.number:
            return (
                f"the live build {live.number} is behind build "
                f"{self._shadow.number}, so --max-changed {limit} cannot be judged; "
                "the shadow is kept. Bring the live one up: kappa-log project "
                f"{self._plan.projection}; then replay again"
            )
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
            self._end(connection, outcome)
        self.has_ended = True
        return self._report(outcome, note)

    def _end(self, connection: sa.Connection, outcome: str) -> None:
        replays.update(
            connection,
            self._database,
            self._row.id,
            now=self._context.clock(),
            phase="done",
            outcome=outcome,
            progress=self._progress,
        )

    def _report(self, outcome: str, note: str | None = None) -> ReplayReport:
        with self._database.read() as connection:
            shadow = self._again(connection)
            rows = count_rows(connection, self._database, shadow)
            stopped = parked.count(connection, self._database, shadow)
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
            parked=stopped,
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
                now=self._context.clock(),
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


def nothing_to_do(plan: ReplayPlan) -> ReplayReport:
    """Return the report of a replay whose start is past the head."""
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
