"""Imports of users' modules: from the configuration's folder, as they are now."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


@contextlib.contextmanager
def importing_from(base: Path) -> Iterator[None]:
    """Put a folder first on ``sys.path``, and import without writing bytecode.

    Python trusts a ``.pyc`` whose source has its size, and its time to the second: an
    edit within that second would be hidden.
    """
    path = str(base.resolve())
    if sys.path[:1] != [path]:
        sys.path.insert(0, path)
    importlib.invalidate_caches()
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def forget_strangers(package: str, base: Path) -> None:
    """Drop modules of this name that another folder brought into the process."""
    root = base.resolve()
    is_here = (root / package).is_dir() or (root / f"{package}.py").is_file()
    if not is_here or package in sys.stdlib_module_names:
        return
    found = {
        name: getattr(module, "__file__", None)
        for name, module in sys.modules.copy().items()  # other threads import, too
        if name == package or name.startswith(package + ".")
    }
    # The files tell, not the package: one without __init__.py takes in all folders of
    # its name on the path.
    if all(Path(file).is_relative_to(root) for file in found.values() if file):
        return
    for name in found:
        del sys.modules[name]


def forget(package: str) -> None:
    """Drop a package and its modules, so that they are imported anew."""
    for name in list(sys.modules):
        if name == package or name.startswith(package + "."):
            del sys.modules[name]


def enter_package(package: str, base: Path) -> None:
    """Make ``import package.module`` look into a folder that has no ``__init__.py``.

    Python prefers any package of that name with an ``__init__.py``, wherever on the
    path it lies, to a folder without one that comes first.
    """
    names = package.split(".")
    if names[0] in sys.stdlib_module_names:
        return
    for depth in range(1, len(names) + 1):
        folder = base.resolve().joinpath(*names[:depth])
        if (folder / "__init__.py").exists():
            continue
        name = ".".join(names[:depth])
        loaded = sys.modules.get(name)
        if loaded is not None and list(getattr(loaded, "__path__", ())) == [
            str(folder)
        ]:
            continue
        forget(name)
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
