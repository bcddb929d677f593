"""Parked: keys whose fold raised, folded on again once their code is mended.

A key is folded from its stored row and its park position up to the build's cursor, by
the code whose fingerprints the build has. That is tried outside of any transaction;
what came meanwhile is folded under the lock of the build's cursor, so that live folding
cannot pass, and row and parked key change there, together or not at all. Live runners
that folded before remember the key as parked: a new epoch of the build makes them drop
what they remember (see `project`). Nothing is claimed beforehand, so a kill leaves
nothing locked; of two who retry one key, the second finds it changed, and loses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.columns import Unsettled
from kappa_log.errors import (
    LostRace,
    NotFound,
    ProjectionError,
    UsageError,
)
from kappa_log.events import Position
from kappa_log.fold import Folding, Parked, Projection, Registry, Rows
from kappa_log.keys import key_shape_of
from kappa_log.project import stale
from kappa_log.readers import PAGE_EVENTS, pages, reader_of
from kappa_log.storage import builds, log, parked, replays
from kappa_log.storage.builds import Build
from kappa_log.storage.database import Database
from kappa_log.storage.parked import ParkedKey, Stand
from kappa_log.storage.rows import RowStore

MAX_COUNTED = 200_000
"""Positions that are read to count what waits, where no index can count it."""


class KeyRetry(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one parked key, or would."""

    key: str
    outcome: str
    """``folded``, ``failed`` or ``lost``: somebody else was there first."""
    events: int
    """Of its events that were folded."""
    position: Position
    """Where it is parked still; else the last of its events."""
    error: str | None = None


class ParkedRetry(msgspec.Struct, frozen=True, kw_only=True):
    """What became of parked keys that were retried, or would."""

    projection: str
    build: int
    dry_run: bool
    folded: int
    failed: int
    lost: int
    keys: list[KeyRetry]


class ParkedRetrier:
    """Folds parked keys of live builds on.

    Args:
        database: The log.
        registry: For the code of the projections.
        clock: The time.
        act: Who does it and why, for the audit trail.
    """

    def __init__(
        self,
        database: Database,
        registry: Registry,
        clock: Callable[[], datetime],
        act: replays.Audit,
    ) -> None:
        self._database = database
        self._registry = registry
        self._clock = clock
        self._act = act

    def retry(
        self, name: str, keys: Sequence[str] | None = None, *, dry_run: bool = False
    ) -> ParkedRetry:
        """Fold parked keys of a live build on, up to its cursor.

        Args:
            name: The projection.
            keys: Keys as they are typed; None means all that are parked.
            dry_run: Fold them in memory, tell what came of it, and write nothing.

        Raises:
            NotFound: There is no live build, or no such parked key.
            StaleCode: The registered code is not that of the build.
            ProjectionError: No key is known for an event; nothing was changed.
            LostRace: Somebody else retried all of them, or promoted another build.
        """
        trial = self._trial(name, keys)
        self._catch_up(trial)
        if not dry_run and trial.stands:
            self._settle(trial)
        result = trial.result(dry_run=dry_run)
        if result.lost and result.lost == len(result.keys):
            msg = (
                f"the parked keys of {trial.build.label} were retried by somebody "
                "else; nothing was changed by this attempt"
            )
            raise LostRace(msg)
        return result

    def _trial(self, name: str, keys: Sequence[str] | None) -> _Trial:
        """Return the keys that are meant, with their rows, folded on by nothing yet."""
        with self._database.read() as connection:
            build = builds.in_role(connection, self._database, name, "live")
            if build is None:
                self._registry.latest(name)
                hint = f"Make it: kappa-log project {name}"
                raise NotFound("live build of", name, hint)
            found = parked.stands(connection, self._database, build)
            fold = self._registry.made_by(name, build.fingerprints)
            if fold is None:
                raise stale(self._registry, build, len(found))
            chosen = found if keys is None else _chosen(build, found, keys)
            store = RowStore(self._database, build, fold)
            states = store.load(connection, chosen)
        return _Trial(self._database, build, fold, chosen, states)

    def _catch_up(self, trial: _Trial) -> None:
        """Fold on until at most a page is left: little is done under the lock."""
        build, cursor = trial.build, trial.build.cursor
        while cursor - trial.cursor > 0 and trial.stands:
            trial.fold_to(cursor)
            with self._database.read() as connection:
                again = builds.get(
                    connection, self._database, build.projection, build.number
                )
            if again.cursor - trial.cursor <= PAGE_EVENTS:
                return
            cursor = again.cursor

    def _settle(self, trial: _Trial) -> None:
        """Fold what is left under the cursor's lock, and write what came of all."""
        database, build, now = self._database, trial.build, self._clock()
        with database.write() as connection:
            held = builds.lock_cursor(connection, database, build)
            live = builds.in_role(connection, database, build.projection, "live")
            if (
                held is None
                or live is None
                or live.id != build.id
                or live.fingerprints != build.fingerprints
            ):
                msg = (
                    f"{build.label} is not live any more, or by other code; nothing "
                    "was changed. Look: kappa-log projections show "
                    f"{build.projection}"
                )
                raise LostRace(msg)
            trial.fold_to(held, connection)
            trial.lose(parked.stands(connection, database, build))
            if not trial.stands:
                return
            store = RowStore(database, build, trial.fold)
            store.save(connection, trial.changed())
            parked.failed_again(connection, database, build, trial.failed, now)
            parked.release(connection, database, build, trial.passed)
            builds.start_epoch(connection, database, build)
            act = msgspec.structs.replace(
                self._act,
                action="retry parked",
                subject=build.label,
                detail={"folded": len(trial.passed), "failed": len(trial.failed)},
            )
            replays.write_audit(connection, database, act, now)


