"""Source: pages of events for folds, from segments instead of the database.

The archive gives what lies in it; positions past its end come from the database, so a
replay goes on over the seam without noticing. Row groups are proved, decompressed and
decoded by a thread while the one before is folded. Columns that no fold asks for are
never read, and payloads go from Parquet to the JSON decoder without becoming strings
of Python's. A segment of other topics is passed over; one that should be read and is
missing or damaged stops the fold.

Folds that read files by themselves are given those of an archive on a disk: each is
proved first, and the next one while these are read.
"""

from __future__ import annotations

import contextlib
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property, reduce
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from kappa_log.archive.export import require_same_log
from kappa_log.archive.layout import EVENTS
from kappa_log.archive.manifest import Segment
from kappa_log.archive.reader import Archive
from kappa_log.archive.scan import OpenSegment
from kappa_log.archive.store import identity
from kappa_log.errors import ArchiveDiverged, ArchiveError
from kappa_log.events import EventPage, FileSpan, Position, from_micros
from kappa_log.fold import Projection
from kappa_log.readers import EventReader
from kappa_log.records import decode_headers
from kappa_log.storage import transfer
from kappa_log.storage.database import Database

_COLUMN = {"payload_text": "payload"}
"""Column of `Event` → column of a segment, where the names differ."""

_REPEATED = ["topic", "group_id", "entity_id", "event_type", "event_version"]

KEPT = 3
"""Open segments, and row groups in memory: pages lie across the seams of some."""


def open_source(
    connection: sa.Connection, database: Database, archive: Archive
) -> ArchiveSource:
    """Return an archive as a source for replays of its log.

    Raises:
        ArchiveDiverged: It is of another log, ahead of this one, or from before an
            erasure.
    """
    require_same_log(connection, database, archive)
    if transfer.erasure_epoch(connection, database) != archive.manifest.erasure_epoch:
        msg = (
            f"events were erased since the archive at {archive.store.url} was written, "
            "and must not be folded again. Bring it up: kappa-log export"
        )
        raise ArchiveDiverged(msg)
    return ArchiveSource(archive)


class ArchiveSource:
    """An archive as a source of events for a replay; see `readers.EventSource`."""

    def __init__(self, archive: Archive) -> None:
        """Take an archive that is of the log to be replayed."""
        self._archive = archive
        self._thread = ThreadPoolExecutor(1, "archive")
        self._open: dict[int, OpenSegment] = {}
        self._files: dict[int, _SegmentFile] = {}

    def reader(
        self, fold: Projection, only: Collection[Any] | None, rest: EventReader
    ) -> ArchiveReader:
        """Return a reader of the events that a projection folds.

        Args:
            fold: The projection.
            only: Keys to fold; None folds all.
            rest: Reads what the archive does not hold.
        """
        return ArchiveReader(self, fold, only, rest)

    def look(self, fold: Projection, upto: Position) -> None:
        """See that the segments a fold would read are there; nothing is hashed.

        Raises:
            ArchiveDamaged: One is missing, or of another size.
        """
        self._archive.store.look(
            segment
            for segment in self.segments
            if segment.first <= upto and _matching(segment, fold)
        )

    def close(self) -> None:
        """End the thread and close all files."""
        self._thread.shutdown(cancel_futures=True)
        for found in self._open.values():
            found.close()
        self._open.clear()

    @property
    def url(self) -> str:
        """Where the archive is, without secrets."""
        return self._archive.store.url

    @property
    def end(self) -> Position:
        """Last position that the archive holds."""
        return self._archive.manifest.position

    @property
    def folder(self) -> Path | None:
        """Where its files lie; None in an object store."""
        return self._archive.store.folder

    @property
    def segments(self) -> list[Segment]:
        """All segments by position."""
        return self._archive.manifest.segments

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        """Have something done by the one thread that touches files."""
        return self._thread.submit(function, *arguments)

    def opened(self, index: int) -> OpenSegment:
        """Return a segment that was proved; for the thread alone.

        Raises:
            ArchiveDamaged: It is missing, or not what was written.
        """
        found = self._open.get(index)
        if found is None:
            while len(self._open) >= KEPT:
                self._open.pop(next(iter(self._open))).close()
            found = OpenSegment(self._archive.store, self.segments[index], _REPEATED)
            self._open[index] = found
        return found

    def file(self, index: int) -> _SegmentFile:
        """Return the file of a segment on a disk, which is being proved."""
        found = self._files.get(index)
        if found is None:
            found = self._files[index] = _SegmentFile(self, index)
        return found

    def prove(self, index: int) -> None:
        """Prove the file of a segment; for the thread alone.

        Raises:
            ArchiveDamaged: It is missing, or not what was written.
        """
        OpenSegment(self._archive.store, self.segments[index]).close()


