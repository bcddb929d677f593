"""Database: engine, transactions, locks, and the border where drivers' errors end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from kappa_log.errors import (
    AlreadyRunning,
    ConfigError,
    DatabaseBusy,
    DatabaseUnavailable,
    StorageError,
)
from kappa_log.storage.schema import Tables

BUSY_SECONDS = 30
"""How long a writer waits for another before it gives up with DatabaseBusy."""

POOL_SIZE = 20
"""Most connections at once, where nobody says how many."""

MAX_PREFIX = 10
"""Longest table prefix; with it a build's name still fits 63 bytes."""


class DatabaseMissing(StorageError):
    """The server has no database of that name; nothing was changed."""


class ConstraintViolated(StorageError):
    """A unique or check constraint refused the transaction; it was rolled back."""


class Database:
    """One log's database.

    Args:
        url: SQLAlchemy URL of a SQLite file or a PostgreSQL database.
        prefix: First part of the name of each table.
        pool_size: Most connections at once. They are opened as they are needed.

    Raises:
        ConfigError: The URL is of no database that can hold a log.
    """

    def __init__(
        self, url: str, prefix: str = "kappa_log_", pool_size: int = POOL_SIZE
    ) -> None:
        self.url = _checked(url)
        self.prefix = _checked_prefix(prefix)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.tables = Tables(prefix, is_sqlite=self.is_sqlite)
        self.pool_size = pool_size
        create = _sqlite if self.is_sqlite else _postgresql
        self.engine = create(self.url, pool_size)
        dbapi = self.engine.dialect.dbapi
        self.driver_errors: tuple[type[Exception], ...] = (
            exc.SQLAlchemyError,
            dbapi.Error,  # type: ignore[union-attr]
        )

    @property
    def path(self) -> Path | None:
        """The SQLite file; None on PostgreSQL."""
        return Path(self.url.database or "") if self.is_sqlite else None

    @property
    def label(self) -> str:
        """The URL without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    def exists(self) -> bool:
        """Tell whether a SQLite file is there; PostgreSQL is asked by connecting."""
        return self.path is None or self.path.exists()

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one snapshot and writes nothing."""
        with self.translating(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self, *, snapshot: bool = False) -> Iterator[sa.Connection]:
        """Open a transaction that commits at the end of the block, or not at all.

        Args:
            snapshot: See one state of the database throughout. SQLite always does.
        """
        with self.translating(), self.engine.connect() as connection:
            connection.info["immediate"] = True
            if snapshot and not self.is_sqlite:
                connection.execution_options(isolation_level="REPEATABLE READ")
            try:
                with connection.begin():
                    yield connection
            finally:
                connection.info.pop("immediate", None)

    @contextlib.contextmanager
    def lock(self, name: str, held: str) -> Iterator[None]:
        """Hold a named lock that dies with this process.

        Args:
            name: What is locked.
            held: Message of the error when another process holds it.

        Raises:
            AlreadyRunning: Another process holds it.
        """
        locking = (
            self._file_lock(name, held)
            if self.is_sqlite
            else self._session_lock(name, held)
        )
        with locking:
            yield

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _file_lock(self, name: str, held: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.path}.{self.prefix}{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise AlreadyRunning(held) from None
        except OSError as error:
            msg = f"lock file {lock.lock_file} cannot be used: {error.strerror}"
            raise StorageError(msg) from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _session_lock(self, name: str, held: str) -> Iterator[None]:
        key = blake2b(f"{self.prefix}{name}".encode(), digest_size=8).digest()
        number = int.from_bytes(key, "little", signed=True)
        with self.translating(), self.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            taken = connection.scalar(sa.select(sa.func.pg_try_advisory_lock(number)))
            if not taken:
                raise AlreadyRunning(held)
            try:
                yield
            finally:
                with contextlib.suppress(*self.driver_errors):
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(number)))

    @contextlib.contextmanager
    def translating(self) -> Iterator[None]:
        """Turn the driver's errors into ours."""
        try:
            yield
        except self.driver_errors as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> StorageError:
        if isinstance(error, exc.TimeoutError):
            msg = (
                f"all {self.pool_size} connections of this process to {self.label} "
                f"were in use for {BUSY_SECONDS} s; nothing was changed; allow more by "
                "database.pool_size"
            )
            return DatabaseBusy(msg)
        origin = getattr(error, "orig", None) or error
        text = " ".join(str(origin).split()) or type(origin).__name__
        state = getattr(origin, "sqlstate", None) or ""
        # The driver's own errors come unwrapped from bulk work: their class is a
        # subclass of IntegrityError there, and its name tells nothing.
        integrity = self.engine.dialect.dbapi.IntegrityError  # type: ignore[union-attr]
        if isinstance(origin, integrity) or state.startswith("23"):
            return ConstraintViolated(text)
        for states, words, kind, message in _TRANSLATIONS:
            if state in states or any(word in text.lower() for word in words):
                return kind(message.format(database=self.label, text=text))
        return StorageError(f"database {self.label}: {text}")


