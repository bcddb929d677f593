"""Fingerprints: what counts as other code, and what does not."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from itertools import count
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from kappa_log.fingerprint import Fingerprints, fingerprint

_numbers = count()

MODULE = '''
from __future__ import annotations
import functools
import statistics
from dataclasses import dataclass
from enum import Enum

RATE = 2
TABLE = {"a": {"b": 1}, "c": [1, 2]}
NAMES = {"x", "y"}

class Color(Enum):
    RED = "r"

@dataclass(frozen=True)
class Base:
    extra: int = 0

    def inherited(self):
        return 5

@dataclass(frozen=True)
class State(Base):
    """A state."""

    count: int = 0

    def plus(self, n):
        return State(self.extra, self.count + helper(n))

START = State()

def helper(n, scale=lambda n: n * 1):
    """Help."""
    return scale(deeper(n))

def deeper(n):
    return n + 10  # ten

@functools.cache
def cached(n):
    return n + 20

def make(step):
    def fold(state, event):
        return (state or 0) + step

    return fold

def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper

@decorated
def wrapped(n):
    return n + 30

def fold(state: State | None, event) -> State | None:
    """Fold."""
    state = state or START
    # A comment.
    parts = [n * RATE for n in TABLE["c"]]
    if event.payload in NAMES or Color.RED:
        return state.plus(cached(sum(parts)) + wrapped(1) + statistics.mean(parts))
    return (lambda n: state.plus(n * 100 + inner(n)))(1)

def inner(n):
    return n + 40

closure = make(1)
bound = functools.partial(deeper, 5)
method = State(0, 7).plus
'''


def _load(folder: Path, source: str, name: str = "") -> Any:
    """Import a source as a module of its own."""
    name = name or f"printed_{next(_numbers)}"
    file = folder / f"{name}.py"
    file.write_text(dedent(source))
    spec = importlib.util.spec_from_file_location("printed", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["printed"] = module
    spec.loader.exec_module(module)
    return module


SAME = [
    ("    # A comment.\n", "", "a comment is gone"),
    ('"""Fold."""', '"""Fold, differently said."""', "a docstring changed"),
    ('    """Fold."""\n', "", "a docstring is gone"),
    ('"""Help."""', '"""Helps."""', "a helper's docstring changed"),
    ('    """A state."""\n\n', "", "a class's docstring is gone"),
    ("  # ten", "", "a comment in a helper is gone"),
    ("return n + 10", "return (\n        n\n        + 10\n    )", "the layout changed"),
    ("def make(step)", "def make(step: int)", "something changed that is not named"),
]


@pytest.mark.parametrize(("old", "new", "_what"), SAME, ids=[s[2] for s in SAME])
def test_what_changes_no_row_changes_no_fingerprint(
    tmp_path: Path, old: str, new: str, _what: str
) -> None:
    """Formatting a module must not stop its live build."""
    assert MODULE.count(old) == 1
    before = fingerprint(_load(tmp_path, MODULE).fold)

    after = fingerprint(_load(tmp_path, MODULE.replace(old, new)).fold)

    assert after == before


OTHER = [
    ("cached(sum(parts))", "cached(sum(parts) + 1)", "the fold itself"),
    ("return n + 10", "return n + 11", "a helper of a helper of its state"),
    ("return n + 20", "return n + 21", "a cached helper"),
    ("return n + 30", "return n + 31", "a wrapped helper"),
    ("n * 1)", "n * 2)", "the default of a helper"),
    ("RATE = 2", "RATE = 3", "a constant named in a comprehension"),
    ('{"b": 1}, "c": [1, 2]', '{"b": 1, "c": [1, 2]}', "where a constant's key lies"),
    ('{"x", "y"}', '{"x", "z"}', "a set"),
    ('RED = "r"', 'RED = "s"', "an enum"),
    ("self.count + helper", "self.count - helper", "a method of its state"),
    ("count: int = 0", "count: int = 1", "a default of its state"),
    ("count: int = 0", "count: float = 0", "a type in its state"),
    ("extra: int = 0", "extra: int = 1", "a base class"),
    ("n * 100", "n * 101", "an inner lambda"),
    ("return n + 40", "return n + 41", "a helper that an inner lambda names"),
    ("START = State()", "START = State(count=5)", "an object it begins with"),
    ("state or START", "state or 5", "a name"),
]


@pytest.mark.parametrize(("old", "new", "_what"), OTHER, ids=[o[2] for o in OTHER])
def test_what_may_change_a_row_changes_the_fingerprint(
    tmp_path: Path, old: str, new: str, _what: str
) -> None:
    """All that the fold names in its own package, wherever it names it."""
    assert MODULE.count(old) == 1
    before = fingerprint(_load(tmp_path, MODULE).fold)

    after = fingerprint(_load(tmp_path, MODULE.replace(old, new)).fold)

    assert after != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("closure", "closure = make(1)", "closure = make(2)"),
        ("bound", "deeper, 5", "deeper, 6"),
        ("bound", "return n + 10", "return n + 11"),
        ("method", "State(0, 7)", "State(0, 8)"),
        ("method", "return n + 10", "return n + 11"),
    ],
)
def test_what_a_function_carries_along_counts(
    tmp_path: Path, name: str, old: str, new: str
) -> None:
    """Closures, arguments filled in, the object of a method."""
    before = fingerprint(getattr(_load(tmp_path, MODULE), name))

    after = fingerprint(getattr(_load(tmp_path, MODULE.replace(old, new)), name))

    assert after != before


LAMBDAS = """
from kappa_log import projection

