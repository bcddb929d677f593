"""Replaying: rebuild, resume, promote, undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kappa_log.app.actor import user
from kappa_log.app.folding import Folding
from kappa_log.plan import Context, ReplayPlan, ReplayRequest
from kappa_log.project import OnProgress
from kappa_log.readers import EventSource
from kappa_log.replay import Replayer
from kappa_log.steps import ReplayReport
from kappa_log.storage import replays
from kappa_log.storage.builds import Build
from kappa_log.storage.replays import ReplayRow
from kappa_log.swap import Swap


class Replaying(Folding):
    """The part about replays."""

    def plan_replay(self, name: str, **request: Any) -> ReplayPlan:
        """Return what a replay would do; nothing is written. Options as `replay`.

        With ``source="archive"`` the archive is looked at, and refused as there.
        """
        self._require()
        return self._replayer().plan(name, ReplayRequest(**request))

    def replay(
        self,
        name: str,
        *,
        on_plan: Callable[[ReplayPlan], None] | None = None,
        on_start: Callable[[int], None] | None = None,
        on_progress: OnProgress | None = None,
        **request: Any,
    ) -> ReplayReport:
        """Fold a range of the log into a new build, compare it, and promote it.

        Args:
            name: The projection; its highest registered version is built.
            on_plan: Called with what the request comes to, before anything is written.
            on_start: Called with the replay's id, once it can be resumed.
            on_progress: Called as folding goes on.
            request: since, from_position or from_offset (a start: only keys touched
                from there on are folded again); by (recorded or event-time); until;
                promote (default True); max_changed; on_error (stop, the default, or
                park); reason; source (sql, or archive: the configured one, as far as
                it reaches). See `ReplayRequest`.

        Raises:
            UsageError: The request contradicts itself, or needs a full replay.
            AlreadyRunning: Another replay of it runs, or was interrupted.
            ProjectionError: The fold failed; the live build was not changed.
            ArchiveError: The archive cannot be read, or is of another log; nothing
                was changed.
        """
        self._require()
        return self._interruptible(
            lambda: self._replayer(on_plan, on_progress, on_start).replay(
                name, ReplayRequest(**request)
            )
        )

    def resume(
        self,
        identifier: int,
        *,
        on_start: Callable[[int], None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> ReplayReport:
        """Go on with a replay that was killed or interrupted."""
        self._require()
        return self._interruptible(
            lambda: self._replayer(None, on_progress, on_start).resume(identifier)
        )

    def cancel(self, identifier: int) -> ReplayRow:
        """End a replay that does not run, and drop what it built."""
        self._require()
        return self._replayer().cancel(identifier)

    def replays(
        self,
        projection: str | None = None,
        *,
        unfinished: bool = False,
        limit: int = 50,
    ) -> list[ReplayRow]:
        """Return replays, newest first."""
        self._require()
        with self.database.read() as connection:
            return replays.listed(
                connection,
                self.database,
                projection=projection,
                unfinished=unfinished,
                limit=limit,
            )

    def replay_row(self, identifier: int) -> ReplayRow:
        """Return one replay as it is stored, or raise NotFound."""
        self._require()
        with self.database.read() as connection:
            return replays.get(connection, self.database, identifier)

    def _replayer(
        self,
        on_plan: Callable[[ReplayPlan], None] | None = None,
        on_progress: OnProgress | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> Replayer:
        def started(identifier: int) -> None:
            self.interrupted_replay = identifier
            if on_start is not None:
                on_start(identifier)

        return Replayer(
            Context(
                database=self.database,
                registry=self.registry,
                clock=self._clock,
                who=user(),
                on_plan=on_plan,
                on_progress=on_progress,
                on_start=started,
                open_archive=self._open_source,
            )
        )

    def _open_source(self) -> EventSource:
        """Open the configured archive as what replays of this log read."""
        from kappa_log.archive.source import open_source

        archive = self.archive()
        with self.database.read() as connection:
            return open_source(connection, self.database, archive)

    def _interruptible(self, run: Callable[[], ReplayReport]) -> ReplayReport:
        self.interrupted_replay = None
        report = run()
        self.interrupted_replay = None
        return report

    def promote(
        self, name: str, *, max_changed: str | None = None, reason: str | None = None
    ) -> ReplayReport:
        """Promote the newest shadow that a replay kept."""
        self._require()
        return self._interruptible(
            lambda: self._replayer().promote(
                name, max_changed=max_changed, reason=reason
            )
        )

    def undo(
        self, name: str, *, behind: bool = False, reason: str | None = None
    ) -> Swap:
        """Make the retired build the live one again.

        Args:
            name: The projection.
            behind: Swap even if the retired build cannot catch up.
            reason: Why, for the audit trail.
        """
        self._require()
        return self._replayer().undo(name, behind=behind, reason=reason)

    def drop_projection(
        self, name: str, *, dry_run: bool = False, reason: str | None = None
    ) -> list[Build]:
        """Drop all builds of a projection whose code is gone, and its view.

        Args:
            name: The projection; its events stay in the log.
            dry_run: Drop nothing.
            reason: Why, for the audit trail.

        Returns:
            What was, or would be, dropped.

        Raises:
            NotFound: It has no build.
            UsageError: Its code is registered, or users' views read its view.
            AlreadyRunning: Another process replays it.
        """
        self._require()
        return self._replayer().drop_all(name, dry_run=dry_run, reason=reason)
