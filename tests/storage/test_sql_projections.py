"""SQL projections are projections: live, replayed, compared, promoted, verified."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kappa_log import KappaLog, ProjectionError, sql_projection, sqlfold
from kappa_log.archive import source
from kappa_log.project import Runner
from kappa_log.sqlfold import SqlProjection
from kappa_log.storage import builds
from support.archives import fill, open_full
from support.logs import append, execute, open_log, rows, set_bounds

SUMS = {
    "events": "count(*)",
    "total": "sum((payload->>'n')::BIGINT)",
    "share": "sum((payload->>'x')::DOUBLE)",
    "cash": "sum((payload->>'c')::DECIMAL(9, 2))",
    "first": "min(event_time)",
    "label": "last(payload->>'s')",
}

COLUMNS = {
    "events": "count(*)",
    "source": "max(source_id)",
    "place": 'max("offset")',
    "sent": 'max("timestamp")',
    "id": "min(message_id)",
    "whose": "min(key)",
    "bytes": "min(raw)",
    "at": "max(event_time)",
    "kept_at": "min(recorded_at)",
    "type": "min(event_type || event_version)",
    "who": "min(entity_id)",
    "sum": "min(checksum)",
    "n": "max(payload->>'n')",
}
"""Something of each column of an event but its headers."""


def declared(version: int = 1, key: Any = None, **columns: str) -> SqlProjection:
    """Return the projection under test."""
    return sql_projection(
        name="sums",
        version=version,
        topics=["things"],
        key=key,
        columns=SUMS | columns,
    )


def objects(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return that many objects of five entities and none."""
    choose = random.Random(seed)
    return [
        {
            "id": choose.choice([*"abcde", None]),
            "at": f"2024-01-{1 + number % 28:02d}T00:00:00Z",
            "n": choose.randrange(-9, 9),
            "x": choose.uniform(-1e6, 1e6),
            "c": f"{choose.randrange(-999, 999) / 100:.2f}",
            "s": choose.choice(["", "ä", None]),
            "seed": seed * 1000 + number,
        }
        for number in range(count)
    ]


@pytest.fixture
def log(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KappaLog]:
    """Open a log with a live build that was folded in many small batches."""
    monkeypatch.setattr(SqlProjection, "pages_at_once", 1)
    set_bounds(page_events=7, flush_seconds=0, patch=monkeypatch)
    with open_log(database_url, tmp_path, declared()) as app:
        for seed in (1, 2, 3):
            append(app, tmp_path / "things.jsonl", objects(20, seed))
            app.project()
        yield app


