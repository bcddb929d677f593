"""Event and Position: what the log keeps, as folds and readers see it.

The log is read in pages of columns. A fold touches few of them, so an `Event`
carries position, entity and payload, and asks its page for the rest: a column
that nobody reads is never fetched from the database, decoded or converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

import msgspec
from typing_extensions import override

from kappa_log.errors import VerificationError

Position = int
"""Place in the log: 1, 2, 3 … without holes, in commit order."""

ORIGIN: Position = 0
"""Before the first event; a cursor that has seen nothing stands here."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Subtraction does not overflow, but nothing could read such an instant again.
_DAYS = range(
    (datetime.min.replace(tzinfo=UTC) - _EPOCH).days,
    (datetime.max.replace(tzinfo=UTC) - _EPOCH).days + 1,
)

Header = tuple[str, bytes | None]
"""One header; names may repeat and their order counts."""


def to_micros(moment: datetime) -> int:
    """Return the microseconds from 1970 UTC to an aware datetime.

    Raises:
        ValueError: The datetime is naive: no zone, so no instant.
    """
    if moment.utcoffset() is None:
        text = moment.isoformat()
        msg = f"time {text} has no zone; give an offset, for instance {text}+00:00"
        raise ValueError(msg)
    since = moment - _EPOCH
    if since.days not in _DAYS:
        msg = f"time {moment.isoformat()} is outside the years 1 to 9999 in UTC"
        raise ValueError(msg)
    return since.days * 86_400_000_000 + since.seconds * 1_000_000 + since.microseconds


def from_micros(micros: int) -> datetime:
    """Return the UTC datetime that lies this many microseconds after 1970.

    Raises:
        OverflowError: It is none of the years 1 to 9999.
    """
    try:
        return _EPOCH + micros * _MICROSECOND
    except OverflowError:
        msg = f"the time {micros} µs after 1970 is outside the years 1 to 9999"
        raise OverflowError(msg) from None


def kept_instant(micros: int) -> datetime:
    """Return `from_micros` of what a log holds.

    Raises:
        VerificationError: It is none of the years 1 to 9999, so nobody put it there
            by this package.
    """
    try:
        return from_micros(micros)
    except OverflowError as error:
        msg = (
            f"{error}, so it is not what was recorded (kappa-log verify names the "
            "place); nothing was changed"
        )
        raise VerificationError(msg) from None


def in_utc(moment: datetime) -> datetime:
    """Return the same instant in UTC; naive or out of range raises ValueError."""
    return from_micros(to_micros(moment))


class ProvedFile(Protocol):
    """A Parquet file with the log's columns."""

    def path(self) -> str:
        """Return where it lies, proved to be what was written.

        Raises:
            ArchiveDamaged: It is missing, or not what was written.
        """
        ...


class FileSpan(NamedTuple):
    """Files that hold the matching events of a span of positions, among others."""

    folder: str
    """Where all of them lie."""
    files: Sequence[ProvedFile]
    first: Position
    last: Position


class EventPage:
    """The columns of some events of the log, side by side; missing ones load late.

    Args:
        columns: Column name → values, all of one length, one entry an event.
        load: Called with the name of a column that is not there yet.
        join: Returns the payload texts from one event to before another as one JSON
            array, for a store that has them side by side already.
        arrow: Returns a column as it lies in Arrow's memory, where it does.
        span: Where files hold the events, for whoever reads these by itself.
        rest: Those events that the files do not hold; None if there are none.
    """

    __slots__ = ("_arrow", "_columns", "_join", "_load", "rest", "span")

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        load: Callable[[str], Sequence[Any]] | None = None,
        join: Callable[[int, int], bytes] | None = None,
        arrow: Callable[[str], Any] | None = None,
        *,
        span: FileSpan | None = None,
        rest: EventPage | None = None,
    ) -> None:
        self.span = span
        self.rest = rest
        self._columns = dict(columns)
        self._load = load
        self._join = join
        self._arrow = arrow

    def column(self, name: str) -> Sequence[Any]:
        """Return a column's values, loading them for the whole page if needed."""
        found = self._columns.get(name)
        if found is None:
            if self._load is None:
                raise AttributeError(name)
            found = self._columns[name] = self._load(name)
        return found

    def arrow(self, name: str) -> Any:
        """Return a column as Arrow has it; None where it does not have it."""
        return None if self._arrow is None else self._arrow(name)

    def joined_payloads(self) -> str | bytes:
        """Return the payload texts as one JSON array; a tombstone's is null."""
        if self._join is not None:
            return self._join(0, len(self.column("position")))
        texts = self.column("payload_text")
        if None in texts:
            texts = ["null" if text is None else text for text in texts]
        return f"[{','.join(texts)}]"

    def parts(self, size: int) -> Iterator[EventPage]:
        """Yield the page in parts of so many events; what one loads, all have."""
        events = len(self.column("position"))
        if events <= size:
            yield self
            return
        for start in range(0, events, size):
            yield self._part(start, min(start + size, events))

    def _part(self, start: int, stop: int) -> EventPage:
        join = self._join
        return EventPage(
            {},
            lambda name: self.column(name)[start:stop],
            join and (lambda first, last: join(start + first, start + last)),
        )


