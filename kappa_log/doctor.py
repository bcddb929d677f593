"""Doctor: look at what commonly goes wrong, and name the command that helps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from kappa_log.errors import KappaLogError
from kappa_log.storage.database import sqlite_module

if TYPE_CHECKING:
    from kappa_log.app import KappaLog


class Check(msgspec.Struct, frozen=True):
    """One thing that doctor looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


def examine(app: KappaLog) -> Iterator[Check]:
    """Yield what was looked at; nothing is changed."""
    version = sys.version.split()[0]
    yield Check("python", sys.version_info >= (3, 11), version)
    place = app.config.file or f"none; defaults for {app.config.folder}"
    yield Check("configuration", ok=True, detail=str(place))
    if app.database.is_sqlite:
        module = sqlite_module()
        fresh = module.sqlite_version_info >= (3, 51, 3)
        yield Check(
            "sqlite",
            fresh,
            f"{module.sqlite_version} of {module.__name__}",
            None
            if fresh
            else "older SQLite can lose commits in WAL mode: pip install pysqlite3",
        )
    try:
        state = app.database_state()
    except KappaLogError as error:
        yield Check("database", ok=False, detail=str(error), remedy="is it running?")
        return
    remedies = {
        "empty": "kappa-log db create",
        "behind": "kappa-log db upgrade",
        "ahead": "install the newer kappa-log",
    }
    detail = f"{state.database}: {state.verdict}"
    yield Check(
        "database", state.verdict == "current", detail, remedies.get(state.verdict)
    )
    try:
        names = app.registry.names
    except KappaLogError as error:
        yield Check("projections", ok=False, detail=str(error), remedy="fix the module")
        return
    yield Check(
        "projections",
        bool(names),
        ", ".join(names) or "none",
        None if names else "kappa-log init",
    )
    for listener in app.config.listeners:
        try:
            app.listener(listener.topic, listener.group_id)
        except KappaLogError as error:
            yield Check(f"listener {listener.topic}", ok=False, detail=str(error))
        else:
            yield Check(f"listener {listener.topic}", ok=True, detail=listener.handler)
    if state.verdict == "current":
        yield from _state_checks(app)


def _state_checks(app: KappaLog) -> Iterator[Check]:
    for status in app.projections():
        behind = status.lag.events if status.lag else 0
        if status.stale:
            yield Check(
                f"projection {status.name}",
                ok=False,
                detail=f"its live build waits: {', '.join(status.stale)} changed",
                remedy=f"kappa-log replay {status.name}",
            )
        elif behind:
            yield Check(
                f"projection {status.name}",
                ok=True,
                detail=f"{behind:,} events behind; kappa-log project {status.name}",
            )
    for row in app.replays(unfinished=True):
        yield Check(
            f"replay {row.id}",
            ok=False,
            detail=f"of {row.projection} has not ended (at '{row.phase}')",
            remedy=f"kappa-log replay --resume {row.id}",
        )
