"""Verify: whatever somebody changes behind the engine's back is found and named.

Six events in batches of two: checkpoints, and so the chain's heads, are at positions
2, 4 and 6. What the chain alone tells is the batch in which an event was changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kappa_log import Event, KappaLog, projection, verify
from kappa_log.chain import payload_digest, personal_digest
from kappa_log.errors import StorageError
from support.logs import FIELDS, append, execute, open_log

EVENTS, CHECKPOINTS = "kappa_log_events", "kappa_log_checkpoints"


@dataclass(frozen=True, slots=True)
class Sum:
    """How much of one entity."""

    total: int = 0


@projection(topics=["things"], version=1, name="sums")
def sums(state: Sum | None, event: Event) -> Sum | None:
    """Add up."""
    return Sum((state or Sum()).total + event.payload["n"])


@pytest.fixture
def log(database_url: str, tmp_path: Path) -> Any:
    """Open a log of six events of three entities, with a live view of them."""
    with open_log(database_url, tmp_path, sums, batch_size=2) as app:
        append(
            app,
            tmp_path / "things.jsonl",
            [
                {"id": who, "n": n, "at": f"2024-01-0{n}T00:00:00Z", "type": "t"}
                for n, who in enumerate("abcabc", start=1)
            ],
        )
        app.project()
        yield app


def findings(app: KappaLog, *names: str, head: str | None = None) -> dict[str, Any]:
    """Return what verify found, as what → first position."""
    report = app.verify(names=names, head=head)
    assert report.ok is (not report.findings)
    assert all(found.message for found in report.findings)
    first: dict[str, Any] = {}
    for found in report.findings:
        others = [p for p in (first.get(found.what), found.position) if p is not None]
        first[found.what] = min(others, default=None)
    return first


@contextmanager
def undone(app: KappaLog, *tables: str) -> Iterator[None]:
    """Put tables back as they were, and check that all is found well again."""
    for table in tables:
        execute(app, f"CREATE TABLE kept_{table} AS SELECT * FROM {table}")
    yield
    for table in tables:
        execute(app, f"DELETE FROM {table}")
        execute(app, f"INSERT INTO {table} SELECT * FROM kept_{table}")
        execute(app, f"DROP TABLE kept_{table}")
    assert findings(app) == {}


def test_a_log_that_nobody_touched_is_proved(log: KappaLog) -> None:
    """Nothing is found, and what was not proved is said."""
    report = log.verify(names=["sums"])

    assert (report.ok, report.findings) == (True, [])
    assert (report.position, report.events, report.checkpoints) == (6, 6, 3)
    assert report.head == log.head().digest
    assert any("kept elsewhere" in limit for limit in report.limits)


CHANGES: list[tuple[str, dict[str, int]]] = [
    (
        "payload = replace(payload, '\"n\": 3', '\"n\": 9')",
        {"checksum": 3, "chain": 3},
    ),
    ("payload = NULL", {"checksum": 3, "chain": 3}),
    ("entity_id = 'z'", {"chain": 3}),
    ("entity_id = NULL", {"chain": 3}),
    ("event_type = 'u'", {"chain": 3}),
    ("event_version = '2'", {"chain": 3}),
    ("topic = 'others'", {"chain": 3}),
    ("group_id = 'others'", {"chain": 3}),
    ('"offset" = 99', {"chain": 3}),
    ("partition = 1", {"chain": 3}),
    ("timestamp = 1", {"chain": 3}),
    ("checksum = 'feed'", {"checksum": 3, "chain": 3}),
    ("event_time = NULL", {"chain": 3}),
]


def test_what_is_as_it_should_be_is_proved_by_columns(
    log: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes a fraction of the time; rows are for finding what is wrong."""
    report = log.verify()
    pages: list[int] = []
    quick = verify._LogCheck._proved  # noqa: SLF001 - both ways are held together

    def proved(check: Any, after: int, until: int, head: bytes) -> bytes | None:
        found = quick(check, after, until, head)
        pages.append(until - after if found else 0)
        return found

    monkeypatch.setattr(verify._LogCheck, "_proved", proved)  # noqa: SLF001
    assert log.verify() == report
    assert pages == [6]

    monkeypatch.setattr(verify._LogCheck, "_proved", lambda *_: None)  # noqa: SLF001
    assert log.verify() == report


