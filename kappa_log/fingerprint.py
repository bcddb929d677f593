"""Fingerprints: which code made a build, by what would change its rows.

A fingerprint of code is the tokens of a function, without comments, docstrings and
layout, and of all functions, classes and constants of its own package that it
names, transitively. So a reformatted fold is the same fold, and a changed helper
is a changed fold. Other packages count by name only: pin them.

It is the same in each process: what has no order is sorted, and addresses are left
out.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import os
import re
import sys
import textwrap
import types
import typing
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any

import msgspec


class Fingerprints(msgspec.Struct, frozen=True):
    """What identifies the making of a build's rows, part by part."""

    code: str
    state: str
    payload: str
    upcasters: str
    routing: str

    def differing(self, other: Fingerprints) -> list[str]:
        """Return the parts in which another differs."""
        names = self.__struct_fields__
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def fingerprint(*parts: object, package: str = "") -> str:
    """Return a short hash of code and plain values, in hex.

    Call it once the modules of the code are imported: what a function names below
    itself is not there before.

    Args:
        parts: Functions, classes, plain values, and containers of these.
        package: Own package of what stands in containers; functions and classes
            say theirs themselves.
    """
    seen: _Seen = {}
    return _digest(
        piece
        for part in parts
        for piece in _Walk(package_of(part) or package, seen).pieces(part)
    )


def package_of(value: object) -> str:
    """Return the top-level package of a function or a class; "" for others."""
    while isinstance(value, functools.partial):
        value = value.func
    # list[Order] says that it is of builtins.
    if typing.get_args(value):
        return ""
    module = getattr(value, "__module__", None) or ""
    package = str(module).partition(".")[0]
    return "" if package in sys.stdlib_module_names else package


_Seen = dict[int, tuple[int, object]]
"""id → (number, object); holding the object keeps its id from being used again."""

_SCALARS = (
    *(int, float, complex, str, bytes),
    *(Decimal, datetime, date, time, timedelta),
)

_ORDERED = (list, tuple, deque)

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{8,}")

_MADE_OF: tuple[tuple[type, tuple[str, ...]], ...] = (
    (types.MethodType, ("__func__", "__self__")),
    (types.CodeType, ("co_code", "co_names", "co_consts")),
    (functools.partial, ("func", "args", "keywords")),
    (functools.partialmethod, ("func", "args", "keywords")),
    (functools.cached_property, ("func",)),
    (functools.singledispatchmethod, ("dispatcher",)),
    (staticmethod, ("__func__",)),
    (classmethod, ("__func__",)),
    (property, ("fget", "fset", "fdel")),
    (re.Pattern, ("pattern", "flags")),
)
"""What counts of a value that is made of others."""


_CODE = (types.FunctionType, *(kind for kind, _ in _MADE_OF))


