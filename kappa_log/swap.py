"""Swap: catch a build up, and make it the live one in one transaction.

Readers see the old rows or the new, never a mix: pointer, view and retirement of the
old build commit together, after the last events were folded under the head's lock.
A build with parked keys lacks events of theirs, so it is not promoted.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import sqlalchemy as sa

from kappa_log.config import OnError
from kappa_log.errors import DatabaseBusy, UsageError
from kappa_log.fold import Projection
from kappa_log.plan import Context
from kappa_log.project import Runner
from kappa_log.readers import PAGE_EVENTS
from kappa_log.storage import builds, log, parked, replays, views
from kappa_log.storage.builds import Build
from kappa_log.storage.database import ConstraintViolated

SWAP_ATTEMPTS = 5
"""How often a swap that readers block is tried again."""


class Swap(msgspec.Struct, frozen=True):
    """Which builds changed places."""

    projection: str
    live: int
    retired: int
    """0 if there was no live build before."""
    behind: int
    """Events that the new live build is behind the head."""


def catch_up(
    context: Context,
    build: Build,
    fold: Projection,
    phase: str,
    on_error: OnError = "stop",
) -> Runner:
    """Fold a build on until at most a page is left, and return its runner."""
    runner = context.runner(build, fold, on_error)
    head = context.head()
    while head > runner.cursor:
        runner.run(head, phase=phase, on_progress=context.on_progress)
        head = context.head()
        if head - runner.cursor <= PAGE_EVENTS:
            break
    return runner


class Swapper(msgspec.Struct, frozen=True, kw_only=True):
    """One swap: which build becomes live, by whose code, and why."""

    context: Context
    projection: str
    number: int
    fold: Projection | None
    """Code to fold the rest by; None swaps a build that cannot catch up."""
    action: str
    """promote or undo, for the audit trail."""
    reason: str | None
    on_error: OnError = "stop"
    """Of the rest that is folded."""
    with_parked: bool = False
    """Whether a build with parked keys is swapped in all the same."""
    then: Callable[[sa.Connection], None] = lambda _: None
    """What else commits with the swap."""

    def run(self) -> Swap:
        """Swap, giving way to readers and trying again.

        Raises:
            DatabaseBusy: Readers held the view each time; nothing was changed.
            UsageError: It is live already, or has parked keys.
        """
        busy: DatabaseBusy | None = None
        for _ in range(SWAP_ATTEMPTS):
            try:
                with self.context.database.write() as connection:
                    return self._swap(connection)
            except DatabaseBusy as error:
                busy = error
            except ConstraintViolated as error:
                # A live build came to be while this one was swapped in.
                busy = DatabaseBusy(str(error))
        msg = (
            f"readers held the view of '{self.projection}' {SWAP_ATTEMPTS} times; the "
            "old build is still live. Try again: "
            f"kappa-log projections {self.action} {self.projection}"
        )
        raise DatabaseBusy(msg) from busy

    def _swap(self, connection: sa.Connection) -> Swap:
        context, name = self.context, self.projection
        database, now = context.database, context.clock()
        views.limit_waiting(connection, database)
        old = builds.in_role(connection, database, name, "live")
        if old is not None:
            builds.lock_cursor(connection, database, old)
        new = builds.get(connection, database, name, self.number)
        if new.role == "live":
            msg = f"{new.label} is live already; nothing was changed"
            raise UsageError(msg)
        head = log.head(connection, database).position
        if self.fold is not None and new.cursor < head:
            runner = context.runner(new, self.fold, self.on_error)
            runner.fold_within(connection, head)
        if not self.with_parked:
            self._refuse_parked(connection, new)
        retired = builds.in_role(connection, database, name, "retired")
        if retired is not None and retired.number != self.number:
            builds.drop(connection, database, retired)
        # By way of shadow: there is never a second live or retired build.
        builds.set_role(connection, database, new, "shadow", now)
        if old is not None:
            builds.set_role(connection, database, old, "retired", now)
        builds.set_role(connection, database, new, "live", now)
        views.point_view(connection, database, new, old)
        new = builds.get(connection, database, name, self.number)
        self.then(connection)
        retired_number = old.number if old else 0
        replays.write_audit(
            connection,
            database,
            replays.Audit(
                who=context.who,
                action=self.action,
                subject=name,
                detail={"live": new.number, "retired": retired_number},
                reason=self.reason,
            ),
            now,
        )
        return Swap(name, new.number, retired_number, head - new.cursor)

    def _refuse_parked(self, connection: sa.Connection, new: Build) -> None:
        database, name = self.context.database, self.projection
        count = parked.count(connection, database, new)
        if not count:
            return
        ((_, first),) = parked.listed(connection, database, new, limit=1)
        keys = "a parked key" if count == 1 else f"{count:,} parked keys"
        remedy = (
            "or swap all the same with --behind"
            if self.action == "undo"
            else f"drop it: kappa-log projections drop {name} {new.number}; "
            "then mend the fold and replay again"
        )
        msg = (
            f"{new.label} has {keys}, the first of them {first.key!r} at position "
            f"{first.position:,} ({first.error_class}: {first.error_message[:200]}), "
            "so it lacks events; nothing was swapped. Look: kappa-log projections "
            f"parked {name} --build {new.number}; {remedy}"
        )
        raise UsageError(msg)
