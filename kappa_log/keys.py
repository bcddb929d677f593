"""KeyShape: what identifies a row of a projection, typed and checked.

Keys are declared, never guessed: str, int, bool, bytes, date, or a tuple of these,
by the annotation of the key function or ``key_type=``. Undeclared keys are str.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from datetime import date
from hashlib import blake2b
from typing import Any

from kappa_log.columns import Column, Unsettled, column, refuse_type
from kappa_log.errors import RegistrationError
from kappa_log.records import field

MAX_KEY_BYTES = 1024
"""Largest key; PostgreSQL cannot index much more."""

SHARDS = 64
"""Fixed number of shards of keys; workers take whole shards."""

_TYPES = (str, int, bool, bytes, date)


class KeyShape:
    """The key columns of one projection.

    A key in memory is the bare value when there is one column, else a tuple.

    Attributes:
        columns: One column a part: ``entity_id``, or ``key``, or ``key_1`` ….
        many: Whether the key function returns a list of keys.
    """

    def __init__(self, types: tuple[type, ...], *, named: str, many: bool) -> None:
        """Lay out the key's parts."""
        self.types = types
        self.many = many
        self.is_single = named != "" and len(types) == 1
        names = (
            [named] if self.is_single else [f"key_{n + 1}" for n in range(len(types))]
        )
        self.columns: tuple[Column, ...] = tuple(map(column, names, types))

    def check(self, key: Any) -> Any:
        """Return a key that both databases can index, or raise Unsettled."""
        if self.is_single:
            self._check_part(self.columns[0], key)
            size = _size(key)
        else:
            if key.__class__ is not tuple or len(key) != len(self.columns):
                wanted = ", ".join(t.__name__ for t in self.types)
                msg = f"{key!r} is not a tuple of ({wanted})"
                raise Unsettled(msg)
            for part_column, part in zip(self.columns, key, strict=True):
                self._check_part(part_column, part)
            size = sum(map(_size, key))
        if size > MAX_KEY_BYTES:
            msg = f"has {size} bytes; at most {MAX_KEY_BYTES} can be indexed"
            raise Unsettled(msg)
        return key

    def values(self, key: Any) -> list[Any]:
        """Return what the table holds for a key, column by column."""
        return [key] if self.is_single else list(key)

    def build(self, stored: Iterable[Any]) -> Any:
        """Return the key that a row's key columns hold."""
        loaded = [c.loaded(v) for c, v in zip(self.columns, stored, strict=True)]
        return loaded[0] if self.is_single else tuple(loaded)

    def parse(self, text: str) -> Any:
        """Return the key that a person typed; parts are joined by ``/``.

        Raises:
            Unsettled: The text is no such key.
        """
        parts = [text] if len(self.types) == 1 else text.split("/")
        if len(parts) != len(self.types):
            msg = (
                f"key {text!r} has not the {len(self.types)} parts of this "
                "projection, joined by /"
            )
            raise Unsettled(msg)
        parsed = [_parse(p, t) for p, t in zip(parts, self.types, strict=True)]
        return self.check(parsed[0] if self.is_single else tuple(parsed))

    def text(self, key: Any) -> str:
        """Return a key as a person types it: what `parse` reads."""
        return "/".join(map(part_text, self.values(key)))

    @staticmethod
    def _check_part(part_column: Column, part: Any) -> None:
        if part.__class__ is not part_column.annotation:
            refuse_type(part, part_column.annotation)
        part_column.settle(part)


def shard_of(key: Any) -> int:
    """Return the shard, 0 to 63, of a key: by BLAKE2b of its type and value."""
    parts = key if isinstance(key, tuple) else (key,)
    typed = b"".join(field(type(p).__name__.encode()) + field(_bytes(p)) for p in parts)
    return blake2b(typed, digest_size=1).digest()[0] % SHARDS


def key_shape(function: Callable[..., Any] | None, key_type: Any) -> KeyShape:
    """Return the shape of the keys of a projection.

    Args:
        function: The key function, or None for the entity_id.
        key_type: What ``key_type=`` declared, or None.

    Raises:
        RegistrationError: A part's type cannot be a key, or is not to be found.
    """
    if function is None:
        return KeyShape((str,), named="entity_id", many=False)
    declared = key_type
    if declared is None:
        declared = _return_type(function)
    declared = _without_none(declared)
    many = typing.get_origin(declared) is list
    if many:
        (declared,) = typing.get_args(declared)
    if typing.get_origin(declared) is tuple:
        parts, named = typing.get_args(declared), ""
    else:
        parts, named = (declared,), "key"
    for part in parts or (declared,):
        if part not in _TYPES:
            known = ", ".join(t.__name__ for t in _TYPES)
            msg = f"key type {part!r} is none of {known}, or a tuple of these"
            raise RegistrationError(msg)
    return KeyShape(tuple(parts), named=named, many=many)


def key_shape_of(kinds: list[str]) -> KeyShape:
    """Return the shape of a build's keys, by the kinds of their columns."""
    types = tuple(t for kind in kinds for t in _TYPES if t.__name__ == kind)
    return KeyShape(types, named="key" if len(types) == 1 else "", many=False)


def _return_type(function: Callable[..., Any]) -> Any:
    if not getattr(function, "__annotations__", None):
        return str
    try:
        return typing.get_type_hints(function).get("return", str)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        msg = (
            f"the annotations of its key function cannot be resolved: {error}; "
            "declare the key's type by key_type="
        )
        raise RegistrationError(msg) from None


def _without_none(declared: Any) -> Any:
    arguments = typing.get_args(declared)
    if type(None) in arguments:
        rest = [a for a in arguments if a is not type(None)]
        return rest[0] if len(rest) == 1 else declared
    return declared


def _size(part: Any) -> int:
    return len(_bytes(part))


def _bytes(part: Any) -> bytes:
    if isinstance(part, bytes):
        return part
    return (part if isinstance(part, str) else str(part)).encode()


def part_text(part: Any) -> str:
    """Return a part of a key as a person types it."""
    match part:
        case bool():
            return str(part).lower()
        case bytes():
            return part.hex()
        case date():
            return part.isoformat()
        case _:
            return str(part)


def _parse(text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is bytes:
            return bytes.fromhex(text)
        if kind is date:
            return date.fromisoformat(text)
        return kind(text)
    except (ValueError, KeyError):
        msg = f"{text!r} is no {kind.__name__}"
        raise Unsettled(msg) from None
