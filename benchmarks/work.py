"""What is measured: our code and bare loops, each in a process of its own.

    python -m benchmarks.work NAME URL FILE

prints seconds, events and peak memory as JSON. The bare loops are what a careful
engineer writes by hand in an afternoon: no dedupe, no chain, no ledger, no cursor, no
diff; but the same table, indexes, rows and batch size.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from benchmarks.shop import TOPIC, Total, sql_totals, totals
from kappa_log import FieldOptions, KappaLog
from kappa_log.config import load_config
from kappa_log.events import to_micros
from kappa_log.storage.bulk import insert_rows, time_shift
from kappa_log.storage.database import Database, driver_connection
from kappa_log.storage.log import EVENT_COLUMNS

FIELDS = FieldOptions(entity_id="customer", event_time="time", event_type="type")
PAGE = 10_000


def open_log(url: str, archive: str = "archive") -> KappaLog:
    """Return a log with the benchmark's projection, created if need be."""
    config = load_config(Path("/"), {"archive.url": archive})
    app = KappaLog(url, config=config, projections=[totals, sql_totals])
    app.create_database()
    return app


def ours_ingest(url: str, file: str) -> tuple[float, int]:
    """Ingest the file by the engine."""
    app = open_log(url)
    started = time.perf_counter()
    report = app.ingest(file, topic=TOPIC, fields=FIELDS)
    return time.perf_counter() - started, report.counts.acked


def bare_ingest(url: str, file: str) -> tuple[float, int]:
    """Write the same rows by a loop: decode, hash for the unique index, insert."""
    app = open_log(url)
    size = app.config.ingest.batch_size
    database, done = app.database, 0
    with database.write() as connection:
        connection.execute(
            database.tables.sources.insert().values(
                id=1, name="bare", created_at=datetime.now(UTC)
            )
        )
    started = time.perf_counter()
    with Path(file).open("rb") as lines:
        while batch := list(islice(lines, size)):
            rows = list(_rows(database, batch, done))
            with database.write() as connection:
                insert_rows(connection, database.tables.events, EVENT_COLUMNS, rows)
            done += len(rows)
    return time.perf_counter() - started, done


def _rows(
    database: Database, batch: list[bytes], done: int
) -> Iterator[tuple[Any, ...]]:
    shift = time_shift(database)
    recorded = to_micros(datetime.now(UTC)) - shift
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(batch, done):
        value = line[:-1]
        payload = decode(value)
        digest = blake2b(value, digest_size=16)
        happened = to_micros(datetime.fromisoformat(payload["time"])) - shift
        yield (
            *(number + 1, 1, TOPIC, "bare", 0, number, None, None, None),
            *(payload["customer"], happened, payload["type"], None, recorded),
            *(digest.hexdigest(), digest.digest(), value.decode(), None),
        )


def ours_replay(url: str, _: str) -> tuple[float, int]:
    """Replay by the engine: read, fold, write the rows, resumably."""
    app = open_log(url)
    report = app.replay("totals", promote=False)
    assert report.build is not None
    app.drop_build("totals", report.build)
    return report.seconds, report.events


def bare_replay(url: str, _: str) -> tuple[float, int]:
    """Read payloads by position, fold in a dict, write the rows once at the end."""
    app = open_log(url)
    return _bare_fold(app.database, _payloads(app.database))


def _bare_fold(
    database: Database, payloads: Iterator[tuple[str, str]]
) -> tuple[float, int]:
    table = _bare_table(database)
    started = time.perf_counter()
    states: dict[str, Total] = {}
    decode = msgspec.json.Decoder().decode
    events = 0
    for entity, text in payloads:
        state = states.get(entity) or Total()
        payload = decode(text)
        states[entity] = Total(state.orders + 1, state.amount + payload["amount"])
        events += 1
    rows = [(key, s.orders, s.amount) for key, s in sorted(states.items())]
    _write_bare(database, table, rows)
    return time.perf_counter() - started, events


