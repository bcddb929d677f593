"""A log with something of everything, for archives to hold; and other databases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from typing_extensions import override

from kappa_log import Event, Handler, KappaLog, Projection, ack, chain, projection
from kappa_log.codec import Decoded, Headers, decode_json
from kappa_log.config import load_config
from kappa_log.decide import Portion
from kappa_log.handler import Metadata
from kappa_log.ingest import ingest_batch
from kappa_log.listeners import Listener
from kappa_log.records import Lane, Record
from kappa_log.storage import ledger
from support.logs import Clock, append

SEGMENT = 7
"""Events of a segment: few, so that a small log has segments of all kinds."""


class Deciding(Handler):
    """Acknowledges, skips or raises, as the payload says."""

    @override
    def consume(self, payload: Any, metadata: Metadata) -> Any:
        """Do what the payload says; a tombstone is acknowledged."""
        found = payload or {}
        if found.get("do") == "raise":
            msg = "no such order"
            raise ValueError(msg)
        if found.get("do") == "skip":
            return None
        return ack(found.get("who"), found.get("at"), found.get("type"), "1")


def raw_json(value: bytes, headers: Headers) -> Decoded:
    """Decode as if the bytes had been another format's."""
    found = decode_json(value, headers)
    return Decoded(found.text, found.payload, value)


class Kind(Enum):
    """A state's field."""

    SMALL = "small"
    LARGE = "large"


@dataclass(frozen=True, slots=True)
class Everything:
    """A state with a column of each kind."""

    seen: int = 0
    share: float = 0.0
    money: Decimal = Decimal(0)
    note: str | None = None
    odd: bool = False
    digest: bytes = b""
    day: date = date(2024, 1, 1)
    at: datetime | None = None
    kind: Kind = Kind.SMALL
    seen_by: tuple[str, ...] = ()


@projection(topics=["orders"], groups=["billing"], version=1)
def everything(state: Everything | None, event: Event) -> Everything | None:
    """Fold into columns of each kind, from each column of an event."""
    old = state or Everything()
    found = event.payload or {}
    if found.get("do") == "drop":
        return None
    headers = sum(len(value or b"") for _, value in event.headers)
    return Everything(
        seen=old.seen + 1,
        share=old.share / 3 + (event.timestamp or 0) % 7 + headers,
        money=old.money + Decimal(found.get("n", 0)) / 8,
        note=f"{event.event_type}/{event.source_id}/{event.partition}/{event.offset}",
        odd=not old.odd,
        digest=bytes.fromhex(event.message_id) + (event.key or b"-"),
        day=event.recorded_at.date(),
        at=event.event_time or old.at,
        kind=Kind.LARGE if (event.checksum or "0") > "8" else Kind.SMALL,
        seen_by=(*old.seen_by[-2:], event.group_id + (event.event_version or "")),
    )


@projection(topics=["orders", "rides"], groups=["billing", "kappa-log"], version=1)
def by_topic(state: int | None, _: Event) -> int:
    """Count under several topics, by a key of several columns."""
    return (state or 0) + 1


def open_full(url: str, folder: Path, **more: Any) -> KappaLog:
    """Open a log whose archive is in the folder; its tables are made."""
    clock = Clock()
    config = load_config(
        folder,
        {
            "database.url": url,
            "projections.modules": [],
            "archive.segment_events": SEGMENT,
        },
    )
    app = KappaLog(
        config=config, projections=[everything, by_topic], clock=clock, **more
    )
    app.create_database()
    return app


