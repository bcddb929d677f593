"""Import of Phobos DB Checkpoint's tables: all of them, as they were, once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.errors import ConfigError, SourceDiverged, SourceError
from kappa_log.phobos import importer
from kappa_log.phobos.importer import PhobosReport
from support.kinds import on_both
from support.logs import open_log
from support.phobos import Old, old_json
from support.processes import Worker

ORDER = '{"id":7, "note":"<a> & b"}'


@pytest.fixture
def old(url: str, tmp_path: Path) -> Iterator[Old]:
    """Give an old database without rows, of the log's kind."""
    made = Old(url, tmp_path)
    yield made
    made.close()


@pytest.fixture
def app(url: str, tmp_path: Path) -> Iterator[KappaLog]:
    """Give an empty log."""
    with open_log(url, tmp_path) as made:
        yield made


def imported(app: KappaLog, old: Old, **how: Any) -> PhobosReport:
    """Import, and check that nothing is otherwise than it was."""
    report = app.import_phobos(old.url, source="shop", **how)
    assert report.problems == []
    assert app.verify().findings == []
    return report


@on_both
def test_a_row_keeps_what_it_was(app: KappaLog, old: Old) -> None:
    """SEED D2, D4, F8, F15, H8, H13: columns, old checksum, the received bytes.

    And a failure whose payload is plain JSON text can be shown, as it could not (F16).
    """
    old.event(ORDER)
    old.failure(ORDER)

    report = imported(app, old)

    (event,) = app.events()
    assert event.payload_text == ORDER
    assert event.payload == {"id": 7, "note": "<a> & b"}
    assert (event.topic, event.group_id, event.entity_id) == ("orders", "billing", "7")
    assert (event.event_type, event.event_version) == ("placed", "1")
    assert event.event_time == datetime(2019, 3, 1, 10, 0, 0, 500_000, UTC)
    assert event.recorded_at == datetime(2019, 3, 1, 10, 0, 1, 250_000, UTC)
    told = old_json(ORDER).encode()
    assert event.checksum == md5(told, usedforsecurity=False).hexdigest()
    assert app.sources()[event.source_id] == "phobos:shop/events"
    assert (event.partition, event.offset) == (0, 1)
    assert report.tables[0].proved == 1
    (kept,) = app.failures()
    assert kept.value == ORDER.encode()
    assert (kept.error_class, kept.error_message) == ("RuntimeError", "boom")
    assert kept.error_backtrace == ["a.rb:1:in `consume'", "b.rb:2"]
    assert kept.metadata["offset"] == 77
    assert (kept.key, kept.headers) == (b"k1", [("origin", b"till")])
    assert (kept.entity_id, kept.attempts, kept.parked) == ("7", 3, False)
    assert kept.first_at == datetime(2019, 3, 1, 10, 0, 1, 250_000, UTC)


def test_rows_that_take_turns_cost_one_checkpoint_a_batch_and_lane(
    app: KappaLog, old: Old
) -> None:
    """A row of the ledger each would be slow; of an hour, order across lanes gives."""
    rows = [
        old.row(json.dumps({"n": n})) | {"group_id": f"g{n % 2}"} for n in range(600)
    ]
    old.put_many("events", rows)

    imported(app, old)

    found = [e.payload["n"] for e in app.events(oldest_first=True, limit=600)]
    first, last = range(importer.BATCH_ROWS), range(importer.BATCH_ROWS, 600)
    assert found == [*first[::2], *first[1::2], *last[::2], *last[1::2]]
    assert app.verify().checkpoints == 4


def test_rows_more_than_an_hour_apart_come_in_the_order_of_their_ids(
    app: KappaLog, old: Old
) -> None:
    """So each is recorded when it was, give or take that hour."""
    for number in range(6):
        topic = "orders" if number % 2 else "refunds"
        at = f"2020-01-01 {2 * number:02}:00:00"
        old.event(json.dumps({"n": number}), topic=topic, created_at=at)

    imported(app, old)

    found = app.events(oldest_first=True)
    assert [e.payload["n"] for e in found] == list(range(6))
    assert [e.recorded_at.hour for e in found] == list(range(0, 12, 2))


