"""The public API: what may be imported, and what importing costs."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import kappa_log

HEAVY = [
    "alembic", "click", "duckdb", "filelock", "psycopg", "pyarrow", "pydantic",
    "pydantic_settings", "pysqlite3", "rich", "sqlalchemy", "sqlite3",
]  # fmt: skip


def _loaded_by(code: str) -> set[str]:
    """Return which heavy modules some code loads in a fresh process.

    What is there before is not ours: measuring coverage needs sqlite3, for instance.
    """
    heavy = f"set(sys.modules) & set({HEAVY!r})"
    shown = f"import sys\nbefore = {heavy}\n{code}\nprint(*({heavy} - before))"
    done = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_public_names_are_sorted_and_there() -> None:
    """As ruff sorts them: constants, classes, functions."""
    names = kappa_log.__all__

    assert names == sorted(
        names, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    )
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(kappa_log, name) is not None
    assert dir(kappa_log) == sorted(names)


def test_a_star_import_brings_the_public_names() -> None:
    """Lazy names too."""
    scope: dict[str, object] = {}
    exec("from kappa_log import *", scope)  # noqa: S102 - what users write

    assert set(kappa_log.__all__) <= set(scope)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="'kappa_log' has no attribute 'Kappa'"):
        kappa_log.Kappa  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Nor does declaring a projection or a handler: folds run where no database is."""
    assert _loaded_by("import kappa_log") == set()
    assert (
        _loaded_by(
            "from kappa_log import Event, Handler, ack, make_event, projection\n"
            "@projection(topics=['t'], version=1)\n"
            "def f(state: int | None, event: Event) -> int | None: return 1\n"
            "f(None, make_event())\nack('a', None)"
        )
        == set()
    )


def test_no_submodule_bears_the_name_of_a_public_object() -> None:
    """Importing it would put the module in the object's place."""
    modules = {found.name for found in pkgutil.iter_modules(kappa_log.__path__)}

    assert not modules & set(kappa_log.__all__)


def test_importing_every_module_leaves_the_public_names_as_they_are() -> None:
    """Whatever was imported first."""
    before = {name: getattr(kappa_log, name) for name in kappa_log.__all__}
    for found in pkgutil.walk_packages(kappa_log.__path__, "kappa_log."):
        if found.name.rpartition(".")[2] != "__main__":
            importlib.import_module(found.name)

    assert {name: getattr(kappa_log, name) for name in kappa_log.__all__} == before


def test_public_objects_are_documented() -> None:
    """help() says what each is for."""
    for name in kappa_log.__all__:
        found = getattr(kappa_log, name)
        if callable(found) and found.__module__.startswith("kappa_log"):
            assert (found.__doc__ or "").strip(), name
