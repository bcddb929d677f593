"""Doctor: look at what commonly goes wrong, and name the command that helps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from kappa_log.decoders import EXTRAS
from kappa_log.errors import KappaLogError
from kappa_log.listeners import configured_listener
from kappa_log.replay import way_out, why_unfinished
from kappa_log.storage.database import sqlite_module

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.config import Config


class Check(msgspec.Struct, frozen=True):
    """One thing that doctor looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


def _own_migrations(app: KappaLog) -> Iterator[Check]:
    """Yield whether the project's own migrations were run, if it has any."""
    try:
        own = app.own_state()
    except KappaLogError as error:
        yield Check("migrations", ok=False, detail=str(error), remedy="fix the file")
        return
    if own is not None:
        is_done = own.verdict == "current"
        detail = f"the project's own: {own.found or 'none'} of {own.wanted}"
        remedy = None if is_done else "kappa-log db upgrade"
        yield Check("migrations", is_done, detail, remedy)


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
    yield from _own_migrations(app)
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
    yield from _listener_checks(app)
    if state.verdict == "current":
        yield from _state_checks(app)


def _listener_checks(app: KappaLog) -> Iterator[Check]:
    config = app.config
    for listener in config.listeners:
        try:
            configured_listener(listener, config)
        except KappaLogError as error:
            for line in str(error).splitlines():
                detail = line.removeprefix(f"listener {listener.id}: ")
                yield Check(f"listener {listener.id}", ok=False, detail=detail)
        else:
            yield Check(f"listener {listener.id}", ok=True, detail=listener.handler)
    if config.registry.get("url") and any(
        x.decoder in EXTRAS for x in config.listeners
    ):
        yield _registry_check(config)
    if config.kafka:
        yield from _cluster_checks(config)


def _registry_check(config: Config) -> Check:
    try:
        from kappa_log.decoders.registry import subjects

        found = subjects(config.registry)
    except (KappaLogError, ImportError) as error:
        remedy = "see [registry] in kappa_log.toml"
        return Check("registry", ok=False, detail=str(error), remedy=remedy)
    return Check("registry", ok=True, detail=f"{found} subjects")


def _cluster_checks(config: Config) -> Iterator[Check]:
    from kappa_log.kafka.cluster import Cluster

    try:
        cluster = Cluster(config)
        yield Check("kafka", ok=True, detail=f"{cluster.label}, id {cluster.id}")
    except KappaLogError as error:
        remedy = "see [kafka] in kappa_log.toml"
        yield Check("kafka", ok=False, detail=str(error), remedy=remedy)
        return
    for listener in config.listeners:
        try:
            theirs = (
                Cluster(config.of_listener(listener)) if listener.kafka else cluster
            )
            found = theirs.topics_of(listener)
        except KappaLogError as error:
            yield Check(f"topic {listener.topic}", ok=False, detail=str(error))
            continue
        partitions = sum(len(topic.partitions) for topic in found.values())
        yield Check(
            f"topic {listener.topic}",
            # A pattern may match later; that it matches nothing yet is worth a look.
            ok=bool(found),
            detail=f"{len(found)} topics, {partitions} partitions",
            remedy=None if found else "no topic matches the pattern yet: see its topic",
        )


def _state_checks(app: KappaLog) -> Iterator[Check]:
    for status in app.projections():
        behind = status.lag.events if status.lag else 0
        if status.version is None:
            yield Check(
                f"projection {status.name}",
                ok=False,
                detail="has builds, but its code is not registered any more",
                remedy="restore its code, or: kappa-log projections drop "
                f"{status.name} --all",
            )
        elif status.stale:
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
                detail=f"{behind:,} events behind; kappa-log project {status.name} "
                "folds them, or says why it cannot",
            )
    for row in app.replays(unfinished=True):
        yield Check(
            f"replay {row.id}",
            ok=False,
            detail=f"of {row.projection} {why_unfinished(row)}",
            remedy=way_out(row),
        )
