"""Expressions: what the SQL texts of a projection say, checked when it is declared.

A column is one sum, count, min, max or last of an expression over the event: these
can be merged, so a fold in two batches is the fold in one. Whatever else it may be
(another function, DISTINCT, a subquery, a window, a clock) is refused with its name.
DuckDB itself parses the texts and tells their types.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec

from kappa_log.errors import RegistrationError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Function = Literal["sum", "count", "min", "max", "last"]

_COLUMNS = {
    "position": "BIGINT",
    "source_id": "BIGINT",
    "topic": "VARCHAR",
    "group_id": "VARCHAR",
    "partition": "BIGINT",
    "offset": "BIGINT",
    "key": "BLOB",
    "headers": 'STRUCT("name" VARCHAR, "value" BLOB)[]',
    "timestamp": "BIGINT",
    "entity_id": "VARCHAR",
    "event_time": "TIMESTAMPTZ",
    "event_type": "VARCHAR",
    "event_version": "VARCHAR",
    "recorded_at": "TIMESTAMPTZ",
    "checksum": "VARCHAR",
    "message_id": "VARCHAR",
    "payload": "JSON",
    "raw": "BLOB",
}
"""Columns of an event that an expression may name."""

_KINDS = {
    **dict.fromkeys(("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"), "int"),
    **dict.fromkeys(("UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"), "int"),
    "UHUGEINT": "int",
    "FLOAT": "float",
    "DOUBLE": "float",
    "VARCHAR": "str",
    "BOOLEAN": "bool",
    "BLOB": "bytes",
    "DATE": "date",
    "TIMESTAMP WITH TIME ZONE": "datetime",
    "JSON": "json",
}
"""DuckDB's types → kinds of columns."""

_REFUSED = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window",
    "STAR": "*",
    "PARAMETER": "a parameter",
    "POSITIONAL_REFERENCE": "a positional reference",
}


_LOOKING = ("->>", "json_extract", "json_extract_string")
"""Functions that take JSON and its text alike; ``->`` is parsed as a lambda."""


class Expression(msgspec.Struct, frozen=True):
    """One expression over an event, as DuckDB writes it."""

    sql: str
    type: str
    """DuckDB's type."""
    kind: str
    names: frozenset[str]
    """The event's columns that it names."""
    needs_json: bool = False
    """The payload must be of DuckDB's type JSON: it does more than look into it, which
    is the same in plain text."""


class Merged(msgspec.Struct, frozen=True):
    """One column: a function that can be merged, of an expression over the event."""

    function: Function
    value: Expression | None
    """None for count(*)."""
    filter: Expression | None
    """Of which events; None of all."""
    type: str
    """DuckDB's type of what it comes to."""
    kind: str

    @property
    def is_float_sum(self) -> bool:
        """Whether it depends on the order of adding up, in its last digits."""
        return self.function == "sum" and self.kind == "float"

    @property
    def names(self) -> frozenset[str]:
        """The event's columns that it names."""
        return frozenset[str]().union(*(part.names for part in self.parts))

    @property
    def parts(self) -> list[Expression]:
        """The expressions that it is made of."""
        return [part for part in (self.value, self.filter) if part is not None]


def expression(text: str) -> Expression:
    """Return what an expression over an event is.

    Raises:
        RegistrationError: DuckDB does not understand it, or it is no pure function
            of one event.
    """
    return _expression(_parsed(text))


def merged(text: str) -> Merged:
    """Return what a column's text says.

    Raises:
        RegistrationError: It is none of the five functions over an event, or more.
    """
    node = _parsed(text)
    name = node.get("function_name", "").removesuffix("_star")
    if node["class"] != "FUNCTION" or name not in get_args(Function):
        known = ", ".join(get_args(Function))
        msg = f"{text!r} is not one of {known}, of an expression over the event"
        raise RegistrationError(msg)
    function = cast("Function", name)
    arguments = [argument["expression"] for argument in node["arguments"]]
    if node["distinct"] or node["order_bys"]["orders"]:
        msg = f"{text!r}: with DISTINCT or ORDER BY it cannot be merged"
        raise RegistrationError(msg)
    if len(arguments) != (0 if node["function_name"] == "count_star" else 1):
        msg = f"{text!r}: {name} takes one expression"
        raise RegistrationError(msg)
    value = _expression(arguments[0]) if arguments else None
    condition = None if node["filter"] is None else _expression(node["filter"])
    if condition is not None and condition.kind != "bool":
        msg = f"{text!r}: FILTER takes a condition, not {condition.type}"
        raise RegistrationError(msg)
    if value is not None and value.kind == "json" and function in ("min", "max", "sum"):
        msg = (
            f"{text!r}: JSON has no {name}; say what it is, for instance "
            f"({value.sql})::DOUBLE, or ->> for text"
        )
        raise RegistrationError(msg)
    kind, found = _typed(_without_filter(function, value))
    return Merged(function, value, condition, found, kind)


def _without_filter(function: Function, value: Expression | None) -> str:
    of = "*" if value is None else value.sql
    return of if function == "last" else f"{function}({of})"


def _expression(node: dict[str, Any]) -> Expression:
    sql = _written(node)
    names: set[str] = set()
    for part in _walk(node):
        _refuse(part, sql)
        names.update(name.lower() for name in part.get("column_names", ()))
    kind, found = _typed(sql)
    named = frozenset(names & _COLUMNS.keys())
    return Expression(sql, found, kind, named, _needs_json(node))


