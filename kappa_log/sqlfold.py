"""SQL projections: columns merged from batches that DuckDB adds up.

A batch is aggregated by key in DuckDB and merged into the states it has of these keys:
sums add up, min and max compare, last takes the later. So a fold in two batches is the
fold in one, and a whole range is folded at DuckDB's speed; nothing but the changed rows
becomes Python's. What lies in files of an archive on a disk DuckDB reads by itself,
once they are proved: a query over about a million positions.

Sums of floats depend on the order of adding up in their last digits. Each has a hidden
column beside it, the sum of the absolute values, which says how far two may differ.
"""

from __future__ import annotations

import functools
import keyword
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from typing_extensions import override

from kappa_log.columns import Unsettled
from kappa_log.errors import ProjectionError, RegistrationError
from kappa_log.events import ORIGIN, Event, EventPage, FileSpan, Position
from kappa_log.expressions import (
    Expression,
    Merged,
    close_off,
    connection,
    expression,
    literal,
    merged,
)
from kappa_log.fingerprint import Fingerprints, fingerprint
from kappa_log.fold import (
    Folding,
    Load,
    Payloads,
    Projection,
    Rows,
    check_columns,
    check_declaration,
)
from kappa_log.keys import MAX_KEY_BYTES, KeyShape
from kappa_log.state import FLOAT_SHARE, StateShape

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

PAGES_AT_ONCE = 50
"""Pages that are read together: in Arrow, they need not fit a processor's cache."""

WAITING_BYTES = 64 * 2**20
"""Pages are aggregated together up to here: a query has its price, whatever it reads,
and several batches are spread over all processors."""

WAITING_POSITIONS = 1_000_000
"""Positions in files that are aggregated together: merging has its price, too. DuckDB
reads them as it goes, so they take no memory; but a kill may cost that much more."""

_PYTHON: Mapping[str, type[Any]] = {
    "int": int,
    "float": float,
    "decimal": Decimal,
    "str": str,
    "bool": bool,
    "bytes": bytes,
    "date": date,
    "datetime": datetime,
}

_KEY_KINDS = ("str", "int", "bool", "bytes", "date")


class Keys(NamedTuple):
    """What identifies a row: SQL over the event, and the columns it fills."""

    parts: Sequence[Expression]
    shape: KeyShape


ONE_KEY = Keys(
    [Expression("0", "INTEGER", "int", frozenset())],
    KeyShape((int,), named="key", many=False),
)
"""The key 0 for every event, where there is but one row."""


