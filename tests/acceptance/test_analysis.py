"""SQL over the log: what DuckDB sees is what the log holds, and nothing else."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from kappa_log import Event, KappaLog, UsageError, projection
from kappa_log.analysis import matching_spans
from kappa_log.cli import run
from kappa_log.errors import StorageError
from kappa_log.storage.arrow import EVENTS_SCHEMA, EventSource
from support.kafka_process import ANSWER_SECONDS, wait_for
from support.logs import FIELDS, append, open_log

BIG = 18_446_744_073_709_551_616


class Size(Enum):
    """A column of its own kind."""

    SMALL = "small"


@dataclass(frozen=True)
class Kinds:
    """One column of each kind, and NULL."""

    count: int
    share: float
    price: Decimal
    label: str | None
    sold: bool
    mark: bytes
    day: date
    at: datetime | None
    size: Size
    rest: dict[str, int]


@projection(topics=["things"], version=1)
def kinds(_: Kinds | None, event: Event) -> Kinds:
    """Take what came last."""
    return Kinds(
        count=event.position,
        share=0.5,
        price=Decimal("-12.340") if event.position > 1 else Decimal(7),
        label=None if event.position > 1 else "ä",
        sold=event.position == 1,
        mark=b"\x00\xff",
        day=date(2024, 2, 29),
        at=event.event_time,
        size=Size.SMALL,
        rest={"x": 1},
    )


OBJECTS = [
    {"id": "ada", "at": "2024-01-01T00:00:00.000001Z", "type": "t", "n": BIG},
    {"id": "bob", "n": 2},
    {"id": "ada", "at": "2024-01-03T00:00:00+01:00", "type": "u", "n": 3},
]


@pytest.fixture
def log(database_url: str, tmp_path: Path) -> Iterator[KappaLog]:
    """Open a log of three events, a duplicate, a failure, and a live view."""
    with _opened(database_url, tmp_path) as app:
        yield app


@contextmanager
def _opened(url: str, folder: Path) -> Iterator[KappaLog]:
    with open_log(url, folder, kinds) as app:
        file = folder / "things.jsonl"
        append(app, file, [*OBJECTS, OBJECTS[0]])
        with file.open("a") as lines:
            lines.write("{broken\n")
        app.ingest(file, topic="things", fields=FIELDS)
        app.project()
        yield app


def fetched(app: KappaLog, query: str) -> list[dict[str, Any]]:
    """Return the rows of a query."""
    found = app.sql(query)
    assert found is not None
    rows: list[dict[str, Any]] = found.to_arrow_table().to_pylist()
    return rows


def test_the_views_hold_what_the_log_holds(log: KappaLog) -> None:
    """On both databases: the same values, of the same types."""
    events = fetched(log, "FROM events ORDER BY position")

    for row, event in zip(events, log.events(oldest_first=True), strict=True):
        text = row.pop("payload")
        assert text == event.payload_text
        assert row.pop("source") == "file:things.jsonl"
        assert row == {name: getattr(event, name) for name in row}
    assert [row["id"] for row in fetched(log, "FROM duplicates")] == [1]
    (failure,) = fetched(log, "SELECT value, parked, error_class FROM failures")
    assert failure == {
        "value": b"{broken",
        "parked": False,
        "error_class": log.failures()[0].error_class,
    }
    ledger = fetched(log, "FROM checkpoints ORDER BY id")
    assert sum(row["acked"] for row in ledger) == 3
    assert ledger[-1]["head"] in (None, log.head().digest)


def test_an_archive_is_read_as_far_as_it_reaches(log: KappaLog, tmp_path: Path) -> None:
    """Its files and the database past them are one view, with the same values."""
    queries = [
        "FROM events ORDER BY position",
        "SELECT count(*) AS n, count(raw) AS r FROM events",
        "SELECT position, message_id FROM events WHERE source LIKE 'file%' ORDER BY 1",
        "SELECT payload->>'n' AS n FROM events WHERE position IN (2, 4) ORDER BY 1",
    ]
    log.export()
    append(log, tmp_path / "more.jsonl", [{"id": "eve", "n": 9}])
    seen = [fetched(log, query) for query in queries]

    shutil.rmtree(tmp_path / "archive" / "events")
    with pytest.raises(duckdb.Error, match="it is missing"):
        fetched(log, queries[0])
    shutil.rmtree(tmp_path / "archive")

    assert seen == [fetched(log, query) for query in queries]
    assert seen[1] == [{"n": 4, "r": 0}]


def test_a_file_that_is_not_what_was_written_is_not_queried(
    log: KappaLog, tmp_path: Path
) -> None:
    """Not at first, nor when it was changed after it had been proved."""
    log.export()
    query = "SELECT md5(string_agg(payload, '' ORDER BY position)) AS h FROM events"
    (good,) = fetched(log, query)
    (file,) = (tmp_path / "archive" / "events").glob("*/*.parquet")
    data = file.read_bytes()

    for place in range(8, len(data), len(data) // 20):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(duckdb.Error, match="its hash differs"):
            fetched(log, query)
    file.write_bytes(data)
    assert fetched(log, query) == [good]


def test_typed_columns_are_queried_past_the_archive_too(
    log: KappaLog, tmp_path: Path
) -> None:
    """Those of its files, and those made of what only the database has, are alike."""
    columns = ["n:int", "n:decimal", "at:timestamp", "id:json"]
    for number, declared in enumerate(columns):
        name = f"things.{declared.partition(':')[0]}"
        query = f'SELECT position, "{name}" AS v, topic FROM events ORDER BY 1'
        log.export(columns=[f"things.{declared}"])
        at = f"2026-01-0{number + 1}T00:00:00Z"
        more = [{"id": f"new-{number}", "n": number, "at": at}]
        append(log, tmp_path / f"{number}.jsonl", more)
        seen = fetched(log, query)
        log.export()
        assert seen == fetched(log, query)
        assert sum(row["v"] is not None for row in seen) > 1
    assert fetched(log, "SELECT max(\"things.id\"->>'$') AS m FROM events") == [
        {"m": "new-3"}
    ]


def test_the_rows_of_a_projection_are_there_by_its_name(log: KappaLog) -> None:
    """Each kind of column, and NULL, comes with the value that people see."""
    rows = fetched(log, "FROM kinds ORDER BY entity_id")

    for row, wanted in zip(rows, log.rows("kinds"), strict=True):
        assert json.loads(row.pop("rest")) == wanted.pop("rest")
        assert row == wanted
    assert fetched(log, "SELECT sum(price) AS total FROM kinds") == [
        {"total": Decimal("-24.680")}
    ]


def test_json_is_queried_as_json(log: KappaLog) -> None:
    """Paths work without a cast, and no digit is lost."""
    (row,) = fetched(
        log,
        "SELECT typeof(payload) AS kind, payload->>'n' AS n FROM events "
        "WHERE position = 1",
    )

    assert row == {"kind": "JSON", "n": str(BIG)}


def test_a_query_reads_its_columns_and_positions_alone(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A question about the end of a long log does not read all of it."""
    seen: list[str] = []
    with open_log(sqlite_url, tmp_path) as app:
        append(app, tmp_path / "f.jsonl", ({"id": str(n)} for n in range(30)))
        source = EventSource(app.database)
        kept = ds.field("position") > 25

        @sa.event.listens_for(app.database.engine, "checkout")
        def watch(connection: Any, *_: object) -> None:
            connection.set_trace_callback(seen.append)

        spans = list(matching_spans(kept, source.schema, source.head(), 10))
        list(source.batches(["entity_id"], spans))

    read = [text for text in seen if "kappa_log_events" in text]
    assert spans == [(20, 30)]
    (only,) = read
    assert re.match(r"SELECT entity_id FROM \S+ WHERE position > 20 AND", only)


