"""What tests share beyond fixtures; `import support` works in every test."""

from __future__ import annotations

import os
from pathlib import Path

import kappa_log


def not_run_here(what: str, *, enable: str) -> str:
    """Return the reason for a skip: what is missing here, and how to have it.

    The test run ends with these reasons; KAPPA_LOG_TEST_REQUIRE=all makes
    failures of them.
    """
    return f"{what}; to enable: {enable}"


def untraced(**changed: str) -> dict[str, str]:
    """Return the environment of a process that finds our code and is not traced.

    Coverage makes a process that consumes or folds take twice as long, and what such
    a one runs is run in the tests' own processes too.
    """
    paths = [Path(kappa_log.__file__).parents[1], Path(__file__).parents[1]]
    found = {n: v for n, v in os.environ.items() if not n.startswith("COVERAGE_")}
    return found | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | changed
