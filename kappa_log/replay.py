"""Replay: fold a range of the log into a new build, compare, promote.

The live build is never touched: a shadow is filled beside it, compared with it at one
position in one snapshot, folded on to the head and swapped in, in one transaction.
Each step commits what it did with where it is, so a killed replay resumes there.

With a start, the law at the head of its beginning: a touched key's row equals a full
rebuild's, any other row is the live row with its events since; nothing counts twice.
Keys that are parked in the live build count as touched: the row of such a key lacks
events, so it cannot be taken over, and folded from its first event it lacks none.

A fold that raises stops the replay, or parks its key in the new build, as in a live one
(see `project`). A build with parked keys can be looked at, and is not promoted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import (
    AlreadyRunning,
    KappaLogError,
    NotFound,
    ProjectionError,
    StaleCode,
    UsageError,
)
from kappa_log.fold import Projection
from kappa_log.plan import (
    Context,
    Planner,
    ReplayPlan,
    ReplayRequest,
    allowed_changes,
)
from kappa_log.steps import ReplayReport, Steps, nothing_to_do
from kappa_log.storage import builds, log, parked, replays, views
from kappa_log.storage.builds import Build, Mixed
from kappa_log.storage.replays import ReplayRow
from kappa_log.storage.rows import RowStore, copy_rows
from kappa_log.swap import Swap, Swapper, catch_up


def why_unfinished(row: ReplayRow) -> str:
    """Return why a replay has not ended, after its name."""
    if row.failure is None:
        return f"was interrupted while it did '{row.phase}'"
    at = f"{row.failure.position:,}"
    return f"failed in its fold at position {at}: {row.failure.reason}"


def way_out(row: ReplayRow) -> str:
    """Return what can be done about a replay that has not ended."""
    if row.failure is not None:
        return _after_failure(row)
    return (
        f"go on: kappa-log replay --resume {row.id}; or drop it: "
        f"kappa-log replay --cancel {row.id}"
    )


def _after_failure(row: ReplayRow) -> str:
    # Mended code is other code, by which it cannot be resumed.
    return (
        f"fix the fold, drop this replay (kappa-log replay --cancel {row.id}) and "
        "replay again; or, where the fold is right and something that it uses was "
        f"amiss, go on: kappa-log replay --resume {row.id}"
    )


class Replayer:
    """Plans, runs, resumes and undoes replays over one database."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._database = context.database

    def plan(self, name: str, request: ReplayRequest) -> ReplayPlan:
        """Return what a request comes to; nothing is written.

        Raises:
            ProjectionNotFound: No such projection is registered.
            UsageError: The request contradicts itself, or needs a full replay.
            ArchiveError: It asks for the archive, which cannot be read, is of another
                log, or lacks files, as one listing shows.
        """
        plan = Planner(self._context).plan(name, request)[0]
        if plan.nothing:
            return plan
        with self._context.reading(request.source) as context:
            if context.source is not None:
                context.source.look(self._context.registry.latest(name), plan.head)
            return plan.read_from(context.source)

    def replay(self, name: str, request: ReplayRequest) -> ReplayReport:
        """Replay one projection.

        Raises:
            AlreadyRunning: Another process replays it, or a killed one left a replay
                that must be resumed or cancelled first.
            ProjectionError: The fold failed; the replay can be resumed or cancelled.
        """
        with self._running(name):
            self._refuse_unfinished(name)
            plan, touched = Planner(self._context).plan(name, request)
            if plan.nothing:
                self._tell(plan)
                return nothing_to_do(plan)
            # Before anything is written: an archive may not be there.
            with self._context.reading(request.source) as context:
                plan = plan.read_from(context.source)
                self._tell(plan)
                row = self._start(plan, request, touched)
                return self._run(row, touched, context)

    def resume(self, identifier: int) -> ReplayReport:
        """Go on with a replay that was killed or interrupted.

        Raises:
            NotFound: No such replay.
            UsageError: It ended already.
            StaleCode: The registered code is not that which it began with.
        """
        row = self._unfinished(identifier)
        with self._running(row.projection):
            row = self._unfinished(identifier)
            request = msgspec.convert(row.request, ReplayRequest)
            with self._context.reading(request.source) as context:
                return self._run(row, None, context)

    def cancel(self, identifier: int) -> ReplayRow:
        """End a replay that does not run, and drop what it built."""
        row = self._unfinished(identifier)
        with self._running(row.projection), self._database.write() as connection:
            row = self._still_unfinished(
                replays.get(connection, self._database, row.id)
            )
            if row.build is not None:
                self._drop_if_there(connection, row.projection, row.build)
            self._mark_cancelled(connection, row)
            return replays.get(connection, self._database, identifier)

    def _mark_cancelled(self, connection: sa.Connection, row: ReplayRow) -> None:
        replays.update(
            connection,
            self._database,
            row.id,
            now=self._context.clock(),
            phase="done",
            outcome="cancelled",
        )

    def promote(
        self, name: str, *, max_changed: str | None, reason: str | None
    ) -> ReplayReport:
        """Promote the newest shadow that a replay kept.

        Raises:
            NotFound: There is none.
            UsageError: max_changed is no limit.
        """
        if max_changed is not None:
            allowed_changes(max_changed, 0)
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
                row = replays.of_build(
                    connection, self._database, name, shadows[-1].number
                )
                self._code_of(row, shadows[-1])
                request = row.request | {
                    "promote": True,
                    "max_changed": max_changed,
                    "reason": reason,
                    "source": "sql",
                }
                replays.update(
                    connection,
                    self._database,
                    row.id,
                    now=self._context.clock(),
                    phase="compare",
                    outcome=None,
                    request=request,
                )
                row = replays.get(connection, self._database, row.id)
            return self._run(row, None, self._context)

    def undo(self, name: str, *, behind: bool, reason: str | None) -> Swap:
        """Make the retired build the live one again, caught up by its own code.

        Raises:
            NotFound: There is no retired build.
            UsageError: Its code is not registered or it has parked keys, and
                ``behind`` was not said.
        """
        with self._running(name):
            with self._database.read() as connection:
                retired = builds.in_role(connection, self._database, name, "retired")
                head = log.head(connection, self._database).position
            if retired is None:
                raise NotFound("retired build of", name, "There is nothing to undo")
            fold = self._context.registry.made_by(name, retired.fingerprints)
            if fold is None and not behind and retired.cursor < head:
                msg = (
                    f"{retired.label} (version {retired.version}) is "
                    f"{head - retired.cursor} events behind and its code is not "
                    "registered, so it cannot catch up. Register that version again, "
                    "or swap all the same with --behind; nothing was changed"
                )
                raise UsageError(msg)
            if fold is not None:
                catch_up(self._context, retired, fold, "undo")
            return Swapper(
                context=self._context,
                projection=name,
                number=retired.number,
                fold=fold,
                action="undo",
                reason=reason,
                with_parked=behind,
            ).run()

    def drop_all(self, name: str, *, dry_run: bool, reason: str | None) -> list[Build]:
        """Drop all builds of a projection whose code is gone, and its view.

        A replay of it that has not ended is cancelled. Numbers are not used again.

        Returns:
            What was, or would be, dropped.

        Raises:
            NotFound: It has no build.
            UsageError: Its code is registered, or users' views read its view; nothing
                was dropped.
            AlreadyRunning: Another process replays it.
        """
        if name in self._context.registry.names:
            msg = (
                f"'{name}' is registered, so the next kappa-log project would make it "
                "anew; nothing was dropped. Remove its code first; or to fold it all "
                f"again: kappa-log replay {name}"
            )
            raise UsageError(msg)
        with self._running(name), self._database.write() as connection:
            found = builds.of(connection, self._database, name)
            if not found:
                raise NotFound("build of", name, "See: kappa-log projections list")
            views.refuse_dependants(connection, self._database, name)
            if not dry_run:
                self._drop_all(connection, name, found, reason)
        return found

    def _drop_all(
        self,
        connection: sa.Connection,
        name: str,
        found: list[Build],
        reason: str | None,
    ) -> None:
        database = self._database
        views.limit_waiting(connection, database)
        for build in found:
            # Whoever still folds it finds its cursor gone, and writes no row.
            builds.lock_cursor(connection, database, build)
        for row in replays.listed(
            connection, database, projection=name, unfinished=True
        ):
            self._mark_cancelled(connection, row)
        views.drop_view(connection, database, name)
        for build in found:
            builds.drop(connection, database, build)
        act = replays.Audit(
            who=self._context.who,
            action="drop",
            subject=name,
            detail={"builds": [build.number for build in found]},
            reason=reason,
        )
        replays.write_audit(connection, database, act, self._context.clock())

    # --- running ------------------------------------------------------------

    def _tell(self, plan: ReplayPlan) -> None:
        if self._context.on_plan is not None:
            self._context.on_plan(plan)

    def _running(self, name: str) -> AbstractContextManager[None]:
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
            way = way_out(row)
            msg = (
                f"replay {row.id} of '{name}' {why_unfinished(row)}. "
                f"{way[0].upper()}{way[1:]}"
            )
            raise AlreadyRunning(msg)

    def _unfinished(self, identifier: int) -> ReplayRow:
        with self._database.read() as connection:
            row = replays.get(connection, self._database, identifier)
        return self._still_unfinished(row)

    @staticmethod
    def _still_unfinished(row: ReplayRow) -> ReplayRow:
        if row.outcome is not None:
            msg = f"replay {row.id} of '{row.projection}' has ended: {row.outcome}"
            raise UsageError(msg)
        return row

    def _start(
        self, plan: ReplayPlan, request: ReplayRequest, touched: set[Any] | None
    ) -> ReplayRow:
        """Make the shadow, and the row that makes the replay durable."""
        fold = self._context.registry.latest(plan.projection)
        now = self._context.clock()
        with self._database.write(snapshot=True) as connection:
            shadow, stopped = self._new_build(connection, fold, plan, touched, now)
            row = replays.start(
                connection,
                self._database,
                replays.NewReplay(
                    projection=plan.projection,
                    build=shadow.number,
                    phase="refold" if plan.kind == "since" else "fill",
                    request=msgspec.to_builtins(request),
                    plan=msgspec.to_builtins(plan),
                    progress={"parked": stopped},
                    reason=request.reason,
                ),
                now,
            )
            replays.write_audit(
                connection,
                self._database,
                replays.Audit(
                    who=self._context.who,
                    action="replay",
                    subject=plan.projection,
                    detail=msgspec.to_builtins(plan),
                    reason=request.reason,
                ),
                now,
            )
        return row

    def _new_build(
        self,
        connection: sa.Connection,
        fold: Projection,
        plan: ReplayPlan,
        touched: set[Any] | None,
        now: datetime,
    ) -> tuple[Build, list[str]]:
        """Return the new build, and the keys parked in the live one that it refolds.

        Those keys are added to ``touched``, as of the snapshot that rows are taken
        from; as texts they go with the replay, which may have to be resumed.
        """
        if touched is None:
            role = "side" if plan.kind == "until" else "shadow"
            build = builds.create(
                connection,
                self._database,
                fold,
                builds.NewBuild(role=role, sharded=True),
                now,
            )
            return build, []
        live = builds.in_role(connection, self._database, fold.name, "live")
        assert live is not None, (
            "a replay with a start was planned without a live build"
        )
        shadow = builds.create(
            connection,
            self._database,
            fold,
            builds.NewBuild(
                role="shadow",
                cursor=live.cursor,
                mixed=Mixed(live.number, plan.from_position, plan.head),
                unkeyed=live.unkeyed,
                sharded=True,
            ),
            now,
        )
        copy_rows(connection, self._database, live, shadow)
        stopped = parked.positions(connection, self._database, live)
        touched.update(stopped)
        RowStore(self._database, shadow, fold).delete(connection, touched)
        return shadow, [parked.key_text(shadow, key) for key in stopped]

    def _run(
        self, row: ReplayRow, touched: set[Any] | None, context: Context
    ) -> ReplayReport:
        """Do what a replay has still to do, step by step."""
        with self._database.read() as connection:
            assert row.build is not None
            shadow = builds.get(connection, self._database, row.projection, row.build)
        if self._context.on_start is not None:
            self._context.on_start(row.id)
        fold = self._code_of(row, shadow)
        steps = Steps(context, row, shadow, fold, touched)
        try:
            return steps.run()
        except ProjectionError as error:
            steps.note_failure(error)
            way = _after_failure(row)
            remedy = f"The live build was not changed. {way[0].upper()}{way[1:]}"
            raise ProjectionError(
                error.projection,
                error.position,
                error.reason,
                key=error.key,
                remedy=remedy,
            ) from error
        except KappaLogError as error:
            if not steps.has_ended:
                error.add_note(
                    f"Replay {row.id} has not ended; the live build was not changed. "
                    f"Once that is mended, go on: kappa-log replay --resume {row.id}; "
                    f"or give it up: kappa-log replay --cancel {row.id}"
                )
            raise

    def _code_of(self, row: ReplayRow, shadow: Build) -> Projection:
        fold = self._context.registry.made_by(row.projection, shadow.fingerprints)
        if fold is not None:
            return fold
        parts = (
            shadow.fingerprints.differing(
                self._context.registry.latest(row.projection).fingerprints
            )
            if row.projection in self._context.registry.names
            else ["code"]
        )
        msg = (
            f"replay {row.id} of '{row.projection}' began with other code than is "
            f"registered now ({', '.join(parts)} changed), so its rows would be a mix. "
            f"Drop it: kappa-log replay --cancel {row.id}; then replay again"
        )
        raise StaleCode(row.projection, shadow.number, parts, msg)

    def _drop_if_there(self, connection: sa.Connection, name: str, number: int) -> None:
        for build in builds.of(connection, self._database, name):
            if build.number == number and build.role in ("shadow", "side"):
                builds.drop(connection, self._database, build)