def test_an_event_that_was_changed_is_found(log: KappaLog) -> None:
    """Each column counts; an own checksum names the event, the chain its batch."""
    for change, found in CHANGES:
        with undone(log, EVENTS):
            statement = f"UPDATE {EVENTS} SET {change} WHERE position = 3"
            assert execute(log, statement) == 1
            assert findings(log) == found, change


def test_times_that_were_changed_are_found(log: KappaLog) -> None:
    """When it happened and when it was recorded are part of the chain."""
    for column in ("event_time", "recorded_at"):
        step = "1" if log.database.is_sqlite else "interval '1 microsecond'"
        move = f"UPDATE {EVENTS} SET {column} = {column} {{}} {step} WHERE position = 5"
        execute(log, move.format("+"))
        assert findings(log) == {"chain": 5}
        execute(log, move.format("-"))
        assert findings(log) == {}


def test_a_forged_payload_is_found_though_the_true_hash_is_put_beside_it(
    log: KappaLog,
) -> None:
    """Hashes stand for contents that were erased, never beside contents."""
    true = log.event(3)
    assert true.payload_text is not None
    hashes = {
        "payload": payload_digest(true.payload_text.encode()),
        "personal": personal_digest(None, None, None, true.entity_id),
    }
    execute(
        log,
        f"UPDATE {EVENTS} SET payload = '{{}}', payload_digest = :hash "
        "WHERE position = 3",
        hash=hashes["payload"],
    )
    assert findings(log)["erased"] == 3
    execute(
        log,
        f"UPDATE {EVENTS} SET payload = NULL, key = :forged, personal_digest = :hash "
        "WHERE position = 3",
        hash=hashes["personal"],
        forged=b"forged",
    )
    assert findings(log)["erased"] == 3


def test_an_event_that_was_erased_is_no_finding_but_a_limit(log: KappaLog) -> None:
    """Its hash holds its place in the chain; its contents cannot be proved."""
    text = log.event(3).payload_text
    assert text is not None
    execute(
        log,
        f"UPDATE {EVENTS} SET payload = NULL, payload_digest = :h WHERE position = 3",
        h=payload_digest(text.encode()),
    )

    assert findings(log) == {}
    assert any("1 events were erased" in limit for limit in log.verify().limits)


def test_two_events_that_changed_places_are_found(log: KappaLog) -> None:
    """Order is what the chain proves, whatever else is the same."""
    for old, new in ((4, 100), (3, 4), (100, 3)):
        execute(
            log,
            f"UPDATE {EVENTS} SET position = :new WHERE position = :old",
            old=old,
            new=new,
        )

    assert findings(log) == {"chain": 3}


def test_an_event_that_is_gone_is_found(log: KappaLog) -> None:
    """The first missing position is named, in the midst and at the end."""
    for gone, found in (("= 1", 1), ("= 3", 3), ("= 6", 6), ("> 4", 5), ("> 0", 1)):
        with undone(log, EVENTS):
            execute(log, f"DELETE FROM {EVENTS} WHERE position {gone}")
            assert findings(log) == {"log": found}


def test_a_tail_cut_with_its_head_is_found_by_the_ledger(log: KappaLog) -> None:
    """Checkpoints and offsets know more than the head tells."""
    log_at_4 = head_at(log, 4)
    execute(log, f"DELETE FROM {EVENTS} WHERE position > 4")
    execute(log, "UPDATE kappa_log_head SET position = 4, digest = :d", d=log_at_4)
    assert "ledger" in findings(log)

    execute(log, f"DELETE FROM {CHECKPOINTS} WHERE last_position > 4")
    assert findings(log) == {"ledger": None}
    report = log.verify()
    assert "offset" in report.findings[0].message


def head_at(log: KappaLog, position: int) -> bytes:
    """Return the chain's head at a checkpoint."""
    table = log.database.tables.checkpoints
    with log.database.read() as connection:
        return bytes(
            connection.scalars(
                sa.select(table.c.head).where(table.c.last_position == position)
            ).one()
        )


def test_an_event_beyond_the_head_is_found(log: KappaLog) -> None:
    """Nothing is in the log that the head does not cover."""
    execute(log, f"UPDATE {EVENTS} SET position = 8 WHERE position = 6")

    assert findings(log)["log"] in (6, 8)
    execute(log, f"UPDATE {EVENTS} SET position = 6 WHERE position = 8")
    execute(log, "UPDATE kappa_log_head SET position = 5")
    assert findings(log)["log"] == 6


