"""Small logs to test on: made from plain objects, read back as plain rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kappa_log import FieldOptions, KappaLog, Projection
from kappa_log.config import load_config
from kappa_log.ingest import IngestReport

START = datetime(2024, 1, 1, tzinfo=UTC)

FIELDS = FieldOptions(entity_id="id", event_time="at", event_type="type")
"""Fields that `append` expects; an object may say null."""


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        """Begin at START."""
        self.now = START

    def __call__(self) -> datetime:
        """Return the time."""
        return self.now

    def move(self, minutes: float) -> None:
        """Go on; backwards too, as clocks of real machines do."""
        self.now += timedelta(minutes=minutes)


def open_log(
    url: str,
    folder: Path,
    *projections: Projection,
    clock: Any = None,
    batch_size: int = 2000,
) -> KappaLog:
    """Return a log over a database, whose tables are made if they are missing."""
    config = load_config(
        folder,
        {
            "database.url": url,
            "ingest.batch_size": batch_size,
            "projections.modules": [],
        },
    )
    more = {} if clock is None else {"clock": clock}
    app = KappaLog(config=config, projections=projections, **more)
    app.create_database()
    return app


def append(
    app: KappaLog,
    file: Path,
    objects: Iterable[dict[str, Any]],
    *,
    topic: str = "things",
    group: str | None = None,
) -> IngestReport:
    """Write objects to the end of a file of JSON lines and ingest what is new in it."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(
            json.dumps({"id": None, "at": None, "type": None} | found) + "\n"
            for found in objects
        )
    return app.ingest(file, topic=topic, group=group, fields=FIELDS)


def rows(app: KappaLog, name: str, build: int | None = None) -> list[dict[str, Any]]:
    """Return a projection's rows in key order."""
    return list(app.rows(name, build=build))


def tables(app: KappaLog) -> list[str]:
    """Return the names of all tables and views of a log's database, sorted."""
    found = sa.inspect(app.database.engine)
    return sorted([*found.get_table_names(), *found.get_view_names()])


def build_tables(app: KappaLog) -> list[str]:
    """Return the names of the tables of builds, sorted."""
    start = f"{app.database.prefix}build_"
    return [name for name in tables(app) if name.startswith(start)]


def execute(app: KappaLog, statement: str, **values: Any) -> int:
    """Run a statement behind the engine's back; return how many rows it changed."""
    with app.database.write() as connection:
        return connection.execute(sa.text(statement), values).rowcount


def set_bounds(
    *, page_events: int, flush_seconds: float, patch: Any = None, **others: Any
) -> None:
    """Make the engine read and write in small batches, in whatever modules count on it.

    Args:
        page_events: Positions a page; other bounds that go with it are about half.
        flush_seconds: How much folding a write waits for.
        patch: pytest's monkeypatch, to undo it after the test; None keeps it.
        others: Any other bound of the engine.
    """
    half = max(1, page_events // 2)
    wanted = {
        "PAGE_EVENTS": page_events,
        "PART_EVENTS": half,
        "MAX_NAMED": half,
        "FLUSH_SECONDS": flush_seconds,
    } | others
    ours = [module for name, module in sys.modules.items() if "kappa_log" in name]
    for name, value in wanted.items():
        holders = [module for module in ours if name in vars(module)]
        assert holders, f"no module of kappa_log has {name}"
        for module in holders:
            (setattr if patch is None else patch.setattr)(module, name, value)
