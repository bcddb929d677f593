"""A database of Phobos DB Checkpoint, made as its migrations made it (SEED §4)."""

from __future__ import annotations

import json
from hashlib import md5
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kappa_log.storage.database import sqlite_module

EVENTS = """CREATE TABLE phobos_db_checkpoint_events (
    id {key}, topic VARCHAR, group_id VARCHAR, entity_id VARCHAR,
    event_time {time}, event_type VARCHAR, event_version VARCHAR, checksum VARCHAR,
    payload JSON, created_at {time})"""

FAILURES = """CREATE TABLE phobos_db_checkpoint_failures (
    id {key}, created_at {time}, topic VARCHAR, group_id VARCHAR, entity_id VARCHAR,
    event_time {time}, event_type VARCHAR, event_version VARCHAR, checksum VARCHAR,
    payload JSON, metadata JSON, error_class VARCHAR, error_message VARCHAR,
    error_backtrace JSON)"""


def old_json(value: Any) -> str:
    """Return JSON as the old system encoded it, HTML's characters escaped (H8)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class Old:
    """An old database with its two tables, beside a log's."""

    def __init__(self, log_url: str, folder: Path) -> None:
        """Make it: a file of its own, or tables beside the log's own on PostgreSQL."""
        self.is_sqlite = log_url.startswith("sqlite")
        self.url = f"sqlite:///{folder / 'shop_events.db'}"
        if not self.is_sqlite:
            self.url = log_url
        more = {"module": sqlite_module()} if self.is_sqlite else {}
        self.engine = sa.create_engine(self.url, **more)
        kinds = {"key": "BIGSERIAL PRIMARY KEY", "time": "TIMESTAMP"}
        if self.is_sqlite:
            kinds = {"key": "INTEGER PRIMARY KEY", "time": "DATETIME"}
        for statement in (EVENTS, FAILURES):
            self.run(statement.format(**kinds))

    def run(self, statement: str, **values: Any) -> None:
        """Run a statement."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def event(self, payload: str | None, **changes: Any) -> None:
        """Keep an event as the old system did, its payload the text received."""
        self.put("events", self.row(payload) | changes)

    def failure(self, payload: str | None, **changes: Any) -> None:
        """Keep a failure as the old system did."""
        more = {
            "metadata": json.dumps(
                {
                    "checksum": "c",
                    "listener_id": "abc123",
                    "group_id": "billing",
                    "topic": "orders",
                    "handler": "OrdersHandler",
                    "key": "k1",
                    "partition": 3,
                    "offset": 77,
                    "retry_count": 2,
                    "headers": {"origin": "till"},
                }
            ),
            "error_class": "RuntimeError",
            "error_message": "boom",
            "error_backtrace": json.dumps(["a.rb:1:in `consume'", "b.rb:2"]),
        }
        self.put("failures", self.row(payload) | more | changes)

    def row(self, payload: str | None) -> dict[str, Any]:
        """Return the columns that both tables have."""
        text = None if payload is None else old_json(payload)
        return {
            "topic": "orders",
            "group_id": "billing",
            "entity_id": "7",
            "event_time": "2019-03-01 10:00:00.5",
            "event_type": "placed",
            "event_version": "1",
            "checksum": text and md5(text.encode(), usedforsecurity=False).hexdigest(),
            "payload": text,
            "created_at": "2019-03-01 10:00:01.25",
        }

    def put(self, table: str, row: dict[str, Any]) -> None:
        """Insert a row as it stands."""
        self.put_many(table, [row])

    def put_many(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Insert rows as they stand."""
        kinds = {"payload": "JSON", "metadata": "JSON", "error_backtrace": "JSON"}
        kinds |= {"event_time": "TIMESTAMP", "created_at": "TIMESTAMP"}

        def mark(name: str) -> str:
            if self.is_sqlite or name not in kinds:
                return f":{name}"
            return f"CAST(:{name} AS {kinds[name]})"

        names = list(rows[0])
        with self.engine.begin() as connection:
            connection.execute(
                sa.text(
                    f"INSERT INTO phobos_db_checkpoint_{table} ({', '.join(names)}) "
                    f"VALUES ({', '.join(map(mark, names))})"
                ),
                rows,
            )

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