LEDGER_CHANGES: list[tuple[str, dict[str, int | None]]] = [
    ("UPDATE {} SET head = :zeros WHERE last_position = 4", {"chain": 3}),
    ("UPDATE {} SET from_offset = 1 WHERE last_position = 4", {"ledger": 3}),
    ("UPDATE {} SET to_offset = 3 WHERE last_position = 2", {"ledger": 3}),
    ("UPDATE {} SET to_offset = 7 WHERE last_position = 6", {"ledger": None}),
    ("UPDATE {} SET skipped = 1 WHERE last_position = 4", {"ledger": 3}),
    ("DELETE FROM {} WHERE last_position = 2", {"ledger": 1}),
    ("DELETE FROM {} WHERE last_position = 4", {"ledger": 3}),
    ("DELETE FROM {} WHERE last_position = 6", {"ledger": 5}),
    ("UPDATE kappa_log_offsets SET next_offset = 5", {"ledger": None}),
    ("DELETE FROM kappa_log_offsets", {"ledger": None}),
    ("UPDATE kappa_log_head SET digest = :zeros", {"chain": 6}),
]


def test_a_ledger_that_was_changed_is_found(log: KappaLog) -> None:
    """Ranges adjoin, add up, cover each position once and end at the offsets."""
    for change, found in LEDGER_CHANGES:
        values = {"zeros": bytes(32)} if ":zeros" in change else {}
        with undone(log, CHECKPOINTS, "kappa_log_offsets", "kappa_log_head"):
            assert execute(log, change.format(CHECKPOINTS), **values) == 1
            assert findings(log) == found, change


def test_a_source_that_was_renamed_is_found(log: KappaLog) -> None:
    """Where an event came from is part of the chain."""
    execute(log, "UPDATE kappa_log_sources SET name = 'file:other'")

    assert findings(log) == {"chain": 1}


def test_a_checkpoint_whose_numbers_do_not_add_up_is_refused(log: KappaLog) -> None:
    """The schema itself does not take it."""
    with pytest.raises(StorageError, match=r"(?i)constraint"):
        execute(log, f"UPDATE {CHECKPOINTS} SET acked = 3 WHERE last_position = 4")


def test_a_row_of_a_view_that_was_changed_is_found(log: KappaLog) -> None:
    """A fresh fold says what the row should be."""
    build = "kappa_log_build_sums_1"
    for change in (
        f"UPDATE {build} SET total = total + 1 WHERE entity_id = 'b'",
        f"DELETE FROM {build} WHERE entity_id = 'b'",
        f"UPDATE {build} SET entity_id = 'y' WHERE entity_id = 'b'",
    ):
        with undone(log, build):
            assert execute(log, change) == 1
            assert findings(log) == {}
            assert findings(log, "sums") == {"sums": 6}, change
            assert "'b'" in log.verify(names=["sums"]).findings[0].message


def test_a_row_that_was_added_to_a_view_is_found(log: KappaLog) -> None:
    """No event made it."""
    execute(log, "INSERT INTO kappa_log_build_sums_1 VALUES ('z', 1, 1)")

    assert findings(log, "sums") == {"sums": 6}


def test_a_cursor_that_was_moved_is_found(log: KappaLog) -> None:
    """Rows belong to the position that their build is said to be at."""
    execute(log, "UPDATE kappa_log_builds SET cursor = 4")

    assert findings(log, "sums") == {"sums": 4}


def test_a_head_kept_elsewhere_catches_who_rewrites_everything(
    log: KappaLog, database_url: str, tmp_path: Path
) -> None:
    """A log that was made anew is whole in itself, and still not the one that was."""
    kept = log.head().digest
    early = head_at(log, 2).hex()
    assert findings(log, head=kept) == {}
    assert findings(log, head=early) == {}

    log.reset_database()
    append(log, tmp_path / "other.jsonl", [{"id": "a", "n": n} for n in range(6)])

    assert findings(log) == {}
    assert findings(log, head=kept) == {"head": None}
    assert findings(log, head=early) == {"head": None}
    assert findings(log, head="no hex") == {"head": None}
    assert database_url


