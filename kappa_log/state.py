"""StateShape: a state type laid out as columns, and how states settle into them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kappa_log.columns import (
    FAST_NAMES,
    FAST_TESTS,
    SYSTEM_COLUMNS,
    Column,
    Unsettled,
    column,
    refuse_type,
)
from kappa_log.errors import RegistrationError

FLOAT_SHARE = 1e-9
"""How far two sums of the same floats may differ, as a share of the sum of their
absolute values: they may be added up in another order."""


class StateShape:
    """The columns of one state type.

    A dataclass, `msgspec.Struct` or NamedTuple has one column a field; any other
    type is one column ``value``.

    Attributes:
        type: The state type.
        is_immutable: A fold cannot change a state in its place.
        columns: Its columns in the order of its fields.
        magnitudes: Column of a sum of floats → hidden column of their absolute values.
        settle: State → the state that its columns read back, or Unsettled. States
            that are settled already come back as they are, at the cost of a few
            comparisons: this runs once an event.
    """

    def __init__(self, state_type: Any) -> None:
        """Lay the type out.

        Raises:
            RegistrationError: A field cannot be a column.
        """
        self.type = state_type
        self.magnitudes: Mapping[str, str] = {}
        fields = _fields(state_type)
        self.is_single = fields is None
        self.columns: tuple[Column, ...]
        if fields is None:
            self.columns = (column("value", state_type),)
        else:
            self.columns = tuple(column(name, kind) for name, kind in fields)
            _check_names([c.name for c in self.columns])
        self.settle = self._compile()
        self.is_immutable = _is_frozen(state_type, is_single=self.is_single) and all(
            c.kind != "json" for c in self.columns
        )

    def values(self, state: Any) -> list[Any]:
        """Return what the table holds for a settled state, column by column."""
        if self.is_single:
            return [self.columns[0].stored(state)]
        return [c.stored(getattr(state, c.name)) for c in self.columns]

    def fields(self, state: Any) -> dict[str, Any] | None:
        """Return a settled state as its row shows it, by column; None for no row.

        Enums are their text and JSON is plain values, as in the table.
        """
        if state is None:
            return None
        values = (
            [state]
            if self.is_single
            else [getattr(state, c.name) for c in self.columns]
        )
        return {
            c.name: c.shown(value)
            for c, value in zip(self.columns, values, strict=True)
        }

    def build(self, stored: Sequence[Any]) -> Any:
        """Return the state that a table's row holds."""
        if self.is_single:
            return self.columns[0].loaded(stored[0])
        return self._make(
            c.loaded(value) for c, value in zip(self.columns, stored, strict=True)
        )

    def _make(self, values: typing.Iterable[Any]) -> Any:
        names = (c.name for c in self.columns)
        return self.type(**dict(zip(names, values, strict=True)))

    def _settle_slowly(self, state: Any) -> Any:
        if self.is_single:
            return self.columns[0].settled(state)
        if state.__class__ is not self.type:
            refuse_type(state, self.type)
        return self._make(c.settled(getattr(state, c.name)) for c in self.columns)

    def _compile(self) -> Callable[[Any], Any]:
        """Return `settle` with the tests for settled values inlined.

        A call and a loop a field would cost more than most folds do.
        """
        if any(c.kind not in FAST_TESTS for c in self.columns):
            return self._settle_slowly
        lines = ["def settle(s):"]
        if not self.is_single:
            lines.append("    if s.__class__ is not T: return slow(s)")
        for c in self.columns:
            test = FAST_TESTS[c.kind]
            test = f"v is None or {test}" if c.nullable else test
            lines += [
                f"    v = s{'' if self.is_single else '.' + c.name}",
                f"    if not ({test}): return slow(s)",
            ]
        lines.append("    return s")
        names: dict[str, Any] = {
            **FAST_NAMES,
            "T": self.type,
            "slow": self._settle_slowly,
        }
        exec("\n".join(lines), names)  # noqa: S102 - source is ours, names are fields
        settle: Callable[[Any], Any] = names["settle"]
        return settle


def _is_frozen(state_type: Any, *, is_single: bool) -> bool:
    """Tell whether the fields of a state cannot be set; a bare value has none."""
    if is_single or issubclass(state_type, tuple):
        return True
    if issubclass(state_type, msgspec.Struct):
        return bool(state_type.__struct_config__.frozen)
    return bool(state_type.__dataclass_params__.frozen)


def _fields(state_type: Any) -> list[tuple[str, Any]] | None:
    if not isinstance(state_type, type):
        return None
    is_tuple = issubclass(state_type, tuple) and hasattr(state_type, "_fields")
    is_struct = issubclass(state_type, msgspec.Struct)
    if not (dataclasses.is_dataclass(state_type) or is_struct or is_tuple):
        return None
    if dataclasses.is_dataclass(state_type):
        for field in dataclasses.fields(state_type):
            if not field.init:
                msg = (
                    f"{state_type.__name__}.{field.name} has init=False, so a row "
                    "cannot be read back"
                )
                raise RegistrationError(msg)
        names = [field.name for field in dataclasses.fields(state_type)]
        _refuse_init_only(state_type, names)
    else:
        names = list(
            state_type.__struct_fields__ if is_struct else state_type._fields  # type: ignore[attr-defined]
        )
    if not names:
        msg = f"{state_type.__name__} has no fields, so no columns"
        raise RegistrationError(msg)
    try:
        hints = typing.get_type_hints(state_type)
    except (NameError, TypeError) as error:
        msg = f"the field types of {state_type.__name__} cannot be resolved: {error}"
        raise RegistrationError(msg) from None
    return [(name, hints.get(name, Any)) for name in names]


def _refuse_init_only(state_type: Any, names: list[str]) -> None:
    """Raise RegistrationError if a dataclass takes an InitVar."""
    pseudo = state_type.__dataclass_fields__.keys() - names
    for name in inspect.signature(state_type).parameters:
        if name in pseudo:
            msg = (
                f"{state_type.__name__}.{name} is an InitVar, which no column keeps, "
                "so a row cannot be read back"
            )
            raise RegistrationError(msg)


def _check_names(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        folded = name.lower()
        if folded in seen:
            msg = f"columns {seen[folded]!r} and {name!r} differ in case alone"
            raise RegistrationError(msg)
        if folded in SYSTEM_COLUMNS:
            msg = f"column {name!r} is kept by kappa_log itself; choose another name"
            raise RegistrationError(msg)
        seen[folded] = name


__all__ = ["StateShape", "Unsettled"]