class _SegmentFile:
    """A segment's file on a disk, for others to read; see `events.ProvedFile`."""

    def __init__(self, source: ArchiveSource, index: int) -> None:
        assert source.folder is not None
        self._source = source
        self._index = index
        self._path = source.folder / source.segments[index].path
        self._proof = source.submit(self._prove)

    def path(self) -> str:
        """Return where it lies, proved; once more if it was touched since.

        Raises:
            ArchiveDamaged: It is missing, or not what was written.
        """
        if self._proof.result() != identity(self._path):
            self._proof = self._source.submit(self._prove)
            self._proof.result()
        return str(self._path)

    def _prove(self) -> Any:
        """Return what it was when it was proved; in the source's thread."""
        found = identity(self._path)
        self._source.prove(self._index)
        return found


class _Group:
    """Matching events of a row group, or none of a segment of other topics."""

    def __init__(
        self,
        place: tuple[int, int],
        span: range,
        positions: Sequence[int],
        mask: pa.Array | None = None,
    ) -> None:
        self.place = place
        """Its segment, and its row group in it."""
        self.span = span
        """Positions that it answers for."""
        self.mask = mask
        """Which of its events match; None if all do."""
        self._positions = positions
        self._columns: dict[str, pa.Array] = {}
        self._texts: dict[str, list[Any]] = {}
        self._plain: dict[str, pa.Array] = {}

    def bounds(self, after: Position, upto: Position) -> tuple[int, int]:
        """Return from which to which of its events a page reaches."""
        return (
            bisect_right(self._positions, after),
            bisect_right(self._positions, upto),
        )

    def has(self, name: str) -> bool:
        """Tell whether a column is there, or need not be."""
        return not self._positions or name == "position" or name in self._columns

    def add(self, table: pa.Table) -> None:
        """Take columns of the row group in."""
        if self.mask is not None:
            table = table.filter(self.mask)
        for name, column in zip(table.column_names, table.columns, strict=True):
            self._columns[name] = column.combine_chunks()

    def values(self, name: str, start: int, stop: int) -> Sequence[Any]:
        """Return a column's values as `Event` has them."""
        if name == "position":
            return list(self._positions[start:stop])
        if start == stop:
            return ()
        column = self._columns[name]
        if pa.types.is_dictionary(column.type):
            return self._repeated(name, column, start, stop)
        return _converted(name, column.slice(start, stop - start))

    def array(self, name: str, start: int, stop: int) -> pa.Array:
        """Return a column's values as Arrow has them."""
        if start == stop:
            return pa.nulls(0, EVENTS.field(name).type)
        if name == "position":
            return self._arrow_positions.slice(start, stop - start)
        column = self._columns[name]
        if pa.types.is_dictionary(column.type):
            column = self._plain.get(name)
            if column is None:
                column = self._plain[name] = self._columns[name].cast(pa.string())
        return column.slice(start, stop - start)

    @cached_property
    def _arrow_positions(self) -> pa.Array:
        data = array("q", self._positions).tobytes()
        buffers = [None, pa.py_buffer(data)]
        return pa.Array.from_buffers(pa.int64(), len(self._positions), buffers)

    def _repeated(
        self, name: str, column: pa.DictionaryArray, start: int, stop: int
    ) -> Sequence[Any]:
        """Return values of which each is made once for the whole row group."""
        texts = self._texts.get(name)
        if texts is None:
            texts = self._texts[name] = column.dictionary.to_pylist()
        places = column.indices.slice(start, stop - start).to_pylist()
        if column.null_count:
            return [None if place is None else texts[place] for place in places]
        return list(map(texts.__getitem__, places))

    def payloads(self, start: int, stop: int) -> _Payloads:
        """Return the payloads of some events side by side."""
        texts = self._columns["payload"] if self._positions else pa.array([], "string")
        return _Payloads(texts.slice(start, stop - start))


