"""Analysis: SQL over the log and its read models, by DuckDB.

Each view stands on a relation that is read when a query scans it: only the columns
that the query names, and of the events only the positions that its conditions leave.
Nothing is copied before, and the log's database is read by the log's own driver.

Of an archive in a folder, each file is proved before a query reads it; once, while
nobody touches it.

The connection is shut in: it reads no files, loads no extensions, sees no variables
of Python, and its settings are locked. What a query makes is gone with it.
"""

from __future__ import annotations

import functools
import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs
from typing_extensions import override

from kappa_log.archive.fields import KINDS, Extractor
from kappa_log.arrow import TYPES, array
from kappa_log.errors import ArchiveError, KappaLogError, UsageError
from kappa_log.events import Position
from kappa_log.storage import builds, lists
from kappa_log.storage.arrow import (
    BATCH_ROWS,
    BuildSource,
    EventSource,
    TableSource,
    small_tables,
)
from kappa_log.storage.database import Database

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from kappa_log.archive.manifest import PayloadColumn
    from kappa_log.archive.reader import Archive

MAX_SPANS = 256
"""Spans of positions that conditions are weighed against, however long the log is."""

Batches = Iterator[pa.RecordBatch]

Span = tuple[Position, Position]
"""Positions (after, upto]."""


class View(msgspec.Struct, frozen=True):
    """A view and its columns, for people."""

    name: str
    columns: dict[str, str]
    """Name → DuckDB's type, in the order of the view."""


Read = Callable[[Sequence[str], Any], Batches]
"""Columns, and the condition on the rows or None → batches; all rows will do."""


class Lazy(ds.Dataset):  # type: ignore[misc] # pyarrow comes without types
    """A relation that DuckDB knows by its columns and reads when it scans it."""

    def __init__(self, schema: pa.Schema, read: Read) -> None:
        # Not that of the base: there is nothing of Arrow's behind this.
        self._columns = schema
        self._read = read
        self.failed: Exception | None = None
        """Why the last reading failed: of an error, DuckDB keeps but its text."""

    @property
    def schema(self) -> pa.Schema:
        """All of its columns."""
        return self._columns

    @override
    def scanner(
        self,
        columns: Sequence[str] | None = None,
        filter: Any = None,
        **_: Any,
    ) -> Scan:
        """Return the reading of some columns of the rows that meet a condition."""
        names = list(self._columns.names if columns is None else columns)
        condition = "" if filter is None else str(filter)
        # Words that name a column by chance cost its reading, nothing else.
        words = set(re.findall(r"\w+", condition))
        also = [n for n in self._columns.names if n in words and n not in names]
        schema = pa.schema([self._columns.field(name) for name in names])
        return Scan(schema, self._batches(names, also, filter))

    def _batches(
        self, names: Sequence[str], also: Sequence[str], condition: Any
    ) -> Batches:
        self.failed = None
        try:
            for batch in self._read([*names, *also], condition):
                met = batch if condition is None else batch.filter(condition)
                yield met.select(names) if also else met
        except Exception as error:
            self.failed = error
            raise


class Scan(NamedTuple):
    """What DuckDB asks of a scanner of Arrow's.

    One of Arrow's own would read ahead in threads of its own, also what nobody wants
    any more, and while the process ends.
    """

    schema: pa.Schema
    batches: Batches

    def to_reader(self) -> pa.RecordBatchReader:
        """Return the batches as DuckDB takes them, each read when it is asked for."""
        return pa.RecordBatchReader.from_batches(self.schema, self.batches)


