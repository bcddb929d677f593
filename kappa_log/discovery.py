"""Discovery: import the user's modules and collect the projections in them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from kappa_log.backtrace import described
from kappa_log.errors import ConfigError, RegistrationError
from kappa_log.fold import Projection, Registry
from kappa_log.imports import enter_package, forget, forget_strangers, importing_from


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
    registry = Registry()
    with importing_from(base):
        for name in modules:
            for module in _modules(name, base):
                for value in vars(module).values():
                    if isinstance(value, Projection):
                        registry.add(value)
    for fold in registry:
        # Now: all names are there, and the files are still those that were imported.
        _ = fold.fingerprints
    return registry


def _modules(name: str, base: Path) -> Iterator[ModuleType]:
    folder = base / name
    if folder.is_dir():
        forget_strangers(Path(name).parts[0], base)
        _forget_edited(folder.resolve(), ".".join(Path(name).parts))
        enter_package(".".join(Path(name).parts), base)
        yield from _folder(folder.resolve(), ".".join(Path(name).parts))
        return
    forget_strangers(name.partition(".")[0], base)
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


_seen: dict[Path, frozenset[tuple[str, int, int]]] = {}
"""Folder → its files as they were when they were last imported from."""


def _forget_edited(folder: Path, package: str) -> None:
    """Drop the modules of a folder whose files changed since they were imported.

    A long-lived process, such as a notebook's, opens the log again after an edit.
    """
    files = [(file, file.stat()) for file in folder.rglob("*.py")]
    now = frozenset((str(f), found.st_mtime_ns, found.st_size) for f, found in files)
    if _seen.get(folder, now) != now:
        forget(package)
    _seen[folder] = now


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _failed(name: str, error: BaseException) -> RegistrationError:
    if isinstance(error, RegistrationError):
        return error
    return RegistrationError(f"module {name} cannot be imported: {described(error)}")
