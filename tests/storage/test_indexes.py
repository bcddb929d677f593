"""Indexes: what people and the engine look up is found without reading the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.storage.pages import Chosen, Page
from support.kinds import on_both
from support.poison import Poisoned

BOOM = {"do": "raise", "n": 1}


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


def plans(app: KappaLog, statements: list[tuple[str, Any]], table: str) -> list[str]:
    """Return how the database would answer each query of a table."""
    explain = "EXPLAIN QUERY PLAN" if app.database.is_sqlite else "EXPLAIN"
    found = []
    with app.database.read() as connection:
        if not app.database.is_sqlite:
            # So few rows are read faster than any index.
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, values in statements:
            if statement.startswith("SELECT") and f"FROM {table}" in statement:
                plan = connection.exec_driver_sql(f"{explain} {statement}", values)
                found.append("\n".join(str(row) for row in plan))
    return found


@pytest.fixture
def orders(url: str, tmp_path: Path) -> Iterator[Poisoned]:
    """Give a log with events of several entities, and some failures."""
    with Poisoned(url, tmp_path) as found:
        found.read(*((f"k{n}", {"n": n % 7}) for n in range(50)), ("bad", BOOM))
        yield found


@on_both
def test_lists_are_read_from_an_index_of_their_own(orders: Poisoned) -> None:
    """SEED D3: of an entity, by event time, of failures; none is sorted first."""
    app = orders.app
    page = Page(limit=5)

    def paged(**values: Any) -> list[Any]:
        return list(app.event_page(Chosen(equal=values), page))

    for index, table, look in (
        ("events_entity", "events", lambda: app.events(entity_id="3", limit=5)),
        ("events_listed", "events", paged),
        ("events_topic", "events", lambda: paged(topic="orders")),
        ("events_event_type", "events", lambda: paged(event_type="order")),
        ("failures_listed", "failures", lambda: app.failure_page(Chosen(), page)),
    ):
        with asked(app) as statements:
            look()
        found = plans(app, statements, f"kappa_log_{table}")
        assert found
        for plan in found:
            assert f"kappa_log_{index}" in plan
            assert (
                index != "events_entity" or "entity_id" in plan
            )  # By it, not past it.
            assert "Sort" not in plan
            assert "TEMP B-TREE" not in plan