@on_both
def test_a_payload_that_is_no_utf_8_is_kept_byte_for_byte(
    app: KappaLog, old: Old
) -> None:
    """One odd row must not block all the others; it is told before and after."""
    if old.is_sqlite:
        for table in ("events", "failures"):
            old.put(table, old.row(None) | {"payload": b"\xff\xfe\0"})
    else:
        for table in ("events", "failures"):
            old.run(
                f"ALTER TABLE phobos_db_checkpoint_{table} "
                "ALTER payload TYPE BYTEA USING NULL"
            )
            old.run(
                f"INSERT INTO phobos_db_checkpoint_{table} (topic, group_id, payload) "
                "VALUES ('orders', 'billing', '\\xfffe00'), ('orders', 'billing', '{}')"
            )

    planned = app.import_phobos(old.url, source="shop", dry_run=True)
    report = imported(app, old)

    for told in (planned, report):
        assert [str(table.not_utf8) for table in told.tables] == ["1", "1"]
    event = app.events(oldest_first=True)[0]
    assert (event.raw, event.payload) == (b"\xff\xfe\0", "//4A")
    assert app.failures()[-1].value == b"\xff\xfe\0"


def test_no_text_of_an_old_row_stops_the_import(
    sqlite_url: str, tmp_path: Path
) -> None:
    """SQLite holds any bytes in any column; what is kept of them is what can be."""
    old = Old(sqlite_url, tmp_path)
    bad = sa.text(
        "INSERT INTO phobos_db_checkpoint_events (topic, group_id, entity_id, payload)"
        " VALUES (CAST(x'6fff' AS TEXT), x'6700', x'ff', CAST(x'7b22ff227d' AS TEXT)),"
        " ('orders', 'billing', '1', CAST(x'22ff22' AS TEXT))"
    )
    with old.engine.begin() as connection:
        connection.execute(bad)
    deep = "[" * 100_000
    old.failure(ORDER, error_backtrace=deep, metadata=deep, checksum="\0")

    with open_log(sqlite_url, tmp_path) as app:
        planned = app.import_phobos(old.url, source="shop", dry_run=True)
        report = imported(app, old)

        events = report.tables[0]
        assert (str(events.not_utf8), str(events.no_events)) == ("1, 2", "1")
        assert planned.tables[0].no_events == events.no_events
        assert app.events()[0].raw == b'"\xff"'
        refused = next(f for f in app.failures() if f.value == b'{"\xff"}')
        assert (refused.topic, refused.group_id) == ("o\ufffd", "g\ufffd")
        assert "entity_id contains a lone surrogate" in (refused.error_message or "")
    old.close()


@on_both
def test_what_is_null_or_no_json_is_kept_all_the_same(app: KappaLog, old: Old) -> None:
    """SEED D2 (all columns nullable), D5, H9, H12, H13: tombstones, text, objects."""
    nothing = dict.fromkeys(old.row(None))
    old.put("events", nothing)
    old.put("events", nothing)
    old.event("plain text, no JSON")
    old.put("events", old.row(None) | {"payload": '{"a": 1}', "checksum": "x"})

    report = imported(app, old)

    null, again, text, decoded = app.events(oldest_first=True)
    assert (null.payload_text, null.topic, null.checksum) == (None, "", None)
    assert null.recorded_at == datetime(1970, 1, 1, tzinfo=UTC)
    assert again.payload_text is None
    assert (text.payload, text.raw) == ("plain text, no JSON", b"plain text, no JSON")
    assert (decoded.payload, decoded.checksum) == ({"a": 1}, "x")
    assert (report.tables[0].proved, report.tables[0].unproved) == (3, 1)


def test_recorded_at_never_falls(app: KappaLog, old: Old) -> None:
    """`replay --since` finds the first position of a time by halving."""
    for day in (3, 1, 2):
        old.event(json.dumps({"day": day}), created_at=f"2020-01-0{day} 00:00:00")

    imported(app, old)

    assert [e.recorded_at.day for e in app.events(oldest_first=True)] == [3, 3, 3]


def test_a_message_that_was_kept_twice_is_an_event_and_a_duplicate(
    app: KappaLog, old: Old
) -> None:
    """SEED H15: nothing backed the old promise; the second one is not lost."""
    old.event(ORDER)
    old.event(ORDER)

    report = imported(app, old)

    assert (report.tables[0].events, report.tables[0].duplicates) == (1, 1)
    (duplicate,) = app.duplicates()
    assert (duplicate.repeats, duplicate.offset) == (1, 2)