class _Trial:
    """Parked keys folded on in memory, each from its park position."""

    def __init__(
        self,
        database: Database,
        build: Build,
        fold: Projection,
        stands: dict[Any, Stand],
        states: dict[Any, Any],
    ) -> None:
        self.build = build
        self.fold = fold
        self.stands = stands
        """Key → where it stood when it was read; those that were lost are not in it."""
        self._lost: dict[Any, Stand] = {}
        self._folding = Folding(fold, only=stands, most_parked=len(stands) + 1)
        self._folding.adopt(states)
        self._reader = reader_of(database, fold, stands)
        self._folded: Counter[Any] = Counter()
        first = min((stand.position for stand in stands.values()), default=1)
        self.cursor = first - 1

    @property
    def failed(self) -> dict[Any, Parked]:
        """Keys whose fold raised again, in the order of the log."""
        found = self._folding.new_parked
        return {key: found[key] for key in self.stands if key in found}

    @property
    def passed(self) -> list[Any]:
        """Keys whose fold went through."""
        return [key for key in self.stands if key not in self._folding.new_parked]

    def fold_to(
        self, target: Position, connection: sa.Connection | None = None
    ) -> None:
        """Fold the keys' events on, up to a position.

        Raises:
            ProjectionError: A payload or key cannot be made.
        """
        found = pages(self._reader, self.fold, self.cursor, target, connection)
        for until, page in found:
            try:
                pairs, _ = self.fold.keyed(page, self.stands)
            except ProjectionError as error:
                remedy = "Nothing was changed: the keys are parked as they were."
                raise ProjectionError(
                    error.projection, error.position, error.reason, remedy=remedy
                ) from error
            self._folding.fold(filter(self._is_due, pairs))
            self.cursor = until

    def _is_due(self, pair: Any) -> bool:
        key, event = pair
        if event.position < self.stands[key].position or key in self._folding.parked:
            return False
        self._folded[key] += 1
        return True

    def lose(self, stands: dict[Any, Stand]) -> None:
        """Give up keys that are not as they were found."""
        for key, stand in list(self.stands.items()):
            if stands.get(key) != stand:
                self._lost[key] = self.stands.pop(key)

    def changed(self) -> Rows:
        """Return the rows to write."""
        return self._folding.rows_of(self._folding.changed(self.stands))

    def result(self, *, dry_run: bool) -> ParkedRetry:
        """Return what came of it."""
        found = [self._outcome(key) for key in self.stands]
        found += [
            KeyRetry(
                key=self._text(key), outcome="lost", events=0, position=at.position
            )
            for key, at in self._lost.items()
        ]
        count = Counter(one.outcome for one in found)
        return ParkedRetry(
            projection=self.build.projection,
            build=self.build.number,
            dry_run=dry_run,
            folded=count["folded"],
            failed=count["failed"],
            lost=count["lost"],
            keys=found,
        )

    def _outcome(self, key: Any) -> KeyRetry:
        failed = self._folding.new_parked.get(key)
        if failed is None:
            return KeyRetry(
                key=self._text(key),
                outcome="folded",
                events=self._folded[key],
                position=self._folding.position_of(key) or self.stands[key].position,
            )
        error = failed.error
        return KeyRetry(
            key=self._text(key),
            outcome="failed",
            # The one that failed was tried, and is not folded.
            events=self._folded[key] - 1,
            position=failed.position,
            error=f"{error.error_class}: {error.error_message}",
        )

    def _text(self, key: Any) -> str:
        return self.fold.key_shape.text(key)


def _chosen(
    build: Build, found: dict[Any, Stand], keys: Sequence[str]
) -> dict[Any, Stand]:
    """Return those of the parked keys that were typed, or raise NotFound."""
    shape = key_shape_of([column.kind for column in build.layout.keys])
    chosen = {}
    for text in dict.fromkeys(keys):
        try:
            key = shape.parse(text)
        except Unsettled as error:
            msg = f"{build.label}: {error}"
            raise UsageError(msg) from None
        if key not in found:
            noun = f"parked key of {build.label}"
            hint = f"See: kappa-log projections parked {build.projection}"
            raise NotFound(noun, repr(text), hint)
        chosen[key] = found[key]
    return chosen


def with_waiting(
    database: Database,
    fold: Projection | None,
    build: Build,
    found: Sequence[tuple[Any, ParkedKey]],
) -> list[ParkedKey]:
    """Return parked keys with the number of events that wait, where it can be had.

    An index counts events of entities. Keys that a function makes are counted by
    reading the log from the first park position on, if that is not far.
    """
    if fold is None or not found:
        return [seen for _, seen in found]
    if fold.key is None:
        with database.read() as connection:
            counts = {
                key: log.count_of_entity(
                    connection,
                    database,
                    key,
                    (seen.position, build.cursor),
                    fold.topics,
                    fold.groups,
                )
                for key, seen in found
            }
    else:
        counts = _read_waiting(database, fold, build, dict(found))
    return [
        msgspec.structs.replace(seen, waiting=counts.get(key)) for key, seen in found
    ]


def _read_waiting(
    database: Database, fold: Projection, build: Build, found: dict[Any, ParkedKey]
) -> dict[Any, int]:
    first = min(seen.position for seen in found.values())
    if build.cursor - first >= MAX_COUNTED:
        return {}
    counts: Counter[Any] = Counter()
    reader = reader_of(database, fold)
    keys: Collection[Any] = found.keys()
    for _, page in pages(reader, fold, first - 1, build.cursor):
        try:
            pairs, _ = fold.keyed(page, keys)
        except ProjectionError:
            # By code that is not the build's, for instance.
            return {}
        counts.update(
            key for key, event in pairs if event.position >= found[key].position
        )
    return counts
