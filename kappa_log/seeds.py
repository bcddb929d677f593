"""Seeds: what a project puts into a new log, by a function of its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kappa_log.backtrace import described
from kappa_log.errors import (
    KappaLogError,
    RegistrationError,
    UsageError,
)
from kappa_log.imports import importing_from

FILE = "seeds.py"

Seed = Callable[[Any], object]


def seed_of(folder: Path) -> Seed | None:
    """Return the function ``seed`` of a project's seeds.py; None without that file.

    What it raises that is no error of ours becomes a RegistrationError, too.

    Raises:
        RegistrationError: The file cannot be imported.
        UsageError: It has no such function.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location("kappa_log_project_seeds", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with importing_from(folder):
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            msg = f"{file} cannot be imported: {described(error)}"
            raise RegistrationError(msg) from error
    found = getattr(module, "seed", None)
    if not callable(found):
        msg = f"{file} has no function seed(log); nothing was seeded"
        raise UsageError(msg)

    def seed(log: Any) -> object:
        try:
            return found(log)
        except KappaLogError:
            raise
        except (Exception, SystemExit) as error:
            msg = (
                f"{file}: seed(log) raised {described(error)}; what it did before "
                "is kept"
            )
            raise RegistrationError(msg) from error

    return seed