@on_both
def test_what_was_imported_is_recognised_when_it_comes_again(
    app: KappaLog, old: Old, tmp_path: Path
) -> None:
    """SEED H6: who reads the topic from its beginning keeps nothing twice."""
    old.event(ORDER)
    imported(app, old)
    file = tmp_path / "again.jsonl"
    file.write_text(ORDER + "\n" + '{"id":8}\n')

    report = app.ingest(file, topic="orders", group="billing")

    counts = report.counts
    assert (counts.acked, counts.duplicate, counts.failed) == (1, 1, 0)


def test_what_the_log_cannot_keep_as_an_event_is_a_failure(
    app: KappaLog, old: Old
) -> None:
    """It is told, counted and kept; nothing is dropped."""
    old.event(ORDER, entity_id="x" * 2000)

    report = imported(app, old)

    assert (report.tables[0].events, report.tables[0].failures) == (0, 1)
    (kept,) = app.failures()
    assert kept.error_message == "entity_id has 2000 bytes; at most 1024 are indexed"


@on_both
def test_importing_again_brings_what_came_since_and_nothing_else(
    app: KappaLog, old: Old
) -> None:
    """The first run may be a rehearsal while the old system is at work."""
    old.event(ORDER)
    old.failure(ORDER)
    imported(app, old)
    old.event('{"id":8}')

    plan = app.import_phobos(old.url, source="shop", dry_run=True)
    again = imported(app, old)

    assert [(t.before, t.rows) for t in plan.tables] == [(1, 1), (1, 0)]
    assert [(t.before, t.rows, t.compared) for t in again.tables] == [
        (1, 1, 2),
        (1, 0, 1),
    ]
    assert app.head().position == 2


def test_a_row_that_came_late_or_changed_is_named(app: KappaLog, old: Old) -> None:
    """Ids are drawn before rows are committed: a late one lies behind the last."""
    old.event('{"id":1}', id=1)
    old.event('{"id":3}', id=3)
    imported(app, old)
    old.event('{"id":2}', id=2)
    old.run("UPDATE phobos_db_checkpoint_events SET checksum = 'y' WHERE id = 1")

    report = app.import_phobos(old.url, source="shop")

    assert not report.ok
    differing, missing = report.problems
    assert differing == "events, rows 1: in the log with another checksum or payload"
    assert missing.startswith("events, rows 2: not in the log: committed after later")


def test_another_database_of_the_same_name_is_refused(app: KappaLog, old: Old) -> None:
    """Else it would be taken for the one that was imported, and half left out."""
    old.event(ORDER)
    imported(app, old)
    old.run("UPDATE phobos_db_checkpoint_events SET checksum = 'other'")

    with pytest.raises(SourceDiverged, match="--source NAME"):
        app.import_phobos(old.url, source="shop")


HANDLER = """
from kappa_log import Handler, ack

TOLD = []

class Orders(Handler):
    def consume(self, payload, metadata):
        TOLD.append(metadata)
        return ack(payload["id"], None)
"""


def test_a_failure_is_retried_with_what_its_handler_was_told_then(
    sqlite_url: str, tmp_path: Path
) -> None:
    """SEED R2: the stored metadata; and the event that it becomes is one (R4, R10)."""
    (tmp_path / "handlers_of_old.py").write_text(HANDLER)
    (tmp_path / "kappa_log.toml").write_text(
        '[[listeners]]\ntopic = "orders"\ngroup_id = "billing"\n'
        'handler = "handlers_of_old:Orders"\n'
    )
    old = Old(sqlite_url, tmp_path)
    old.failure(ORDER)
    with open_log(sqlite_url, tmp_path) as app:
        imported(app, old)

        done = app.retry_failure(1)

        (told,) = sys.modules["handlers_of_old"].TOLD
        assert (told.listener_id, told.checksum) == ("abc123", "c")
        assert (told.partition, told.offset, told.key) == (3, 77, b"k1")
        assert (done.outcome, app.failures()) == ("acked", [])
        assert app.events()[0].payload_text == ORDER
        old.failure('{"id":9}')
        imported(app, old)
        app.discard_failure(app.failures()[0].id, reason="a test order")
        again = imported(app, old)
        assert (again.tables[1].compared, again.tables[1].settled) == (1, 1)


