"""Lookup: which index SQLite takes, however common or rare what is asked for is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kappa_log import KappaLog
from kappa_log.storage import lookup
from kappa_log.storage.database import driver_connection
from kappa_log.storage.log import LogReader
from kappa_log.storage.pages import Chosen, Page
from support.logs import append


@pytest.fixture
def log(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KappaLog]:
    """Give a log of a common and a rare topic, type and entity; three are few."""
    monkeypatch.setattr(lookup, "RARE", 3)
    with KappaLog(sqlite_url) as app:
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


def found_by(app: KappaLog, look: Any) -> tuple[list[Any], str]:
    """Return what a look gives, and how SQLite found the events."""
    statements: list[str] = []
    with app.database.read() as connection:
        driver = driver_connection(connection)
        driver.set_trace_callback(statements.append)
    # It is the connection that is used next.
    found = look()
    driver.set_trace_callback(None)
    (query,) = (
        s for s in statements if "FROM kappa_log_events" in s and "payload" in s
    )
    (first, *_) = driver.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    return found, str(first[-1])


def _matches(event: Any, wanted: dict[str, Any]) -> bool:
    return all(
        getattr(event, name) in (value if isinstance(value, tuple) else (value,))
        for name, value in wanted.items()
    )


@pytest.mark.parametrize(
    ("wanted", "by_time", "by_position"),
    [
        ({}, "events_listed", "SCAN kappa_log_events"),
        ({"topic": "rare"}, "events_topic", "events_topic"),
        ({"topic": "common"}, "events_topic", "PRIMARY KEY (rowid<?)"),
        ({"event_type": "rare"}, "events_event_type", "events_event_type"),
        ({"event_type": "common"}, "events_event_type", "SCAN kappa_log_events"),
        ({"entity_id": "rare"}, "events_entity", "events_entity"),
        ({"entity_id": "common"}, "events_listed", "events_entity"),
        ({"topic": "common", "entity_id": "rare"}, "events_entity", "events_entity"),
        ({"topic": "rare", "entity_id": "common"}, "events_topic", "events_topic"),
        ({"topic": "rare", "event_type": "common"}, "events_topic", "events_topic"),
        (
            {"topic": "common", "event_type": "common"},
            "events_event_type",
            "PRIMARY KEY (rowid<?)",
        ),
        (
            {"topic": "common", "event_type": "rare"},
            "events_event_type",
            "events_event_type",
        ),
        ({"group_id": "file"}, "events_listed", "SCAN kappa_log_events"),
    ],
)
def test_the_rarest_leads_else_the_order(
    log: KappaLog, wanted: dict[str, Any], by_time: str, by_position: str
) -> None:
    """What is found is the same, and few rows are sorted, or none."""
    everything = log.events(oldest_first=True, limit=100)
    expected = [e.position for e in everything if _matches(e, wanted)]

    page = Page(limit=100)
    paged, plan = found_by(log, lambda: log.event_page(Chosen(equal=wanted), page))
    assert sorted(event.position for event in paged) == expected
    assert by_time in plan

    named = {"group" if n == "group_id" else n: v for n, v in wanted.items()}
    listed, plan = found_by(log, lambda: log.events(**named, limit=100))
    assert [event.position for event in listed] == expected[::-1]
    assert plan.endswith(by_position) or f"kappa_log_{by_position} " in plan


def test_any_of_several_values_are_looked_up_too(log: KappaLog) -> None:
    """They are as rare as all of them are."""
    page = Page(limit=100)
    for topics, kinds, index in (
        (("rare", "none"), ("common", "rare"), "events_topic"),
        (("rare", "common"), ("rare", "none"), "events_event_type"),
    ):
        wanted = {"topic": topics, "event_type": kinds}
        found, plan = found_by(
            log, lambda w=wanted: log.event_page(Chosen(equal=w), page)
        )
        assert index in plan
        assert {(event.topic, event.event_type) for event in found} <= {
            (topic, kind) for topic in topics for kind in kinds
        }
        assert len(found) == {"events_topic": 3, "events_event_type": 2}[index]


def test_the_newest_of_a_topic_of_the_past_are_read_from_its_end_on(
    log: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger knows where that is; all that came later is not read first."""
    monkeypatch.setattr(lookup, "RARE", 0)
    found, plan = found_by(log, lambda: log.events(topic="rare"))

    assert [event.position for event in found] == [3, 2, 1]
    assert plan.endswith("USING INTEGER PRIMARY KEY (rowid<?)")
    assert log.events(topic="none") == []


def test_projections_read_along_the_positions(log: KappaLog) -> None:
    """By a topic's index they would fetch, and sort, row by row what lies in order."""
    reader = LogReader(log.database, ["common"])

    _, plan = found_by(log, lambda: reader.raw(["position", "payload_text"], 0, 100))

    assert "USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)" in plan