def both(left, right):
    return left, right

LIMIT = 5

@projection(topics=["t"], version=1, key=lambda event: event.payload["a"])
def one_line(state: int | None, event) -> int | None:
    return 1

@projection(
    topics=["t"],
    version=1,
    key=lambda event: event.payload["b"] + LIMIT,
)
def many_lines(state: int | None, event) -> int | None:
    return 1

first, second = both(lambda e: e.c, lambda e: e.d)
ternary = (lambda e: 1) if LIMIT else (lambda e: 2)
constant = lambda: 7
inner = lambda e: (lambda f: f + 8)(e)
"""


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ('"a"]', '"x"]', {"one_line"}),
        ('"b"]', '"x"]', {"many_lines"}),
        ("LIMIT = 5", "LIMIT = 6", {"many_lines"}),
        ("e.c", "e.x", {"first"}),
        ("e.d", "e.x", {"second"}),
        ("e: 1", "e: 9", {"ternary"}),
        ("e: 2", "e: 9", set()),
        (": 7", ": 9", {"constant"}),
        ("f + 8", "f + 9", {"inner"}),
        ("    return 1", "    return 2", set()),
        ("version=1, key", "version=2, key", set()),
        ("lambda event: event.payload[", "lambda event: event.payload [", set()),
    ],
)
def test_a_lambda_is_itself_and_nothing_around_it(
    tmp_path: Path, old: str, new: str, changed: set[str]
) -> None:
    """In a decorator's arguments too, and beside others on its line."""

    def prints(source: str) -> dict[str, str]:
        found = _load(tmp_path, source)
        names = ("first", "second", "ternary", "constant", "inner")
        keys = {n: getattr(found, n).key for n in ("one_line", "many_lines")}
        return {
            n: fingerprint(f)
            for n, f in (keys | {n: getattr(found, n) for n in names}).items()
        }

    before, after = prints(LAMBDAS), prints(LAMBDAS.replace(old, new))

    assert {name for name in before if before[name] != after[name]} == changed


def test_a_helper_named_by_way_of_its_module_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``rates.of(day)`` names it as much as ``of(day)``."""
    package = tmp_path / "shop_printed"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rates.py").write_text(
        "def of(n):\n    return n\ndef other(): return 1\n"
    )
    (package / "folds.py").write_text(
        "import math\nfrom shop_printed import rates\n"
        "def fold(state, event):\n    return rates.of(math.pi)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def prints() -> str:
        for name in [n for n in sys.modules if n.startswith("shop_printed")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return fingerprint(importlib.import_module("shop_printed.folds").fold)

    before = prints()
    (package / "rates.py").write_text(
        "def of(n):\n    return n\ndef other(): return 22\n"
    )
    unnamed = prints()
    (package / "rates.py").write_text("def of(n):\n    return n + 100\n")

    assert unnamed == before
    assert prints() != before


def test_another_packages_function_counts_by_its_name(tmp_path: Path) -> None:
    """What is installed is pinned elsewhere; its source may differ by its build."""
    fold = "import statistics\nfrom statistics import mean as chosen\n" + dedent(
        """
        def fold(state, event):
            return chosen([1]) + statistics.mean([1])
        """
    )
    mean = fingerprint(_load(tmp_path, fold).fold)

    assert fingerprint(_load(tmp_path, fold).fold) == mean
    median = fold.replace("import mean", "import median")
    assert fingerprint(_load(tmp_path, median).fold) != mean


IN_CONTAINERS = """
import msgspec