@on_both
def test_an_import_that_is_killed_goes_on(
    url: str, app: KappaLog, old: Old, tmp_path: Path
) -> None:
    """Whatever was in flight comes once, in order."""
    rows = [
        old.row(json.dumps({"n": number})) | {"topic": f"t{number // 700 % 2}"}
        for number in range(3 * importer.BATCH_ROWS)
    ]
    old.put_many("events", rows)
    task = {"url": url, "folder": str(tmp_path), "old": old.url}
    with Worker(work="import_phobos", pause=True, **task) as worker:
        worker.wait_for("paused")
        worker.go_on()
        assert worker.kill()

    before = app.head().position
    report = imported(app, old)

    assert before >= importer.BATCH_ROWS
    assert report.tables[0].before + report.tables[0].rows == len(rows)
    found = app.events(oldest_first=True, limit=len(rows))
    assert [e.payload["n"] for e in found] == list(range(len(rows)))


def test_the_old_file_is_not_changed(sqlite_url: str, tmp_path: Path) -> None:
    """Not a byte: it may be all that is left of the old system."""
    old = Old(sqlite_url, tmp_path)
    old.event(ORDER)
    old.close()
    file = tmp_path / "shop_events.db"
    before = file.read_bytes()

    with open_log(sqlite_url, tmp_path) as app:
        report = app.import_phobos(old.url)

    assert report.tables[0].source == "phobos:shop_events/events"
    assert file.read_bytes() == before
    assert sorted(f.name for f in tmp_path.glob("shop_events*")) == [file.name]


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("mysql://somebody:secret@host/shop", ConfigError, "this is neither"),
        ("no url", ConfigError, "this is neither"),
        ("sqlite:///{folder}/none.db", SourceError, "unable to open .*; nothing was"),
        ("sqlite:///{folder}/log.db", SourceError, "has no tables .*; nothing was"),
    ],
)
def test_a_database_that_is_none_of_the_old_system_is_refused(
    sqlite_url: str, tmp_path: Path, url: str, error: type[Exception], words: str
) -> None:
    """Nothing is imported, and no secret shown."""
    with open_log(sqlite_url, tmp_path) as app:
        with pytest.raises(error, match=words) as raised:
            app.import_phobos(url.format(folder=tmp_path))

        assert "secret" not in str(raised.value)
        assert app.head().position == 0


def test_tables_of_the_first_version_are_found(sqlite_url: str, tmp_path: Path) -> None:
    """SEED D1, D5: no prefix, and no created_at of events yet."""
    old = Old(sqlite_url, tmp_path)
    old.event(ORDER)
    for table in ("events", "failures"):
        old.run(f"ALTER TABLE phobos_db_checkpoint_{table} RENAME TO {table}")
    old.run("ALTER TABLE events DROP COLUMN created_at")
    old.close()

    with open_log(sqlite_url, tmp_path) as app:
        imported(app, old)
        assert app.events()[0].recorded_at == datetime(1970, 1, 1, tzinfo=UTC)


def test_rows_are_read_a_page_at_a_time(
    app: KappaLog, old: Old, monkeypatch: Any
) -> None:
    """Memory is bounded, whatever the table holds."""
    monkeypatch.setattr(importer, "BATCH_ROWS", 2)
    for number in range(5):
        old.event(json.dumps({"n": number}))
    steps: list[tuple[str, int]] = []

    imported(
        app, old, on_progress=lambda found: steps.append((found.phase, found.done))
    )

    assert steps[:3] == [("events", 2), ("events", 4), ("events", 5)]


KEPT = "{rows} of its rows are in the log, and the same command goes on after them"


@pytest.mark.parametrize(
    ("pages", "state"),
    [
        (1, KEPT),
        (0, "nothing was imported"),
    ],
)
def test_who_interrupts_or_loses_the_old_database_is_told_what_is_kept(
    app: KappaLog, old: Old, monkeypatch: Any, pages: int, state: str
) -> None:
    """Neither more nor less; and that the same command goes on."""
    monkeypatch.setattr(importer, "BATCH_ROWS", 2)
    for number in range(5):
        old.event(json.dumps({"n": number}))

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    def dropped(_: Any) -> None:
        old.run("DROP TABLE IF EXISTS phobos_db_checkpoint_failures")

    with pytest.raises(KeyboardInterrupt) as stop:
        app.import_phobos(old.url, dry_run=not pages, on_progress=interrupted)
    with pytest.raises(SourceError, match="no such table") as lost:
        app.import_phobos(old.url, dry_run=not pages, on_progress=dropped)

    assert stop.value.__notes__ == [state.format(rows=2)]
    assert str(lost.value).endswith(f"; {state.format(rows=5)}")