def sql_projection(
    *,
    name: str,
    version: int,
    topics: Sequence[str],
    columns: Mapping[str, str],
    key: str | Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> SqlProjection:
    """Declare a projection whose columns DuckDB computes.

    Args:
        name: Name of the projection.
        version: The author's number; raise it when rows change their meaning.
        topics: Topics whose events are folded.
        columns: Name → one of sum, count, min, max, last (by position) of an SQL
            expression over the event, for instance ``"sum((payload->>'km')::DOUBLE)"``;
            ``FILTER (WHERE …)`` may follow. As in SQL, sum, min and max pass over NULL.
        key: SQL expression of the key, or a list of them; the entity_id if not given.
            Where one is NULL, the event is not for this projection.
        groups: Consumer groups whose events are folded, as for `projection`.

    Raises:
        RegistrationError: A text is anything else; the message says what.
    """
    module = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001
    check_declaration(name, version, topics, groups)
    return SqlProjection(
        name=name,
        version=version,
        topics=tuple(dict.fromkeys(topics)),
        groups=None if groups is None else tuple(dict.fromkeys(groups)),
        key=key,
        columns=columns,
        module=str(module),
    )


class SqlShape(StateShape):
    """The columns that a projection declares, and behind them the hidden ones."""

    def __init__(self, columns: Mapping[str, Merged]) -> None:
        """Lay the columns out."""
        sums = [name for name, column in columns.items() if column.is_float_sum]
        hidden = {name: f"_magnitude_{n + 1}" for n, name in enumerate(sums)}
        fields = [(name, _annotation(column)) for name, column in columns.items()]
        fields += [(name, float | None) for name in hidden.values()]
        super().__init__(msgspec.defstruct("Row", fields, frozen=True))
        self.magnitudes = hidden

    @override
    def fields(self, state: Any) -> dict[str, Any] | None:
        found = super().fields(state)
        hidden = self.magnitudes.values()
        return found and {n: v for n, v in found.items() if n not in hidden}


class SqlProjection(Projection):
    """A projection whose fold is SQL; see `sql_projection`."""

    pages_at_once = PAGES_AT_ONCE

    def __init__(  # noqa: PLR0913 - what `sql_projection` was given, by the same names
        self,
        *,
        name: str,
        version: int,
        topics: tuple[str, ...],
        groups: tuple[str, ...] | None,
        key: str | Sequence[str] | None,
        columns: Mapping[str, str],
        module: str,
    ) -> None:
        """Check the declaration; see `sql_projection`."""
        self.__name__ = self.name = name
        self.__module__ = module
        self.__doc__ = f"{', '.join(columns)} by SQL."
        self.version, self.topics, self.groups = version, topics, groups
        self._texts = {name: str(text).strip() for name, text in columns.items()}
        self._key_texts = [key] if key is None or isinstance(key, str) else list(key)
        self._payload, self.upcast = None, {}
        self.payloads = Payloads(None, {})
        self.reducer = self._reduced
        self.key = None if key is None else self._key_of
        try:
            self.keys = _keys(self._key_texts)
            self.columns = _columns(columns)
            parts = [*self.keys.parts]
            parts += [part for column in self.columns.values() for part in column.parts]
            self.needs_json = any(part.needs_json for part in parts)
            self.names = sorted({"position"}.union(*(part.names for part in parts)))
            # Their form in files is none that SQL takes apart.
            self.reads_files = "headers" not in self.names
            self.key_shape = self.keys.shape
            self.state_shape = SqlShape(self.columns)
            check_columns(self.key_shape, self.state_shape)
        except RegistrationError as error:
            msg = f"projection '{name}' ({module}): {error}"
            raise RegistrationError(msg) from None

    @override
    def folding(
        self,
        load: Load | None = None,
        only: Collection[Any] | None = None,
        most_parked: int = 0,
    ) -> SqlFolding:
        # It parks no key: batches are aggregated whole, so an error stops them.
        return SqlFolding(self, load, only)

    @override
    def is_same(self, left: Any, right: Any) -> bool:
        if left is None or right is None:
            return left is right
        hidden = self.state_shape.magnitudes
        for name in self.columns:
            a, b = getattr(left, name), getattr(right, name)
            if a == b:
                continue
            if name not in hidden or a is None or b is None:
                return False
            scale = max(getattr(state, hidden[name]) or 0.0 for state in (left, right))
            if abs(a - b) > FLOAT_SHARE * scale:
                return False
        return True

    def _reduced(self, state: Any, event: Event) -> Any:
        """Return the state after one event, whatever its key."""
        return self.folding().after(None, state, event)

    def _key_of(self, event: Event) -> Any:
        return self.folding().keys_of(_page_of(event, self.names))[0]

    @override
    def _function_keys(
        self, events: Sequence[Event], page: EventPage
    ) -> tuple[list[tuple[Any, Event]], int]:
        keys = self.folding().keys_of(page)
        pairs = [(k, e) for k, e in zip(keys, events, strict=True) if k is not None]
        return pairs, len(events) - len(pairs)

    @override
    def _fingerprints(self) -> Fingerprints:
        shape = [(c.name, c.kind, c.nullable) for c in self.state_shape.columns]
        keys = [(c.name, c.kind) for c in self.key_shape.columns]
        nothing = fingerprint(None)
        return Fingerprints(
            code=fingerprint("sql", list(self._texts.items())),
            state=fingerprint("sql", shape),
            payload=nothing,
            upcasters=nothing,
            routing=fingerprint(
                "sql",
                [sorted(self.topics), sorted(self.groups or ())],
                [keys, [(name, kind) for name, kind, _ in shape]],
                self._key_texts,
            ),
        )


class SqlFolding(Folding):
    """States of one build in a DuckDB of its own; otherwise as `Folding`."""

    def __init__(
        self,
        fold: SqlProjection,
        load: Load | None = None,
        only: Collection[Any] | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Prepare; DuckDB starts with the first page.

        Args:
            fold: The projection.
            load: As `Folding`.
            only: As `Folding`.
            keys: What identifies its rows; the projection's if None.
        """
        super().__init__(fold, load, only)
        self._fold = fold
        self._keys = keys or fold.keys
        self._sql = Statements(fold, self._keys)
        self._waiting: list[pa.Table] = []
        self._spans: list[FileSpan] = []
        self._folder: str | None = None
        self._is_closed = False
        self._drained: Position = ORIGIN

    @functools.cached_property
    def _duck(self) -> DuckDBPyConnection:
        duck = connection()
        duck.execute(f"CREATE TABLE states ({self._sql.layout})")
        if self._only is not None:
            rows = [self._keys.shape.values(key) for key in self._only]
            duck.register("wanted", self._sql.key_table(rows))
        return duck

    @functools.cached_property
    def _single(self) -> SqlFolding:
        return SqlFolding(self._fold, keys=ONE_KEY)

    def forget(self) -> None:
        """Drop all states, and what waits to be folded into them."""
        self._waiting.clear()
        self._spans.clear()
        self._drained = ORIGIN
        self._rows("DELETE FROM states")

    @override
    def __len__(self) -> int:
        return self._number("SELECT count(*) FROM states")

    @override
    def adopt(self, states: Mapping[Any, Any]) -> None:
        if not states:
            return
        keys, shape = self._keys.shape, self._fold.state_shape
        rows = [[*keys.values(k), *shape.values(state)] for k, state in states.items()]
        self._duck.register("adopted", self._sql.state_table(rows))
        self._rows(f"INSERT INTO states SELECT *, {ORIGIN} FROM adopted")

    @override
    def apply(self, page: EventPage) -> None:
        if page.span is not None and self._can_read(page.span.folder):
            self._wait_for(page.span)
            if page.rest is None:
                return
            page = page.rest
        table = _table_of(page, self._fold)
        if not table.num_rows:
            return
        if self._spans:
            self.complete()
        self._waiting.append(table)
        if sum(waiting.nbytes for waiting in self._waiting) >= WAITING_BYTES:
            self.complete()

    def _can_read(self, folder: str) -> bool:
        """Tell whether it sees the files of a folder: of the first it is asked for."""
        if not self._is_closed and self._folder is None:
            self._folder = folder
        return self._folder == folder

    def _wait_for(self, span: FileSpan) -> None:
        if self._waiting or (self._spans and self._spans[-1].last + 1 != span.first):
            self.complete()
        self._spans.append(span)
        # It starts while the first file is proved.
        _ = self._duck
        if span.last - self._spans[0].first >= WAITING_POSITIONS - 1:
            self.complete()

    def _taken(self) -> _Tables | _Files | None:
        """Return what waits, which then waits no more."""
        import pyarrow as pa

        spans, self._spans = self._spans, []
        tables, self._waiting = self._waiting, []
        if any(span.files for span in spans):
            return _Files(spans, self._fold)
        return _Tables(pa.concat_tables(tables)) if tables else None

    @override
    def complete(self) -> None:
        batch = self._taken()
        if batch is None:
            return
        try:
            self._merge(batch)
        except _Refused as error:
            raise self._first_failure(batch, error) from error
        self._rows("DROP TABLE states; ALTER TABLE next RENAME TO states")
        ((events, unkeyed),) = self._rows(self._sql.counts)
        self.events += int(events)
        self.unkeyed += int(unkeyed)

    def _merge(self, batch: _Tables | _Files, upto: Position | None = None) -> None:
        """Leave a batch's rows in ``partial``, and all states after it in ``next``.

        Args:
            batch: The events.
            upto: The last position of them that counts; None takes all.

        Raises:
            _Refused: An expression fails, or comes to what no column holds.
        """
        self._show(batch, upto)
        sql = self._sql
        try:
            try:
                self._rows(sql.partial(is_limited=self._only is not None))
            finally:
                batch.check()
            self._refuse(sql.unfit_key, "partial", "its key")
            if self._load is not None:
                missing = self._rows(sql.missing)
                self.adopt(self._load([self._keys.shape.build(r) for r in missing]))
            self._rows(sql.merged)
            self._refuse(sql.unfit_field, "next", "its new state")
        except _faults() as error:
            raise _Refused(_first_line(error)) from error

    def _refuse(self, why: str, table: str, what: str) -> None:
        """Raise _Refused if there is a reason why a row of a table cannot be stored."""
        rows = self._rows(
            f"SELECT {self._sql.keys}, {why} AS why FROM {table} "
            "WHERE why IS NOT NULL LIMIT 1"
        )
        for row in rows:
            msg = f"{what} {row[-1]}"
            raise _Refused(msg, self._keys.shape.build(row[:-1]))

    def _show(self, batch: _Tables | _Files, upto: Position | None = None) -> None:
        """Make ``page`` of a batch's events, of those up to a position."""
        # From here on expressions run, which are to see events and nothing else.
        if not self._is_closed:
            close_off(self._duck, self._folder)
            self._is_closed = True
        batch.show(self._duck, upto)

    def _first_failure(
        self, batch: _Tables | _Files, error: _Refused
    ) -> ProjectionError:
        """Return the error of the first event with which a batch cannot be folded."""
        first, bad = batch.bounds
        good = first - 1
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                self._merge(batch, middle)
            except _Refused as found:
                bad, error = middle, found
            else:
                good = middle
        reason = self._blamed(batch, bad) or str(error)
        return self._failed(bad, error.key, reason)

    def _blamed(self, batch: _Tables | _Files, position: Position) -> str | None:
        """Return which text cannot be computed for an event, and why, if one cannot."""
        self._show(batch, position)
        event = f"(SELECT * FROM page WHERE position = {position})"
        for what, computed in self._sql.texts:
            try:
                self._rows(f"SELECT {computed} FROM {event}")
            except _faults() as error:
                return f"{what}: {_first_line(error)}"
        return None

    @override
    def drain(self) -> dict[Any, tuple[Any, Position]]:
        shape, keys = self._fold.state_shape, self._keys.shape
        width = len(self._keys.parts)
        return {
            keys.build(row[:width]): (shape.settle(shape.build(row[width:-1])), row[-1])
            for row in self.drain_rows().kept
        }

    @override
    def drain_rows(self) -> Rows:
        self.complete()
        changed = self._sql.changed_since(self._drained)
        found = self._duck.sql(changed).to_arrow_table()
        columns = [column.to_pylist() for column in found.columns]
        width = len(self._keys.parts)
        for number, column in enumerate(self._fold.columns.values(), start=width):
            if column.kind == "json":
                columns[number] = self._canonical(number - width, columns)
        self._drained = max(columns[-1], default=self._drained)
        return Rows(list(zip(*columns, strict=True)), [])

    def _canonical(self, number: int, columns: Sequence[list[Any]]) -> list[Any]:
        """Return JSON as its column stores it, however it was spelt."""
        column = self._fold.state_shape.columns[number]
        texts = columns[len(self._keys.parts) + number]
        stored = []
        for row, text in enumerate(texts):
            try:
                stored.append(column.stored(column.settled(column.loaded(text))))
            except Unsettled as error:
                reason = f"its new state {error}"
                raise self._failed(columns[-1][row], None, reason) from error
        return stored

    @override
    def after(self, key: Any, state: Any, event: Event) -> Any:
        single = self._single
        single.forget()
        if state is not None:
            single.adopt({0: state})
        try:
            single.apply(_page_of(event, self._fold.names))
            return single.drain()[0][0]
        except ProjectionError as error:
            raise self._failed(error.position, key, error.reason) from error

    def keys_of(self, page: EventPage) -> list[Any]:
        """Return the key of each event, None for one that has none.

        Raises:
            ProjectionError: The key of an event cannot be computed, or be a key.
        """
        batch = _Tables(_table_of(page, self._fold))
        self._show(batch)
        try:
            rows = self._rows(self._sql.keys_in_order)
        except _faults() as error:
            refused = _Refused(_first_line(error))
            raise self._first_failure(batch, refused) from error
        shape = self._keys.shape
        keys = [None if None in row else shape.build(row) for row in rows]
        for position, key in zip(page.column("position"), keys, strict=True):
            if key is not None:
                try:
                    shape.check(key)
                except Unsettled as error:
                    raise self._failed(position, None, f"its key {error}") from error
        return keys

    def _number(self, query: str) -> int:
        ((number,),) = self._rows(query)
        return int(number)

    def _rows(self, query: str) -> list[Any]:
        """Run a statement to its end: a result half read would block all others."""
        return self._duck.execute(query).fetchall()


class _Refused(Exception):
    """A page cannot be folded; the key is that of a row, if one is to blame."""

    def __init__(self, reason: str, key: Any = None) -> None:
        super().__init__(reason)
        self.key = key


class _Tables:
    """A batch of events in Arrow's memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    @property
    def bounds(self) -> tuple[Position, Position]:
        """The first and the last position."""
        positions = self._table.column("position")
        return positions[0].as_py(), positions[-1].as_py()

    def show(self, duck: DuckDBPyConnection, upto: Position | None) -> None:
        """Make ``page`` of the events up to a position."""
        import pyarrow.compute as pc

        table = self._table
        if upto is not None:
            table = table.filter(pc.less_equal(table.column("position"), upto))
        duck.execute("DROP VIEW IF EXISTS page")
        duck.register("page", table)

    def check(self) -> None:
        """Do nothing: it is in memory."""


class _Files:
    """A batch of events in files that DuckDB reads."""

    def __init__(self, spans: Sequence[FileSpan], fold: SqlProjection) -> None:
        self.bounds = spans[0].first, spans[-1].last
        self._files = list(dict.fromkeys(f for span in spans for f in span.files))
        made = {"message_id": "lower(hex(message_id))"}
        if fold.needs_json:
            made["payload"] = "payload::JSON"
        self._columns = ", ".join(
            f'{made[name]} AS "{name}"' if name in made else f'"{name}"'
            for name in fold.names
        )
        wanted = {"topic": fold.topics, "group_id": fold.groups}
        self._where = "".join(
            f" AND {name} IN ({', '.join(map(literal, values))})"
            for name, values in wanted.items()
            if values is not None
        )

    def show(self, duck: DuckDBPyConnection, upto: Position | None) -> None:
        """Make ``page`` of the events up to a position; nothing is read yet.

        Raises:
            ArchiveDamaged: A file is missing, or not what was written.
        """
        first, last = self.bounds
        paths = ", ".join(literal(f.path()) for f in self._files)
        duck.execute(
            f"CREATE OR REPLACE TEMP VIEW page AS SELECT {self._columns} "
            f"FROM read_parquet([{paths}], hive_partitioning = false) "
            f"WHERE position BETWEEN {first} AND {last if upto is None else upto}"
            f"{self._where}"
        )

    def check(self) -> None:
        """Raise ArchiveDamaged if a file is not any more what it was when shown."""
        for file in self._files:
            file.path()


class Statements:
    """The SQL of one projection.

    ``page`` are events; ``partial`` their rows, not merged yet; ``next`` are the rows
    of ``states`` once these are merged.
    """

    def __init__(self, fold: SqlProjection, keys: Keys) -> None:
        """Write it."""
        columns = list(fold.columns.values())
        parts = {f"_k{n}": part for n, part in enumerate(keys.parts)}
        self._fields = {f"_c{n}": (c.kind, c.type) for n, c in enumerate(columns)}
        sums = [n for n, column in enumerate(columns) if column.is_float_sum]
        self._fields |= {f"_m{n}": ("float", "DOUBLE") for n in sums}
        self._key_types = {name: (p.kind, p.type) for name, p in parts.items()}
        types = self._key_types | self._fields
        self.keys = ", ".join(parts)
        self.is_unkeyed = " OR ".join(f"{name} IS NULL" for name in parts)
        self.layout = ", ".join(f"{name} {of}" for name, (_, of) in types.items())
        self.layout += ", _position BIGINT"
        made = ", ".join(f"{part.sql} AS {name}" for name, part in parts.items())
        self._keyed = f"(SELECT *, {made} FROM page) AS events"
        aggregates = [a for n, column in enumerate(columns) for a in _parts(n, column)]
        self._aggregates = ", ".join(aggregates)
        self.texts = [("key", part.sql) for part in keys.parts]
        """What each text of the declaration is for, and what is computed by it."""
        self.texts += [
            (f"column '{name}'", ", ".join(_parts(number, column)))
            for number, (name, column) in enumerate(fold.columns.items())
        ]
        self.missing = (
            f"SELECT {self.keys} FROM partial ANTI JOIN states USING ({self.keys}) "
            f"WHERE NOT ({self.is_unkeyed})"
        )
        merges = [_merge(n, column) for n, column in enumerate(columns)]
        merges += [_sum(f"_m{n}") for n in sums]
        self.merged = (
            "CREATE OR REPLACE TABLE next AS "
            f"SELECT {', '.join(f'p.{name}' for name in parts)}, {', '.join(merges)}, "
            "p._position FROM partial p LEFT JOIN states s "
            f"USING ({self.keys}) WHERE NOT ({self.is_unkeyed}) "
            f"UNION ALL SELECT * FROM states ANTI JOIN partial USING ({self.keys})"
        )
        self.counts = (
            "SELECT coalesce(sum(_n), 0), "
            f"coalesce(sum(_n) FILTER (WHERE {self.is_unkeyed}), 0) FROM partial"
        )
        shown = [_as_python(name, kind) for name, (kind, _) in types.items()]
        self._shown = ", ".join(shown)
        self.keys_in_order = f"SELECT {self.keys} FROM {self._keyed} ORDER BY position"
        sizes = " + ".join(f"strlen({name}::VARCHAR)" for name in parts)
        self.unfit_key = _unfit(
            [(name, "", kind) for name, (kind, _) in self._key_types.items()],
            (f"{sizes} > {MAX_KEY_BYTES}", f"has more than {MAX_KEY_BYTES} bytes"),
        )
        self.unfit_field = _unfit(
            [
                (f"_c{n}", f"field '{name}' ", column.kind)
                for n, (name, column) in enumerate(fold.columns.items())
            ]
        )

    def partial(self, *, is_limited: bool) -> str:
        """Return what adds a page up by key; limited to the keys in ``wanted``."""
        semi_join = f" SEMI JOIN wanted USING ({self.keys})" if is_limited else ""
        return (
            f"CREATE OR REPLACE TABLE partial AS SELECT {self.keys}, "
            f"{self._aggregates}, max(position) AS _position, count(*) AS _n "
            f"FROM {self._keyed}{semi_join} GROUP BY {self.keys}"
        )

    def changed_since(self, drained: Position) -> str:
        """Return what tells the rows into which later positions were folded."""
        return (
            f"SELECT {self._shown}, _position FROM states "
            f"WHERE _position > {drained} ORDER BY {self.keys}"
        )

    def key_table(self, rows: Sequence[Sequence[Any]]) -> pa.Table:
        """Return keys, each as its columns' values, in Arrow."""
        return _stored(self._key_types, rows)

    def state_table(self, rows: Sequence[Sequence[Any]]) -> pa.Table:
        """Return rows of keys and stored fields in Arrow."""
        return _stored(self._key_types | self._fields, rows)


def _parts(number: int, column: Merged) -> list[str]:
    """Return what a page's rows hold of a column."""
    where = "" if column.filter is None else f" FILTER (WHERE {column.filter.sql})"
    of = "*" if column.value is None else column.value.sql
    if column.function == "last":
        return [
            f"arg_max_null({of}, position){where} AS _c{number}",
            f"count(*){where} > 0 AS _h{number}",
        ]
    found = [f"{column.function}({of}){where} AS _c{number}"]
    if column.is_float_sum:
        found.append(f"sum(abs({of})){where} AS _m{number}")
    return found


def _merge(number: int, column: Merged) -> str:
    """Return what a column becomes, from the state ``s`` and the page's row ``p``."""
    name = f"_c{number}"
    merges = {
        "sum": _sum(name),
        "count": f"coalesce(s.{name}, 0) + p.{name} AS {name}",
        "min": f"least(s.{name}, p.{name}) AS {name}",
        "max": f"greatest(s.{name}, p.{name}) AS {name}",
        "last": f"CASE WHEN p._h{number} THEN p.{name} ELSE s.{name} END AS {name}",
    }
    return merges[column.function]


def _sum(name: str) -> str:
    return f"coalesce(s.{name} + p.{name}, s.{name}, p.{name}) AS {name}"


_UNFIT: Mapping[str, tuple[str, str]] = {
    "int": (
        "{0} NOT BETWEEN -9223372036854775808 AND 9223372036854775807",
        "is outside 64 bits",
    ),
    "float": ("NOT isfinite({0})", "is no finite number, which SQL and JSON lack"),
    "str": ("contains({0}, chr(0))", "contains a NUL character"),
    "date": (
        "NOT isfinite({0}) OR year({0}) NOT BETWEEN 1 AND 9999",
        "is outside the years 1 to 9999",
    ),
}
_UNFIT = {**_UNFIT, "datetime": _UNFIT["date"]}
"""Kind → when a value does not fit its column, and why. As `columns` refuses."""


def _unfit(columns: Sequence[tuple[str, str, str]], *others: tuple[str, str]) -> str:
    """Return SQL that says why a row cannot be stored; NULL if it can."""
    checks = [
        (_UNFIT[kind][0].format(name), label + _UNFIT[kind][1])
        for name, label, kind in columns
        if kind in _UNFIT
    ]
    cases = [
        f"WHEN {check} THEN '{why.replace(chr(39), chr(39) * 2)}'"
        for check, why in (*checks, *others)
    ]
    return f"CASE {' '.join(cases)} END" if cases else "NULL"


_AS_PYTHON = {
    "int": "{0}::BIGINT",
    # SQLite keeps -0.0 as 0; so does everyone here.
    "float": "{0}::DOUBLE + 0.0",
    "json": "{0}::VARCHAR",
}


def _as_python(name: str, kind: str) -> str:
    """Return a column in the type that becomes what Python's column holds."""
    return _AS_PYTHON.get(kind, "{0}").format(name)


def _stored(
    types: Mapping[str, tuple[str, str]], rows: Sequence[Sequence[Any]]
) -> pa.Table:
    import pyarrow as pa

    from kappa_log.arrow import array

    columns = list(zip(*rows, strict=True)) or [()] * len(types)
    arrays = [
        array(kind, values, is_sqlite=False, scale=_scale(of))
        for values, (kind, of) in zip(columns, types.values(), strict=True)
    ]
    return pa.table(arrays, names=list(types))


def _scale(of: str) -> int | None:
    found = re.fullmatch(r"DECIMAL\(\d+,(\d+)\)", of)
    return int(found[1]) if found else None


def _table_of(page: EventPage, fold: SqlProjection) -> pa.Table:
    """Return the columns of a page that a projection names, in Arrow."""
    import pyarrow as pa

    columns = [_column_of(page, name, fold.needs_json) for name in fold.names]
    return pa.table(columns, names=fold.names)


def _column_of(page: EventPage, name: str, needs_json: bool) -> Any:
    import pyarrow as pa

    from kappa_log.arrow import EVENT_KINDS, TYPES

    kind = EVENT_KINDS[name]
    source = "payload_text" if name == "payload" else name
    # What Arrow keeps in another form comes as Python has it.
    found = None if kind in ("headers", "hex") else page.arrow(source)
    if found is None:
        values = page.column(source)
        if kind == "headers":
            values = [[{"name": n, "value": v} for n, v in pairs] for pairs in values]
        found = pa.array(values, pa.string() if kind == "json" else TYPES[kind])
    if kind != "json" or not needs_json:
        return found
    chunks = found.chunks if isinstance(found, pa.ChunkedArray) else [found]
    wrapped = [pa.ExtensionArray.from_storage(TYPES[kind], chunk) for chunk in chunks]
    return pa.chunked_array(wrapped, TYPES[kind])


def _page_of(event: Event, names: Sequence[str]) -> EventPage:
    """Return a page of one event."""
    own: dict[str, Any] = {"position": event.position, "entity_id": event.entity_id}
    columns = {}
    for name in names:
        source = "payload_text" if name == "payload" else name
        columns[source] = [own[name] if name in own else getattr(event, source)]
    if columns.get("payload_text") == [None] and event.payload is not None:
        # An event of a test has its payload decoded alone.
        columns["payload_text"] = [msgspec.json.encode(event.payload).decode()]
    return EventPage(columns)


def _keys(texts: Sequence[str | None]) -> Keys:
    if texts == [None]:
        entity = Expression("entity_id", "VARCHAR", "str", frozenset({"entity_id"}))
        return Keys([entity], KeyShape((str,), named="entity_id", many=False))
    parts = [expression(text) for text in texts if text is not None]
    for part in parts:
        if part.kind not in _KEY_KINDS:
            msg = f"key {part.sql!r} is of type {part.type}, which cannot be a key"
            raise RegistrationError(msg)
    if not parts:
        msg = "key= is an empty list"
        raise RegistrationError(msg)
    types = tuple(_PYTHON[part.kind] for part in parts)
    named = "key" if len(parts) == 1 else ""
    return Keys(parts, KeyShape(types, named=named, many=False))


def _columns(texts: Mapping[str, str]) -> dict[str, Merged]:
    if not texts:
        msg = "columns= is empty"
        raise RegistrationError(msg)
    for name in texts:
        is_plain = name.isidentifier() and name.isascii() and not name.startswith("_")
        if not is_plain or keyword.iskeyword(name):
            msg = f"{name!r} is no name for a column"
            raise RegistrationError(msg)
    return {name: merged(text) for name, text in texts.items()}


def _annotation(column: Merged) -> Any:
    if column.function == "count":
        return int
    return Any if column.kind == "json" else _PYTHON[column.kind] | None


def _faults() -> tuple[type[Exception], ...]:
    """Return DuckDB's errors that data is to blame for; not a lack of memory."""
    import duckdb

    return duckdb.DataError, duckdb.ProgrammingError, duckdb.NotSupportedError


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