_TRANSLATIONS: tuple[
    tuple[tuple[str, ...], tuple[str, ...], type[StorageError], str], ...
] = (
    (
        ("55P03", "40P01", "40001"),
        ("database is locked", "database table is locked"),
        DatabaseBusy,
        (
            "the database {database} is held by another process ({text}); nothing of "
            "this transaction was kept; try again later"
        ),
    ),
    (
        ("53100",),
        ("disk is full",),
        DatabaseUnavailable,
        (
            "the disk of {database} is full ({text}); nothing of this transaction was "
            "kept; free some space and run the command again"
        ),
    ),
    (
        ("3D000",),
        ('fatal: database "',),
        DatabaseMissing,
        "the database {database} does not exist; run: kappa-log db create",
    ),
    (
        ("53300",),
        ("too many clients", "remaining connection slots", "too many connections"),
        DatabaseBusy,
        (
            "the server of {database} has no connection left ({text}); nothing was "
            "changed; it allows max_connections, this process database.pool_size"
        ),
    ),
    (
        ("57P01", "57P02", "57P03", "08000", "08003", "08006"),
        ("connection", "unable to open", "disk i/o error", "readonly database"),
        DatabaseUnavailable,
        (
            "the database {database} cannot be used: {text}. What was committed is "
            "kept; run the command again when it is back"
        ),
    ),
)
"""SQL states or words of the driver → error and its message; the first match counts."""


def driver_connection(connection: sa.Connection) -> Any:
    """Return the driver's own connection, for bulk work and binary reads."""
    return connection.connection.driver_connection


def _checked(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        msg = (
            f"database url {url!r} is no URL; use sqlite:///FILE or "
            "postgresql+psycopg://USER@HOST/NAME"
        )
        raise ConfigError(msg) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        msg = f"database url: {backend} is not supported; use sqlite or postgresql"
        raise ConfigError(msg)
    if parsed.database in (None, "", ":memory:"):
        msg = "database url: a log needs a file, for instance sqlite:///kappa_log.db"
        raise ConfigError(msg)
    return parsed


def _checked_prefix(prefix: str) -> str:
    if not (prefix.isidentifier() and prefix.isascii() and prefix == prefix.lower()):
        msg = f"database prefix {prefix!r} is no lower-case ASCII identifier"
        raise ConfigError(msg)
    if len(prefix) > MAX_PREFIX:
        msg = f"database prefix {prefix!r} is longer than {MAX_PREFIX} characters"
        raise ConfigError(msg)
    return prefix


def sqlite_module() -> Any:
    """Return the SQLite driver: pysqlite3's newer SQLite where it is installed.

    The standard library's SQLite 3.40 has a WAL bug that can lose commits. Only one
    of the two may ever open a log's file in one process: closing it drops the other's
    locks.
    """
    try:
        from pysqlite3 import dbapi2
    except ImportError:
        from sqlite3 import dbapi2
    return dbapi2


def _engine(url: sa.URL, pool_size: int, **options: Any) -> sa.Engine:
    """Make an engine whose connections are counted; the last used is used next."""
    return sa.create_engine(
        url,
        poolclass=sa.pool.QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=BUSY_SECONDS,
        pool_use_lifo=True,
        **options,
    )


def _sqlite(url: sa.URL, pool_size: int) -> sa.Engine:
    engine = _engine(
        url,
        pool_size,
        module=sqlite_module(),
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA cache_size = -65536")
        # 64 MB of pages at once, not 4: in a log of 9 million events, whose identities
        # change pages everywhere, an ingest is a tenth faster.
        cursor.execute("PRAGMA wal_autocheckpoint = 16384")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # Deferred would take the write lock at the first write, and fail at once
        # when another process wrote since the first read.
        immediate = connection.info.get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _postgresql(url: sa.URL, pool_size: int) -> sa.Engine:
    engine = _engine(url, pool_size, pool_pre_ping=True)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'UTC'")
            cursor.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
        connection.commit()

    return engine
