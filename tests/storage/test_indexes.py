"""Indexes: what people and the engine look up is found without reading the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kappa_log import KappaLog
from kappa_log.storage.pages import Chosen, Page
from support.kinds import on_both
from support.plans import asked, is_sorted, plan_of
from support.poison import Poisoned

BOOM = {"do": "raise", "n": 1}


def plans(app: KappaLog, statements: list[tuple[str, Any]], table: str) -> list[str]:
    """Return how the database would answer each query of a table."""
    return [
        plan_of(app, statement, values)
        for statement, values in statements
        if statement.startswith("SELECT") and f"FROM {table}" in statement
    ]


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
        ("failures_listed", "failures", lambda: app.failure_page(Chosen(), page)),
    ):
        with asked(app) as statements:
            assert look()
        found = plans(app, statements, f"kappa_log_{table}")
        assert found
        for plan in found:
            assert f"kappa_log_{index}" in plan
            assert (
                index != "events_entity" or "entity_id" in plan
            )  # By it, not past it.
            assert not is_sorted(plan)
