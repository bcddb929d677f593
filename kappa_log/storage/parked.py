"""Parked keys in SQL: which keys of a build are not folded on, since where, and why.

They are written in the transactions that write rows and cursor, so the row of a parked
key is always the fold of its events below its park position.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import date, datetime
from hashlib import blake2b
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.events import Position
from kappa_log.fold import Parked
from kappa_log.keys import KeyShape, key_shape_of
from kappa_log.storage.builds import Build
from kappa_log.storage.database import Database

_CHUNK = 5_000


class ParkedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key whose fold raised: its row stands before that event, others go on."""

    key: str
    """As it is typed; parts are joined by ``/``."""
    position: Position
    """Of its first event that is not folded."""
    error_class: str
    error_message: str
    error_backtrace: list[str]
    fingerprint: str
    """The same for errors of one class from one place."""
    attempts: int
    first_at: datetime
    last_at: datetime
    waiting: int | None = None
    """Events up to the cursor that wait, the failing one included; None if they
    cannot be counted by an index, and there are too many to read."""


class Stand(msgspec.Struct, frozen=True):
    """What decides whether a parked key is still as it was found."""

    position: Position
    attempts: int


def positions(
    connection: sa.Connection, database: Database, build: Build
) -> dict[Any, Position]:
    """Return key → park position of all parked keys of a build."""
    found = stands(connection, database, build)
    return {key: stand.position for key, stand in found.items()}


def stands(
    connection: sa.Connection, database: Database, build: Build
) -> dict[Any, Stand]:
    """Return key → where it stands, of all parked keys of a build, in log order."""
    table, read = database.tables.parked_keys, _reader(build)
    rows = connection.execute(
        sa.select(table.c.key, table.c.position, table.c.attempts)
        .where(table.c.build_id == build.id)
        .order_by(table.c.position, table.c.key_id)
    )
    return {read(row.key): Stand(row.position, row.attempts) for row in rows}


def count(connection: sa.Connection, database: Database, build: Build) -> int:
    """Return how many keys of a build are parked."""
    table = database.tables.parked_keys
    query = sa.select(sa.func.count()).where(table.c.build_id == build.id)
    return connection.scalar(query) or 0


def listed(
    connection: sa.Connection,
    database: Database,
    build: Build,
    *,
    key: Any = None,
    limit: int | None = None,
    offset: int = 0,
) -> list[tuple[Any, ParkedKey]]:
    """Return parked keys, typed and as people look at them, in log order.

    Args:
        connection: Open transaction.
        database: The log.
        build: Whose.
        key: This one alone.
        limit: Most to return.
        offset: How many to pass over.
    """
    table, read, shape = database.tables.parked_keys, _reader(build), _shape(build)
    query = (
        sa.select(table)
        .where(table.c.build_id == build.id)
        .order_by(table.c.position, table.c.key_id)
        .offset(offset)
        .limit(limit)
    )
    if key is not None:
        query = query.where(table.c.key_id == _key_id(key_text(build, key)))
    found = []
    for row in connection.execute(query):
        typed = read(row.key)
        seen = ParkedKey(
            key=shape.text(typed),
            position=row.position,
            error_class=row.error_class,
            error_message=row.error_message,
            error_backtrace=json.loads(row.error_backtrace),
            fingerprint=row.fingerprint,
            attempts=row.attempts,
            first_at=row.first_at,
            last_at=row.last_at,
        )
        found.append((typed, seen))
    return found


def park(
    connection: sa.Connection,
    database: Database,
    build: Build,
    new: Mapping[Any, Parked],
    now: datetime,
) -> None:
    """Keep keys that were parked just now."""
    if not new:
        return
    rows = []
    for key, parked in new.items():
        text = key_text(build, key)
        row = {
            "build_id": build.id,
            "key_id": _key_id(text),
            "key": text,
            "position": parked.position,
            "attempts": 1,
            "first_at": now,
            "last_at": now,
        }
        rows.append(row | parked.error._asdict())
    connection.execute(database.tables.parked_keys.insert(), rows)


def failed_again(
    connection: sa.Connection,
    database: Database,
    build: Build,
    failed: Mapping[Any, Parked],
    now: datetime,
) -> None:
    """Keep where keys that were retried stand now, and the error of this attempt."""
    table = database.tables.parked_keys
    for key, parked in failed.items():
        connection.execute(
            table.update()
            .where(
                table.c.build_id == build.id,
                table.c.key_id == _key_id(key_text(build, key)),
            )
            .values(
                position=parked.position,
                attempts=table.c.attempts + 1,
                last_at=now,
                **parked.error._asdict(),
            )
        )


def release(
    connection: sa.Connection, database: Database, build: Build, keys: Collection[Any]
) -> None:
    """Forget that keys were parked."""
    table = database.tables.parked_keys
    ids = [_key_id(key_text(build, key)) for key in keys]
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        connection.execute(
            table.delete().where(
                table.c.build_id == build.id, table.c.key_id.in_(chunk)
            )
        )


def key_text(build: Build, key: Any) -> str:
    """Return a key as the JSON text that a column of ours keeps."""
    return json.dumps([_plain(part) for part in _shape(build).values(key)])


def keys_of(build: Build, texts: Collection[str]) -> list[Any]:
    """Return the keys of a build that such texts say."""
    return list(map(_reader(build), texts))


def _plain(part: Any) -> Any:
    match part:
        case bytes():
            return part.hex()
        case date():
            return part.isoformat()
        case _:
            return part


def _reader(build: Build) -> Any:
    shape = _shape(build)
    reads = [_READ.get(column.kind) for column in build.layout.keys]

    def read(text: str) -> Any:
        parts = json.loads(text)
        return shape.build(
            part if how is None else how(part)
            for how, part in zip(reads, parts, strict=True)
        )

    return read


_READ: dict[str, Any] = {"bytes": bytes.fromhex, "date": date.fromisoformat}


def _shape(build: Build) -> KeyShape:
    return key_shape_of([column.kind for column in build.layout.keys])


def _key_id(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
