"""Readers: pages of events for folds, from the database or from another source."""

from __future__ import annotations

from collections.abc import Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import sqlalchemy as sa

from kappa_log.cursor import spans
from kappa_log.events import EventPage, Position
from kappa_log.fold import Projection
from kappa_log.storage import log
from kappa_log.storage.database import Database

PAGE_EVENTS = 2_000
"""Positions a page spans: few enough to stay in the processor's cache while they are
folded (measured: 10,000 take half as long again), many enough to be worth a query."""

MAX_INDEXED_ENTITIES = 500
"""Entities that are looked up by index; of more, all events are read."""


class EventReader(Protocol):
    """Reads the events that one projection folds, page by page."""

    @property
    def waits(self) -> bool:
        """Whether reading mostly waits for another process."""
        ...

    def page(
        self, after: Position, upto: Position, connection: sa.Connection | None = None
    ) -> EventPage:
        """Return the matching events in (after, upto], in order of position.

        With a connection, those that its transaction sees.
        """
        ...


class EventSource(Protocol):
    """Where a replay reads events from, if not from the database."""

    def reader(
        self, fold: Projection, only: Collection[Any] | None, rest: EventReader
    ) -> EventReader:
        """Return a reader of the events of a fold, and of these keys if not None.

        What the source does not hold comes from ``rest``, the database's reader.
        """
        ...

    @property
    def url(self) -> str:
        """Where it is, for people."""
        ...

    @property
    def end(self) -> Position:
        """Last position that it holds."""
        ...

    def look(self, fold: Projection, upto: Position) -> None:
        """See that what a fold would read is there; what is in it is not read.

        Raises:
            ArchiveDamaged: Some of it is not.
        """
        ...

    def close(self) -> None:
        """Let go of whatever it holds open."""
        ...


def reader_of(
    database: Database,
    fold: Projection,
    only: Collection[Any] | None = None,
    source: EventSource | None = None,
) -> EventReader:
    """Return a reader of the events that a projection folds.

    Few entities are looked up by index; many are cheaper to find by reading all.
    """
    entities = None
    if fold.key is None and only is not None and len(only) <= MAX_INDEXED_ENTITIES:
        entities = list(only)
    reader = log.LogReader(database, fold.topics, fold.groups, entities)
    return reader if source is None else source.reader(fold, only, reader)


def pages(
    reader: EventReader,
    fold: Projection,
    after: Position,
    upto: Position,
    connection: sa.Connection | None = None,
) -> Generator[tuple[Position, EventPage]]:
    """Yield the matching events in (after, upto] as pages, each with its last position.

    Where reading waits for another process, the next page is read while one is folded.

    Args:
        reader: Reads them.
        fold: What they are for.
        after: Exclusive lower bound.
        upto: Inclusive upper bound, at most the head: what is there does not change.
        connection: Open transaction whose snapshot must be seen; in it, nothing is
            read ahead.
    """
    size = PAGE_EVENTS * fold.pages_at_once
    steps = spans(after, upto, size)
    if connection is not None or not reader.waits or upto - after <= size:
        for start, until in steps:
            yield until, reader.page(start, until, connection)
        return
    with ThreadPoolExecutor(1, "read") as thread:
        ahead = ((until, thread.submit(reader.page, a, until)) for a, until in steps)
        pending = next(ahead, None)
        while pending is not None:
            until, read = pending
            page = read.result()
            pending = next(ahead, None)
            yield until, page
