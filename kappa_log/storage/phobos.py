"""The tables of Phobos DB Checkpoint, read as they are, page by page; never written.

Its tables are those of SEED §4: `events` and `failures`, by default with the prefix
`phobos_db_checkpoint_` (D1), all columns but the id nullable (D2, D4), `created_at` of
events missing before its third migration (D5). JSON columns are read as their text,
byte for byte, and times as text too: what cannot be kept is then one row's failure.
Bytes that are no UTF-8 are surrogates of the text (PEP 383), which give them back: no
row can make the others unreadable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import sqlalchemy as sa

from kappa_log.errors import ConfigError, SourceError
from kappa_log.records import Lane
from kappa_log.storage.database import Database, sqlite_module

PREFIXES = ("phobos_db_checkpoint_", "")
"""Of the tables' names: of versions 2 and 3, and of version 1."""

_EVENT = (
    "topic",
    "group_id",
    "entity_id",
    "event_time",
    "event_type",
    "event_version",
    "checksum",
    "payload",
    "created_at",
)
_FAILURE = (*_EVENT, "metadata", "error_class", "error_message", "error_backtrace")
COLUMNS = {"events": _EVENT, "failures": _FAILURE}
"""Table → its columns beside the id."""

_BYTE_FOR_BYTE = frozenset({"payload", "entity_id", "event_type", "event_version"})
"""Columns that the log refuses, or keeps as bytes, where they are no clean text. In the
others, which name and explain a row, what no text can hold becomes U+FFFD."""


class OldRow(msgspec.Struct, frozen=True):
    """A row of one of the two tables, as text; None where it is NULL or missing."""

    id: int
    topic: str | None = None
    group_id: str | None = None
    entity_id: str | None = None
    event_time: str | None = None
    event_type: str | None = None
    event_version: str | None = None
    checksum: str | None = None
    payload: str | None = None
    """JSON text. For a handler that took the payload as it came, a JSON string that
    holds the received text (H13). Bytes that are no UTF-8 are surrogates in it."""
    created_at: str | None = None
    metadata: str | None = None
    error_class: str | None = None
    error_message: str | None = None
    error_backtrace: str | None = None


class Counted(msgspec.Struct, frozen=True):
    """How many rows of a topic and group a table has."""

    topic: str | None
    group_id: str | None
    rows: int


