"""The API under test: an application over a log, and rows put into it verbatim."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

from kappa_log import KappaLog, Projection
from kappa_log.config import load_config
from kappa_log.web import create_app
from kappa_log.web.replays import JOBS

UNKNOWN = datetime(1970, 1, 1, tzinfo=UTC)
"""When a row was made that does not say it."""

HANDLER = '''
"""A handler that does what script.json says, and notes what it was called with."""

import json
from pathlib import Path

from kappa_log import Handler, ack

HERE = Path(__file__).parent


class Main(Handler):
    """Does what it is told."""

    def consume(self, payload, metadata):
        """Note the call, then obey."""
        told = json.loads((HERE / "script.json").read_text())
        noted = {n: getattr(metadata, n) for n in metadata.__struct_fields__}
        with (HERE / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps([payload, noted], default=_text) + "\\n")
        if told["do"] == "raise":
            raise RuntimeError(told["message"])
        if told["do"] == "return":
            return told["value"]
        names = ("entity_id", "event_time", "event_type", "event_version")
        return ack(*(told[name] for name in names))


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)
'''

ACKING = {
    "do": "ack",
    "entity_id": "ada",
    "event_time": "2026-05-05T05:05:05.500Z",
    "event_type": "paid",
    "event_version": "1",
}


class ApiWorld:
    """A log with an application in front, and a handler that obeys a script."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *projections: Projection,
        listeners: list[dict[str, Any]] | None = None,
        **how: Any,
    ) -> None:
        """Make the tables and the application; options as `create_app`."""
        self.folder = folder
        (folder / "scripted.py").write_text(HANDLER)
        config = load_config(
            folder,
            {
                "database.url": url,
                "projections.modules": [],
                "listeners": listeners or [],
            },
        )
        self.log = KappaLog(config=config, projections=projections)
        self.log.create_database()
        options = {"needs_token": False, "hosts": ["localhost", "127.0.0.1"]} | how
        self.app = create_app(self.log, **options)
        self._source: int | None = None

    def close(self) -> None:
        """End the jobs, then close the log.

        A replay's row says that it ended a moment before its thread does, and that
        still has a connection, which nobody would close after the log was.
        """
        self.app.extensions[JOBS].stop()
        self.log.close()

    @property
    def client(self) -> FlaskClient:
        """Return a client of the application."""
        client: FlaskClient = self.app.test_client()
        return client

    def script(self, told: Mapping[str, Any]) -> None:
        """Tell the handler what to do."""
        (self.folder / "script.json").write_text(json.dumps(told))

    def calls(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return what the handler was called with: payload and metadata."""
        file = self.folder / "calls.jsonl"
        if not file.exists():
            return []
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()]

    def put_event(self, row: Mapping[str, Any]) -> None:
        """Put an event into the table as it stands, and the head past it."""
        tables = self.log.database.tables
        payload = row["payload"]
        number = row["id"]
        with self.log.database.write() as connection:
            connection.execute(
                tables.events.insert().values(
                    position=number,
                    source_id=self._source_id(connection),
                    partition=row.get("partition", 0),
                    offset=row.get("offset", number),
                    event_time=moment(row["event_time"]),
                    recorded_at=moment(row["created_at"]) or UNKNOWN,
                    message_id=number.to_bytes(16, "big"),
                    payload=payload if payload is None else json.dumps(payload),
                    **{name: row[name] for name in SHARED},
                )
            )
            connection.execute(
                tables.head.update()
                .where(tables.head.c.position < number)
                .values(position=number)
            )

    def put_failure(self, row: Mapping[str, Any]) -> None:
        """Put a failure into the table as it stands."""
        metadata = row["metadata"] or {}
        key = metadata.get("key")
        created = moment(row["created_at"]) or UNKNOWN
        backtrace = row["error_backtrace"]
        with self.log.database.write() as connection:
            connection.execute(
                self.log.database.tables.failures.insert().values(
                    id=row["id"],
                    source_id=self._source_id(connection),
                    partition=metadata.get("partition", 0),
                    offset=metadata.get("offset", 1000 + row["id"]),
                    key=None if key is None else key.encode(),
                    value=json.dumps(row["payload"], ensure_ascii=False).encode(),
                    event_time=moment(row["event_time"]),
                    parked=row.get("parked", 0),
                    error_class=row["error_class"],
                    error_message=row["error_message"],
                    error_backtrace=backtrace and json.dumps(backtrace),
                    fingerprint=row.get("fingerprint"),
                    attempts=metadata.get("retry_count", 0) + 1,
                    first_at=created,
                    last_at=created,
                    metadata=json.dumps(metadata),
                    **{name: row[name] for name in SHARED},
                )
            )

    def _source_id(self, connection: Any) -> int:
        if self._source is None:
            self._source = connection.execute(
                self.log.database.tables.sources.insert()
                .values(name="imported", created_at=UNKNOWN)
                .returning(self.log.database.tables.sources.c.id)
            ).scalar_one()
        return self._source


SHARED = (
    "topic",
    "group_id",
    "entity_id",
    "event_type",
    "event_version",
    "checksum",
)


def moment(text: str | None) -> datetime | None:
    """Return the time that a text says."""
    return None if text is None else datetime.fromisoformat(text)


def an_event(number: int, **changes: Any) -> dict[str, Any]:
    """Return a row for `ApiWorld.put_event`."""
    row: dict[str, Any] = {
        "id": number,
        "topic": "orders",
        "group_id": "billing",
        "entity_id": f"e{number}",
        "event_time": None,
        "event_type": "placed",
        "event_version": "1",
        "checksum": f"c{number}",
        "payload": {"n": number},
        "created_at": f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z",
    }
    return row | changes


def a_failure(number: int, **changes: Any) -> dict[str, Any]:
    """Return a row for `ApiWorld.put_failure`."""
    row = an_event(number) | {
        "metadata": None,
        "error_class": "RuntimeError",
        "error_message": "boom",
        "error_backtrace": ["handlers.py:1"],
        "fingerprint": "f1",
    }
    return row | changes


def ask(url: str, method: str = "GET", **body: Any) -> Any:
    """Send a request and return the JSON of its answer."""
    request = urllib.request.Request(  # noqa: S310 - our own server
        url,
        json.dumps(body).encode() if body else None,
        {"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        return json.load(response)
