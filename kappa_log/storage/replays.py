"""Replays and the audit trail, as rows."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import NotFound
from kappa_log.storage.builds import Build, to_text
from kappa_log.storage.database import Database
from kappa_log.storage.diff import Diff


class Failure(msgspec.Struct, frozen=True):
    """Where the fold of a replay failed when it was last tried, and why."""

    position: int
    reason: str


class ReplayRow(msgspec.Struct, frozen=True):
    """One replay as it is stored. Whether it runs is a lock, never a status."""

    id: int
    projection: str
    build: int | None
    phase: str
    """What it does next: fill, refold, compare, catch-up, promote, done."""
    outcome: str | None
    """None until it ended: promoted, kept, refused, side, nothing, cancelled."""
    request: dict[str, Any]
    plan: dict[str, Any]
    progress: dict[str, Any]
    reason: str | None
    created_at: datetime
    updated_at: datetime

    @property
    def failure(self) -> Failure | None:
        """How its fold failed; None if something else ended it, or nothing did."""
        found = self.progress.get("failure")
        return None if found is None else msgspec.convert(found, Failure)


class NewReplay(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay begins with."""

    projection: str
    build: int
    phase: str
    request: dict[str, Any]
    plan: dict[str, Any]
    progress: dict[str, Any] = {}
    reason: str | None


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """One act for the audit trail."""

    who: str
    action: str
    subject: str
    detail: dict[str, Any] = {}
    reason: str | None = None


def start(
    connection: sa.Connection, database: Database, new: NewReplay, now: datetime
) -> ReplayRow:
    """Write a new replay and return it."""
    table = database.tables.replays
    identifier = connection.execute(
        table.insert()
        .values(
            projection=new.projection,
            build=new.build,
            phase=new.phase,
            request=to_text(new.request),
            plan=to_text(new.plan),
            progress=to_text(new.progress),
            reason=new.reason,
            created_at=now,
            updated_at=now,
        )
        .returning(table.c.id)
    ).scalar_one()
    return get(connection, database, identifier)


def get(connection: sa.Connection, database: Database, identifier: int) -> ReplayRow:
    """Return a replay, or raise NotFound."""
    table = database.tables.replays
    row = None
    if 0 < identifier < 2**63:
        query = sa.select(table).where(table.c.id == identifier)
        row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound("replay", identifier, "See: kappa-log replay --list")
    return _replay(row)


def of_build(
    connection: sa.Connection, database: Database, projection: str, number: int
) -> ReplayRow:
    """Return the replay that filled a build, or raise NotFound."""
    table = database.tables.replays
    row = connection.execute(
        sa.select(table)
        .where(table.c.projection == projection, table.c.build == number)
        .order_by(table.c.id.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        noun = f"replay of {projection} build"
        raise NotFound(noun, number)
    return _replay(row)


def diff_of(
    connection: sa.Connection, database: Database, old: Build, new: Build
) -> Diff | None:
    """Return the diff that a replay took of two builds, if it did."""
    try:
        row = of_build(connection, database, new.projection, new.number)
    except NotFound:
        return None
    taken = row.progress.get("diff")
    found = None if taken is None else msgspec.convert(taken, Diff)
    return found if found is not None and found.old_build == old.number else None


def listed(
    connection: sa.Connection,
    database: Database,
    *,
    projection: str | None = None,
    unfinished: bool = False,
    limit: int = 50,
) -> list[ReplayRow]:
    """Return replays, newest first."""
    table = database.tables.replays
    query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
    if projection is not None:
        query = query.where(table.c.projection == projection)
    if unfinished:
        query = query.where(table.c.outcome.is_(None))
    return [_replay(row) for row in connection.execute(query)]


def update(
    connection: sa.Connection,
    database: Database,
    identifier: int,
    *,
    now: datetime,
    **changes: Any,
) -> None:
    """Change a replay's phase, outcome, plan or progress."""
    table = database.tables.replays
    stored = {
        name: to_text(value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    result = connection.execute(
        table.update().where(table.c.id == identifier).values(updated_at=now, **stored)
    )
    if result.rowcount != 1:
        raise NotFound("replay", identifier)


def write_audit(
    connection: sa.Connection, database: Database, act: Audit, now: datetime
) -> None:
    """Add to the audit trail, in the transaction of the act itself."""
    connection.execute(
        database.tables.audit.insert().values(
            at=now,
            who=act.who,
            action=act.action,
            subject=act.subject,
            detail=to_text(act.detail),
            reason=act.reason,
        )
    )


def _replay(row: Any) -> ReplayRow:
    return ReplayRow(
        id=row.id,
        projection=row.projection,
        build=row.build,
        phase=row.phase,
        outcome=row.outcome,
        request=msgspec.json.decode(row.request),
        plan=msgspec.json.decode(row.plan),
        progress=msgspec.json.decode(row.progress),
        reason=row.reason,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
