"""Reading: events, the ledger and the head, as they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from kappa_log.app.base import POLL_SECONDS
from kappa_log.app.tables import Tables
from kappa_log.events import Event, Position, from_micros
from kappa_log.status import HeadStatus
from kappa_log.storage import (
    ledger,
    lists,
    log,
    pages,
)
from kappa_log.storage.pages import Chosen, Page


class Reading(Tables):
    """The part that reads the log."""

    def head(self) -> HeadStatus:
        """Return the end of the log."""
        self._require()
        with self.database.read() as connection:
            found = log.head(connection, self.database)
        at = None if found.recorded_at is None else from_micros(found.recorded_at)
        return HeadStatus(found.position, found.digest.hex(), at)

    def events(
        self, *, limit: int = 20, oldest_first: bool = False, **chosen: Any
    ) -> list[Event]:
        """Return events by position, newest first.

        Args:
            limit: Most events to return.
            oldest_first: Begin at the lowest position.
            chosen: topic, group, entity_id, event_type, after, before, since.
        """
        self._require()
        with self.database.read() as connection:
            return lists.events(
                connection,
                self.database,
                lists.EventFilter(**chosen),
                limit=limit,
                oldest_first=oldest_first,
            )

    def event_page(self, chosen: Chosen, page: Page) -> list[Event]:
        """Return a page of events, the latest event time first."""
        self._require()
        with self.database.read() as connection:
            return pages.events(connection, self.database, chosen, page)

    def failure_page(self, chosen: Chosen, page: Page) -> list[lists.Failure]:
        """Return a page of failures, the latest event time first."""
        self._require()
        with self.database.read() as connection:
            return pages.failures(connection, self.database, chosen, page)

    def event(self, position: Position) -> Event:
        """Return the event at a position, or raise NotFound."""
        self._require()
        with self.database.read() as connection:
            return lists.event(connection, self.database, position)

    def sources(self) -> dict[int, str]:
        """Return source_id → name of the sources that the log knows."""
        self._require()
        with self.database.read() as connection:
            return lists.sources(connection, self.database)

    def tail(
        self,
        *,
        stop: threading.Event,
        after: Position | None = None,
        topic: str | None = None,
    ) -> Iterator[Event]:
        """Yield events as they come, until told to stop.

        Args:
            stop: Ends the iteration when set, from any thread or signal handler.
            after: Position to begin after; None begins at the head.
            topic: Topic to follow; None follows all.
        """
        cursor = self.head().position if after is None else after
        while not stop.is_set():
            found = self.events(after=cursor, topic=topic, limit=500, oldest_first=True)
            yield from found
            if found:
                cursor = found[-1].position
            else:
                time.sleep(POLL_SECONDS)

    def checkpoints(
        self, *, limit: int = 50, after: int | None = None
    ) -> list[lists.Checkpointed]:
        """Return the ledger's rows by id."""
        self._require()
        with self.database.read() as connection:
            return lists.checkpoints(
                connection, self.database, limit=limit, after=after
            )

    def seen(self) -> ledger.Counts:
        """Return what became of all records that were ever read."""
        self._require()
        with self.database.read() as connection:
            return ledger.totals(connection, self.database)