def _needs_json(node: dict[str, Any]) -> bool:
    """Tell whether an expression does more with the payload than look into it."""
    parts = list(_walk(node))
    looked_into = [
        part["lhs"] if part["class"] == "LAMBDA" else part["arguments"][0]["expression"]
        for part in parts
        if part["class"] == "LAMBDA" or part.get("function_name") in _LOOKING
    ]
    return sum(map(_is_payload, parts)) > sum(map(_is_payload, looked_into))


def _is_payload(part: dict[str, Any]) -> bool:
    names = [name.lower() for name in part.get("column_names", ())]
    return part["class"] == "COLUMN_REF" and "payload" in names


def _refuse(part: dict[str, Any], sql: str) -> None:
    """Raise RegistrationError for what is no pure function of one event."""
    what = _REFUSED.get(part["class"])
    if what is None:
        words = [part.get("function_name", ""), *part.get("column_names", ())[-1:]]
        aggregates, impure = _functions()
        for word in (word.lower() for word in words):
            if word in _COLUMNS and part["class"] == "COLUMN_REF":
                continue
            if word in aggregates:
                what = f"{word}(), which takes many events"
            elif word in impure:
                what = f"{word}, which is not the same whenever it is asked"
    if what is not None:
        msg = f"{sql!r} has {what}; an expression is over one event"
        raise RegistrationError(msg)


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """Yield all parts of a parsed expression."""
    if isinstance(node, dict):
        if "class" in node:
            yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _parsed(text: Any) -> dict[str, Any]:
    """Return an expression as DuckDB parses it, or raise RegistrationError."""
    if not isinstance(text, str) or not text.strip():
        msg = f"{text!r} is no SQL expression"
        raise RegistrationError(msg)
    query = f"SELECT\n{text}\n"
    found = json.loads(_asked("SELECT json_serialize_sql(?::VARCHAR)", query))
    if found["error"]:
        msg = f"{text!r}: {found['error_message']}"
        raise RegistrationError(msg)
    node = found["statements"][0]["node"]
    chosen = node.get("select_list", [])
    plain = json.loads(_asked("SELECT json_serialize_sql(?::VARCHAR)", "SELECT 1"))
    rest = plain["statements"][0]["node"] | {"select_list": chosen}
    is_one = len(found["statements"]) == len(chosen) == 1 and not chosen[0]["alias"]
    if not is_one or node != rest:
        msg = f"{text!r} is more than one expression"
        raise RegistrationError(msg)
    only: dict[str, Any] = chosen[0]
    return only


def _written(node: dict[str, Any]) -> str:
    """Return a parsed expression as SQL."""
    whole = json.loads(_asked("SELECT json_serialize_sql(?::VARCHAR)", "SELECT 1"))
    whole["statements"][0]["node"]["select_list"] = [node]
    found = _asked("SELECT json_deserialize_sql(?::JSON)", json.dumps(whole))
    return found.removeprefix("SELECT ")


def _typed(sql: str) -> tuple[str, str]:
    """Return the kind and DuckDB's type of an expression over the events."""
    import duckdb

    try:
        rows = _answers(f"DESCRIBE SELECT {sql} FROM events")  # noqa: S608 - DuckDB wrote it
    except duckdb.Error as error:
        msg = f"{sql!r}: {error}"
        raise RegistrationError(msg) from None
    found = str(rows[0][1])
    kind = "decimal" if found.startswith("DECIMAL") else _KINDS.get(found)
    if kind is None:
        hint = "; say ::TIMESTAMPTZ" if found == "TIMESTAMP" else ""
        msg = f"{sql!r} is of type {found}, which no column holds{hint}"
        raise RegistrationError(msg)
    return kind, found


def _asked(query: str, value: str) -> str:
    ((found,),) = _answers(query, value)
    return str(found)


def _answers(query: str, *values: str) -> list[Any]:
    with _asking:
        return _scratch().execute(query, list(values)).fetchall()


_asking = threading.RLock()
"""One question at a time: threads may import projections, and a connection is one's."""


@functools.cache
def _functions() -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of aggregates, and of functions that are never pure."""
    rows = _answers(
        "SELECT function_name, function_type, stability FROM duckdb_functions()"
    )
    aggregates = {name for name, kind, _ in rows if kind == "aggregate"}
    pure = {name for name, _, stable in rows if stable == "CONSISTENT"}
    unstable = {name for name, _, stable in rows if stable and stable != "CONSISTENT"}
    # What the parser makes a call of only when it is bound.
    clocks = {"current_timestamp", "current_time", "localtime", "localtimestamp"}
    return frozenset(aggregates), frozenset((unstable - pure) | clocks)


def connection() -> DuckDBPyConnection:
    """Return an empty DuckDB, which must be closed off before it runs anything."""
    import duckdb

    found = duckdb.connect(config={"python_enable_replacements": False})
    found.execute("SET TimeZone = 'UTC'")
    return found


def close_off(duck: DuckDBPyConnection, folder: str | None = None) -> None:
    """Have a DuckDB see nothing any more but what it is given, and files of a folder.

    Nothing can undo that.
    """
    if folder is not None:
        duck.execute(f"SET allowed_directories = [{literal(folder)}]")
    duck.execute("SET enable_external_access = false")


def literal(text: str) -> str:
    """Return a text as SQL writes it."""
    return "'{}'".format(text.replace("'", "''"))


@functools.cache
def _scratch() -> DuckDBPyConnection:
    """Return a connection that has an empty table ``events``, to ask for types."""
    found = connection()
    close_off(found)
    columns = ", ".join(f'"{name}" {kind}' for name, kind in _COLUMNS.items())
    found.execute(f"CREATE TABLE events ({columns})")
    return found