@settings(max_examples=60)
@given(data=st.data(), head=st.integers(0, 60), size=st.integers(1, 9))
def test_no_position_that_meets_a_condition_is_left_out(
    data: st.DataObject, head: int, size: int
) -> None:
    """Whatever is compared, joined and negated, with other columns too."""
    number = st.integers(-5, 65)

    def compared(draw: Any) -> Any:
        value = draw(number)
        field = ds.field("position")
        return draw(
            st.sampled_from(
                [
                    (field == value, lambda p: p == value),
                    (field != value, lambda p: p != value),
                    (field < value, lambda p: p < value),
                    (field >= value, lambda p: p >= value),
                    (field.isin([value, 7]), lambda p: p in (value, 7)),
                    (ds.field("topic") == "t", lambda _: True),
                ]
            )
        )

    left, is_left = compared(data.draw)
    right, is_right = compared(data.draw)
    kept, keeps = data.draw(
        st.sampled_from(
            [
                (left & right, lambda p: is_left(p) and is_right(p)),
                (left | right, lambda p: is_left(p) or is_right(p)),
                (~left, lambda p: not is_left(p)),
            ]
        )
    )

    spans = list(matching_spans(kept, EVENTS_SCHEMA, head, size))
    covered = [p for after, upto in spans for p in range(after + 1, upto + 1)]

    assert covered == sorted(set(covered))
    assert set(covered) >= {p for p in range(1, head + 1) if keeps(p)}
    assert all(1 <= position <= head for position in covered)


