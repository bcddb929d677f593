"""Trial: what a retry would come to, walked in earnest and rolled back.

A key is walked as a retry drains it: in the order of offsets, up to the first record
that fails again; what comes behind would wait. One transaction spans the walk, so a
handler sees what was written for the records before, and its end undoes all of it.
Nothing is kept of a trial: no event, no attempt, no entry in the audit trail. But
handlers are called, and what they do elsewhere is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kappa_log.decide import Decided, Portion, decide, identify
from kappa_log.effects import Effects, TransactionDied
from kappa_log.errors import LostRace
from kappa_log.events import Position
from kappa_log.storage import log
from kappa_log.storage.database import Database
from kappa_log.storage.failures import Waiting

MAX_TRIALS = 500
"""Failures that one dry run looks at; the others are only counted."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What a retry of one failure would come to."""

    id: int
    outcome: str
    """``acked``, ``skipped``, ``duplicate``, ``failed``; ``waits`` behind an earlier
    failure of its key; ``gone``: retried or discarded while we looked."""
    position: Position | None = None
    """Of the event that it repeats. An event that it would become has none yet."""
    repeats: int | None = None
    """Failure whose event it would repeat, once that one is retried."""
    behind: int | None = None
    """Failure that it would wait for."""
    error_class: str | None = None
    error_message: str | None = None


class Trier:
    """Walks keys, and remembers what would have become an event by then.

    Args:
        database: The log.
        portion_of: Gives a failure's record with who decides about it; raises
            LostRace if it is gone.
    """

    def __init__(
        self, database: Database, portion_of: Callable[[Waiting], Portion]
    ) -> None:
        self._database = database
        self._portion_of = portion_of
        self._known: dict[bytes, log.Known] = {}
        """Would-be events; minus the failure's id stands for the position."""

    def walk(self, queue: Sequence[Waiting]) -> Iterator[Trial]:
        """Yield what would become of a key's failures, given head first.

        Raises:
            StorageError: The database is away or busy; nothing was changed.
        """
        left = deque(queue)
        failed: int | None = None
        while left and failed is None:
            with Effects(self._database) as effects:
                for trial in self._until_it_dies(left, effects):
                    failed = trial.id if trial.outcome == "failed" else None
                    yield trial
        for found in left:
            yield Trial(id=found.id, outcome="waits", behind=failed)

    def _until_it_dies(self, left: deque[Waiting], effects: Effects) -> Iterator[Trial]:
        """Yield from a queue until a record fails, or ends the transaction."""
        while left:
            found = left.popleft()
            try:
                trial = self._try(found, effects)
            except TransactionDied as error:
                # As in a retry, once more without the connection that it abused.
                with Effects(self._database, refused=error) as refusing:
                    yield self._try(found, refusing)
                return
            yield trial
            if trial.outcome == "failed":
                return

    def _try(self, found: Waiting, effects: Effects) -> Trial:
        """Decide about one failure.

        Raises:
            TransactionDied: Its handler ended the transaction.
        """
        try:
            portion = self._portion_of(found)
        except LostRace:
            return Trial(id=found.id, outcome="gone")
        batch = identify(self._database, [portion])
        decision = decide(self._database, batch, effects, also_known=self._known)
        (decided,) = decision.decided
        for acked in decided.acked:
            self._known[acked.message_id] = log.Known(-found.id, acked.checksum)
        return _trial_of(found.id, decided)


def _trial_of(identifier: int, decided: Decided) -> Trial:
    if decided.failed:
        kind, said, *_ = decided.failed[0].explained
        return Trial(
            id=identifier, outcome="failed", error_class=kind, error_message=said
        )
    if decided.duplicates:
        place = decided.duplicates[0][1]
        return Trial(
            id=identifier,
            outcome="duplicate",
            position=place if place > 0 else None,
            repeats=-place if place < 0 else None,
        )
    return Trial(id=identifier, outcome="acked" if decided.acked else "skipped")