class _Payloads:
    """Payload texts side by side, any of them to be had as one JSON array."""

    def __init__(self, texts: pa.StringArray) -> None:
        if texts.null_count:
            texts = texts.fill_null("null")
        row = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
        self._joined = memoryview(pc.binary_join(row, ",")[0].as_buffer())
        ends = memoryview(texts.buffers()[1]).cast("i")
        self._ends = ends[texts.offset :]

    def array(self, start: int, stop: int) -> bytes:
        """Return those from one to before another."""
        if start == stop:
            return b"[]"
        # A comma comes before each text but the first.
        ends, first = self._ends, self._ends[0]
        part = self._joined[ends[start] - first + start : ends[stop] - first + stop - 1]
        return b"[%b]" % bytes(part)


class ArchiveReader:
    """Reads matching events page by page; see `storage.log.LogReader`."""

    waits = False
    """It has a thread of its own that reads ahead."""

    def __init__(
        self,
        source: ArchiveSource,
        fold: Projection,
        only: Collection[Any] | None,
        rest: EventReader,
    ) -> None:
        self._source = source
        self._fold = fold
        self._topics = set(fold.topics)
        self._groups = None if fold.groups is None else set(fold.groups)
        self._entities = None
        if fold.key is None and only is not None:
            self._entities = pa.array(sorted(only), pa.string())
        self._rest = rest
        self._gives_files = fold.reads_files and source.folder is not None
        self._names = ["entity_id", "payload"]
        self._firsts = [segment.first for segment in source.segments]
        self._groups_read: list[_Group] = []
        self._ahead: Future[_Group | None] | None = None

    def page(
        self, after: Position, upto: Position, connection: sa.Connection | None = None
    ) -> EventPage:
        """Return the matching events in (after, upto], in order.

        Args:
            after: Exclusive lower bound.
            upto: Inclusive upper bound.
            connection: Open transaction whose snapshot must be seen: then the
                database is read.

        Raises:
            ArchiveDamaged: A segment is missing, or not what was written.
        """
        end = self._source.end
        if connection is not None or after >= end:
            return self._rest.page(after, upto, connection)
        rest = self._rest.page(end, upto) if upto > end else None
        if self._gives_files:
            return self._filed(after, min(upto, end), rest)
        return self._read(after, min(upto, end), rest)

    def _read(
        self, after: Position, upto: Position, rest: EventPage | None
    ) -> EventPage:
        """Return the events of row groups, and the rest behind them."""
        pages = [self._slice(group, after, upto) for group in self._within(after, upto)]
        if rest is not None:
            pages.append(rest)
        return pages[0] if len(pages) == 1 else _merged(pages)

    def _filed(
        self, after: Position, upto: Position, rest: EventPage | None
    ) -> EventPage:
        """Return the files of a span; their columns only if somebody asks for them."""
        first, next_one = self._index_of(after + 1), self._index_of(upto) + 1
        files = self._files(range(first, next_one))
        self._files(range(next_one, min(next_one + 1, len(self._firsts))))

        @cache
        def read() -> EventPage:
            return self._read(after, upto, rest)

        return EventPage(
            {},
            lambda name: read().column(name),
            arrow=lambda name: read().arrow(name),
            span=FileSpan(str(self._source.folder), files, after + 1, upto),
            rest=rest,
        )

    def _files(self, indexes: range) -> list[_SegmentFile]:
        """Return the files of segments that have matching events, and prove them."""
        segments = self._source.segments
        wanted = [n for n in indexes if _matching(segments[n], self._fold)]
        return [self._source.file(n) for n in wanted]

    def _slice(self, group: _Group, after: Position, upto: Position) -> EventPage:
        """Return the events of a row group in (after, upto]."""
        first, last = group.bounds(after, upto)

        def required(name: str) -> str:
            column = _COLUMN.get(name, name)
            if not group.has(column):
                self._require(column, group)
            return column

        @cache
        def payloads() -> _Payloads:
            return group.payloads(first, last)

        return EventPage(
            {},
            lambda name: group.values(required(name), first, last),
            lambda start, stop: payloads().array(start, stop),
            lambda name: group.array(required(name), first, last),
        )

    def _require(self, name: str, group: _Group) -> None:
        """Read a column that is not there yet, and from now on with all others."""
        if name not in EVENTS.names:
            raise AttributeError(name)
        if name not in self._names:
            self._names = [*self._names, name]
        self._source.submit(self._add, group, [name]).result()

    def _within(self, after: Position, upto: Position) -> Iterator[_Group]:
        while after < upto:
            group = self._group_at(after + 1)
            yield group
            after = group.span[-1]

    def _index_of(self, position: Position) -> int:
        """Return the number of the segment that holds a position."""
        return bisect_right(self._firsts, position) - 1

    def _group_at(self, position: Position) -> _Group:
        for group in self._groups_read:
            if position in group.span:
                return group
        found = self._taken_ahead()
        if found is None or position not in found.span:
            index = self._index_of(position)
            found = self._source.submit(self._load_at, index, position).result()
        self._groups_read = [*self._groups_read[1 - KEPT :], found]
        self._ahead = self._source.submit(self._load_after, found)
        return found

    def _taken_ahead(self) -> _Group | None:
        """Return what was read ahead; what could not be read is none."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            # If that is what is wanted now, reading it again says what is wrong.
            with contextlib.suppress(ArchiveError):
                return ahead.result()
        return None

    # --- in the source's thread -----------------------------------------------

    def _load_at(self, index: int, position: Position) -> _Group:
        """Return the row group of a segment that has a position."""
        segment = self._source.segments[index]
        matching = _matching(segment, self._fold)
        if not matching:
            return _Group((index, 0), range(segment.first, segment.last + 1), ())
        opened = self._source.opened(index)
        number = opened.group_of(position)
        span = opened.groups[number]
        mask = None
        if len(matching) < len(segment.lanes) or self._entities is not None:
            mask = self._mask(opened.read(number, ["topic", "group_id", "entity_id"]))
        positions: Sequence[int] = span
        if mask is not None:
            positions = pa.array(span, pa.int64()).filter(mask).to_pylist()
        group = _Group((index, number), span, positions, mask)
        self._add(group, self._names)
        return group

    def _load_after(self, group: _Group) -> _Group | None:
        position = group.span[-1] + 1
        if position > self._source.end:
            return None
        return self._load_at(self._index_of(position), position)

    def _add(self, group: _Group, names: Sequence[str]) -> None:
        index, number = group.place
        group.add(self._source.opened(index).read(number, names))

    def _mask(self, table: pa.Table) -> pa.Array:
        """Return which events match."""
        wanted = [("topic", pa.array(sorted(self._topics), pa.string()))]
        if self._groups is not None:
            wanted.append(("group_id", pa.array(sorted(self._groups), pa.string())))
        if self._entities is not None:
            wanted.append(("entity_id", self._entities))
        masks = [
            pc.is_in(table.column(name).cast(pa.string()), values)
            for name, values in wanted
        ]
        return reduce(pc.and_, masks).combine_chunks()


def _matching(segment: Segment, fold: Projection) -> list[tuple[str, str]]:
    """Return what of a segment's topics and groups a fold wants."""
    topics, groups = fold.topics, fold.groups
    return [
        (topic, group)
        for topic, group in segment.lanes
        if topic in topics and (groups is None or group in groups)
    ]


def _merged(pages: Sequence[EventPage]) -> EventPage:
    """Return pages that follow each other as one."""

    def load(name: str) -> Sequence[Any]:
        return list(chain.from_iterable(page.column(name) for page in pages))

    def arrow(name: str) -> pa.ChunkedArray | None:
        parts = [page.arrow(name) for page in pages]
        if any(part is None for part in parts):
            return None
        return pa.chunked_array(parts)

    return EventPage({}, load, arrow=arrow)


def _converted(name: str, column: pa.Array) -> Sequence[Any]:
    """Return a column's values as `Event` has them."""
    if pa.types.is_timestamp(column.type):
        micros = column.cast(pa.int64()).to_pylist()
        return [None if value is None else from_micros(value) for value in micros]
    values: list[Any] = column.to_pylist()
    if name == "headers":
        return [decode_headers(value) for value in values]
    if name == "message_id":
        return [value.hex() for value in values]
    return values
