"""Columns: how a Python value lies in a table, the same on every database.

A value is *settled* when writing it and reading it back gives an equal value of the
same type. Folds only ever see settled states, so rows cannot depend on when a batch
happened to be written.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

import msgspec

from kappa_log.errors import RegistrationError
from kappa_log.events import in_utc

Kind = Literal[
    "int",
    "float",
    "decimal",
    "str",
    "bool",
    "bytes",
    "date",
    "datetime",
    "enum",
    "json",
]

MAX_NAME_BYTES = 63
"""Longest name that PostgreSQL keeps whole."""

SYSTEM_COLUMNS = (
    "_position",
    *("ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"),
)
"""Columns that a build has beside key and state: the last position folded into the
row, and those that PostgreSQL gives every table."""

_INT_RANGE = range(-(2**63), 2**63)
_MAX_DIGITS = 1000


class Unsettled(Exception):
    """A value that its column cannot hold; the message says why."""


class Column(msgspec.Struct, frozen=True):
    """One column of a build: its name, and how values enter and leave it."""

    name: str
    kind: Kind
    nullable: bool
    annotation: Any
    settle: Callable[[Any], Any]
    """Value → settled value, or Unsettled. Never called with None."""
    store: Callable[[Any], Any]
    """Settled value → what the table holds."""
    load: Callable[[Any], Any]
    """What the table holds → settled value."""

    def settled(self, value: Any) -> Any:
        """Return the value as this column gives it back."""
        if value is None:
            if self.nullable:
                return None
            if self.kind != "json":
                msg = (
                    f"field {self.name!r} is None but its type "
                    f"{_name(self.annotation)} is not"
                )
                raise Unsettled(msg)
        try:
            return self.settle(value)
        except Unsettled as error:
            msg = f"field {self.name!r} {error}"
            raise Unsettled(msg) from None

    def stored(self, value: Any) -> Any:
        """Return what the table holds for a settled value."""
        if value is None and (self.nullable or self.kind != "json"):
            return None
        return self.store(value)

    def shown(self, value: Any) -> Any:
        """Return a settled value as a row of the read model shows it."""
        if value is None or self.kind not in ("enum", "json"):
            return value
        stored = self.store(value)
        return json.loads(stored) if self.kind == "json" else stored

    def loaded(self, value: Any) -> Any:
        """Return the settled value for what the table holds."""
        return None if value is None else self.load(value)


def column(name: str, annotation: Any) -> Column:
    """Return the column for a field with this annotation.

    Raises:
        RegistrationError: The name or the type cannot be a column.
    """
    if len(name.encode()) > MAX_NAME_BYTES:
        msg = f"column name {name!r} is longer than {MAX_NAME_BYTES} bytes"
        raise RegistrationError(msg)
    inner, nullable = _strip_none(annotation)
    if isinstance(inner, type) and issubclass(inner, Enum):
        settle, store, load = _enum(inner)
        return Column(name, "enum", nullable, inner, settle, store, load)
    kind = _SCALARS.get(inner)
    if kind is not None:
        return Column(name, kind, nullable, inner, _SETTLE[kind], _same, _same)
    settle, store, load = _json(name, inner)
    return Column(name, "json", nullable, inner, settle, store, load)


def check_text(value: str) -> str:
    """Return a text that both databases can hold, or raise Unsettled."""
    if "\0" in value:
        msg = "contains a NUL character"
        raise Unsettled(msg)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            msg = "contains a lone surrogate"
            raise Unsettled(msg) from None
    return value


def refuse_type(value: Any, wanted: Any) -> typing.NoReturn:
    """Raise Unsettled for a value of the wrong type."""
    msg = f"is {_name(type(value))}, not {_name(wanted)}"
    raise Unsettled(msg)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _same(value: Any) -> Any:
    return value


def _strip_none(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arguments = typing.get_args(annotation)
        rest = tuple(a for a in arguments if a is not type(None))
        if len(rest) < len(arguments):
            return (rest[0] if len(rest) == 1 else typing.Union[rest]), True  # noqa: UP007
    return annotation, False


def _settle_int(value: Any) -> int:
    if value.__class__ is not int:
        refuse_type(value, int)
    if value not in _INT_RANGE:
        msg = f"{value} is outside 64 bits"
        raise Unsettled(msg)
    return value


def _settle_float(value: Any) -> float:
    if value.__class__ is not float:
        if value.__class__ is not int:
            refuse_type(value, float)
        try:
            value = float(value)
        except OverflowError:
            msg = "is too large for a double"
            raise Unsettled(msg) from None
    if not math.isfinite(value):
        msg = f"is {value}, which SQL and JSON cannot hold"
        raise Unsettled(msg)
    # SQLite keeps -0.0 as 0; so does everyone here.
    return float(value) + 0.0


def _settle_decimal(value: Any) -> Decimal:
    if value.__class__ is int:
        value = Decimal(value)
    if value.__class__ is not Decimal:
        refuse_type(value, Decimal)
    if not value.is_finite():
        msg = f"is {value}, which SQL cannot hold"
        raise Unsettled(msg)
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int), "a finite decimal has an exponent"
    if len(digits) > _MAX_DIGITS or abs(exponent) > _MAX_DIGITS:
        msg = f"has more than {_MAX_DIGITS} digits"
        raise Unsettled(msg)
    if not value:
        value = value.copy_abs()
    # Fixed point, as NUMERIC prints it: 1E+3 is 1000.
    return value if exponent <= 0 else Decimal(format(value, "f"))


def _settle_str(value: Any) -> str:
    if not isinstance(value, str):
        refuse_type(value, str)
    return check_text(str.__str__(value))


def _settle_bool(value: Any) -> bool:
    if value is not True and value is not False:
        refuse_type(value, bool)
    return value


def _settle_bytes(value: Any) -> bytes:
    if not isinstance(value, (bytes, bytearray)):
        refuse_type(value, bytes)
    return bytes(value)


def _settle_date(value: Any) -> date:
    if value.__class__ is not date:
        refuse_type(value, date)
    return value


def _settle_datetime(value: Any) -> datetime:
    if not isinstance(value, datetime):
        refuse_type(value, datetime)
    try:
        return in_utc(value)
    except ValueError as error:
        raise Unsettled(str(error)) from None


_SCALARS: dict[Any, Kind] = {
    int: "int",
    float: "float",
    Decimal: "decimal",
    str: "str",
    bool: "bool",
    bytes: "bytes",
    date: "date",
    datetime: "datetime",
}

_SETTLE: dict[str, Callable[[Any], Any]] = {
    "int": _settle_int,
    "float": _settle_float,
    "decimal": _settle_decimal,
    "str": _settle_str,
    "bool": _settle_bool,
    "bytes": _settle_bytes,
    "date": _settle_date,
    "datetime": _settle_datetime,
}

FAST_TESTS: dict[Kind, str] = {
    "int": f"v.__class__ is int and {-(2**63)} <= v <= {2**63 - 1}",
    # Zero goes the slow way: it may be -0.0. v - v is NaN for NaN and infinity.
    "float": "v.__class__ is float and v and v - v == 0.0",
    "str": "v.__class__ is str and v.isascii() and '\\0' not in v",
    "bool": "(v is True or v is False)",
    "bytes": "v.__class__ is bytes",
    "date": "v.__class__ is date",
    "datetime": "v.__class__ is datetime and v.tzinfo is UTC and not v.fold",
}
"""Source of a test that is true only for settled values ``v``; others are checked."""

FAST_NAMES: dict[str, Any] = {"date": date, "datetime": datetime, "UTC": UTC}
"""What the tests name."""


def _enum(kind: type[Enum]) -> tuple[Callable[[Any], Any], ...]:
    by_value = all(isinstance(member.value, str) for member in kind)
    lookup = {(m.value if by_value else m.name): m for m in kind}

    def store(value: Any) -> Any:
        return value.value if by_value else value.name

    def settle(value: Any) -> Any:
        if value.__class__ is not kind:
            refuse_type(value, kind)
        if lookup.get(store(value)) is not value:
            # A combination of flags, for instance.
            msg = f"is {value!r}, no member of {_name(kind)} by name"
            raise Unsettled(msg)
        check_text(store(value))
        return value

    def load(stored: str) -> Any:
        return lookup[stored]

    return settle, store, load


def _json(name: str, annotation: Any) -> tuple[Callable[[Any], Any], ...]:
    try:
        decoder = msgspec.json.Decoder(annotation)
    except (TypeError, NotImplementedError) as error:
        msg = (
            f"column {name!r}: {_name(annotation)} is no type that JSON can hold: "
            f"{error}"
        )
        raise RegistrationError(msg) from None

    def store(value: Any) -> str:
        return _to_json(value)

    def load(stored: str) -> Any:
        return decoder.decode(stored)

    def settle(value: Any) -> Any:
        text = _to_json(value)
        try:
            return decoder.decode(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            msg = f"does not fit its type {_name(annotation)}: {error}"
            raise Unsettled(msg) from None

    return settle, store, load


def _to_json(value: Any) -> str:
    """Return deterministic JSON: sorted keys and sets, NaN refused."""
    try:
        plain = msgspec.to_builtins(value, str_keys=True, order="deterministic")
        # msgspec would write NaN as null, silently; the standard library refuses.
        text = json.dumps(
            plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")
        )
        text.encode()
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        msg = f"cannot be written as JSON: {error}"
        raise Unsettled(msg) from None
    return text