def test_the_connection_is_shut_in(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that came from elsewhere reads the views, and nothing of the machine."""
    monkeypatch.chdir(tmp_path)
    secret = [1]
    with open_log(sqlite_url, tmp_path) as app:
        for query in (
            "FROM read_csv('/etc/passwd')",
            "COPY (SELECT 1) TO 'out.csv'",
            "ATTACH 'other.db'",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            "SET threads = 1",
            "FROM secret",
            "DROP TABLE events",
        ):
            with pytest.raises(UsageError):
                app.sql(query)
        assert fetched(app, "SELECT count(*) AS n FROM events") == [{"n": 0}]

    assert secret
    assert not {"out.csv", "other.db", ".tmp"} & {f.name for f in tmp_path.iterdir()}


def test_other_columns_by_now_are_said(log: KappaLog) -> None:
    """Promoted meanwhile: the error says to open another connection, and not how."""
    analysis = log.analysis()

    @projection(topics=["things"], version=2, name="kinds")
    def fewer(state: int | None, event: Event) -> int:
        """Count."""
        return (state or 0) + bool(event.position)

    log.registry.add(fewer)
    log.replay("kinds")

    with pytest.raises(duckdb.Error) as caught:
        analysis.connection.execute("FROM kinds").fetchall()
    ours = analysis.error(caught.value)
    assert isinstance(ours, StorageError)
    assert "open another" in str(ours)
    assert fetched(log, "FROM kinds WHERE entity_id = 'ada'") == [
        {"entity_id": "ada", "value": 2}
    ]


def test_a_process_may_end_with_a_query_half_read(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Notebooks do; nothing of ours may run while Python goes down."""
    with open_log(sqlite_url, tmp_path) as app:
        append(app, tmp_path / "f.jsonl", ({"id": str(n)} for n in range(100)))
    code = (
        "from pathlib import Path\n"
        "from kappa_log import KappaLog\n"
        "from kappa_log.config import load_config\n"
        "from kappa_log.storage import arrow\n"
        "arrow.BATCH_ROWS = 10\n"
        f"app = KappaLog({sqlite_url!r}, config=load_config(Path('/')))\n"
        "reader = app.sql('FROM events').to_arrow_reader(10)\n"
        "print(reader.read_next_batch().num_rows)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


# --- kappa-log sql -----------------------------------------------------------


@pytest.fixture
def typed(
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Return a function that types `kappa-log sql` and returns stdout and stderr.

    What is printed does not depend on the database; see the tests above.
    """
    with _opened(sqlite_url, tmp_path):
        monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("KAPPA_LOG__DATABASE__URL", sqlite_url)

    def type_(*arguments: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert run(["sql", *arguments]) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.out, said.err

    return type_


def test_sql_prints_a_table_or_json_or_csv(typed: Any) -> None:
    """A table for people, and all rows for programs; JSON passes through whole."""
    out, err = typed(
        "SELECT position, event_time, payload, checksum FROM events", "--limit", "2"
    )
    assert len(max(out.splitlines(), key=len)) <= 80
    assert "more rows than --limit 2" in err

    out, _ = typed(
        "SELECT position, payload, event_time, sum(position) OVER () AS all, "
        "1.50 AS price FROM events ORDER BY 1",
        "--json",
    )
    first, *rest = [json.loads(line) for line in out.splitlines()]
    assert len(rest) == 2
    assert first["payload"]["n"] == BIG
    assert str(BIG) in out
    assert first["event_time"] == "2024-01-01T00:00:00.000001Z"
    assert (first["all"], first["price"]) == (6, "1.50")

    out, _ = typed(
        "SELECT '=1+1' AS f, -1.5 AS n, '-x' AS m, 'a,\"b' AS c, NULL AS u, "
        "TRUE AS t, '@' AS \"+h\", event_time AS e, [1, 2] AS l "
        "FROM events WHERE position = 1",
        "--csv",
    )
    heading, row = list(csv.reader(io.StringIO(out)))
    assert heading == ["f", "n", "m", "c", "u", "t", "'+h", "e", "l"]
    assert row == [
        *("'=1+1", "-1.5", "'-x", 'a,"b', "", "true", "'@"),
        *("2024-01-01T00:00:00.000001Z", "[1,2]"),
    ]


def test_sql_prints_each_type_that_duckdb_has(typed: Any) -> None:
    """Also those that Python has not, and times that it cannot count to."""
    values = {
        "INTERVAL '1 year 2 days'": "1 year 2 days",
        "TIMESTAMP_NS '2026-01-01 00:00:00.123456789'": "2026-01-01 00:00:00.123456789",
        "TIMETZ '12:00:00+02'": "12:00:00+02",
        "'101'::BIT": "101",
        "MAP {'a': 1}": {"a": 1},
        "union_value(n := 5)": {"n": 5},
        "{'i': INTERVAL '1 day'}": {"i": "1 day"},
        "[DATE '2026-01-01']": ["2026-01-01"],
        "DATE '0044-03-15 (BC)'": "0044-03-15 (BC)",
        "TIMESTAMP '20000-01-01'": "20000-01-01 00:00:00",
        "TIMESTAMPTZ 'infinity'": "infinity",
    }
    query = "SELECT " + ", ".join(f'{value} AS "{value}"' for value in values)
    assert json.loads(typed(query, "--json")[0]) == values
    heading, row = csv.reader(io.StringIO(typed(query, "--csv")[0]))
    assert heading == [*values]
    assert row[:4] == [*values.values()][:4]
    typed(query)

    rows = typed(
        "SELECT unnest(['infinity'::TIMESTAMP, '2026-01-01', NULL]) AS t, "
        'to_days(2) AS "t" ORDER BY 1 DESC',
        "--csv",
    )[0].splitlines()
    assert rows == ["t,t", "infinity,2 days", "2026-01-01T00:00:00,2 days", ",2 days"]
    assert typed("SELECT TIMESTAMP '2026-01-01' AS t")[0].endswith(" 00:00:00\n")


def test_sql_writes_parquet_whole_or_not_at_all(typed: Any, tmp_path: Path) -> None:
    """A query that fails halfway leaves what was there before."""
    file = tmp_path / "out.parquet"

    _, err = typed("SELECT position, payload FROM events", "--parquet", str(file))
    assert "3 rows" in err
    before = file.read_bytes()
    assert pq.read_table(file).num_rows == 3

    _, err = typed(
        "SELECT (payload->>'id')::INT FROM events", "--parquet", str(file), code=2
    )
    assert "Could not convert string 'ada'" in err
    assert file.read_bytes() == before
    other = tmp_path / "other"
    other.write_text("mine")
    _, err = typed("SELECT 1", "--parquet", str(other), code=2)
    assert "no Parquet is there" in err
    assert other.read_text() == "mine"
    assert [f for f in tmp_path.iterdir() if "parquet" in f.name] == [file]
    _, err = typed("SELECT 1", "--parquet", "nowhere/x.parquet", code=2)
    assert "its folder is not there" in err
    _, err = typed("SELECT to_days(1) AS i", "--parquet", str(file), code=2)
    assert "cast it, for instance to VARCHAR. Nothing was written." in err
    assert file.read_bytes() == before


@pytest.mark.usefixtures("typed")
def test_a_query_ends_by_ctrl_c(tmp_path: Path) -> None:
    """DuckDB does not hear of it by itself; nothing is left of the file."""
    (tmp_path / "out").mkdir()
    forever = "range(10000000000000) a WHERE a.range < 50000"
    command = [sys.executable, "-m", "kappa_log", "sql", f"FROM {forever}"]
    with subprocess.Popen(
        [*command, "--parquet", "out/n.parquet"], stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_for(lambda: [*(tmp_path / "out").iterdir()], "the file to be begun")
            process.send_signal(signal.SIGINT)
            assert process.wait(ANSWER_SECONDS) == 130
        finally:
            process.kill()
    assert not [*(tmp_path / "out").iterdir()]


def test_sql_reads_the_query_from_stdin_and_lists_views_without_one(
    typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For queries of many lines; and for whoever does not know what there is."""
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 42\nAS answer"))
    assert typed("-")[0] == "answer\n    42\n"

    out, _ = typed("--json")
    views = {
        view["name"]: view["columns"] for view in map(json.loads, out.splitlines())
    }
    assert list(views) == ["events", "failures", "checkpoints", "duplicates", "kinds"]
    assert views["kinds"]["price"] == "DECIMAL(38,3)"
    out, err = typed()
    assert "  payload        JSON" in out
    assert "kappa-log sql" in err


def test_what_duckdb_refuses_is_said_in_its_words(typed: Any) -> None:
    """It knows best what is wrong; no trace, exit code 2."""
    assert "syntax error" in typed("SELEC 1", code=2)[1]
    _, err = typed("FROM knds", code=2)
    assert "Table with name knds does not" in err
    assert "The views are: events, failures, checkpoints, duplicates, kinds." in err
    assert '"nope" not found' in typed("SELECT nope FROM events", code=2)[1]


def test_what_asks_for_nothing_is_refused(typed: Any) -> None:
    """What it made would be gone with the command; a step on the way may make it."""
    for query in ("DROP VIEW events", "VACUUM", "CREATE TABLE t (n INT)", "SET x = 1"):
        assert "asks for no rows" in typed(query, code=2)[1]
    assert "the query is empty" in typed(" ; -- nothing", code=2)[1]
    script = "CREATE TEMP TABLE t AS FROM events; SELECT count(*) AS n, 7 AS n FROM t"
    assert typed(script, "--json")[0] == '{"n":3,"n_1":7}\n'


def test_one_form_of_output_at_a_time(typed: Any) -> None:
    """Two would be mixed on stdout."""
    assert "give one of" in typed("SELECT 1", "--json", "--csv", code=2)[1]
