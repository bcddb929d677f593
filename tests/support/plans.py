"""What a database is asked, and by which index it would find the answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.storage.database import driver_connection


@contextmanager
def asked(app: KappaLog) -> Iterator[list[tuple[str, Any]]]:
    """Give each statement, with its values, that the database gets meanwhile."""
    found: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, values: Any, *___: Any) -> None:
        found.append((statement, values))

    sa.event.listen(app.database.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(app.database.engine, "before_cursor_execute", note)


def plan_of(app: KappaLog, query: str, values: Any) -> str:
    """Return how the database would answer a query, a line a step."""
    with app.database.read() as connection:
        driver = driver_connection(connection)
        if app.database.is_sqlite:
            steps = driver.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall()
            return "\n".join(str(step[-1]) for step in steps)
        # So few rows are read faster than any index.
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        steps = driver.execute(f"EXPLAIN {query}", values).fetchall()
        return "\n".join(line for (line,) in steps)


def is_sorted(plan: str) -> bool:
    """Tell whether rows are sorted in it, not read in the order that is wanted."""
    return "Sort" in plan or "TEMP B-TREE" in plan
