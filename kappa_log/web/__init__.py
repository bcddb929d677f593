"""The HTTP API: parse, call `KappaLog`, answer.

`create_app` returns a WSGI application; `kappa-log serve` runs it. It loads on first
use: whoever imports `kappa_log` pays for no web framework.
"""

from __future__ import annotations

from typing import Any

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    """Load the factory when it is asked for (PEP 562)."""
    if name != "create_app":
        msg = f"module 'kappa_log.web' has no attribute {name!r}"
        raise AttributeError(msg)
    from kappa_log.web.factory import create_app

    return create_app
