"""Scan: segments proved, opened and read ahead in a thread, a row group at a time.

Hashing, decompressing and decoding let go of Python's lock, so they cost nothing while
the row group before is worked on. A file is hashed before anything of it is parsed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from kappa_log.archive.manifest import File, Segment
from kappa_log.archive.store import Store
from kappa_log.events import Position

SLICE = 8_192
"""Rows that are in Python's memory at a time."""


class OpenSegment:
    """A segment whose file is what was written, open to read.

    Args:
        store: Where it is.
        segment: Which one.
        repeated: Columns to read with each of their values once.

    Raises:
        ArchiveDamaged: It is missing, or not what was written.
    """

    def __init__(
        self, store: Store, segment: Segment, repeated: Sequence[str] = ()
    ) -> None:
        self.segment = segment
        self._store = store
        self._stack = ExitStack()
        try:
            path = self._stack.enter_context(store.checked(segment))
            self._file = self._stack.enter_context(
                pq.ParquetFile(path, read_dictionary=list(repeated))
            )
            rows = [
                self._file.metadata.row_group(number).num_rows
                for number in range(self._file.num_row_groups)
            ]
        except (OSError, pa.ArrowException) as error:
            self._stack.close()
            raise store.damaged(segment.path, f"cannot be read: {error}") from error
        except BaseException:
            self._stack.close()
            raise
        ends = [segment.first]
        for count in rows:
            ends.append(ends[-1] + count)
        self.groups: list[range] = [range(*pair) for pair in pairwise(ends)]
        """Positions of each row group."""
        if ends[-1] != segment.last + 1:
            self._stack.close()
            raise store.damaged(segment.path, f"it has {sum(rows):,} rows")

    def group_of(self, position: Position) -> int:
        """Return the number of the row group with a position."""
        for number, group in enumerate(self.groups):
            if position in group:
                return number
        msg = f"position {position} is not in {self.segment.path}"
        raise AssertionError(msg)

    def read(self, group: int, names: Sequence[str] | None = None) -> pa.Table:
        """Return columns of a row group; all of them if None."""
        try:
            return self._file.read_row_group(
                group, columns=None if names is None else list(names)
            )
        except (OSError, pa.ArrowException) as error:
            path = self.segment.path
            raise self._store.damaged(path, f"cannot be read: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._stack.close()


class Part(msgspec.Struct, frozen=True):
    """A row group of a segment."""

    segment: Segment
    table: pa.Table
    is_last: bool
    """The next part is of another segment."""


def scan(
    store: Store, segments: Sequence[Segment], names: Sequence[str] | None = None
) -> Iterator[Part]:
    """Yield all row groups of some segments in order, one read ahead.

    Raises:
        ArchiveDamaged: A file is missing, or not what was written.
    """
    with (
        closing(_parts(store, segments, names)) as parts,
        # Ends before the parts are closed: then nothing reads them any more.
        ThreadPoolExecutor(1, "scan") as thread,
    ):
        pending = thread.submit(next, parts, None)
        while (part := pending.result()) is not None:
            pending = thread.submit(next, parts, None)
            yield part


def _parts(
    store: Store, segments: Sequence[Segment], names: Sequence[str] | None
) -> Generator[Part]:
    for segment in segments:
        with closing(OpenSegment(store, segment)) as opened:
            count = len(opened.groups)
            for number in range(count):
                table = opened.read(number, names)
                yield Part(segment, table, number == count - 1)


def batches(store: Store, file: File, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield columns of a file beside the segments, `SLICE` rows at a time.

    Args:
        store: Where it is.
        file: Which one.
        schema: Columns to read; the file may have others.

    Raises:
        ArchiveDamaged: It is missing, not what was written, or not of such rows.
    """
    with store.checked(file) as path:
        try:
            with pq.ParquetFile(path) as found:
                _check_shape(store, file, found, schema)
                yield from found.iter_batches(SLICE, columns=schema.names)
        except (OSError, pa.ArrowException) as error:
            raise store.damaged(file.path, f"cannot be read: {error}") from error


def _check_shape(
    store: Store, file: File, found: pq.ParquetFile, schema: pa.Schema
) -> None:
    """Raise unless a file has the rows that the manifest says, in these columns."""
    rows, there = found.metadata.num_rows, found.schema_arrow
    if rows != file.rows:
        why = f"it has {rows:,} rows, the manifest says {file.rows:,}"
        raise store.damaged(file.path, why)
    for field in schema:
        place = there.get_field_index(field.name)
        if place < 0 or not there.field(place).equals(field):
            why = f"it has no column '{field.name}' of {field.type}"
            raise store.damaged(file.path, why)