class Event(msgspec.Struct, frozen=True, eq=False, gc=False, repr_omit_defaults=True):
    """An acknowledged record, immutable, at its position in the log."""

    position: Position
    entity_id: str | None
    payload: Any
    """The payload decoded from its JSON text; None for a tombstone."""
    page: EventPage
    index: int

    @property
    def source_id(self) -> int:
        """The source (a topic's incarnation or a file) that the record came from."""
        return self.page.column("source_id")[self.index]  # type: ignore[no-any-return]

    @property
    def topic(self) -> str:
        """Topic of the record."""
        return self.page.column("topic")[self.index]  # type: ignore[no-any-return]

    @property
    def group_id(self) -> str:
        """Consumer group whose handler acknowledged the record."""
        return self.page.column("group_id")[self.index]  # type: ignore[no-any-return]

    @property
    def partition(self) -> int:
        """Partition of the record; 0 for a file."""
        return self.page.column("partition")[self.index]  # type: ignore[no-any-return]

    @property
    def offset(self) -> int:
        """Offset of the record; the line number from 0 for a file."""
        return self.page.column("offset")[self.index]  # type: ignore[no-any-return]

    @property
    def key(self) -> bytes | None:
        """Key of the record as received."""
        return self.page.column("key")[self.index]  # type: ignore[no-any-return]

    @property
    def headers(self) -> list[Header]:
        """Headers of the record in order; names may repeat."""
        return self.page.column("headers")[self.index]  # type: ignore[no-any-return]

    @property
    def timestamp(self) -> int | None:
        """Kafka's timestamp in milliseconds as given; None for a file."""
        return self.page.column("timestamp")[self.index]  # type: ignore[no-any-return]

    @property
    def event_time(self) -> datetime | None:
        """When it happened, in UTC, as the handler said."""
        return self.page.column("event_time")[self.index]  # type: ignore[no-any-return]

    @property
    def event_type(self) -> str | None:
        """Type of the event, as the handler said."""
        return self.page.column("event_type")[self.index]  # type: ignore[no-any-return]

    @property
    def event_version(self) -> str | None:
        """Version of the event's schema, as the handler said."""
        found = self.page.column("event_version")
        return found[self.index]  # type: ignore[no-any-return]

    @property
    def recorded_at(self) -> datetime:
        """When the log took it, in UTC; never falls as positions rise."""
        found = self.page.column("recorded_at")
        return found[self.index]  # type: ignore[no-any-return]

    @property
    def checksum(self) -> str | None:
        """BLAKE2b-128 of the received value in hex; None for a tombstone."""
        return self.page.column("checksum")[self.index]  # type: ignore[no-any-return]

    @property
    def message_id(self) -> str:
        """Identity under the dedupe mode, in hex: the key for effects elsewhere."""
        return self.page.column("message_id")[self.index]  # type: ignore[no-any-return]

    @property
    def raw(self) -> bytes | None:
        """Received bytes where a decoder made the JSON payload from another format."""
        return self.page.column("raw")[self.index]  # type: ignore[no-any-return]

    @property
    def payload_text(self) -> str | None:
        """The payload's JSON text, byte for byte as received."""
        found = self.page.column("payload_text")
        return found[self.index]  # type: ignore[no-any-return]

    @override
    def __repr__(self) -> str:
        """Show what tells events apart."""
        return (
            f"Event(position={self.position}, entity_id={self.entity_id!r}, "
            f"payload={self.payload!r})"
        )


def make_event(
    position: Position = 1,
    payload: Any = None,
    *,
    entity_id: str | None = None,
    **columns: Any,
) -> Event:
    """Return an event that is in no log, for tests of folds.

    Args:
        position: Its place among the events of the test.
        payload: The decoded payload.
        entity_id: The entity that it belongs to.
        columns: Any other column of `Event`; the rest take plain defaults.
    """
    known: dict[str, Any] = {
        "source_id": 1,
        "topic": "test-topic",
        "group_id": "test-group",
        "partition": 0,
        "offset": position - 1,
        "key": None,
        "headers": [],
        "timestamp": None,
        "event_time": None,
        "event_type": None,
        "event_version": None,
        "recorded_at": _EPOCH,
        "checksum": None,
        "message_id": f"{position:032x}",
        "raw": None,
        "payload_text": None,
    }
    unknown = sorted(set(columns) - set(known))
    if unknown:
        msg = f"an event has no column {unknown[0]!r}; it has {', '.join(known)}"
        raise TypeError(msg)
    page = EventPage({name: [value] for name, value in (known | columns).items()})
    return Event(position, entity_id, payload, page, 0)
