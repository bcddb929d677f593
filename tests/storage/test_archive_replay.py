"""Replays from the archive make the rows that replays from the database make."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from kappa_log import Event, KappaLog, errors, projection
from kappa_log.archive import layout, source
from support.archives import (
    SEGMENT,
    by_topic,
    contents,
    erase,
    everything,
    fill,
    open_full,
    other_kind,
    states,
)
from support.logs import START, open_log, set_bounds
from support.worlds import CASES, OLD, Case, World


@pytest.fixture
def app(database_url: str, tmp_path: Path) -> Iterator[KappaLog]:
    """A log with something of everything, half of it in the archive."""
    with open_full(database_url, tmp_path) as found:
        fill(found)
        found.export()
        fill(found, rounds=2, begin=3)
        yield found


@pytest.fixture
def apps(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[int, KappaLog]]:
    """One log a batch size, all over one database that each example empties."""
    monkeypatch.setenv("KAPPA_LOG__ARCHIVE__SEGMENT_EVENTS", "4")
    made = {n: open_log(database_url, tmp_path, batch_size=n) for n in (1, 3, 2000)}
    yield made
    for found in made.values():
        found.close()


# --- the same rows ------------------------------------------------------------------


def test_random_replays_read_the_same_from_both(
    apps: dict[int, KappaLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full, with a start, until a time; with any key, page, row group and seam."""

    def on(case: Case) -> None:
        set_bounds(
            page_events=case.page_events,
            flush_seconds=case.flush_seconds,
            patch=monkeypatch,
            MAX_INDEXED_ENTITIES=case.max_indexed,
        )
        shutil.rmtree(tmp_path / "archive", ignore_errors=True)
        world = World(apps, tmp_path, case)
        world.play(case.before, case.live_moves)
        world.live()
        world.app.export()
        world.play(case.between)
        new = world.change()
        head, model = len(world.model.events), world.model

        done = world.app.replay(world.name, source="archive", promote=False)
        assert done.build is not None
        assert world.rows(done.build) == model.rebuilt(new)
        world.app.drop_build(world.name, done.build)
        request, start = world.start()
        if not world.app.plan_replay(world.name, **request).nothing:
            live = world.status().cursor
            assert start is not None
            world.app.replay(world.name, source="archive", **request)
            touched = model.touched(start, head)
            assert world.rows() == model.replayed(OLD, new, live, touched)
        world.case = replace(case, start=("recorded", case.start[1]))
        request, first = world.start()
        until = request["since"]
        done = world.app.replay(world.name, source="archive", until=until)
        end = head if first is None else first - 1
        assert world.rows(done.build) == model.rebuilt(new, end)

    many = 8 if apps[1].database.is_sqlite else 3
    settings(
        max_examples=many,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        report_multiple_bugs=False,
    )(given(case=CASES)(on))()


@pytest.mark.parametrize("page_events", [2, 2000])
def test_each_column_of_an_event_is_the_same(
    app: KappaLog, monkeypatch: pytest.MonkeyPatch, page_events: int
) -> None:
    """Over row groups, segments and the seam, for folds that look at all of it."""
    set_bounds(page_events=page_events, flush_seconds=0.0, patch=monkeypatch)
    monkeypatch.setattr(layout, "ROW_GROUP", 3)
    shutil.rmtree(Path(app.config.folder, "archive"))
    app.export()
    fill(app, rounds=1, begin=5)
    for name in ("everything", "by_topic"):
        app.replay(name)
    before = states(app, [everything, by_topic])

    for name in ("everything", "by_topic"):
        done = app.replay(name, source="archive")
        assert (done.added, done.removed, done.changed) == (0, 0, 0)
        assert done.to_position == app.head().position

    assert states(app, [everything, by_topic]) == before


def test_an_interrupted_replay_goes_on_from_the_archive(app: KappaLog) -> None:
    """Where it reads is kept with it."""
    fails = [True]

    @projection(topics=["orders"], groups=["billing"], version=1)
    def brittle(state: int | None, event: Event) -> int:
        if event.position > 8 and fails:
            raise KeyboardInterrupt
        return (state or 0) + event.position

    app.registry.add(brittle)
    with pytest.raises(KeyboardInterrupt):
        app.replay("brittle", source="archive")
    (left,) = app.replays(unfinished=True)
    assert left.request["source"] == "archive"
    archive = Path(app.config.folder, "archive")
    archive.rename(archive.with_name("away"))
    with pytest.raises(errors.ArchiveMissing):
        app.resume(left.id)
    archive.with_name("away").rename(archive)
    fails.clear()

    assert app.resume(left.id).outcome == "promoted"

    assert app.verify(names=["brittle"]).findings == []


