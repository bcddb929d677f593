"""Arrow: kinds of columns as Arrow and DuckDB have them, whichever the database.

A decimal's type depends on its values, or on what computes it: its scale is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from kappa_log.records import decode_headers

MAX_DECIMAL_DIGITS = 38
"""Digits of the widest decimal that DuckDB and Parquet know."""

HEADERS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.binary())]))
INSTANT = pa.timestamp("us", "UTC")

TYPES: Mapping[str, pa.DataType] = {
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "date": pa.date32(),
    "datetime": INSTANT,
    "enum": pa.string(),
    "json": pa.json_(pa.string()),
    "hex": pa.string(),
    "headers": HEADERS,
}
"""Kind of a column → its Arrow type; a decimal's depends on its values."""

EVENT_KINDS: Mapping[str, str] = {
    "position": "int",
    "source_id": "int",
    "topic": "str",
    "group_id": "str",
    "partition": "int",
    "offset": "int",
    "key": "bytes",
    "headers": "headers",
    "timestamp": "int",
    "entity_id": "str",
    "event_time": "datetime",
    "event_type": "str",
    "event_version": "str",
    "recorded_at": "datetime",
    "checksum": "str",
    "message_id": "hex",
    "payload": "json",
    "raw": "bytes",
}
"""Columns of an event, by the names that `Event` has, with their kinds."""


def array(
    kind: str, values: Sequence[Any], *, is_sqlite: bool, scale: int | None = None
) -> pa.Array:
    """Return a column's values, as the driver gave them, in Arrow.

    Args:
        kind: Kind of the column.
        values: One a row; None is NULL.
        is_sqlite: Which driver gave them.
        scale: Of a decimal; None writes decimals as text.
    """
    if kind == "decimal":
        return _decimals(values, scale)
    if kind == "json":
        return pa.ExtensionArray.from_storage(
            TYPES["json"], pa.array(values, pa.string())
        )
    if kind == "headers":
        pairs = map(decode_headers, values)
        named = [[{"name": n, "value": v} for n, v in found] for found in pairs]
        return pa.array(named, HEADERS)
    if kind == "hex":
        values = [None if v is None else bytes(v).hex() for v in values]
    elif kind == "bool":
        values = [None if v is None else bool(v) for v in values]
    elif is_sqlite and kind == "date":
        return pa.array(values, pa.string()).cast(pa.date32())
    return pa.array(values, TYPES[kind])


def _decimals(values: Sequence[Any], scale: int | None) -> pa.Array:
    if scale is None:
        texts = [None if v is None else format(Decimal(v), "f") for v in values]
        return pa.array(texts, pa.string())
    numbers = [None if v is None else Decimal(v) for v in values]
    return pa.array(numbers, pa.decimal128(MAX_DECIMAL_DIGITS, scale))
