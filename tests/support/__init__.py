"""What tests share beyond fixtures; `import support` works in every test."""

from __future__ import annotations


def not_run_here(what: str, *, enable: str) -> str:
    """Return the reason for a skip: what is missing here, and how to have it.

    The test run ends with these reasons; KAPPA_LOG_TEST_REQUIRE=all makes
    failures of them.
    """
    return f"{what}; to enable: {enable}"