class Order(msgspec.Struct):
    amount: int

def helper(old):
    return {"amount": old["cents"]}

def upcast(old):
    return helper(old)

payload = {"order": Order}
upcasters = {("order", "1"): upcast}
lines = list[Order]
"""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("payload", "amount: int", "amount: float"),
        ("upcasters", '["cents"]', '["pence"]'),
        ("lines", "amount: int", "amount: float"),
    ],
)
def test_classes_and_helpers_in_containers_count(
    tmp_path: Path, name: str, old: str, new: str
) -> None:
    """A dict of payload types or upcasters is of the package of its fold."""
    before = _load(tmp_path, IN_CONTAINERS)
    first = fingerprint(getattr(before, name), package="printed")

    after = _load(tmp_path, IN_CONTAINERS.replace(old, new))

    assert fingerprint(getattr(after, name), package="printed") != first


REACHED = """
import functools, types
from dataclasses import dataclass
from functools import cached_property, singledispatch

class Table:
    def __init__(self, rate):
        self.rate = rate

class Slotted:
    __slots__ = ("rate", "unset")
    def __init__(self, rate):
        self.rate = rate

class Node:
    def __init__(self, rate):
        self.rate, self.me, self.near = rate, self, {1: [self]}

def scaled(function):
    @functools.wraps(function)
    def wrapper(state, event):
        return function(state, event) * 2
    return wrapper

def by_get(): return 10
def by_set(): return 11
def by_cached(): return 12
def by_static(): return 13
def by_class(): return 14
def by_dispatch(): return 15
def by_assigned(): return 16
CHOSEN = 17

@dataclass
class State:
    count: int = 0
    limit: int = CHOSEN
    renamed = by_assigned
    @property
    def a(self): return by_get()
    @a.setter
    def a(self, new): by_set()
    @cached_property
    def b(self): return by_cached()
    @staticmethod
    def c(): return by_static()
    @classmethod
    def d(cls): return by_class()

@singledispatch
def chosen(value): return 0
@chosen.register
def _(value: int): return by_dispatch()

TABLE, SLOTTED, NODE = Table(20), Slotted(21), Node(22)
PROXY = types.MappingProxyType({"a": {"b": 23}})

@scaled
def fold(state, event):
    return State(1), chosen(1), TABLE, SLOTTED, NODE, PROXY
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("function(state, event) * 2", "function(state, event) * 3"),
        ("return State(1)", "return State(2)"),
        *((f"return {n}", f"return {n}0") for n in range(10, 17)),
        ("CHOSEN = 17", "CHOSEN = 18"),
        ("Table(20)", "Table(0)"),
        ("Slotted(21)", "Slotted(0)"),
        ("Node(22)", "Node(0)"),
        ('{"b": 23}', '{"b": 0}'),
    ],
)
def test_what_a_fold_reaches_by_descriptors_and_objects_counts(
    tmp_path: Path, old: str, new: str
) -> None:
    """Decorators' bodies, properties, dispatch, and what objects and mappings hold."""
    assert REACHED.count(old) == 1
    before = fingerprint(_load(tmp_path, REACHED).fold)

    assert fingerprint(_load(tmp_path, REACHED).fold) == before
    assert fingerprint(_load(tmp_path, REACHED.replace(old, new)).fold) != before


BELOW = """
from kappa_log import projection

@projection(topics=["t"], version=1)
def fold(state: int | None, event) -> int | None:
    return helper(state) + RATE

def helper(n):
    return n

RATE = 2
"""


@pytest.mark.parametrize(
    ("old", "new"), [("return n", "return n + 1"), ("RATE = 2", "RATE = 3")]
)
def test_what_stands_below_a_fold_counts(tmp_path: Path, old: str, new: str) -> None:
    """When its decorator ran, its module did not have it yet."""
    before = _load(tmp_path, BELOW).fold.fingerprints

    after = _load(tmp_path, BELOW.replace(old, new)).fold.fingerprints

    assert before.differing(after) == ["code"]