class OldDatabase:
    """A database of the old system.

    Args:
        url: SQLAlchemy URL of a PostgreSQL database or a SQLite file; as Rails writes
            it (``postgres://``), too.

    Raises:
        ConfigError: The URL is of neither.
        SourceError: It cannot be reached, or has no such tables.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.label = self.url.render_as_string(hide_password=True)
        self._engine = _engine(self.url)
        try:
            with self._reading() as connection:
                self._tables = self._found(sa.inspect(connection))
        except SourceError as error:
            msg = f"{error}; nothing was imported"
            raise SourceError(msg) from error

    @property
    def name(self) -> str:
        """Name of the database; of a file, without its ending."""
        name = self.url.database or ""
        return Path(name).stem if self.url.get_backend_name() == "sqlite" else name

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def page(self, table: str, after: int, limit: int) -> list[OldRow]:
        """Return the rows of a table past an id, in order of their ids.

        Raises:
            SourceError: They cannot be read; it does not say what was imported.
        """
        found = self._tables[table]
        query = sa.select(*found.selected).where(found.table.c.id > after)
        with self._reading(f", {found.table.name} past id {after}") as connection:
            rows = connection.execute(query.order_by(found.table.c.id).limit(limit))
            names = list(rows.keys())[1:]
            return [
                OldRow(
                    row[0], **dict(zip(names, map(_text, names, row[1:]), strict=True))
                )
                for row in rows
            ]

    def counts(self, table: str, after: int = 0) -> list[Counted]:
        """Return how many rows past an id each topic and group has."""
        old = self._tables[table].table
        query = (
            sa.select(old.c.topic, old.c.group_id, sa.func.count())
            .where(old.c.id > after)
            .group_by(old.c.topic, old.c.group_id)
            .order_by(old.c.topic, old.c.group_id)
        )
        with self._reading() as connection:
            return [Counted(*row) for row in connection.execute(query)]

    def count_upto(self, table: str, last: int) -> int:
        """Return how many rows a table has up to an id."""
        old = self._tables[table].table
        query = sa.select(sa.func.count()).where(old.c.id <= last)
        with self._reading() as connection:
            return int(connection.scalar(query) or 0)

    def _found(self, inspector: Any) -> dict[str, _Table]:
        names = set(inspector.get_table_names())
        for prefix in PREFIXES:
            if all(prefix + name in names for name in COLUMNS):
                return {
                    name: _Table(
                        prefix + name,
                        {
                            c["name"]: c["type"]
                            for c in inspector.get_columns(prefix + name)
                        },
                        columns,
                    )
                    for name, columns in COLUMNS.items()
                }
        msg = (
            f"{self.label} has no tables {PREFIXES[0]}events and {PREFIXES[0]}failures "
            "(nor events and failures)"
        )
        raise SourceError(msg)

    @contextlib.contextmanager
    def _reading(self, what: str = "") -> Iterator[sa.Connection]:
        errors = (sa.exc.SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error)
        try:
            with self._engine.connect() as connection:
                yield connection
        except errors as error:
            text = str(getattr(error, "orig", None) or error).strip()
            why = text.partition("\n")[0]
            msg = f"{self.label}{what} cannot be read: {why}"
            raise SourceError(msg) from error


class _Table:
    """One of the tables, and what is selected of it."""

    def __init__(
        self, name: str, there: dict[str, Any], wanted: tuple[str, ...]
    ) -> None:
        self.table = sa.table(name, sa.column("id"), *map(sa.column, sorted(there)))
        self.selected: list[sa.ColumnElement[Any]] = [self.table.c.id]
        for column in wanted:
            if column in there:
                found: sa.ColumnElement[Any] = self.table.c[column]
                if not isinstance(there[column], sa.LargeBinary):
                    # PostgreSQL would write bytes in hexadecimal.
                    found = sa.cast(found, sa.Text)
                self.selected.append(found.label(column))


def _text(name: str, value: Any) -> str | None:
    """Return a column's value as text that can be made bytes again, or be kept."""
    if value is None:
        return None
    text = _decoded(bytes(value)) if isinstance(value, bytes) else str(value)
    if name in _BYTE_FOR_BYTE or (text.isascii() and "\0" not in text):
        return text
    known = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return known.replace("\0", "\ufffd")


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def kept_values(
    connection: sa.Connection, database: Database, lane: Lane, source: int, span: range
) -> dict[int, tuple[str | None, bytes | None]]:
    """Return offset → checksum and received bytes of what a lane keeps at a span.

    A duplicate has those of the event that it repeats.
    """
    tables = database.tables
    events, duplicates, failures = tables.events, tables.duplicates, tables.failures

    def of(table: sa.Table, *columns: Any) -> sa.Select[Any]:
        return sa.select(table.c.offset, *columns).where(
            table.c.source_id == source,
            table.c.group_id == lane.group_id,
            table.c.topic == lane.topic,
            table.c.partition == lane.partition,
            table.c.offset.between(span.start, span.stop - 1),
        )

    contents = (events.c.checksum, events.c.payload, events.c.raw)
    repeated = duplicates.join(events, events.c.position == duplicates.c.repeats)
    found: dict[int, tuple[str | None, bytes | None]] = {}
    for query in (
        of(events, *contents),
        of(duplicates, *contents).select_from(repeated),
    ):
        for offset, checksum, text, raw in connection.execute(query):
            value = raw if raw is not None or text is None else text.encode()
            found[offset] = checksum, None if value is None else bytes(value)
    for offset, checksum, value in connection.execute(
        of(failures, failures.c.checksum, failures.c.value)
    ):
        found[offset] = checksum, None if value is None else bytes(value)
    return found


def reached(connection: sa.Connection, database: Database, source: str) -> int:
    """Return the next offset of a source, over all its lanes; 0 if it is new."""
    table, sources = database.tables.offsets, database.tables.sources
    query = (
        sa.select(sa.func.max(table.c.next_offset))
        .join_from(table, sources)
        .where(sources.c.name == source)
    )
    return int(connection.scalar(query) or 0)


def brought(connection: sa.Connection, database: Database, source: str) -> int:
    """Return how many records of a source the ledger counts, what they became aside."""
    table, sources = database.tables.checkpoints, database.tables.sources
    names = ("acked", "skipped", "duplicate", "failed", "parked")
    seen = sum((table.c[name] for name in names), start=sa.literal(0))
    query = (
        sa.select(sa.func.sum(seen))
        .join_from(table, sources)
        .where(sources.c.name == source, table.c.kind == "batch")
    )
    return int(connection.scalar(query) or 0)


def _checked(url: str) -> sa.URL:
    msg = (
        "the old database is given as postgresql://USER@HOST/NAME or sqlite:///FILE; "
        "this is neither"
    )
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(msg) from None
    # By the name alone: Rails' names are none of SQLAlchemy's.
    backend = parsed.drivername.partition("+")[0]
    if backend in ("postgresql", "postgres", "postgis"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend in ("sqlite", "sqlite3") and parsed.database:
        return parsed.set(drivername="sqlite")
    raise ConfigError(msg)


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url).execution_options(postgresql_readonly=True)
    path = Path(url.database or "").absolute()
    module = sqlite_module()

    def connected() -> Any:
        # Not a byte of the old file changes, its journal neither.
        connection = module.connect(
            f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False
        )
        connection.text_factory = _decoded
        return connection

    return sa.create_engine(
        "sqlite://",
        module=module,
        poolclass=sa.pool.QueuePool,
        creator=connected,
    )