def exact(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without the sums of floats."""
    return [{n: v for n, v in row.items() if n != "share"} for row in found]


def test_live_rows_are_those_of_a_replay_and_of_sql(log: KappaLog) -> None:
    """However they were folded; the hidden column is in no view and no row."""
    live = rows(log, "sums")
    report = log.replay("sums", promote=False)
    by_hand = log.sql(
        "SELECT entity_id, count(*) AS events, "
        "sum((payload->>'n')::BIGINT)::BIGINT AS total, "
        "sum((payload->>'c')::DECIMAL(9, 2)) AS cash, min(event_time) AS first, "
        "arg_max_null(payload->>'s', position) AS label "
        "FROM events WHERE entity_id IS NOT NULL GROUP BY 1 ORDER BY 1"
    )

    assert (report.added, report.removed, report.changed) == (0, 0, 0)
    assert report.events == 60
    assert exact(rows(log, "sums", report.build)) == exact(live)
    assert by_hand is not None
    assert exact(live) == by_hand.to_arrow_table().to_pylist()
    assert list(live[0]) == ["entity_id", *SUMS]
    with log.database.read() as connection:
        view = connection.execute(sa.text("SELECT * FROM kappa_log_view_sums"))
        assert list(view.keys()) == ["entity_id", *SUMS]


def test_it_is_replayed_from_an_archive_and_over_its_end(
    log: KappaLog, tmp_path: Path
) -> None:
    """Columns come as Arrow has them from files, as Python has them past these."""
    log.export()
    append(log, tmp_path / "things.jsonl", objects(9, 4))
    log.project()

    report = log.replay("sums", source="archive", promote=False)

    assert (report.events, report.changed) == (69, 0)
    assert exact(rows(log, "sums", report.build)) == exact(rows(log, "sums"))


def test_files_give_the_rows_that_the_database_gives(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From each column in each form, for its topics and groups, over segments."""
    folds = [
        sql_projection(
            name=name,
            version=1,
            topics=["orders"],
            groups=["billing"],
            key=["topic", '"partition"'],
            columns=COLUMNS | more,
        )
        for name, more in {
            "typed": {},
            "texts": {"body": "last(payload) FILTER (WHERE position < 20)"},
            "named": {"headers": "sum(len(headers))"},
        }.items()
    ]
    folder = tmp_path / "it's [1] *?"
    folder.mkdir()
    set_bounds(page_events=3, flush_seconds=9, patch=monkeypatch)
    monkeypatch.setattr(SqlProjection, "pages_at_once", 1)
    monkeypatch.setattr(sqlfold, "WAITING_POSITIONS", 10)
    proved: list[int] = []
    real = source.ArchiveSource.prove

    def noted(self: source.ArchiveSource, index: int) -> None:
        proved.append(index)
        real(self, index)

    monkeypatch.setattr(source.ArchiveSource, "prove", noted)
    with open_full(database_url, folder) as app:
        fill(app)
        app.export()
        fill(app, rounds=1, begin=3)
        for fold in folds:
            app.registry.add(fold)
            app.replay(fold.name)
            proved.clear()

            report = app.replay(fold.name, source="archive", promote=False)

            assert len(set(proved)) == len(proved)
            assert bool(proved) == (fold.name != "named")
            assert (report.added, report.removed, report.changed) == (0, 0, 0)
            assert rows(app, fold.name, report.build) == rows(app, fold.name) != []


def test_what_is_folded_within_a_transaction_counts_what_has_no_key(
    log: KappaLog, tmp_path: Path
) -> None:
    """As a swap folds its last events; the count is stored before the rows are."""
    database, before = log.database, log.projection("sums").live
    assert before is not None
    append(log, tmp_path / "things.jsonl", [*objects(9, 4), {"id": None, "n": 1}])
    without = sum(event.entity_id is None for event in log.events(limit=10))

    with database.write() as connection:
        build = builds.in_role(connection, database, "sums", "live")
        assert build is not None
        runner = Runner(database, build, log.registry.latest("sums"), log.now)
        runner.fold_within(connection, log.head().position)

    after = log.projection("sums").live
    assert after is not None
    assert after.unkeyed - before.unkeyed == without > 0
    assert log.verify(names=["sums"]).ok


def test_it_is_replayed_from_a_start_promoted_undone_explained_and_verified(
    log: KappaLog, tmp_path: Path
) -> None:
    """As any other projection."""
    before = exact(rows(log, "sums"))

    report = log.replay("sums", from_position=50)
    assert report.promoted
    assert report.changed == 0
    assert 0 < report.keys <= 5
    assert exact(rows(log, "sums")) == before
    log.undo("sums")
    append(log, tmp_path / "things.jsonl", objects(9, 4))
    (folded,) = log.project()
    assert folded.events == 9
    history = list(log.explain("sums", "a"))
    (row,) = log.rows("sums", key="a")
    assert exact([{"entity_id": "a"} | (history[-1].state or {})]) == exact([row])
    assert len(history) == row["events"]
    assert log.verify(names=["sums"]).ok


def test_sums_of_floats_may_differ_in_their_last_digits_alone(log: KappaLog) -> None:
    """By the rule, for them alone: diff and verify look away for nothing else."""
    build = log.replay("sums", promote=False).build
    table = f"kappa_log_build_sums_{build}"

    execute(log, f"UPDATE {table} SET share = share + _magnitude_1 * 5e-10")
    assert log.diff("sums").total == 0
    log.promote("sums")
    assert log.verify(names=["sums"]).ok

    execute(log, f"UPDATE {table} SET share = share + _magnitude_1 * 5e-9")
    assert log.diff("sums").changed == 5
    assert not log.verify(names=["sums"]).ok

    execute(log, f"UPDATE {table} SET share = share - _magnitude_1 * 5e-9")
    execute(log, f"UPDATE {table} SET total = total + 1 WHERE entity_id = 'b'")
    assert log.diff("sums").changed == 1
    (finding,) = log.verify(names=["sums"]).findings
    assert "'b'" in finding.message


def test_changed_texts_are_replayed_and_compared(log: KappaLog) -> None:
    """An expression is code: the build waits, and a replay with a start may do."""
    log.registry.add(declared(2, total="sum((payload->>'n')::BIGINT * 2)"))

    (waiting,) = log.project()
    assert waiting.waiting is None
    report = log.replay("sums", promote=False)
    assert report.changed == 5
    assert log.replay("sums", from_position=1).promoted
    log.registry.add(declared(3, "payload->>'s'"))
    report = log.replay("sums", max_changed="100%", promote=False)
    assert report.added == 2
    assert [row["key"] for row in rows(log, "sums", report.build)] == ["", "ä"]


def test_an_event_that_cannot_be_folded_stops_it_there(
    log: KappaLog, tmp_path: Path
) -> None:
    """All before is written, the position is named, and live rows are good."""
    bad = {"id": "a", "n": "no number"}
    append(log, tmp_path / "things.jsonl", [*objects(3, 5), bad, *objects(3, 6)])

    with pytest.raises(ProjectionError, match="Could not convert") as caught:
        log.project()

    assert caught.value.position == 64
    assert [found.cursor for found in log.cursors()] == [63]
    with pytest.raises(ProjectionError, match="position 64"):
        log.replay("sums")
    log.cancel(log.replays(unfinished=True)[0].id)
    log.export()
    with pytest.raises(ProjectionError, match="position 64"):
        log.replay("sums", source="archive")
    assert log.verify(names=["sums"]).ok
