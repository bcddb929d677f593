"""Effects: SQL that a handler runs in the very transaction that keeps its record.

The transaction opens when a handler first asks for `metadata.connection`, and commits
with the batch. Each record has a savepoint of its own: what a handler wrote goes when
its record fails, also if it swallowed the database's error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from kappa_log.errors import StorageError, UsageError
from kappa_log.storage.database import ConstraintViolated, Database

_OURS = frozenset(
    {
        "begin", "begin_nested", "begin_twophase", "close", "commit", "commit_prepared",
        "connection", "detach", "engine", "execution_options", "get_nested_transaction",
        "get_transaction", "invalidate", "rollback", "rollback_prepared",
    }
)  # fmt: skip
"""What would end or change a transaction that is not the handler's."""

_NO_CODE = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$""",
    re.DOTALL,
)
"""Parts of a statement in which words are no commands."""

_ENDING = re.compile(
    r"(?:^|;)\s*(?:abort|begin|commit|end|start\s+transaction|prepare\s+transaction"
    r"|rollback(?!\s+(?:work\s+|transaction\s+)?to\b))\b",
    re.IGNORECASE,
)
"""Statements that end a transaction; a savepoint of the handler's own is none."""

_PASSING_STATES = ("08", "40001", "40P01", "53100", "55P03", "57P01", "57P02", "57P03")
_PASSING_WORDS = ("database is locked", "disk is full", "disk i/o error")


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
        """The first error that the database raised, told on or swallowed."""
        self.is_over = False
        """Whether its record is decided."""

    def __getattr__(self, name: str) -> Any:
        """Return what SQLAlchemy's connection has, errors noted."""
        if name in _OURS:
            msg = (
                f"metadata.connection.{name} is not for handlers: the transaction is "
                "the batch's, and ends with it"
            )
            raise UsageError(msg)
        if self.is_over:
            msg = (
                "metadata.connection was of a record that is decided; each record's "
                "metadata has its own"
            )
            raise UsageError(msg)
        found = getattr(self._connection, name)
        return self._noting(found) if callable(found) else found

    def _noting(self, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except sa.exc.SQLAlchemyError as error:
                self.error = self.error or error
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
        self._denied: Exception | None = None
        """Why the record at hand asked in vain."""
        self._is_over = False

    @property
    def is_used(self) -> bool:
        """Tell whether a handler asked for the connection."""
        return self._connection is not None

    def connection(self) -> HandlerConnection:
        """Return the connection for the record at hand."""
        if self._is_over:
            msg = "metadata.connection: the transaction of this record has ended"
            raise UsageError(msg)
        try:
            return self._handed or self._hand()
        except (StorageError, UsageError) as error:
            self._denied = error
            raise

    def _hand(self) -> HandlerConnection:
        if self._refused is not None:
            msg = f"metadata.connection: {self._refused}"
            raise UsageError(msg)
        if self._connection is None:
            self._open = self.database.write()
            self._connection = self._open.__enter__()
            sa.event.listen(self._connection, "before_cursor_execute", self._check)
        with self.database.translating():
            self._savepoint = self._connection.begin_nested()
        self._handed = HandlerConnection(self._connection)
        return self._handed

    def _check(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        """Refuse a handler's statement that would end the transaction of the batch."""
        if self._handed is None:
            return
        if _ENDING.search(_NO_CODE.sub(" ", statement)):
            msg = (
                f"metadata.connection: {statement[:40]!r} is not for handlers: the "
                "transaction is the batch's, and ends with it"
            )
            raise UsageError(msg)

    def end_of_record(self, *, keep: bool) -> Exception | None:
        """Keep or undo what the record's handler wrote.

        Returns:
            Why nothing is kept, if the database or we refused what the handler asked.

        Raises:
            StorageError: The database is away or busy; no record is to blame.
            TransactionDied: The handler ended the transaction of the batch.
        """
        handed, savepoint = self._handed, self._savepoint
        denied, self._denied = self._denied, None
        self._handed = self._savepoint = None
        if handed is None or savepoint is None:
            self._raise_what_passes(denied)
            return denied
        handed.is_over = True
        self._raise_what_passes(handed.error)
        try:
            if keep and handed.error is None:
                savepoint.commit()
            else:
                savepoint.rollback()
        except sa.exc.SQLAlchemyError as error:
            self._raise_what_passes(error)
            msg = f"the transaction ended while a handler had it: {error}"
            raise TransactionDied(msg) from error
        return handed.error

    def _raise_what_passes(self, error: Exception | None) -> None:
        """Raise an error that another try may not meet, as an error of ours."""
        if error is not None and _passes(error):
            with self.database.translating():
                raise error

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Open the transaction that the batch commits in, or go on with it."""
        if self._open is None or self._connection is None:
            with self.database.write() as connection:
                yield connection
            return
        with self.database.translating():
            yield self._connection
        opened, self._open = self._open, None
        try:
            opened.__exit__(None, None, None)
        except ConstraintViolated as error:
            # Ours are checked at each statement: this one was deferred by a handler.
            msg = f"the database refused to commit what handlers wrote: {error}"
            raise TransactionDied(msg) from error

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
        self._is_over = True
        opened, self._open = self._open, None
        if opened is None or self._connection is None:
            return
        # A connection that cannot roll back any more goes, and the work with it.
        with contextlib.suppress(StorageError):
            opened.__exit__(_Abandoned, _Abandoned(), None)


def _passes(error: Exception) -> bool:
    """Tell whether an error is of the database's state, not of what it was asked."""
    if isinstance(error, StorageError):
        return error.retryable
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None) or ""
    return (
        error.connection_invalidated
        or state.startswith(_PASSING_STATES)
        or any(word in str(error.orig).lower() for word in _PASSING_WORDS)
    )
