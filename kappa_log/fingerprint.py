"""Fingerprints: which code made a build, by what would change its rows.

A fingerprint of code is the tokens of a function, without comments, docstrings and
layout, and of all functions, classes and constants of its own package that it
names, transitively. So a reformatted fold is the same fold, and a changed helper
is a changed fold. Other packages count by name only: pin them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
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


def fingerprint(*parts: object) -> str:
    """Return a short hash of code and plain values, in hex."""
    seen: set[int] = set()
    digest = blake2b(digest_size=16)
    for part in parts:
        for piece in _pieces(part, seen, _package_of(part)):
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
    elif isinstance(value, dict):
        for key in value:
            yield f"key {key!r}"
            yield from _pieces(value[key], seen, package)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)}"
        for item in value:
            yield from _pieces(item, seen, package)
    elif isinstance(value, (set, frozenset)):
        yield f"set {sorted(map(repr, value))}"
    else:
        yield _plain(value)


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
    for hint in getattr(value, "__annotations__", {}).values():
        if isinstance(hint, type):
            yield from _pieces(hint, seen, package)


def _named(function: types.FunctionType, seen: set[int], package: str) -> Iterator[str]:
    """Yield the pieces of what a function names in its own package."""
    scope = inspect.getclosurevars(function)
    for names in (scope.globals, scope.nonlocals):
        for name in sorted(names):
            value = names[name]
            wrapped = getattr(value, "__wrapped__", None)
            target = wrapped if isinstance(wrapped, types.FunctionType) else value
            yield f"name {name}"
            is_code = isinstance(target, (types.FunctionType, type))
            if is_code and _package_of(target) != package:
                yield f"{target.__module__}.{target.__qualname__}"
            else:
                yield from _pieces(target, seen, package)
    yield f"defaults {function.__defaults__!r} {function.__kwdefaults__!r}"


def _source(value: Any) -> str:
    """Return source with comments, docstrings and layout taken out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        # A lambda inside an expression, or code typed at a prompt: its bytecode.
        code = getattr(value, "__code__", None)
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
