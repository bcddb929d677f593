"""Lookup: which index is taken, however common or rare what is asked for is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kappa_log import KappaLog
from kappa_log.storage import lookup
from kappa_log.storage.log import LogReader
from kappa_log.storage.pages import Chosen, Page
from support.logs import append
from support.plans import asked, is_sorted, plan_of

TABLE = "kappa_log_events"

PAGE = Page(limit=100)


@pytest.fixture
def log(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KappaLog]:
    """Give a log of a common and a rare topic, type and entity; three are few."""
    monkeypatch.setattr(lookup, "RARE", 3)
    with KappaLog(database_url) as app:
        app.create_database()
        for topic, events in (("rare", 3), ("common", 20)):
            made = [
                {
                    "n": n,
                    "id": "rare" if n == 1 else "common",
                    "type": "rare" if n == 2 else "common",
                    "at": f"2026-01-{1 + n % 7:02d}T00:00:00Z",
                }
                for n in range(events)
            ]
            append(app, tmp_path / f"{topic}.jsonl", made, topic=topic)
        yield app


def found_by(app: KappaLog, look: Callable[[], list[Any]]) -> tuple[list[Any], str]:
    """Return what a look gives, and how the database found the events."""
    found, query = queried(app, look)
    return found, plan_of(app, *query)


def queried(
    app: KappaLog, look: Callable[[], list[Any]]
) -> tuple[list[Any], tuple[str, Any]]:
    """Return what a look gives, and its query of events with the values in it."""
    with asked(app) as statements:
        found = look()
    (query,) = (
        (statement, values)
        for statement, values in statements
        if f"FROM {TABLE}" in statement and "payload" in statement
    )
    return found, query


def _matches(event: Any, wanted: dict[str, Any]) -> bool:
    return all(getattr(event, name) == value for name, value in wanted.items())


@pytest.mark.parametrize(
    ("wanted", "by_time", "by_position"),
    [
        ({}, "listed", None),
        ({"topic": "rare"}, "topic", "topic"),
        ({"topic": "common"}, "topic", None),
        ({"event_type": "rare"}, "event_type", "event_type"),
        ({"event_type": "common"}, "event_type", None),
        ({"entity_id": "rare"}, "entity", "entity"),
        ({"entity_id": "common"}, "listed", "entity"),
        ({"topic": "common", "entity_id": "rare"}, "entity", "entity"),
        ({"topic": "rare", "entity_id": "common"}, "topic", "topic"),
        ({"topic": "rare", "event_type": "common"}, "topic", "topic"),
        ({"topic": "common", "event_type": "common"}, "event_type", None),
        ({"topic": "common", "event_type": "rare"}, "event_type", "event_type"),
    ],
)
def test_the_rarest_leads_else_the_order(
    log: KappaLog, wanted: dict[str, Any], by_time: str, by_position: str | None
) -> None:
    """What is found is the same, and few rows are sorted, or none."""
    everything = log.events(oldest_first=True, limit=100)
    expected = [e.position for e in everything if _matches(e, wanted)]

    paged, plan = found_by(log, lambda: log.event_page(Chosen(equal=wanted), PAGE))
    assert sorted(event.position for event in paged) == expected
    assert _is_by_index(plan, by_time), plan

    listed, plan = found_by(log, lambda: log.events(**wanted, limit=100))
    assert [event.position for event in listed] == expected[::-1]
    if by_position is not None:
        assert _is_by_index(plan, by_position), plan
    else:
        assert _is_by_position(log, plan), plan


def _is_by_index(plan: str, index: str) -> bool:
    return re.search(rf"{TABLE}_{index}\b", plan) is not None


def _is_by_position(app: KappaLog, plan: str) -> bool:
    if app.database.is_sqlite:
        return plan == f"SCAN {TABLE}" or "USING INTEGER PRIMARY KEY" in plan
    return _is_by_index(plan, "pkey")


def test_neither_a_topic_nor_a_type_is_sorted_first(log: KappaLog) -> None:
    """Their indexes have the order of the list, each in its own part."""
    for wanted in ({"topic": "common"}, {"event_type": "common"}):
        chosen = Chosen(equal=wanted)
        found, plan = found_by(log, partial(log.event_page, chosen, PAGE))
        assert len(found) >= 20
        assert not is_sorted(plan), plan


def test_any_of_several_values_are_looked_up_too(log: KappaLog) -> None:
    """They are as rare as all of them are."""
    for topics, kinds, index, number in (
        (("rare", "none"), ("common", "rare"), "topic", 3),
        (("rare", "common"), ("rare", "none"), "event_type", 2),
    ):
        chosen = Chosen(equal={"topic": topics, "event_type": kinds})
        found, plan = found_by(log, partial(log.event_page, chosen, PAGE))
        assert _is_by_index(plan, index), plan
        assert len(found) == number
        assert all(e.topic in topics and e.event_type in kinds for e in found)


def test_the_newest_of_a_topic_of_the_past_are_read_from_its_end_on(
    log: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger knows where that is; all that came later is not read first."""
    monkeypatch.setattr(lookup, "RARE", 0)

    found, (query, values) = queried(log, lambda: log.events(topic="rare"))

    assert [event.position for event in found] == [3, 2, 1]
    assert _is_by_position(log, plan_of(log, query, values))
    assert 3 in (values if log.database.is_sqlite else values.values())
    assert log.events(topic="none") == []


def test_projections_read_along_the_positions(log: KappaLog) -> None:
    """By a topic's index all events of the topic would be looked at for each page."""
    reader = LogReader(log.database, ["common"])

    plan = plan_of(log, *reader.query("position, payload", 0, 10))

    assert _is_by_position(log, plan), plan
    assert "rowid>? AND rowid<?" in plan or "Index Cond: ((" in plan
