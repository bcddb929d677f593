"""Folds: events in, rows out, in memory and by the code of a replay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kappa_log.codec import made
from kappa_log.events import Event, EventPage, make_event
from kappa_log.fold import Folding, Projection

_ANY = make_event()
_DEFAULT_TOPIC, _DEFAULT_GROUP = _ANY.topic, _ANY.group_id

_COLUMNS = (
    "source_id", "topic", "group_id", "partition", "offset", "key", "headers",
    "timestamp", "entity_id", "event_time", "event_type", "event_version",
    "recorded_at", "checksum", "message_id", "raw",
)  # fmt: skip


def given(events: Iterable[Any]) -> Given:
    """Return what a fold is to be tried on.

    Args:
        events: In order: of `make_event`, of a log, or plain payloads. Their positions
            are 1, 2, 3 …, as in a log.
    """
    found = [e if isinstance(e, Event) else make_event(payload=e) for e in events]
    return Given(found)


class Given:
    """Events, to be folded."""

    def __init__(self, events: list[Event]) -> None:
        """Keep them in order."""
        self.events = events

    def fold(self, projection: Projection) -> Folded:
        """Return the rows of these events, made as a replay makes them.

        Payloads go by JSON, and through upcasters, as in a log. Events of other topics
        and groups are left out; one that names none belongs to the projection's.

        Raises:
            ProjectionError: The fold failed on one of them.
        """
        page = _page(self.events, projection)
        folding = projection.folding()
        folding.apply(page)
        return Folded(projection, folding)


class Folded:
    """What a fold made."""

    def __init__(self, projection: Projection, folding: Folding) -> None:
        """Keep the states that are there: None is no row."""
        self._projection = projection
        self._states = {
            key: state
            for key, (state, _) in folding.drain().items()
            if state is not None
        }
        self.events = folding.events
        """How many events matched."""
        self.unkeyed = folding.unkeyed
        """How many of them were for no key."""

    def state(self, key: Any) -> Any:
        """Return the state of a key as the fold has it; None if there is no row."""
        return self._states.get(key)

    def keys(self) -> list[Any]:
        """Return the keys that have a row, in order."""
        return sorted(self._states)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows by key: key columns, then the state's fields."""
        shape = self._projection.key_shape
        names = [column.name for column in shape.columns]
        return [
            dict(zip(names, shape.values(key), strict=True))
            | (self._projection.state_shape.fields(self._states[key]) or {})
            for key in self.keys()
        ]


def _page(events: list[Event], projection: Projection) -> EventPage:
    """Return the events that a projection's build would read, as the log has them."""
    rows: list[dict[str, Any]] = []
    for position, event in enumerate(events, 1):
        row = {name: getattr(event, name) for name in _COLUMNS}
        if row["topic"] == _DEFAULT_TOPIC:
            row["topic"] = projection.topics[0]
        if row["group_id"] == _DEFAULT_GROUP and projection.groups:
            row["group_id"] = projection.groups[0]
        groups = projection.groups or (row["group_id"],)
        if row["topic"] in projection.topics and row["group_id"] in groups:
            text = event.payload_text
            if text is None and event.payload is not None:
                text = made(event.payload, b"").text
            rows.append(row | {"position": position, "payload_text": text})
    names = (*_COLUMNS, "position", "payload_text")
    return EventPage({name: [row[name] for row in rows] for name in names})