class _Walk:
    """Says what a value is, in pieces of text, and what it is made of.

    Functions, classes and objects are said once, then by their number: they may
    name one another in a circle.
    """

    def __init__(self, package: str, seen: _Seen) -> None:
        self._package = package
        self._seen = seen

    def pieces(self, value: Any) -> Iterator[str]:
        """Yield what a value is."""
        if value is None or isinstance(value, (*_SCALARS, enum.Enum)):
            yield from self._scalar(value)
        elif isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
            yield value.__name__
        elif id(value) in self._seen:
            yield f"again {self._seen[id(value)][0]}"
        else:
            self._seen[id(value)] = len(self._seen), value
            yield from self._inside(value)
            if isinstance(value, (*_ORDERED, Mapping, AbstractSet)):
                # Whether equal constants are one object is Python's to choose.
                del self._seen[id(value)]

    def _is_own(self, kind: type) -> bool:
        return bool(self._package) and package_of(kind) == self._package

    def _scalar(self, value: Any) -> Iterator[str]:
        kind = type(value)
        if isinstance(value, enum.Enum):
            yield f"{kind.__qualname__}.{value.name}"
        else:
            base: Any = next((s for s in _SCALARS if isinstance(value, s)), kind)
            yield f"{kind.__qualname__} {base.__repr__(value)}"
        if self._is_own(kind):
            yield from self.pieces(kind)

    def _inside(self, value: Any) -> Iterator[str]:
        if typing.get_args(value):
            yield "generic"
            for part in (typing.get_origin(value), *typing.get_args(value)):
                yield from self.pieces(part)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, type):
            yield from self._class(value)
        else:
            names = next((n for kind, n in _MADE_OF if isinstance(value, kind)), None)
            if names is None:
                yield from self._object(value)
            else:
                yield type(value).__name__
                for name in names:
                    yield from self.pieces(getattr(value, name))

    # --- code -----------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        # functools.wraps copies __module__; the globals tell whose body it is.
        home = str(function.__globals__.get("__name__") or "")
        code = function.__code__
        if home.partition(".")[0] in ("", self._package):
            yield "function"
            yield from self._source(function, code)
            yield from self._named(function)
        else:
            yield f"function {home}.{code.co_qualname}"
        wrapped = vars(function).get("__wrapped__")
        if wrapped is not None:
            yield "wraps"
            yield from self.pieces(wrapped)
        registry = vars(function).get("registry")
        if isinstance(registry, types.MappingProxyType):
            yield "dispatches"
            yield from self.pieces(set(registry.items()))

    def _source(
        self, function: types.FunctionType, code: types.CodeType
    ) -> Iterator[str]:
        source = _source(code)
        if source is not None:
            yield source
        elif code.co_filename == "<string>" and code.co_name.startswith("__"):
            yield code.co_name  # a dataclass's, made from what its class says
        else:
            yield function.__name__  # typed at a prompt: its bytecode
            yield from self.pieces(code)

    def _named(self, function: types.FunctionType) -> Iterator[str]:
        """Yield the pieces of what a function names in its own package."""
        scope = dict(_named_in(function.__globals__, _names(function.__code__)))
        scope |= _nonlocals(function)
        for name, value in self._through_modules(scope, _names(function.__code__)):
            yield f"name {name}"
            yield from self.pieces(value)
        yield "defaults"
        for default in (function.__defaults__, function.__kwdefaults__):
            yield from self.pieces(default)

    def _through_modules(
        self, scope: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[str, Any]]:
        """Yield names and values, those named as `rates.of(day)` too."""
        waiting = sorted(scope.items(), reverse=True)
        known: set[str] = set()
        while waiting:
            name, value = waiting.pop()
            yield name, value
            if isinstance(value, types.ModuleType) and value.__name__ not in known:
                known.add(value.__name__)
                if value.__name__.partition(".")[0] == self._package:
                    waiting += [
                        (f"{value.__name__}.{inner}", found)
                        for inner, found in _named_in(vars(value), names)
                    ][::-1]

    def _class(self, value: type) -> Iterator[str]:
        if not self._is_own(value):
            yield f"class {value.__module__}.{value.__qualname__}"
            return
        yield f"class {_source(value) or value.__qualname__}"
        for base in value.__bases__:
            yield from self.pieces(base)
        for name, member in sorted(vars(value).items()):
            # What is named _x_ or __x__ and is no code is Python's.
            is_special = name.startswith("_") and name.endswith("_")
            if not is_special or isinstance(member, _CODE):
                yield f"member {name}"
                yield from self.pieces(member)
        yield from self.pieces(_hints(value))

    # --- data -----------------------------------------------------------------

    def _object(self, value: Any) -> Iterator[str]:
        kind = type(value)
        is_own = self._is_own(kind)
        is_record = dataclasses.is_dataclass(kind) or isinstance(value, msgspec.Struct)
        wrapped = getattr(value, "__wrapped__", None)
        yield kind.__qualname__
        if (
            isinstance(value, (*_ORDERED, Mapping, AbstractSet))
            and value is not os.environ
        ):
            yield from self._contents(value)
        elif isinstance(wrapped, types.FunctionType):
            yield from self.pieces(wrapped)
        elif not (is_own or is_record):
            yield _ADDRESS.sub("", repr(value))
        if is_own or is_record:
            for name, found in _attributes(value):
                yield f"attribute {name}"
                yield from self.pieces(found)
        if is_own:
            yield from self.pieces(kind)

    def _contents(self, value: Collection[Any]) -> Iterator[str]:
        yield f"holds {len(value)}"
        if isinstance(value, (dict, types.MappingProxyType)):
            for key, found in value.items():
                yield from self.pieces(key)
                yield from self.pieces(found)
        elif isinstance(value, _ORDERED):
            for item in value:
                yield from self.pieces(item)
        elif isinstance(value, Mapping):
            yield from self._sorted(value.items())
        else:
            yield from self._sorted(value)

    def _sorted(self, items: Collection[Any]) -> Iterator[str]:
        """Yield the pieces of items without an order, each on its own."""
        own = {type(item) for item in items if self._is_own(type(item))}
        for kind in sorted(own, key=lambda kind: (kind.__module__, kind.__qualname__)):
            yield from self.pieces(kind)
        yield from sorted(
            _digest(_Walk(self._package, dict(self._seen)).pieces(item))
            for item in items
        )


def _digest(pieces: Iterable[str]) -> str:
    digest = blake2b(digest_size=16)
    for piece in pieces:
        encoded = piece.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, by its slots too, without what it has cached."""
    kind = type(value)
    slots = {
        name
        for base in kind.__mro__
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    }
    for name in sorted(slots | set(getattr(value, "__dict__", ()))):
        cached = inspect.getattr_static(kind, name, None)
        if hasattr(value, name) and not isinstance(cached, functools.cached_property):
            yield name, getattr(value, name)


def _hints(value: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(value, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return dict(getattr(value, "__annotations__", {}))


def _named_in(scope: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, Any]]:
    return [(name, scope[name]) for name in sorted(names) if name in scope]


def _nonlocals(function: types.FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    empty = types.CellType()
    return {name: cell.cell_contents for name, cell in cells if cell != empty}


def _names(code: types.CodeType) -> set[str]:
    """Return all names in code, those in inner functions and comprehensions too."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _source(value: types.CodeType | type) -> str | None:
    """Return source with comments, docstrings and layout taken out, None without."""
    try:
        if isinstance(value, types.CodeType) and value.co_name == "<lambda>":
            return ast.unparse(_lambda(value))
        # Of the code, not of its function: that would be of what it wraps.
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError, LookupError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            node.decorator_list = [
                d for d in node.decorator_list if not _is_projection(d)
            ]
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _lambda(code: types.CodeType) -> ast.Lambda:
    """Return the lambda that code was made of, or raise LookupError.

    Its lines alone do not tell: in the arguments of a decorator they are taken for
    the decorated function, and one line may hold several lambdas.
    """
    places = [
        (line, column)
        for line, _, column, end in code.co_positions()
        if line is not None and column is not None and (column, end) != (0, 0)
    ]
    lines, _ = inspect.findsource(code)
    around = [
        node
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, ast.Lambda)
        and node.lineno == code.co_firstlineno
        and all(_begin(node) <= place <= _end(node) for place in places)
    ]
    if not around or (len(around) > 1 and not places):
        raise LookupError(code)
    return max(around, key=_begin)


def _begin(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.expr) -> tuple[int, int]:
    return node.end_lineno or node.lineno, node.end_col_offset or node.col_offset


def _is_projection(decorator: ast.expr) -> bool:
    """Tell the registration apart: its arguments have fingerprints of their own."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = (
        target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
    )
    return name == "projection"
