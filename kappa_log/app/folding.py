"""Folding: live read models, their rows, and how a row came to be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kappa_log import project
from kappa_log.app.actor import user
from kappa_log.app.base import POLL_SECONDS
from kappa_log.app.failing import Failing
from kappa_log.columns import Unsettled
from kappa_log.config import OnError
from kappa_log.errors import (
    DatabaseBusy,
    DatabaseUnavailable,
    KappaLogError,
    NotFound,
    SchemaOutOfDate,
    UsageError,
)
from kappa_log.events import ORIGIN, Event, Position
from kappa_log.fold import Projection
from kappa_log.keys import key_shape_of
from kappa_log.parked import ParkedRetrier, ParkedRetry, with_waiting
from kappa_log.project import OnProgress, ProjectReport
from kappa_log.readers import pages, reader_of
from kappa_log.status import (
    CursorStatus,
    ProjectionStatus,
    cursor_statuses,
    projection_status,
)
from kappa_log.storage import (
    builds,
    diff,
    log,
    replays,
)
from kappa_log.storage import parked as stored_parked
from kappa_log.storage.builds import Build
from kappa_log.storage.diff import Diff
from kappa_log.storage.parked import ParkedKey
from kappa_log.storage.rows import plain_rows

_OF_ALL = (DatabaseBusy, DatabaseUnavailable, SchemaOutOfDate)
"""Errors that the next projection would meet, too."""

OnFailure = Callable[[KappaLogError], None]


class Explained(msgspec.Struct, frozen=True):
    """One event of a row, and the state after it; None deletes the row."""

    event: Event
    state: dict[str, Any] | None
    error: str | None = None
    """Why the key is parked at this event: the state is that before it."""


class Folding(Failing):
    """The part about projections and their builds."""

    def projections(self) -> list[ProjectionStatus]:
        """Return all projections that are registered or built, by name."""
        self._require()
        with self.database.read() as connection:
            built = {build.projection for build in builds.of(connection, self.database)}
            names = sorted({*self.registry.names, *built})
            return [self._status(connection, name) for name in names]

    def cursors(self) -> list[CursorStatus]:
        """Return how far each live build is behind the head; no rows are counted."""
        self._require()
        with self.database.read() as connection:
            return cursor_statuses(connection, self.database, self._clock)

    def projection(self, name: str) -> ProjectionStatus:
        """Return one projection, or raise ProjectionNotFound."""
        self._require()
        with self.database.read() as connection:
            if not builds.of(connection, self.database, name):
                self.registry.latest(name)
            return self._status(connection, name)

    def _status(self, connection: Any, name: str) -> ProjectionStatus:
        return projection_status(
            connection, self.database, self.registry, name, self._clock
        )

    def project(
        self,
        names: Sequence[str] = (),
        *,
        on_progress: OnProgress | None = None,
        on_error: OnError | None = None,
        on_failure: OnFailure | None = None,
    ) -> list[ProjectReport]:
        """Bring live builds up to the head; make those that are missing.

        One that fails stops no other: each is folded as far as it can be.

        Args:
            names: Which projections; all registered ones if empty.
            on_progress: Called as folding goes on.
            on_error: ``park``: the key of a fold that raises waits, all others go on;
                ``stop``: the projection stops before that event. The configuration's
                if None.
            on_failure: Called with the error of each projection that fails. If None,
                the first is raised once all others are folded; theirs are its notes.

        Returns:
            What was done for each that did not fail.

        Raises:
            ProjectionNotFound: No such projection; nothing was folded.
            ProjectionError: A fold failed, and stops; all before that event is written.
        """
        self._require()
        for name in names:
            self.projection(name)
        reports: list[ProjectReport] = []
        failures: list[KappaLogError] = []
        for name in names or self.registry.names:
            try:
                report = project.project(
                    self.database,
                    self.registry,
                    name,
                    self._clock,
                    on_progress,
                    on_error or self.config.projections.on_error,
                )
            except _OF_ALL:
                raise
            except KappaLogError as error:
                (on_failure or failures.append)(error)
            else:
                reports.append(report)
        if failures:
            for other in failures[1:]:
                failures[0].add_note(str(other))
            raise failures[0]
        return reports

    def follow(
        self,
        names: Sequence[str] = (),
        *,
        stop: threading.Event,
        on_report: Callable[[ProjectReport], None] | None = None,
        on_error: OnError | None = None,
        on_failure: OnFailure | None = None,
    ) -> None:
        """Keep live builds at the head until told to stop.

        Args:
            names: As for `project`.
            stop: Set to end it, from any thread or signal handler.
            on_report: Called with what each round did for a projection.
            on_error: As for `project`.
            on_failure: Called with the error of a projection that fails, each round
                again; the others go on. If None, it is raised.

        Raises:
            ProjectionError: Nobody wants to be told, or no projection is left that
                does not fail.
        """
        while not stop.is_set():
            failures: list[KappaLogError] = []
            reports = self.project(names, on_error=on_error, on_failure=failures.append)
            for report in reports:
                if on_report is not None:
                    on_report(report)
            for error in failures:
                if on_failure is None or not reports:
                    raise error
                on_failure(error)
            time.sleep(POLL_SECONDS)

    def rows(
        self,
        name: str,
        *,
        key: str | None = None,
        build: int | None = None,
        limit: int | None = None,
        after: str | None = None,
        offset: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a projection by key: key columns, then the state's fields.

        Args:
            name: The projection.
            key: One key as text; parts of a tuple joined by ``/``.
            build: Number of a build; the live one if None.
            limit: Most rows to yield.
            after: A key as text; only rows past it.
            offset: Rows to pass over.
        """
        self._require()
        with self.database.read() as connection:
            found = self._build(connection, name, build)
            where = None if key is None else _key_columns(found, key)
            past = None if after is None else _key_columns(found, after)
            yield from plain_rows(
                connection,
                self.database,
                found,
                where=where,
                limit=limit,
                past=past,
                offset=offset,
            )

    def explain(self, name: str, key: str) -> Iterator[Explained]:
        """Yield each event of a row with the state after it, up to the live cursor.

        A parked key ends with the event that it is parked at, and the error.

        Raises:
            ProjectionNotFound: The projection's code is not registered.
            ProjectionError: The fold fails on one of the events.
        """
        self._require()
        fold = self.registry.latest(name)
        stop: ParkedKey | None = None
        with self.database.read() as connection:
            build = builds.in_role(connection, self.database, name, "live")
            end = log.head(connection, self.database).position
            if build is not None:
                fold = self.registry.made_by(name, build.fingerprints) or fold
                end = build.cursor
            wanted = _parsed(fold, key)
            if build is not None:
                found = stored_parked.listed(
                    connection, self.database, build, key=wanted
                )
                stop = found[0][1] if found else None
        state: Any = None
        folding = fold.folding()
        for event in self._events_of(fold, wanted, stop.position if stop else end):
            if stop is not None and event.position == stop.position:
                error = f"{stop.error_class}: {stop.error_message}"
                yield Explained(event, fold.state_shape.fields(state), error)
                return
            state = folding.after(wanted, state, event)
            yield Explained(event, fold.state_shape.fields(state))

    def _events_of(self, fold: Projection, key: Any, end: Position) -> Iterator[Event]:
        reader = reader_of(self.database, fold, {key})
        for _, page in pages(reader, fold, ORIGIN, end):
            for _, event in fold.keyed(page, {key})[0]:
                yield event

    def parked(
        self,
        name: str,
        *,
        build: int | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[ParkedKey]:
        """Return the keys of a projection that are parked, in log order.

        Args:
            name: The projection.
            build: Number of a build; the live one if None.
            limit: Most to return.
            offset: How many to pass over.

        Raises:
            NotFound: No such build.
        """
        self._require()
        with self.database.read() as connection:
            found = self._build(connection, name, build)
            keys = stored_parked.listed(
                connection, self.database, found, limit=limit, offset=offset
            )
        fold = None
        if name in self.registry.names:
            made_by = self.registry.made_by(name, found.fingerprints)
            fold = made_by or self.registry.latest(name)
        return with_waiting(self.database, fold, found, keys)

    def retry_parked(
        self,
        name: str,
        keys: Sequence[str] | None = None,
        *,
        dry_run: bool = False,
        who: str | None = None,
        reason: str | None = None,
    ) -> ParkedRetry:
        """Fold parked keys of the live build on, from where they are parked.

        A key whose fold raises again stays parked, at that event. The registered code
        must be that of the build, or have been declared `compatible`.

        Args:
            name: The projection.
            keys: Keys as text, parts of a tuple joined by ``/``; all if None.
            dry_run: Tell what would come of it, and write nothing.
            who: Whom the audit trail names; the user of the machine if None.
            reason: Why, for the audit trail.

        Raises:
            NotFound: There is no live build, or a key is not parked.
            StaleCode: The registered code is not that of the build.
            ProjectionError: A payload or key cannot be made; nothing was changed.
            LostRace: Somebody else retried them first.
        """
        self._require()
        act = replays.Audit(who=who or user(), action="", subject="", reason=reason)
        retrier = ParkedRetrier(self.database, self.registry, self._clock, act)
        return retrier.retry(name, keys, dry_run=dry_run)

    def diff(self, name: str, old: int | None = None, new: int | None = None) -> Diff:
        """Compare two builds of a projection at one position.

        If they have moved apart, the comparison that the replay took is returned.

        Args:
            name: The projection.
            old: Number of a build; the live one if None.
            new: Number of a build; the newest other one if None.

        Raises:
            NotFound: No such builds.
            UsageError: They are at different positions.
        """
        self._require()
        with self.database.read() as connection:
            left = self._build(connection, name, old)
            others = [
                build
                for build in builds.of(connection, self.database, name)
                if build.number != left.number
            ]
            if new is None and not others:
                raise NotFound(
                    "a second build of",
                    name,
                    f"Make one: kappa-log replay {name} --no-promote",
                )
            right = others[-1] if new is None else self._build(connection, name, new)
            if left.cursor != right.cursor:
                taken = replays.diff_of(connection, self.database, left, right)
                if taken is not None:
                    return taken
                msg = (
                    f"{left.label} is at position {left.cursor}, {right.label} at "
                    f"{right.cursor}; rows are compared at one position only. "
                    f"Bring the live build up: kappa-log project {name}"
                )
                raise UsageError(msg)
            return diff.compare(connection, self.database, left, right)

    def drop_build(self, name: str, number: int, *, reason: str | None = None) -> None:
        """Drop a build that is not live; a live one is what users read.

        Raises:
            NotFound: No such build.
            UsageError: It is live, or a replay that fills it has not ended.
        """
        self._require()
        with self.database.write() as connection:
            build = self._build(connection, name, number)
            if build.role == "live":
                other = (
                    "Promote another first"
                    if name in self.registry.names
                    else "Its code is not registered; to drop all builds of it: "
                    f"kappa-log projections drop {name} --all"
                )
                msg = f"{build.label} is live: users read it. {other}"
                raise UsageError(msg)
            for row in replays.listed(
                connection, self.database, projection=name, unfinished=True
            ):
                if row.build == number:
                    msg = (
                        f"replay {row.id} fills {build.label}; run: "
                        f"kappa-log replay --cancel {row.id}"
                    )
                    raise UsageError(msg)
            builds.drop(connection, self.database, build)
            self._audit(connection, "drop", f"{name} build {number}", reason)

    def compatible(self, name: str, *, reason: str | None = None) -> list[str]:
        """Declare that the registered code makes the same rows as the live build's.

        Returns:
            The fingerprints that were declared equal; empty if they are anyway.

        Raises:
            UsageError: The routing or the columns changed: never the same rows.
        """
        self._require()
        fold = self.registry.latest(name)
        with self.database.write() as connection:
            build = self._build(connection, name, None)
            parts = build.fingerprints.differing(fold.fingerprints)
            fixed = [part for part in parts if part in ("routing", "state")]
            if fixed:
                msg = (
                    f"'{name}' cannot be declared compatible: {', '.join(fixed)} "
                    "changed, which rows or columns there are. "
                    f"Run: kappa-log replay {name}"
                )
                raise UsageError(msg)
            if parts:
                builds.set_fingerprints(
                    connection, self.database, build, fold.fingerprints, self._clock()
                )
                self._audit(connection, "compatible", build.label, reason)
        return parts

    def _build(self, connection: Any, name: str, number: int | None) -> Build:
        if number is not None:
            return builds.get(connection, self.database, name, number)
        found = builds.in_role(connection, self.database, name, "live")
        if found is None:
            self.registry.latest(name)
            raise NotFound("live build of", name, f"Make it: kappa-log project {name}")
        return found


def _key_columns(build: Build, key: str) -> dict[str, Any]:
    """Return the key columns of a build for a key that a person typed."""
    columns = build.layout.keys
    shape = key_shape_of([column.kind for column in columns])
    try:
        values = shape.values(shape.parse(key))
    except Unsettled as error:
        msg = f"{build.label}: {error}"
        raise UsageError(msg) from None
    return {c.name: value for c, value in zip(columns, values, strict=True)}


def _parsed(fold: Projection, key: str) -> Any:
    try:
        return fold.key_shape.parse(key)
    except Unsettled as error:
        msg = f"projection '{fold.name}': {error}"
        raise UsageError(msg) from None
