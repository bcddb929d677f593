"""The log that an application serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flask import current_app

if TYPE_CHECKING:
    from kappa_log.app import KappaLog

KEY = "kappa_log"


def log() -> KappaLog:
    """Return the log of the application at hand."""
    return cast("KappaLog", current_app.extensions[KEY])