def fill(app: KappaLog, rounds: int = 3, begin: int = 0) -> None:
    """Fill a log with events of several days, skips, failures, duplicates and more."""
    clock = app._clock  # noqa: SLF001 - the test's own
    assert isinstance(clock, Clock)
    listener = Listener("b", "orders", "billing", Deciding(), decode_json, "payload")
    raw = msgspec.structs.replace(listener, decoder=raw_json)
    for number in range(begin, begin + rounds):
        for partition, chosen in ((0, listener), (1, raw)):
            lane = Lane("kafka:c/1", "orders", "billing", partition)
            with app.database.write() as connection:
                held = ledger.assign(
                    connection,
                    app.database,
                    lane,
                    ledger.Reader("payload", None),
                    app.now(),
                )
            records = list(_records(held.next_offset, number, partition))
            end = records[-1].offset + 3
            portion = Portion(lane, held, chosen, records, end)
            ingest_batch(app.database, [portion], app.now)
        append(
            app,
            Path(app.config.folder, "rides.jsonl"),
            [{"id": f"ü{n}", "n": n, "round": number} for n in range(4)],
            topic="rides",
        )
        clock.move(60 * 17)


def _records(first: int, number: int, partition: int) -> Iterator[Record]:
    values: list[dict[str, Any] | bytes | None] = [
        {"who": "ada", "n": number, "p": partition, "at": "2023-05-05T05:05:05Z"},
        {"who": "ada", "n": number, "p": partition, "at": "2023-05-05T05:05:05Z"},
        {"who": "b\u00f6b", "do": "skip", "n": number},
        None,
        {"who": "eve", "type": "t\u00fc", "n": number, "p": partition},
        b"{broken",
        {"who": "ada", "do": "raise", "n": number, "p": partition},
        {"who": 7, "n": 2**70, "p": partition, "round": number, "nested": {"y": "7"}},
        {"do": "drop" if number == 1 else "add", "who": "eve", "p": partition},
    ]
    for place, value in enumerate(values):
        data = value if value is None or isinstance(value, bytes) else _json(value)
        if place == 4:
            # A number whose last digit a float loses.
            data = data and data[:-1] + b', "x": 1.50}'
        yield Record(
            first + place + (place > 4),
            data,
            [None, b"", b"\0\xff"][place % 3],
            (("a", b"1"), ("a", None)) if place % 2 else (),
            [None, -5, 2**63 - 1, 1_700_000_000_000][place % 4],
        )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def erase(app: KappaLog, position: int) -> None:
    """Take an event's contents away, as an erasure does."""
    table = app.database.tables.events
    event = app.event(position)
    headers = None
    with app.database.write() as connection:
        row = connection.execute(
            sa.select(table).where(table.c.position == position)
        ).one()
        headers = None if row.headers is None else bytes(row.headers)
        payload = None if row.payload is None else row.payload.encode()
        personal = chain.personal_digest(event.raw, event.key, headers, event.entity_id)
        connection.execute(
            table.update()
            .where(table.c.position == position)
            .values(
                payload=None,
                raw=None,
                key=None,
                headers=None,
                entity_id="erased",
                payload_digest=chain.payload_digest(payload),
                personal_digest=personal,
            )
        )
        head = app.database.tables.head
        connection.execute(head.update().values(erasure_epoch=head.c.erasure_epoch + 1))


def contents(app: KappaLog) -> dict[str, list[Any]]:
    """Return all rows of the tables that an archive holds, head included."""
    tables = app.database.tables
    named = [
        *(tables.head, tables.sources, tables.offsets, tables.events),
        *(tables.checkpoints, tables.duplicates, tables.failures),
    ]
    with app.database.read() as connection:
        return {
            table.name: sorted(
                map(tuple, connection.execute(sa.select(table))), key=repr
            )
            for table in named
        }


def states(app: KappaLog, projections: list[Projection]) -> Mapping[str, list[Any]]:
    """Return the rows of projections, bit by bit."""
    return {
        found.name: [repr(row) for row in app.rows(found.name)] for found in projections
    }


def files(folder: Path) -> dict[str, bytes]:
    """Return path → bytes of all files in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def other_kind(request: Any, url: str, folder: Path, **more: Any) -> Iterator[KappaLog]:
    """Open an empty log of the other kind of database, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    name = "postgresql_url" if url.startswith("sqlite") else "sqlite_url"
    with open_full(request.getfixturevalue(name), folder, **more) as app:
        yield app
