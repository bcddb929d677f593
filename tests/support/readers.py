"""Readers of the views, as users' own programs are: plain connections, no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import psycopg
import sqlalchemy as sa

from kappa_log.storage.database import sqlite_module


def connect(url: str) -> Any:
    """Return a driver's own connection in which each statement stands alone.

    Statements are not prepared: one prepared before a change of columns fails, which
    PostgreSQL does by itself and the README says.
    """
    if url.startswith("sqlite"):
        # The engine's own SQLite: closing a file by a second library drops our locks.
        path = sa.make_url(url).database
        return sqlite_module().connect(path, isolation_level=None, timeout=30)
    return psycopg.connect(
        url.replace("+psycopg", ""), autocommit=True, prepare_threshold=None
    )


class Reader:
    """A thread that reads a query's rows over and over and judges each answer."""

    def __init__(
        self, url: str, query: str, judge: Callable[[list[Any]], None]
    ) -> None:
        """Begin in `with`, which raises what the query or the judge raised."""
        self._url, self._query, self._judge = url, query, judge
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        self.answers = 0

    def __enter__(self) -> Self:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and raise what went wrong in the thread."""
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def wait_for(self, more: int) -> None:
        """Wait until it has had so many more answers, or has failed."""
        enough = self.answers + more
        while self.answers < enough and self._thread.is_alive():
            time.sleep(0.001)

    def _run(self) -> None:
        connection = connect(self._url)
        try:
            while not self._stop.is_set():
                self._judge(connection.execute(self._query).fetchall())
                self.answers += 1
        except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
            self._error = error
        finally:
            connection.close()
