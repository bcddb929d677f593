"""Fields: typed columns that are made of payload fields, for analysis.

The payload stays as it was received; these are copies, so that a query can read one
number without parsing a megabyte of text. What is not of the declared type becomes
NULL and is counted, and said: one strange event must not keep a log from its archive.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

import msgspec
import pyarrow as pa

from kappa_log.archive.layout import TIME
from kappa_log.archive.manifest import PayloadColumn
from kappa_log.columns import Unsettled, column
from kappa_log.config import did_you_mean
from kappa_log.errors import UsageError
from kappa_log.fold import Projection

KINDS: dict[str, tuple[Any, pa.DataType]] = {
    "int": (int, pa.int64()),
    "float": (float, pa.float64()),
    "decimal": (Decimal, pa.string()),
    "str": (str, pa.string()),
    "bool": (bool, pa.bool_()),
    "bytes": (bytes, pa.binary()),
    "date": (date, pa.date32()),
    "datetime": (datetime, TIME),
    "enum": (str, pa.string()),
    "json": (Any, pa.string()),
}
"""Kind of a column of a state → Python type, and how Parquet holds it. Decimals are
text, as exact as they came: Parquet's have one scale a column."""

_ALIASES = {
    "int64": "int",
    "integer": "int",
    "bigint": "int",
    "double": "float",
    "float64": "float",
    "string": "str",
    "text": "str",
    "varchar": "str",
    "boolean": "bool",
    "binary": "bytes",
    "date32": "date",
    "timestamp": "datetime",
    "timestamptz": "datetime",
    "numeric": "decimal",
}


_NAMED = [kind for kind in KINDS if kind != "enum"]
"""Kinds that a column of a payload field may be declared as."""


def fields_of(columns: Iterable[PayloadColumn]) -> list[pa.Field]:
    """Return the Arrow fields of payload columns; their kind is in the metadata."""
    return [field_of(c.name, c.type, nullable=True) for c in columns]


def field_of(name: str, kind: str, *, nullable: bool) -> pa.Field:
    """Return the Arrow field for a kind of column."""
    metadata = {"kappa_log.kind": kind}
    return pa.field(name, KINDS[kind][1], nullable=nullable, metadata=metadata)


def parse_column(text: str, topics: Sequence[str]) -> PayloadColumn:
    """Return the column that TOPIC.FIELD:TYPE declares.

    Args:
        text: What was typed.
        topics: Topics that the log knows; one may hold dots itself.

    Raises:
        UsageError: It is no such declaration.
    """
    path, _, kind = text.rpartition(":")
    known = sorted((t for t in topics if path.startswith(f"{t}.")), key=len)
    if not kind or not all(path.rpartition(".")):
        names = ", ".join(topics) or "none yet"
        msg = (
            f"column {text!r} is not TOPIC.FIELD:TYPE, for instance "
            f"orders.amount:double; the log's topics are: {names}"
        )
        raise UsageError(msg)
    if not known:
        raise UsageError(_no_topic(text, path, topics))
    given, kind = kind, _ALIASES.get(kind.lower(), kind.lower())
    if kind not in _NAMED:
        near = get_close_matches(given.lower(), [*_NAMED, *_ALIASES], n=1)
        hint = did_you_mean(given.lower(), near) if near else ""
        msg = (
            f"column {text!r}: type {given!r} is none of {', '.join(_NAMED)}, nor of "
            f"their names in Arrow and SQL: {', '.join(_ALIASES)}{hint}"
        )
        raise UsageError(msg)
    topic = known[-1]
    return PayloadColumn(
        name=path, topic=topic, field=path[len(topic) + 1 :], type=kind
    )


def _no_topic(text: str, path: str, topics: Sequence[str]) -> str:
    """Return what to tell about a column of a topic that is not there.

    A topic may hold dots, so nobody knows where the one that was meant ends.
    """
    parts = path.split(".")
    starts = [".".join(parts[:count]) for count in range(1, len(parts))]
    near = (start for start in starts if get_close_matches(start, topics))
    meant = next(near, starts[0])
    hint = did_you_mean(meant, topics or ["none yet"])
    return f"column {text!r}: the log has no topic '{meant}'{hint}"


