"""Writing: columns of the database become Parquet, a row group at a time.

Rows are gathered in small pages and leave as row groups, which a thread compresses
and writes while the next pages are read. Where a row group ends depends on its events
alone, so the same events make the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kappa_log.archive import layout
from kappa_log.archive.fields import Extractor
from kappa_log.archive.manifest import PayloadColumn, Segment
from kappa_log.archive.presence import Presence
from kappa_log.archive.reader import schema_of
from kappa_log.archive.store import Sink, Store
from kappa_log.chain import Chain, Lists
from kappa_log.cursor import spans
from kappa_log.events import Position
from kappa_log.storage import transfer
from kappa_log.storage.database import Database
from kappa_log.storage.transfer import ARCHIVED, Columns

PAGE = 2_048
"""Rows in Python's memory at a time; a row group is a multiple of it."""


class Cut(msgspec.Struct, frozen=True):
    """Where a segment begins and ends."""

    day: date
    first: Position
    last: Position
    sealed: bool

    def path(self, variant: str) -> str:
        """Return the path of its segment; see `layout.variant_of`."""
        return layout.segment_path(self.day, self.first, self.last, variant)


class SegmentWriter:
    """Writes segments, the chain going on from one to the next.

    Args:
        database: The log.
        store: Where to.
        names: source_id → name.
        columns: Payload columns to make.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        names: dict[int, str],
        columns: Sequence[PayloadColumn],
    ) -> None:
        self._database = database
        self._store = store
        self._names = names
        self._schema = schema_of(columns)
        self.extractor = Extractor(columns)
        self.presence = Presence(columns)
        self.events = 0
        """Events written so far."""

    def write(
        self, cut: Cut, path: str, head: bytes, step: Callable[[Position], None]
    ) -> Segment:
        """Write one segment.

        Args:
            cut: Where it begins and ends.
            path: Where it goes.
            head: Head of the chain before it.
            step: Called with the positions read so far.

        Raises:
            VerificationError: A position is missing.
        """
        chain = Chain(self._names, cut.first - 1, head)
        lanes: set[tuple[str, str]] = set()
        options = layout.event_options(cut.last - cut.first + 1)
        with (
            self._store.writing() as sink,
            _writer(sink, self._schema, options) as writer,
        ):
            for after, until in spans(cut.first - 1, cut.last, PAGE):
                with self._database.read() as connection:
                    page = transfer.events(connection, self._database, after, until)
                batch, values = self._batch(page)
                chain.extend(values)
                lanes.update(zip(values["topic"], values["group_id"], strict=True))
                writer.add(batch, _contents(batch))
                step(until)
            writer.finish()
            file = sink.done(path, cut.last - cut.first + 1)
        self.events += file.rows
        return Segment(
            **msgspec.structs.asdict(file),
            date=cut.day.isoformat(),
            first=cut.first,
            last=cut.last,
            head=chain.head.hex(),
            sealed=cut.sealed,
            lanes=sorted(lanes),
        )

    def _batch(self, page: Columns) -> tuple[pa.RecordBatch, Lists]:
        """Return a page as Arrow columns, and as the chain wants it."""
        values: Lists = dict(zip(ARCHIVED, page, strict=True))
        arrays = []
        for field in layout.EVENTS:
            array = pa.array(values[field.name], field.type)
            arrays.append(array)
            if pa.types.is_timestamp(field.type) and not self._database.is_sqlite:
                values[field.name] = array.cast(pa.int64()).to_pylist()
        values["payload"] = [
            None if text is None else text.encode() for text in values["payload"]
        ]
        arrays += self.extractor.arrays(values["topic"], values["payload"])
        self.presence.look(values["topic"], values["payload"])
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema), values


def write_pages(sink: Sink, schema: pa.Schema, pages: Iterable[Columns]) -> int:
    """Write pages of columns as a file; return the number of rows."""
    with _writer(sink, schema, layout.OPTIONS) as writer:
        for page in pages:
            arrays = [
                pa.array(values, field.type)
                for values, field in zip(page, schema, strict=True)
            ]
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
            writer.add(batch, batch.nbytes)
        writer.finish()
    return writer.rows


def _contents(batch: pa.RecordBatch) -> int:
    """Return the bytes of what may be large: a number of the events' own."""
    sizes = (
        pc.sum(pc.binary_length(batch.column(name))).as_py()
        for name in ("payload", "raw", "key", "headers")
    )
    return sum(size or 0 for size in sizes)


class _Writer:
    """Gathers pages into row groups; one is written while the next is gathered."""

    def __init__(self, file: pq.ParquetWriter, thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._thread = thread
        self._pages: list[pa.RecordBatch] = []
        self._gathered = 0
        self._bytes = 0
        self._pending: Future[None] | None = None
        self.rows = 0

    def add(self, page: pa.RecordBatch, size: int) -> None:
        """Take the next page in."""
        self._pages.append(page)
        self.rows += page.num_rows
        self._gathered += page.num_rows
        self._bytes += size
        if self._gathered >= layout.ROW_GROUP or self._bytes >= layout.ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and the end of the file."""
        if self._pages:
            self._flush()
        self._wait()
        self._file.close()

    def _flush(self) -> None:
        # One at a time: memory holds the row group being written and the next.
        self._wait()
        pages, self._pages, self._gathered, self._bytes = self._pages, [], 0, 0
        self._pending = self._thread.submit(self._write, pages)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, pages: list[pa.RecordBatch]) -> None:
        table = pa.Table.from_batches(pages).combine_chunks()
        self._file.write_table(table, row_group_size=layout.ROW_GROUP)


@contextlib.contextmanager
def _writer(
    sink: Sink, schema: pa.Schema, options: dict[str, Any]
) -> Iterator[_Writer]:
    file = pq.ParquetWriter(pa.PythonFile(sink, "w"), schema, **options)
    try:
        with ThreadPoolExecutor(1, "parquet") as thread:
            yield _Writer(file, thread)
    except BaseException:
        # Or it would write its end when it is collected, into what is gone by then.
        with contextlib.suppress(Exception):
            file.close()
        raise