class Analysis:
    """A DuckDB connection over a log."""

    def __init__(self, database: Database, archive: Archive | None = None) -> None:
        """Make the views; no event is read.

        Args:
            database: The log.
            archive: An archive of this log, whose files are faster to read; the
                database gives what it lacks.
        """
        self.connection: DuckDBPyConnection = duckdb.connect(
            config={"python_enable_replacements": False}
        )
        self.connection.execute("SET TimeZone = 'UTC'")
        self._lazy: list[Lazy] = []
        for source in _sources(database, archive):
            self._add(source)
        self.connection.execute("SET enable_external_access = false")
        self.connection.execute("SET lock_configuration = true")

    def _add(
        self, source: EventSource | ArchivedEvents | TableSource | BuildSource
    ) -> None:
        names = [view.name for view in self.views()]
        name = source.name if source.name not in names else f"{source.name}_rows"
        if isinstance(source, EventSource | ArchivedEvents):
            read = _reading_events(source)
        else:
            read = _reading_all(source)
        lazy = Lazy(source.schema, read)
        self._lazy.append(lazy)
        self.connection.register(f"_{name}", lazy)
        self.connection.execute(f'CREATE VIEW "{name}" AS FROM "_{name}"')

    def views(self) -> list[View]:
        """Return the views and their columns."""
        rows = self.connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() "
            "WHERE NOT internal AND table_name NOT LIKE '\\_%' ESCAPE '\\' "
            "ORDER BY table_oid, column_index"
        ).fetchall()
        found: dict[str, dict[str, str]] = {}
        for view, column, kind in rows:
            found.setdefault(view, {})[column] = kind
        return [View(name, columns) for name, columns in found.items()]

    def statements(self, text: str) -> list[str]:
        """Return the kinds of the statements in a text, as DuckDB names them.

        Raises:
            UsageError: DuckDB cannot read it; the message is DuckDB's.
        """
        try:
            found = self.connection.extract_statements(text)
        except duckdb.Error as error:
            raise self.error(error) from error
        return [statement.type.name for statement in found]

    def sql(self, query: str) -> DuckDBPyRelation | None:
        """Return what a query comes to, computed when it is fetched.

        None for statements that have no rows.

        Raises:
            UsageError: DuckDB refuses the query; the message is DuckDB's.
        """
        try:
            return self.connection.sql(query)
        except duckdb.Error as error:
            raise self.error(error) from error

    def error(self, error: duckdb.Error) -> KappaLogError:
        """Return the error of ours that one of DuckDB's stands for."""
        for lazy in self._lazy:
            if isinstance(lazy.failed, KappaLogError):
                return lazy.failed
        if str(error).startswith("Catalog Error: Table"):
            names = ", ".join(view.name for view in self.views())
            # It guesses among DuckDB's own tables, too.
            said = re.sub(r'\nDid you mean "pg_.*"\?', "", str(error))
            return UsageError(f"{said}\n\nThe views are: {names}.")
        return UsageError(str(error))


class ArchivedEvents:
    """The events of an archive's files, and past its end those of the database.

    The archive's typed columns of payload fields are there, too; of the events past its
    end they are made when they are read.
    """

    name = EventSource.name

    def __init__(
        self, archive: Archive, rest: EventSource, sources: Mapping[int, str]
    ) -> None:
        """Prepare; nothing is read.

        Args:
            archive: Of this log.
            rest: What the archive lacks.
            sources: Source_id → name.
        """
        self._archive = archive
        self._rest = rest
        self._sources = sources
        self.head = rest.head
        self._typed = {column.name: column for column in archive.manifest.columns}
        self.schema: pa.Schema = EventSource.schema
        for name, column in self._typed.items():
            self.schema = self.schema.append(pa.field(name, _type_of(column)))

    def batches(self, names: Sequence[str], spans: Iterable[Span]) -> Batches:
        """Yield some columns of the events in spans (after, upto] of positions.

        Raises:
            ArchiveError: A file cannot be read, or is not what was written.
        """
        end, found = self._archive.manifest.position, list(spans)
        kept = [(after, min(upto, end)) for after, upto in found if after < end]
        try:
            self._prove(kept)
            yield from self._archived(names, kept)
        except (OSError, pa.ArrowException) as error:
            msg = f"the archive at {self._archive.store.url} cannot be read: {error}"
            raise ArchiveError(msg) from error
        rest = [(max(after, end), upto) for after, upto in found if upto > end]
        yield from self._live(names, rest)

    def _prove(self, spans: Sequence[Span]) -> None:
        """Prove all files of some positions; two at a time: hashing frees the lock."""
        segments = self._archive.manifest.segments
        touched = {
            segment.path: segment
            for after, upto in spans
            for segment in segments[
                bisect_left(segments, after + 1, key=lambda s: s.last) : bisect_right(
                    segments, upto, key=lambda s: s.first
                )
            ]
        }
        with ThreadPoolExecutor(2, "prove") as threads:
            for _ in threads.map(self._archive.store.check_untouched, touched.values()):
                pass

    def _live(self, names: Sequence[str], spans: Sequence[Span]) -> Batches:
        """Yield columns of the events that the archive lacks."""
        typed = [name for name in names if name in self._typed]
        if not typed:
            yield from self._rest.batches(names, spans)
            return
        extractor = Extractor([self._typed[name] for name in typed])
        wanted = [name for name in names if name not in self._typed]
        also = [name for name in ("topic", "payload") if name not in wanted]
        schema = pa.schema([self.schema.field(name) for name in names])
        for batch in self._rest.batches([*wanted, *also], spans):
            topics, texts = (
                batch["topic"].to_pylist(),
                batch["payload"].storage.to_pylist(),
            )
            found = zip(typed, extractor.arrays(topics, texts), strict=True)
            made = {name: self._column(name, column) for name, column in found}
            arrays = [made[name] if name in made else batch[name] for name in names]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _archived(self, names: Sequence[str], spans: Sequence[Span]) -> Batches:
        if not spans:
            return
        position = ds.field("position")
        within = [(position > a) & (position <= b) for a, b in _joined(spans)]
        columns = ["source_id" if name == "source" else name for name in names]
        schema = pa.schema([self.schema.field(name) for name in names])
        for batch in self._archive.events().to_batches(
            columns=columns, filter=functools.reduce(operator.or_, within)
        ):
            arrays = map(self._column, names, batch.columns)
            yield pa.RecordBatch.from_arrays(list(arrays), schema=schema)

    def _column(self, name: str, column: pa.Array) -> pa.Array:
        """Return a column of a file as the view has it."""
        if name == "source":
            column = pa.array([self._sources[number] for number in column.to_pylist()])
        elif self.schema.field(name).type == TYPES["json"]:
            column = pa.ExtensionArray.from_storage(TYPES["json"], column)
        elif name in ("headers", "message_id"):
            kind = "hex" if name == "message_id" else name
            column = array(kind, column.to_pylist(), is_sqlite=False)
        return column


