"""Effects: SQL that a handler runs in the very transaction that keeps its record.

The transaction opens when a handler first asks for `metadata.connection`, and commits
with the batch. Each record has a savepoint of its own: what a handler wrote goes when
its record fails, also if it swallowed the database's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from kappa_log.errors import UsageError
from kappa_log.storage.database import Database

_OURS = frozenset(
    {
        "begin", "begin_nested", "begin_twophase", "close", "commit", "detach",
        "engine", "execution_options", "get_transaction", "invalidate", "rollback",
    }
)  # fmt: skip
"""What would end or change a transaction that is not the handler's."""


class TransactionDied(Exception):
    """A handler's work ended the transaction of its whole batch."""


class _Abandoned(Exception):
    """The transaction is rolled back, with no error to tell."""


class HandlerConnection:
    """The connection as a handler has it: it runs statements and ends nothing.

    All of SQLAlchemy's `Connection` is there but what begins or ends transactions.
    """

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self.error: Exception | None = None
        """The last error that the database raised, told on or swallowed."""

    def __getattr__(self, name: str) -> Any:
        """Return what SQLAlchemy's connection has, errors noted."""
        if name in _OURS:
            msg = (
                f"metadata.connection.{name} is not for handlers: the transaction is "
                "the batch's, and ends with it"
            )
            raise UsageError(msg)
        found = getattr(self._connection, name)
        return self._noting(found) if callable(found) else found

    def _noting(self, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except sa.exc.SQLAlchemyError as error:
                self.error = error
                raise

        return noted


class Effects:
    """The one transaction of a batch, opened early if a handler asks for it.

    Use as a context: at its end, what was not committed rolls back.

    Args:
        database: The log.
        refused: Why no handler gets the connection.
    """

    def __init__(
        self, database: Database, *, refused: TransactionDied | None = None
    ) -> None:
        self.database = database
        self._refused = refused
        self._open: AbstractContextManager[sa.Connection] | None = None
        self._connection: sa.Connection | None = None
        self._handed: HandlerConnection | None = None
        self._savepoint: sa.NestedTransaction | None = None

    @property
    def is_used(self) -> bool:
        """Tell whether a handler asked for the connection."""
        return self._connection is not None

    def connection(self) -> HandlerConnection:
        """Return the connection for the record at hand."""
        if self._refused is not None:
            msg = f"metadata.connection: {self._refused}"
            raise UsageError(msg)
        if self._connection is None:
            self._open = self.database.write()
            self._connection = self._open.__enter__()
        if self._handed is None:
            with self.database.translating():
                self._savepoint = self._connection.begin_nested()
            self._handed = HandlerConnection(self._connection)
        return self._handed

    def end_of_record(self, *, keep: bool) -> Exception | None:
        """Keep or undo what the record's handler wrote.

        Returns:
            The database's error, if the handler met one: then nothing is kept.
        """
        handed, savepoint = self._handed, self._savepoint
        if handed is None or savepoint is None:
            return None
        self._handed = self._savepoint = None
        try:
            if keep and handed.error is None:
                savepoint.commit()
            else:
                savepoint.rollback()
        except sa.exc.SQLAlchemyError as error:
            msg = f"the transaction ended while a handler had it: {error}"
            raise TransactionDied(msg) from error
        return handed.error

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Open the transaction that the batch commits in, or go on with it."""
        if self._open is None or self._connection is None:
            with self.database.write() as connection:
                yield connection
            return
        yield self._connection
        opened, self._open = self._open, None
        opened.__exit__(None, None, None)

    def __enter__(self) -> Self:
        """Return itself; nothing is open yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Roll back what was not committed."""
        opened, self._open = self._open, None
        if opened is None or self._connection is None:
            return
        try:
            opened.__exit__(_Abandoned, _Abandoned(), None)
        except sa.exc.SQLAlchemyError:
            # What a handler broke is not given back to the pool.
            self._connection.invalidate()
