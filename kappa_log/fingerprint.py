"""Fingerprints: which code made a build, by what would change its rows.

A fingerprint of code is the tokens of a function, without comments, docstrings and
layout, and of all functions, classes and constants of its own package that it
names, transitively. So a reformatted fold is the same fold, and a changed helper
is a changed fold. Other packages count by name only: pin them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Iterator
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

    Args:
        parts: Functions, classes, plain values, and containers of these.
        package: Own package of what stands in containers; functions and classes
            say theirs themselves.
    """
    seen: set[int] = set()
    digest = blake2b(digest_size=16)
    for part in parts:
        # list[Order] says that it is of builtins.
        own = "" if typing.get_args(part) else _package_of(part)
        for piece in _pieces(part, seen, own or package):
            digest.update(len(piece).to_bytes(4, "little") + piece.encode())
    return digest.hexdigest()


def _package_of(value: object) -> str:
    module = getattr(value, "__module__", None) or ""
    return str(module).partition(".")[0]


def _pieces(value: object, seen: set[int], package: str) -> Iterator[str]:
    if id(value) in seen:
        return
    if isinstance(value, types.FunctionType):
        seen.add(id(value))
        yield f"function {_source(value)}"
        yield from _named(value, seen, package)
    elif isinstance(value, type):
        seen.add(id(value))
        yield from _class(value, seen, package)
    elif isinstance(value, (types.MethodType, functools.partial)):
        yield from _pieces(_bound(value), seen, package)
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        yield from _contents(value, seen, package)
    elif typing.get_args(value):
        yield repr(value)
        yield from _pieces(list(typing.get_args(value)), seen, package)
    else:
        yield _plain(value)
        if _package_of(type(value)) == package:
            yield from _pieces(type(value), seen, package)


def _bound(value: types.MethodType | functools.partial[Any]) -> list[object]:
    """Return what a method or a partial application is made of."""
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    return [value.func, value.args, value.keywords]


def _contents(value: Collection[Any], seen: set[int], package: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield f"dict {len(value)}"
        for key in value:
            yield f"key {key!r}"
            yield from _pieces(value[key], seen, package)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)}"
        for item in value:
            yield from _pieces(item, seen, package)
    else:
        yield f"set {sorted(map(_plain, value))}"


def _plain(value: object) -> str:
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
        return value.__name__
    if value is None or isinstance(value, (str, int, float, bytes, bool, complex)):
        return f"{type(value).__name__} {value!r}"
    shown = repr(value)
    # The default repr holds an address: no property of the code.
    return f"{type(value).__qualname__} {shown if ' at 0x' not in shown else ''}"


def _class(value: type, seen: set[int], package: str) -> Iterator[str]:
    if _package_of(value) != package:
        yield f"class {value.__module__}.{value.__qualname__}"
        return
    yield f"class {_source(value)}"
    for base in value.__bases__:
        yield from _pieces(base, seen, package)
    for member in vars(value).values():
        function = inspect.unwrap(getattr(member, "__func__", member))
        if (
            isinstance(function, types.FunctionType)
            and _package_of(function) == package
        ):
            yield from _named(function, seen, package)
    yield from _pieces(_hints(value), seen, package)


def _hints(value: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(value)
    except (NameError, TypeError):
        return dict(getattr(value, "__annotations__", {}))


def _named(function: types.FunctionType, seen: set[int], package: str) -> Iterator[str]:
    """Yield the pieces of what a function names in its own package."""
    names = _names(function.__code__)
    scope = {n: function.__globals__[n] for n in names if n in function.__globals__}
    scope |= inspect.getclosurevars(function).nonlocals
    for name, value in sorted(scope.items(), key=lambda item: item[0]):
        yield f"name {name}"
        yield from _named_value(value, names, seen, package)
    yield "defaults"
    for default in (function.__defaults__, function.__kwdefaults__):
        yield from _pieces(default, seen, package)


def _named_value(
    value: object, names: set[str], seen: set[int], package: str
) -> Iterator[str]:
    wrapped = getattr(value, "__wrapped__", None)
    target = wrapped if isinstance(wrapped, types.FunctionType) else value
    if isinstance(target, types.ModuleType):
        yield target.__name__
        if target.__name__.partition(".")[0] == package:
            # A helper named by way of its module: `rates.of(day)`.
            for name in sorted(names & vars(target).keys()):
                yield f"name {target.__name__}.{name}"
                yield from _named_value(vars(target)[name], names, seen, package)
    elif (
        isinstance(target, (types.FunctionType, type))
        and _package_of(target) != package
    ):
        yield f"{target.__module__}.{target.__qualname__}"
    else:
        yield from _pieces(target, seen, package)


def _names(code: types.CodeType) -> set[str]:
    """Return all names in code, those in inner functions and comprehensions too."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _source(value: Any) -> str:
    """Return source with comments, docstrings and layout taken out."""
    code = getattr(value, "__code__", None)
    try:
        if code is not None and value.__name__ == "<lambda>":
            return ast.unparse(_lambda(code))
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError, LookupError):
        # Code typed at a prompt: its bytecode.
        if code is None:
            return f"{value.__module__}.{value.__qualname__}"
        return f"{code.co_code.hex()} {code.co_names} {_constants(code)}"
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


def _constants(code: types.CodeType) -> str:
    return repr(
        [
            _constants(c) + c.co_code.hex() if isinstance(c, types.CodeType) else c
            for c in code.co_consts
        ]
    )