def _type_of(column: PayloadColumn) -> pa.DataType:
    return TYPES["json"] if column.type == "json" else KINDS[column.type][1]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return spans that follow each other as one."""
    found: list[Span] = []
    for after, upto in spans:
        if found and found[-1][1] == after:
            found[-1] = (found[-1][0], upto)
        else:
            found.append((after, upto))
    return found


def _sources(
    database: Database, archive: Archive | None
) -> Iterator[EventSource | ArchivedEvents | TableSource | BuildSource]:
    events = EventSource(database)
    if archive is None:
        yield events
    else:
        with database.read() as connection:
            names = lists.sources(connection, database)
        yield ArchivedEvents(archive, events, names)
    yield from small_tables(database)
    with database.read() as connection:
        found = builds.of(connection, database)
    for build in found:
        if build.role == "live":
            yield BuildSource(database, build)


def _reading_events(source: EventSource | ArchivedEvents) -> Read:
    def read(names: Sequence[str], condition: Any) -> Batches:
        spans = matching_spans(condition, source.schema, source.head())
        return source.batches(names, spans)

    return read


def _reading_all(source: TableSource | BuildSource) -> Read:
    def read(names: Sequence[str], _: Any) -> Batches:
        return source.batches(names)

    return read


def matching_spans(
    condition: Any, schema: pa.Schema, head: Position, size: int = BATCH_ROWS
) -> Iterator[tuple[Position, Position]]:
    """Yield spans (after, upto] of positions that hold all rows a condition may meet.

    Args:
        condition: Arrow's expression; None is met by all.
        schema: Of all that it may name.
        head: Last position.
        size: Most positions of a span.
    """
    spans: list[tuple[Position, Position]] = [(0, head)] if head else []
    if condition is not None and "position" in str(condition):
        width = max(size, -(-head // MAX_SPANS))
        spans = _weighed(condition, schema, head, width)
    for after, upto in spans:
        for start in range(after, upto, size):
            yield start, min(start + size, upto)


def _weighed(
    condition: Any, schema: pa.Schema, head: Position, size: int
) -> list[tuple[Position, Position]]:
    """Return the spans that a condition does not rule out.

    Arrow knows how to rule out whole files by what is true of all their rows. So each
    span is put to it as a file, which is never opened.
    """
    disk, form, position = fs.LocalFileSystem(), ds.ParquetFileFormat(), "position"
    files = [
        form.make_fragment(
            f"/{after}",
            disk,
            partition_expression=(ds.field(position) > after)
            & (ds.field(position) <= after + size),
        )
        for after in range(0, head, size)
    ]
    known = ds.FileSystemDataset(files, schema, form, disk)
    starts = [int(file.path[1:]) for file in known.get_fragments(filter=condition)]
    return [(after, min(after + size, head)) for after in starts]