def test_a_kept_shadow_is_promoted_without_the_archive(app: KappaLog) -> None:
    """What is left to fold then is read from the database."""
    app.replay("everything", source="archive", promote=False)
    shutil.rmtree(Path(app.config.folder, "archive"))

    assert app.promote("everything").promoted
    assert app.replays()[0].request["source"] == "sql"


# --- what cannot be read -------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_a_damaged_segment_stops_a_replay(app: KappaLog, damage: str) -> None:
    """Never is it folded as if it were empty; the live rows stay as they are."""
    app.project()
    before = states(app, [everything])
    segment = app.archive().manifest.segments[2]
    path = Path(app.config.folder, "archive", segment.path)
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        broken = bytearray(data)
        broken[len(data) // 3] ^= 4
        path.write_bytes(broken if damage == "flipped" else data[: len(data) // 2])

    with pytest.raises(errors.ArchiveDamaged, match=segment.path) as caught:
        app.replay("everything", source="archive")

    assert "kappa-log" in str(caught.value) or "Put it back" in str(caught.value)
    assert states(app, [everything]) == before
    (left,) = app.replays(unfinished=True)
    path.write_bytes(data)
    assert app.resume(left.id).promoted
    assert states(app, [everything]) == before


def test_a_file_is_proved_again_once_somebody_touched_it(app: KappaLog) -> None:
    """Whoever reads it by itself asks for it before and after."""
    with app.database.read() as connection:
        opened = source.open_source(connection, app.database, app.archive())
    with contextlib.closing(opened):
        file = opened.file(0)
        path = Path(file.path())
        data = path.read_bytes()
        path.write_bytes(data)
        assert file.path() == str(path)

        path.write_bytes(data[:-1])
        for _ in range(2):
            with pytest.raises(errors.ArchiveDamaged, match=path.name):
                file.path()
        file = opened.file(1)
        path = Path(file.path())
        path.unlink()
        with pytest.raises(errors.ArchiveDamaged, match="missing"):
            file.path()


def test_segments_of_other_topics_are_not_read(
    app: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says which topics are in a segment."""
    opened: list[int] = []
    real = source.ArchiveSource.opened

    def noted(self: Any, index: int) -> Any:
        opened.append(index)
        return real(self, index)

    monkeypatch.setattr(source.ArchiveSource, "opened", noted)

    @projection(topics=["rides"], version=1)
    def riders(state: int | None, _: Event) -> int:
        return (state or 0) + 1

    app.registry.add(riders)
    segments = app.archive().manifest.segments
    with_rides = {
        n for n, s in enumerate(segments) if ("rides", "kappa-log") in s.lanes
    }
    assert len(with_rides) < len(segments)

    app.replay("riders", source="archive")

    assert set(opened) == with_rides
    assert app.verify(names=["riders"]).findings == []


def test_what_is_no_archive_of_this_log_is_refused_before_anything_is_written(
    app: KappaLog, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """No replay begins: there is none to resume or to cancel."""
    archive = tmp_path / "archive"
    with other_kind(request, app.config.database.url, tmp_path / "other") as other:
        for act in ("replay", "ahead"):
            with pytest.raises(errors.ArchiveMissing, match="kappa-log export"):
                other.replay("everything", source="archive")
            shutil.copytree(archive, tmp_path / "other" / "archive")
            if act == "ahead":
                fill(other, rounds=4, begin=9)
            with pytest.raises(errors.ArchiveDiverged):
                other.replay("everything", source="archive")
            shutil.rmtree(tmp_path / "other" / "archive")
            assert other.replays() == []
            assert other.projection("everything").builds == []


def test_an_archive_from_before_an_erasure_is_not_folded(app: KappaLog) -> None:
    """It still holds what must not be seen again."""
    app.project()
    erase(app, 1)
    for ask in (app.plan_replay, app.replay):
        with pytest.raises(errors.ArchiveDiverged, match="kappa-log export"):
            ask("everything", source="archive")

    app.export()
    app.replay("everything", source="archive")
    rows = states(app, [everything])
    app.replay("everything")

    assert states(app, [everything]) == rows


def test_a_start_is_resolved_and_refolded_from_the_archive(app: KappaLog) -> None:
    """With few keys and with many, up to the live cursor and on from there."""
    app.project()
    fill(app, rounds=1, begin=7)
    head = app.head().position

    for request in (
        {"from_position": head},
        {"from_position": SEGMENT + 2},
        {"since": START + timedelta(hours=20)},
    ):
        done = app.replay("everything", source="archive", **request)
        assert (done.kind, done.promoted) == ("since", True)

    rows = states(app, [everything])
    app.replay("everything")
    assert states(app, [everything]) == rows
    assert contents(app)["kappa_log_head"][0][1] == head
