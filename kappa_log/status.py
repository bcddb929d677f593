"""Status: what is registered, what is built, and how far behind it is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import msgspec
import sqlalchemy as sa

from kappa_log.cursor import Lag, lag
from kappa_log.events import Position
from kappa_log.fold import Registry
from kappa_log.storage import builds, log, parked
from kappa_log.storage.builds import Build, Mixed
from kappa_log.storage.database import Database
from kappa_log.storage.rows import count_rows


class HeadStatus(msgspec.Struct, frozen=True):
    """The end of the log; its digest, kept elsewhere, proves the log later."""

    position: Position
    digest: str
    recorded_at: datetime | None


class BuildStatus(msgspec.Struct, frozen=True):
    """One build of a projection."""

    number: int
    version: int
    role: str
    cursor: Position
    rows: int
    mixed: Mixed | None
    unkeyed: int
    parked: int
    """Keys whose fold raised: their later events wait."""
    created_at: datetime
    updated_at: datetime


class ProjectionStatus(msgspec.Struct, frozen=True):
    """A projection: what is registered, and what is built."""

    name: str
    version: int | None
    """Highest registered version; None if none is."""
    doc: str | None
    topics: list[str]
    view: str
    live: BuildStatus | None
    builds: list[BuildStatus]
    lag: Lag | None
    stale: list[str]
    """Fingerprints in which the live build differs from the registered code."""
    columns: list[str]
    key_columns: list[str]
    """The first of the columns."""


class CursorStatus(msgspec.Struct, frozen=True):
    """How far a live build is behind the head."""

    projection: str
    build: int
    cursor: Position
    lag: Lag
    parked: int
    updated_at: datetime


def cursor_statuses(
    connection: sa.Connection, database: Database, clock: Callable[[], datetime]
) -> list[CursorStatus]:
    """Return the cursors of all live builds, by projection."""
    head = log.head(connection, database).position
    return [
        CursorStatus(
            projection=build.projection,
            build=build.number,
            cursor=build.cursor,
            lag=lag(
                build.cursor,
                head,
                log.recorded_after(connection, database, build.cursor),
                clock(),
            ),
            parked=parked.count(connection, database, build),
            updated_at=build.updated_at,
        )
        for build in builds.of(connection, database)
        if build.role == "live"
    ]


def projection_status(
    connection: sa.Connection,
    database: Database,
    registry: Registry,
    name: str,
    clock: Callable[[], datetime],
) -> ProjectionStatus:
    """Return the status of one projection, registered or built."""
    found = [
        (build, build_status(connection, database, build))
        for build in builds.of(connection, database, name)
    ]
    live = next((pair for pair in found if pair[0].role == "live"), None)
    fold = registry.latest(name) if name in registry.names else None
    behind = None
    stale: list[str] = []
    if live is not None:
        behind = lag(
            live[0].cursor,
            log.head(connection, database).position,
            log.recorded_after(connection, database, live[0].cursor),
            clock(),
        )
        if registry.made_by(name, live[0].fingerprints) is None:
            stale = (
                ["code"]
                if fold is None
                else live[0].fingerprints.differing(fold.fingerprints)
            )
    layout = live[0].layout if live else fold and builds.layout_of(fold)
    return ProjectionStatus(
        name=name,
        version=fold.version if fold else None,
        doc=(fold.__doc__ or "").strip() or None if fold else None,
        topics=list(fold.topics) if fold else [],
        view=builds.view_name(database, name),
        live=live[1] if live else None,
        builds=[status for _, status in found],
        lag=behind,
        stale=stale,
        columns=layout.names if layout else [],
        key_columns=[column.name for column in layout.keys] if layout else [],
    )


def build_status(
    connection: sa.Connection, database: Database, build: Build
) -> BuildStatus:
    """Return the status of one build."""
    return BuildStatus(
        number=build.number,
        version=build.version,
        role=build.role,
        cursor=build.cursor,
        rows=count_rows(connection, database, build),
        mixed=build.mixed,
        unkeyed=build.unkeyed,
        parked=parked.count(connection, database, build),
        created_at=build.created_at,
        updated_at=build.updated_at,
    )
