"""Discovery: import the user's modules and collect the projections in them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from kappa_log.errors import ConfigError, RegistrationError
from kappa_log.fold import Projection, Registry, describe


def discover(modules: Sequence[str], base: Path) -> Registry:
    """Return the projections of all modules.

    Args:
        modules: Packages, modules, or folders relative to ``base``; in packages and
            folders every module is imported.
        base: The configuration's folder; goes first on ``sys.path``.

    Raises:
        ConfigError: A module is not there.
        RegistrationError: A module cannot be imported, or declares what cannot work.
    """
    path = str(base.resolve())
    if sys.path[:1] != [path]:
        sys.path.insert(0, path)
    importlib.invalidate_caches()
    registry = Registry()
    for name in modules:
        for module in _modules(name, base):
            for value in vars(module).values():
                if isinstance(value, Projection):
                    registry.add(value)
    return registry


def _modules(name: str, base: Path) -> Iterator[ModuleType]:
    folder = base / name
    if folder.is_dir():
        _forget_strangers(Path(name).parts[0], base)
        yield from _folder(folder.resolve(), ".".join(Path(name).parts))
        return
    _forget_strangers(name.partition(".")[0], base)
    try:
        root = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise _failed(name, error) from error
        msg = (
            f"[projections] modules: {name!r} is neither a module nor a folder of "
            f"{base}"
        )
        raise ConfigError(msg) from None
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error
    yield root
    for found in pkgutil.walk_packages(getattr(root, "__path__", ()), name + "."):
        yield _import(found.name)


def _folder(folder: Path, package: str) -> Iterator[ModuleType]:
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if any(not part.isidentifier() for part in parts):
            continue
        names = parts[:-1] if parts[-1] == "__init__" else parts
        yield _import(".".join((package, *names)))


def _forget_strangers(package: str, base: Path) -> None:
    """Drop modules of this name that another folder brought into the process."""
    root = base.resolve()
    is_here = (root / package).is_dir() or (root / f"{package}.py").is_file()
    if not is_here or package in sys.stdlib_module_names:
        return
    found = {
        name: getattr(module, "__file__", None)
        for name, module in sys.modules.items()
        if name == package or name.startswith(package + ".")
    }
    # The files tell, not the package: one without __init__.py takes in all folders of
    # its name on the path.
    if all(Path(file).is_relative_to(root) for file in found.values() if file):
        return
    for name in found:
        del sys.modules[name]


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _failed(name: str, error: BaseException) -> RegistrationError:
    if isinstance(error, RegistrationError):
        return error
    return RegistrationError(f"module {name} cannot be imported: {describe(error)}")