def test_own_modules_that_name_each_other_end(tmp_path: Path) -> None:
    """And so do containers that hold themselves."""
    source = """
    import printed
    def fold(state, event):
        return printed.printed.fold, CIRCLE, SETS
    CIRCLE = []
    CIRCLE.append({"again": CIRCLE})
    class Node:
        pass
    SETS = Node()
    SETS.near = {SETS, Node()}
    """
    file = tmp_path / "printed.py"
    file.write_text(dedent(source))
    sys.modules.pop("printed", None)
    sys.path.insert(0, str(tmp_path))
    try:
        fold = importlib.import_module("printed").fold
    finally:
        sys.path.remove(str(tmp_path))

    assert fingerprint(fold) == fingerprint(fold)


ACROSS = """
import collections, enum, functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

import msgspec
from kappa_log import projection
from kappa_log.fingerprint import fingerprint
SENTINEL = object()
def helper(a, b=SENTINEL, *, c=lambda: 1):
    return a
CALLS = {helper}
def fold(state, event):
    return helper(1), CALLS, {"x", "y", "z"}, NAMES
NAMES = {"x", "y", "z"}
class Color(enum.Enum):
    RED = "r"
    BLUE = "b"
@dataclass(frozen=True)
class Frozen:
    names: frozenset
class Order(msgspec.Struct):
    amount: Annotated[int, SENTINEL]
class Plain:
    def __init__(self):
        self.names, self.marker = {"p", "q", "r"}, SENTINEL
HELD = (
    Frozen(frozenset("abc")),
    {Frozen(frozenset("abc")), Frozen(frozenset("def")), frozenset({Color.RED})},
    {frozenset("abc"): {Color.RED, Color.BLUE}},
    MappingProxyType({"k": {"x", "y", "z"}}),
    Plain(), {Plain(), SENTINEL}, collections.deque([{"x", "y", "z"}]),
    {"x": 1}.keys() | {"y", "z"}, functools.lru_cache(helper), print, [].append,
    Annotated[int, SENTINEL], list[Annotated[int, frozenset("abc")]], None, ...,
)
@projection(
    topics=["t"],
    version=1,
    key=lambda e: HELD,
    key_type=str,
    payload=Annotated[Order, SENTINEL],
    upcast={("a", None): lambda old: HELD, (None, "1"): fold},
)
def held(state: list[Annotated[int, SENTINEL]] | None, event) -> list[int] | None:
    return HELD
exec("def typed(s, e): return e in {'x', 'y', 'z'}")
if __name__ == "__main__":
    print(fingerprint(fold), fingerprint(typed), held.fingerprints)
"""


def test_a_fingerprint_is_the_same_in_each_process(tmp_path: Path) -> None:
    """Addresses and hash seeds are no code; else each start would be other code."""
    file = tmp_path / "across.py"
    file.write_text(ACROSS)
    run = [sys.executable, str(file)]

    found = {
        subprocess.run(
            run,
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2", "3")
    }

    assert len(found) == 1
    assert found != {""}


def test_code_without_source_has_a_fingerprint_too() -> None:
    """Typed at a prompt, its bytecode counts."""
    scopes: list[dict[str, Any]] = [{}, {}, {}]
    for scope, number in zip(scopes, (1, 1, 2), strict=True):
        exec(f"def fold(s, e): return (lambda: {number})", scope)  # noqa: S102
        exec(f"key = lambda e: {number}", scope)  # noqa: S102

    prints = [[fingerprint(scope[n]) for n in ("fold", "key")] for scope in scopes]

    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0]
    assert prints[0][1] != prints[2][1]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (["a", "b"], ["ab"]),
        ([1], ["1"]),
        ([1], [True]),
        ([[1], [2]], [[1, 2]]),
        ([(1,)], [[1]]),
        ([{"a": {"b": 1}, "c": 2}], [{"a": {"b": 1, "c": 2}}]),
        ([None], []),
        ([1.0], [1]),
    ],
)
def test_different_values_have_different_fingerprints(
    left: list[Any], right: list[Any]
) -> None:
    """Parts are framed and typed."""
    assert fingerprint(*left) != fingerprint(*right)


def test_differing_parts_are_named() -> None:
    """The message about a stale build names them."""
    old = Fingerprints("a", "b", "c", "d", "e")
    new = Fingerprints("a", "x", "c", "d", "y")

    assert old.differing(new) == ["state", "routing"]
    assert old.differing(old) == []
