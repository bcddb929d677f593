"""Requests that must not be done twice: what was asked by which key, and the answer."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec
import sqlalchemy as sa

from kappa_log.storage.database import ConstraintViolated, Database

KEPT = timedelta(hours=24)
"""How long an answer is given again."""


class Answer(msgspec.Struct, frozen=True):
    """An answer as it was sent."""

    status: int
    body: str
    headers: dict[str, str]


class Asked(msgspec.Struct, frozen=True):
    """A request that was made with the same key before."""

    digest: bytes
    answer: Answer | None
    """None while it is worked on."""


def begin(
    database: Database, who: str, key: str, digest: bytes, now: datetime
) -> Asked | None:
    """Note a request; return the one that was made before with its key, if any.

    The primary key decides between two that come at once.
    """
    table = database.tables.requests
    try:
        with database.write() as connection:
            connection.execute(sa.delete(table).where(table.c.at < now - KEPT))
            connection.execute(
                table.insert().values(who=who, key=key, digest=digest, at=now)
            )
    except ConstraintViolated:
        with database.read() as connection:
            row = connection.execute(
                sa.select(table).where(table.c.who == who, table.c.key == key)
            ).one_or_none()
        if row is None:
            return begin(database, who, key, digest, now)
        answer = row.answer and msgspec.json.decode(row.answer, type=Answer)
        return Asked(bytes(row.digest), answer or None)
    return None


def finish(database: Database, who: str, key: str, answer: Answer | None) -> None:
    """Keep the answer of a request; None lets it be made again."""
    table = database.tables.requests
    found = sa.and_(table.c.who == who, table.c.key == key)
    with database.write() as connection:
        if answer is None:
            connection.execute(sa.delete(table).where(found))
        else:
            text = msgspec.json.encode(answer).decode()
            connection.execute(table.update().where(found).values(answer=text))