def columns_of(projection: Projection) -> list[PayloadColumn]:
    """Return a column for each field of a projection's payload Struct.

    Raises:
        UsageError: It declares none, or one for each event type.
    """
    payload = projection.payload_type
    if not (isinstance(payload, type) and issubclass(payload, msgspec.Struct)):
        msg = (
            f"projection '{projection.name}' declares no payload= Struct, whose fields "
            "--columns-of makes columns of; name them: --columns TOPIC.FIELD:TYPE"
        )
        raise UsageError(msg)
    hints = typing.get_type_hints(payload, include_extras=False)
    return [
        PayloadColumn(
            name=f"{topic}.{field.encode_name}",
            topic=topic,
            field=field.encode_name,
            type=column(field.name[:60], hints[field.name]).kind,
        )
        for topic in projection.topics
        for field in msgspec.structs.fields(payload)
    ]


def chosen(
    declared: Sequence[str], projections: Sequence[Projection], topics: Sequence[str]
) -> list[PayloadColumn]:
    """Return the columns that are declared one by one or by projections, each once.

    Raises:
        UsageError: A declaration is none, or one column has two types.
    """
    found = [parse_column(text, topics) for text in declared]
    for projection in projections:
        found += columns_of(projection)
    by_name: dict[str, PayloadColumn] = {}
    for new in found:
        old = by_name.setdefault(new.name, new)
        if old != new:
            msg = f"column {new.name!r} is declared {old.type} and {new.type}"
            raise UsageError(msg)
    return list(by_name.values())


class Extractor:
    """Makes the typed columns of pages of events."""

    def __init__(self, columns: Sequence[PayloadColumn]) -> None:
        """Prepare; nothing is read."""
        self._columns = [(c, c.field.split("."), _converter(c)) for c in columns]
        self._topics = {c.topic for c in columns}
        # From the text a Decimal keeps all its digits; all others are as always.
        plain, exact = msgspec.json.Decoder(), msgspec.json.Decoder(float_hook=Decimal)
        self._decoders = {c.type == "decimal": plain for c in columns}
        if True in self._decoders:
            self._decoders[True] = exact
        self.nulls: dict[str, int] = {}
        """Column → values so far that are not of its type."""

    def arrays(
        self, topics: Sequence[str], payloads: Sequence[bytes | None]
    ) -> list[pa.Array]:
        """Return one array a column, one entry an event."""
        values = {
            is_exact: [
                decoder.decode(text) if text is not None and t in self._topics else None
                for t, text in zip(topics, payloads, strict=True)
            ]
            for is_exact, decoder in self._decoders.items()
        }
        return [
            pa.array(
                self._made(
                    found.name,
                    convert,
                    _at(path, found.topic, topics, values[found.type == "decimal"]),
                ),
                KINDS[found.type][1],
            )
            for found, path, convert in self._columns
        ]

    def _made(
        self, name: str, convert: Callable[[Any], Any], values: Iterable[Any]
    ) -> list[Any]:
        made: list[Any] = []
        for value in values:
            if value is None:
                made.append(None)
                continue
            try:
                made.append(convert(value))
            except (Unsettled, ValueError, TypeError, ArithmeticError):
                made.append(None)
                self.nulls[name] = self.nulls.get(name, 0) + 1
        return made


def _at(
    path: Sequence[str], topic: str, topics: Sequence[str], values: Sequence[Any]
) -> Iterable[Any]:
    """Yield what the payloads of a topic have at a path; None for all others."""
    for there, found in zip(topics, values, strict=True):
        value = found if there == topic else None
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        yield value


def _converter(declared: PayloadColumn) -> Callable[[Any], Any]:
    kind = declared.type
    if kind == "json":
        return lambda value: msgspec.json.encode(value).decode()
    wanted = KINDS[kind][0]
    settled = column("value", wanted).settled
    if kind == "decimal":
        return lambda value: str(settled(msgspec.convert(value, Decimal)))
    return lambda value: settled(msgspec.convert(value, wanted))