@pytest.fixture
def mixed(log: KappaLog, tmp_path: Path) -> KappaLog:
    """The log, and two files more: one of a duplicate and a failure, one of failures.

    The duplicate and one like it were there; the latter was admitted.
    """
    known = (tmp_path / "things.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text(known[0] + "no json\n" + known[1])
    (tmp_path / "none.jsonl").write_text("no json\nneither\n")
    for name in ("some.jsonl", "none.jsonl"):
        log.ingest(tmp_path / name, topic="things", fields=FIELDS)
    log.admit(log.duplicates()[-1].id)
    assert findings(log) == {}
    assert (len(log.duplicates()), len(log.failures())) == (1, 3)
    return log


OF_SOME = (
    "source_id = (SELECT id FROM kappa_log_sources WHERE name = 'file:some.jsonl')"
)
OF_NONE = (
    "source_id = (SELECT id FROM kappa_log_sources WHERE name = 'file:none.jsonl')"
)

INCOMPLETE = [
    (f"DELETE FROM kappa_log_failures WHERE {OF_SOME}", "some.jsonl.* has 0 failures"),
    (f"DELETE FROM kappa_log_duplicates WHERE {OF_SOME}", "some.jsonl.* 0 duplicates"),
    (f"DELETE FROM {{}} WHERE {OF_NONE}", "offset of things .*none.jsonl.* end at 0"),
    (
        f"UPDATE {{}} SET failed = 0, skipped = 2 WHERE {OF_NONE}",
        "none.jsonl for group kappa-log has 2 failures, .* account for 0",
    ),
    (
        f"UPDATE {{}} SET duplicate = 0 WHERE {OF_SOME} AND kind = 'batch'",
        "some.jsonl.* has 1 duplicates, .* account for -1",
    ),
    (f"UPDATE {{}} SET failed = 9 WHERE {OF_NONE}", "accounts for 9 .*none.jsonl"),
    (f"UPDATE {{}} SET skipped = -1 WHERE {OF_NONE}", "accounts for 1 .*none.jsonl"),
    (f"UPDATE {{}} SET from_offset = 1, failed = 1 WHERE {OF_NONE}", "not at 0"),
    (f"DELETE FROM {{}} WHERE {OF_SOME} AND from_offset = 0", "not at 0"),
    (f"DELETE FROM kappa_log_offsets WHERE {OF_NONE}", "none.jsonl.* is gone"),
    (
        f'UPDATE kappa_log_failures SET "offset" = 9 WHERE {OF_NONE} AND "offset" = 1',
        "none.jsonl.* has failures up to offset 9, but was read only up to 1",
    ),
]


@pytest.mark.parametrize(("change", "message"), INCOMPLETE)
def test_a_ledger_that_is_not_complete_is_found(
    mixed: KappaLog, change: str, message: str
) -> None:
    """Whatever was read is accounted for, what became no event too; lanes are named."""
    assert execute(mixed, change.format(CHECKPOINTS)) >= 1

    report = mixed.verify()

    assert {found.what for found in report.findings} <= {"ledger"}
    assert any(re.search(message, found.message) for found in report.findings)


@pytest.mark.parametrize("column", ["first_position", "last_position", "head"])
def test_a_checkpoint_without_its_positions_or_head_is_refused(
    log: KappaLog, column: str
) -> None:
    """A check that comes to NULL would let it pass."""
    with pytest.raises(StorageError, match=r"(?i)constraint"):
        execute(log, f"UPDATE {CHECKPOINTS} SET {column} = NULL WHERE id = 2")
    assert findings(log) == {}


def unchecked(app: KappaLog, statement: str) -> None:
    """Run a statement past the schema's checks, as a damaged disk would."""
    with app.database.write() as connection:
        if app.database.is_sqlite:
            connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        else:
            name = f"{CHECKPOINTS}_positions"
            connection.exec_driver_sql(
                f"ALTER TABLE {CHECKPOINTS} DROP CONSTRAINT {name}"
            )
        connection.exec_driver_sql(statement)
        if app.database.is_sqlite:
            connection.exec_driver_sql("PRAGMA ignore_check_constraints = OFF")


@pytest.mark.parametrize(
    ("change", "position"),
    [
        ("first_position = NULL", 3),
        ("last_position = NULL", 3),
        ("head = NULL", 4),
        ("first_position = NULL, last_position = NULL, head = NULL", 3),
        ("acked = 0", 4),
        ("acked = 1", 4),
    ],
)
def test_a_checkpoint_that_lost_its_positions_is_found(
    log: KappaLog, change: str, position: int
) -> None:
    """Damage is a finding, not an error."""
    unchecked(log, f"UPDATE {CHECKPOINTS} SET {change} WHERE last_position = 4")

    assert findings(log)["ledger"] == position


DAMAGE: list[tuple[str, dict[str, int | None]]] = [
    (f"UPDATE {EVENTS} SET recorded_at = {{never}} WHERE position = 3", {"log": 3}),
    (f"UPDATE {EVENTS} SET event_time = {{never}} WHERE position = 3", {"log": 3}),
    (f"UPDATE {EVENTS} SET message_id = {{empty}} WHERE position = 3", {"chain": 3}),
    (f"UPDATE {EVENTS} SET headers = {{empty}} WHERE position = 3", {"chain": 3}),
    (f"UPDATE {CHECKPOINTS} SET recorded_at = {{never}}", {}),
    (f"UPDATE {CHECKPOINTS} SET head = {{empty}} WHERE id = 2", {"chain": 3}),
    ("UPDATE kappa_log_sources SET created_at = {never}", {}),
    ("UPDATE kappa_log_head SET recorded_at = {never}", {}),
    ("UPDATE kappa_log_head SET position = 3", {"ledger": 7, "chain": 3, "log": 6}),
    ("DELETE FROM kappa_log_head", {"log": 6, "ledger": 7}),
]

NO_TEXT: list[tuple[str, dict[str, int | None]]] = [
    (f"UPDATE {EVENTS} SET entity_id = {{}} WHERE position = 3", {"log": 3}),
    (f"UPDATE {EVENTS} SET payload = {{}} WHERE position = 6", {"log": 6}),
    (f"UPDATE {CHECKPOINTS} SET topic = {{}} WHERE id = 3", {"ledger": None}),
    ("UPDATE kappa_log_offsets SET topic = {}", {"ledger": None}),
    ("UPDATE kappa_log_sources SET name = {}", {"log": None, "chain": 1}),
]


@pytest.mark.parametrize(("change", "found"), DAMAGE)
def test_damage_is_found_not_raised(
    log: KappaLog, change: str, found: dict[str, int | None]
) -> None:
    """What cannot be read is named by its position; the rest is verified."""
    lite = log.database.is_sqlite
    never = str(2**63 - 1) if lite else "'infinity'"
    empty = "x''" if lite else "''::bytea"
    execute(log, change.format(never=never, empty=empty).replace(":", "\\:"))

    assert findings(log).items() >= found.items()
    assert bool(findings(log)) is bool(found)


@pytest.mark.parametrize(("change", "found"), NO_TEXT)
def test_bytes_that_are_no_text_are_found_not_raised(
    sqlite_url: str, tmp_path: Path, change: str, found: dict[str, int | None]
) -> None:
    """SQLite keeps what it is given; PostgreSQL refuses it."""
    with open_log(sqlite_url, tmp_path, sums, batch_size=2) as app:
        many = [{"id": "a", "n": n} for n in range(6)]
        append(app, tmp_path / "things.jsonl", many)
        app.project()
        assert execute(app, change.format("CAST(x'ff' AS TEXT)")) >= 1

        assert findings(app, "sums").items() >= found.items()


def test_a_row_of_a_view_that_cannot_be_read_is_found(
    sqlite_url: str, tmp_path: Path
) -> None:
    """The projection is named."""
    with open_log(sqlite_url, tmp_path, sums) as app:
        append(app, tmp_path / "things.jsonl", [{"id": "a", "n": 1}])
        app.project()
        build = "kappa_log_build_sums_1"
        execute(app, f"UPDATE {build} SET entity_id = CAST(x'ff' AS TEXT)")

        assert list(findings(app, "sums")) == ["sums"]


def test_a_database_that_is_gone_is_no_finding(log: KappaLog) -> None:
    """Nothing was found out about it."""
    with log.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE kappa_log_head RENAME TO gone"))

    with pytest.raises(StorageError, match="kappa_log_head"):
        verify.verify(log.database, log.registry)
