"""Cursor: the last position a build has folded, and how far it is from the head."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import msgspec

from kappa_log.events import Position


class Lag(msgspec.Struct, frozen=True):
    """How far a cursor is behind the head."""

    events: int
    """Events of the log past the cursor, matching or not."""
    seconds: float
    """Since the first event past the cursor was recorded; 0 at the head."""


def lag(
    cursor: Position, head: Position, waiting_since: datetime | None, now: datetime
) -> Lag:
    """Return the lag of a cursor.

    Args:
        cursor: Last position folded.
        head: Last position of the log.
        waiting_since: When the first event past the cursor was recorded.
        now: The current time.
    """
    if waiting_since is None or cursor >= head:
        return Lag(0, 0.0)
    return Lag(head - cursor, max(0.0, (now - waiting_since).total_seconds()))


def spans(
    after: Position, upto: Position, size: int
) -> Iterator[tuple[Position, Position]]:
    """Yield (after, upto) pairs that cover (after, upto] in steps of at most size.

    Positions have no holes, so a span bounds the events of a page without counting
    them, and a cursor can pass events that no projection wants.
    """
    while after < upto:
        step = min(after + size, upto)
        yield after, step
        after = step
