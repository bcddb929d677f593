"""Presence: whether any payload has the fields that typed columns are made of.

A column of a field that no event has is NULL throughout, which is what a mistyped name
looks like. It is no error, since events to come may have the field; so it is said,
with the field that was meant. Nothing is searched for any more once it was met, so
where all fields are there, this costs a look at one event of each topic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec

from kappa_log.archive.manifest import PayloadColumn
from kappa_log.config import did_you_mean
from kappa_log.cursor import spans
from kappa_log.storage import ledger
from kappa_log.storage.database import Database
from kappa_log.storage.log import LogReader

SAMPLE = 2_048
"""Positions up to a topic's last event that are looked at; and events of a topic that
are asked for the names of their fields."""

PAGE = 256
"""Positions that are read at once."""

NAMED = 500
"""Names of fields of a topic that are kept, to find what was meant among them."""

LISTED = 10
"""Names that are told where none is like the one that was typed."""


class AbsentField(msgspec.Struct, frozen=True, kw_only=True):
    """A payload column whose field no event that was looked at has."""

    column: str
    topic: str
    field: str
    events: int
    """Events of the topic that were looked at."""
    near: str | None
    """A field of theirs that may have been meant."""
    there: list[str]
    """Fields that they have: the first few by name."""


class Presence:
    """Looks for the fields of columns in the payloads that go by."""

    def __init__(self, columns: Sequence[PayloadColumn]) -> None:
        """Prepare; nothing is read."""
        self._wanted: dict[str, list[PayloadColumn]] = {}
        for found in columns:
            self._wanted.setdefault(found.topic, []).append(found)
        self._events: dict[str, int] = dict.fromkeys(self._wanted, 0)
        self._names: dict[str, set[str]] = {topic: set() for topic in self._wanted}
        self._decoder = msgspec.json.Decoder()

    def look(
        self, topics: Sequence[str], payloads: Sequence[bytes | str | None]
    ) -> None:
        """Look at events; those that were erased tell nothing."""
        if not self._wanted:
            return
        for topic, text in zip(topics, payloads, strict=True):
            if topic in self._wanted and text is not None:
                self._look(topic, self._decoder.decode(text))

    def look_back(self, database: Database) -> None:
        """Look at the last events of the topics of which a field was not met yet."""
        for topic in list(self._wanted):
            with database.read() as connection:
                upto = ledger.last_of_topic(connection, database, topic)
            # As a rule what was written is among them: it is not counted twice.
            before, self._events[topic] = self._events[topic], 0
            reader = LogReader(database, [topic])
            for after, until in spans(max(0, upto - SAMPLE), upto, PAGE):
                if topic in self._wanted:
                    texts = reader.page(after, until).column("payload_text")
                    self.look([topic] * len(texts), texts)
            self._events[topic] = max(before, self._events[topic])

    def absent(self) -> list[AbsentField]:
        """Return the fields that were not met, of topics with events, by column."""
        return sorted(
            (
                self._absent(column)
                for topic, columns in self._wanted.items()
                for column in columns
                if self._events[topic]
            ),
            key=lambda found: found.column,
        )

    def _look(self, topic: str, payload: Any) -> None:
        wanted = [c for c in self._wanted[topic] if not _has(payload, c.field)]
        self._events[topic] += 1
        if not wanted:
            del self._wanted[topic]
            return
        self._wanted[topic] = wanted
        names = self._names[topic]
        if len(names) < NAMED and self._events[topic] <= SAMPLE:
            depth = max(column.field.count(".") for column in wanted)
            names.update(_fields(payload, depth))

    def _absent(self, column: PayloadColumn) -> AbsentField:
        names = sorted(self._names[column.topic])
        near = get_close_matches(column.field, names, n=1)
        return AbsentField(
            column=column.name,
            topic=column.topic,
            field=column.field,
            events=self._events[column.topic],
            near=near[0] if near else None,
            there=names[:LISTED],
        )


def _has(payload: Any, field: str) -> bool:
    """Tell whether a payload has a field, if only as null."""
    for name in field.split("."):
        if not isinstance(payload, dict) or name not in payload:
            return False
        payload = payload[name]
    return True


def _fields(payload: Any, depth: int, path: str = "") -> Iterator[str]:
    """Yield the fields of a payload as dotted paths, so many levels down."""
    if not isinstance(payload, dict):
        return
    for name, value in payload.items():
        yield path + name
        if depth:
            yield from _fields(value, depth - 1, f"{path}{name}.")


def told(absent: Iterable[AbsentField]) -> Iterator[str]:
    """Yield what to tell people about fields that are not there."""
    for found in absent:
        known = [found.near] if found.near else found.there
        hint = did_you_mean(found.field, known) if known else ""
        yield (
            f"column {found.column}: none of the {found.events:,} events of "
            f"'{found.topic}' that were looked at has a field '{found.field}', so it "
            f"is NULL there{hint}{'' if hint.endswith('?') else '.'}"
        )