def _bare_table(database: Database) -> sa.Table:
    """Make the table that the bare loops fill, anew."""
    count = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    money: Any = sa.Double().with_variant(sa.REAL(), "sqlite")
    table = sa.Table(
        "bare_totals",
        sa.MetaData(),
        sa.Column("entity_id", sa.Text, primary_key=True),
        sa.Column("orders", count, nullable=False),
        sa.Column("amount", money, nullable=False),
        sqlite_with_rowid=False,
    )
    with database.write() as connection:
        table.drop(connection, checkfirst=True)
        table.create(connection)
    return table


def _write_bare(database: Database, table: sa.Table, rows: list[Any]) -> None:
    with database.write() as connection:
        insert_rows(connection, table, ("entity_id", "orders", "amount"), rows)


def _payloads(database: Database) -> Iterator[tuple[str, str]]:
    query = "SELECT entity_id, payload FROM kappa_log_events ORDER BY position"
    with database.read() as connection:
        driver = driver_connection(connection)
        if database.is_sqlite:
            cursor = driver.execute(query)
        else:
            cursor = driver.cursor("bare", binary=True)
            cursor.itersize = PAGE
            cursor.execute(query)
        while page := cursor.fetchmany(PAGE):
            yield from page


# --- the archive ------------------------------------------------------------------


def export(url: str, folder: str) -> tuple[float, int]:
    """Write all of the log as Parquet."""
    app = open_log(url)
    started = time.perf_counter()
    report = app.export(folder)
    return time.perf_counter() - started, report.events


def verify_archive(url: str, folder: str) -> tuple[float, int]:
    """Prove all of the archive."""
    app = open_log(url)
    started = time.perf_counter()
    report = app.verify_archive(folder)
    assert report.ok, report.findings
    return time.perf_counter() - started, report.events


def import_archive(url: str, folder: str) -> tuple[float, int]:
    """Bring the archive into an empty log."""
    app = open_log(url)
    started = time.perf_counter()
    report = app.import_archive(folder)
    return time.perf_counter() - started, report.position


def ours_archive(url: str, folder: str) -> tuple[float, int]:
    """Replay from the archive by the engine."""
    app = open_log(url, archive=folder)
    report = app.replay("totals", promote=False, source="archive")
    assert report.build is not None
    app.drop_build("totals", report.build)
    return report.seconds, report.events


def bare_archive(url: str, folder: str) -> tuple[float, int]:
    """Read the same files batch by batch, fold in a dict, write the rows at the end."""
    return _bare_fold(open_log(url).database, _archived(Path(folder)))


def ours_sql(url: str, folder: str) -> tuple[float, int]:
    """Replay the SQL projection from the archive by the engine."""
    app = open_log(url, archive=folder)
    report = app.replay("sql_totals", promote=False, source="archive")
    assert report.build is not None
    app.drop_build("sql_totals", report.build)
    return report.seconds, report.events


def bare_sql(url: str, folder: str) -> tuple[float, int]:
    """Have DuckDB aggregate the same files, and write the rows at the end."""
    import duckdb

    database = open_log(url).database
    table = _bare_table(database)
    started = time.perf_counter()
    rows = duckdb.execute(
        "SELECT entity_id, count(*), sum((payload->>'amount')::DOUBLE) "
        f"FROM '{folder}/events/*/*.parquet' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    _write_bare(database, table, rows)
    return time.perf_counter() - started, sum(row[1] for row in rows)


def _archived(folder: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("events/*/*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(PAGE, columns=["entity_id", "payload"]):
                entities, payloads = (column.to_pylist() for column in batch.columns)
                yield from zip(entities, payloads, strict=True)


WORK: dict[str, Callable[[str, str], tuple[float, int]]] = {
    "ours_ingest": ours_ingest,
    "bare_ingest": bare_ingest,
    "ours_replay": ours_replay,
    "bare_replay": bare_replay,
    "export": export,
    "verify_archive": verify_archive,
    "import_archive": import_archive,
    "ours_archive": ours_archive,
    "bare_archive": bare_archive,
    "ours_sql": ours_sql,
    "bare_sql": bare_sql,
}


def main(name: str, url: str, file: str) -> None:
    """Do one piece of work and print what it took."""
    seconds, events = WORK[name](url, file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "events": events, "peak_mb": peak / 1024}))


if __name__ == "__main__":
    main(*sys.argv[1:])
