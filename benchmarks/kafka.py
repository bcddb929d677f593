"""Kafka into the log: against a bare loop, with one and two processes, and how soon.

    python -m benchmarks.kafka [--events 300000] [--runs 3] [--only sqlite]

The broker is the one of the tests: real, and started for this. The bare loop consumes
the same topic in a group, decodes, hashes for the unique index, and writes the same
rows in batches of the same size; it keeps no offsets in SQL, no chain and no ledger.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from confluent_kafka import Consumer
from typing_extensions import override

from benchmarks.__main__ import _databases as databases
from benchmarks.shop import TOPIC, lines, totals
from kappa_log import Handler, KappaLog, ack
from kappa_log.config import Config, load_config
from kappa_log.events import to_micros
from kappa_log.storage.bulk import insert_rows, time_shift
from kappa_log.storage.database import Database
from kappa_log.storage.log import EVENT_COLUMNS

PARTITIONS = 4
TARGET = 0.6
PROBES = 200


class Keep(Handler):
    """Keeps every record."""

    @override
    def consume(self, payload: Any, metadata: Any) -> object:
        """Acknowledge it with its customer, time and type."""
        return ack(payload["customer"], payload["time"], payload["type"])


def settings(url: str, bootstrap: str, group: str) -> Config:
    """Return the configuration that both sides of a pair use."""
    return load_config(
        Path("/"),
        {
            "database.url": url,
            "kafka": {"bootstrap.servers": bootstrap},
            "listeners": [
                {
                    "topic": TOPIC,
                    "group_id": group,
                    "handler": "benchmarks.kafka:Keep",
                }
            ],
            "projections.modules": [],
        },
    )


# --- what is measured, each in a process of its own ---------------------------


def ours(url: str, bootstrap: str, group: str) -> float:
    """Consume by the engine until the end; return the seconds to the last commit."""
    app = KappaLog(config=settings(url, bootstrap, group), projections=[totals])
    app.create_database()
    started = last = time.perf_counter()

    def committed(_: object) -> None:
        nonlocal last
        last = time.perf_counter()

    app.consume(until_end=True, on_progress=committed)
    return last - started


def bare(url: str, bootstrap: str, group: str) -> float:
    """Consume and write by a bare loop; return the seconds to the last commit."""
    app = KappaLog(config=settings(url, bootstrap, group), projections=[])
    app.create_database()
    database = app.database
    with database.write() as connection:
        connection.execute(
            database.tables.sources.insert().values(
                id=1, name="bare", created_at=datetime.now(UTC)
            )
        )
    started = last = time.perf_counter()
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    consumer.subscribe([TOPIC])
    position = 0
    ended: set[int | None] = set()
    while len(ended) < PARTITIONS:
        batch = []
        for message in consumer.consume(app.config.ingest.batch_size, 0.2):
            if message.error() is None:
                batch.append(message)
            else:
                ended.add(message.partition())
        rows = list(_rows(database, batch, position))
        if rows:
            with database.write() as connection:
                insert_rows(connection, database.tables.events, EVENT_COLUMNS, rows)
            position += len(rows)
            last = time.perf_counter()
    consumer.close()
    return last - started


def _rows(
    database: Database, batch: list[Any], position: int
) -> Iterator[tuple[Any, ...]]:
    shift = time_shift(database)
    recorded = to_micros(datetime.now(UTC)) - shift
    decode = msgspec.json.Decoder().decode
    for number, message in enumerate(batch, position + 1):
        value = message.value()
        payload = decode(value)
        digest = blake2b(value, digest_size=16)
        happened = to_micros(datetime.fromisoformat(payload["time"])) - shift
        yield (
            *(number, 1, TOPIC, "bare", message.partition(), message.offset()),
            *(message.key(), None, message.timestamp()[1]),
            *(payload["customer"], happened, payload["type"], None, recorded),
            *(digest.hexdigest(), digest.digest(), value.decode(), None),
        )


def latency(url: str, bootstrap: str, group: str) -> list[float]:
    """Return the seconds from producing a record until its row is visible."""
    from confluent_kafka import Producer

    app = KappaLog(config=settings(url, bootstrap, group), projections=[totals])
    app.create_database()
    stop = threading.Event()
    running = threading.Thread(target=lambda: app.run(stop=stop), daemon=True)
    running.start()
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    reader = Database(url)
    taken = []
    try:
        for number in range(-20, PROBES):
            key = f"{group}-{number}"
            line = {"customer": key, "time": "2026-01-01T00:00:00Z", "type": "probe"}
            value = json.dumps(line | {"amount": 1.0, "at": time.time_ns()})
            began = time.perf_counter()
            producer.produce(TOPIC, value.encode(), key.encode())
            producer.flush()
            _wait_for_row(reader, key)
            if number >= 0:
                taken.append(time.perf_counter() - began)
    finally:
        stop.set()
        running.join(10)
    return taken


def _wait_for_row(database: Database, key: str) -> None:
    query = sa.text("SELECT 1 FROM kappa_log_view_totals WHERE entity_id = :key")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(Exception), database.read() as connection:
            if connection.execute(query, {"key": key}).one_or_none() is not None:
                return
        time.sleep(0.001)
    msg = f"the row of {key} never came"
    raise TimeoutError(msg)


# --- the runs -------------------------------------------------------------------


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kafka")
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.kafka_broker import own_broker

    with own_broker() as broker, tempfile.TemporaryDirectory() as folder:
        broker.create_topic(TOPIC, PARTITIONS)
        _fill(broker.bootstrap, chosen.events)
        for kind in ("sqlite", "postgresql"):
            if chosen.only in (None, kind):
                with databases(kind, Path(folder)) as urls:
                    _measure(kind, urls, broker.bootstrap, chosen)


def _fill(bootstrap: str, events: int) -> None:
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20})
    for number, line in enumerate(lines(events)):
        key = msgspec.json.decode(line)["customer"].encode()
        producer.produce(TOPIC, line.encode(), key)
        if number % 10_000 == 0:
            producer.flush()
    producer.flush()


def _measure(kind: str, urls: Iterator[str], bootstrap: str, chosen: Any) -> None:
    names = (f"{kind}-{number}" for number in range(1000))
    pairs = []
    for _ in range(chosen.runs):
        (mine,) = _work("ours", next(urls), bootstrap, next(names))
        (theirs,) = _work("bare", next(urls), bootstrap, next(names))
        pairs.append((mine, theirs))
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    best = min(mine for mine, _ in pairs)
    print(
        f"{kind:11} kafka → log {chosen.events:>9,} records  "
        f"ours {chosen.events / best:>9,.0f}/s  "
        f"bare {chosen.events / min(t for _, t in pairs):>9,.0f}/s  "
        f"ratio median {statistics.median(ratios):.2f} min {ratios[0]:.2f} "
        f"(target {TARGET})",
        flush=True,
    )
    two = _work("ours", next(urls), bootstrap, next(names), processes=2)
    print(
        f"{kind:11} two processes of one group: {chosen.events / max(two):,.0f}/s",
        flush=True,
    )
    (taken,) = _work("latency", next(urls), bootstrap, next(names))
    taken.sort()
    print(
        f"{kind:11} produce → row visible: p50 {1000 * statistics.median(taken):.0f} ms"
        f", p99 {1000 * taken[int(len(taken) * 0.99)]:.0f} ms, {len(taken)} probes",
        flush=True,
    )


def _work(
    name: str, url: str, bootstrap: str, group: str, processes: int = 1
) -> list[Any]:
    command = [sys.executable, "-m", "benchmarks.kafka", name, url, bootstrap, group]
    if processes > 1:
        KappaLog(url, config=load_config(Path("/"))).create_database()
    at_work = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    answers = [process.communicate()[0] for process in at_work]
    return [json.loads(answer) for answer in answers]


WORK = {"ours": ours, "bare": bare, "latency": latency}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in WORK:
        print(json.dumps(WORK[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
