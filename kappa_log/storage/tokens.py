"""Tokens: who may ask the API. Only their digests are kept."""

from __future__ import annotations

import hmac
from datetime import datetime
from hashlib import sha256
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import NotFound, UsageError
from kappa_log.storage.database import ConstraintViolated, Database

MAX_TOKENS = 1000
"""Most that are looked at; each request compares with all of them."""


class Token(msgspec.Struct, frozen=True):
    """A token as it is kept: all but its secret."""

    name: str
    role: str
    """read or operate."""
    created_at: datetime
    revoked_at: datetime | None


def keep(database: Database, name: str, role: str, secret: str, now: datetime) -> None:
    """Keep a new token's digest.

    Raises:
        UsageError: A token has the name, or had it: the audit trail knows it.
    """
    table = database.tables.tokens
    try:
        with database.write() as connection:
            connection.execute(
                table.insert().values(
                    name=name, role=role, digest=_digest(secret), created_at=now
                )
            )
    except ConstraintViolated:
        msg = f"there is or was a token '{name}'; choose another name"
        raise UsageError(msg) from None


def listed(connection: sa.Connection, database: Database) -> list[Token]:
    """Return all tokens, those that were revoked too."""
    table = database.tables.tokens
    query = sa.select(table).order_by(table.c.id).limit(MAX_TOKENS)
    return [_token(row) for row in connection.execute(query)]


def active(connection: sa.Connection, database: Database) -> int:
    """Return how many tokens open something."""
    table = database.tables.tokens
    query = sa.select(sa.func.count()).where(table.c.revoked_at.is_(None))
    return int(connection.scalar(query.select_from(table)) or 0)


def found_by(
    connection: sa.Connection, database: Database, secret: str
) -> Token | None:
    """Return the token with a secret; None if there is none, or it was revoked.

    All digests are compared, and each in constant time: how long it takes tells
    nothing.
    """
    table = database.tables.tokens
    query = sa.select(table).where(table.c.revoked_at.is_(None)).limit(MAX_TOKENS)
    wanted = _digest(secret)
    found = None
    for row in connection.execute(query):
        if hmac.compare_digest(bytes(row.digest), wanted):
            found = _token(row)
    return found


def revoke(
    connection: sa.Connection, database: Database, name: str, now: datetime
) -> None:
    """Let a token open nothing any more; its name stays known.

    Raises:
        NotFound: No such token, or it was revoked already.
    """
    table = database.tables.tokens
    result = connection.execute(
        table.update()
        .where(table.c.name == name, table.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    if result.rowcount != 1:
        raise NotFound("token", name, "See: kappa-log token list")


def _digest(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _token(row: Any) -> Token:
    return Token(row.name, row.role, row.created_at, row.revoked_at)
