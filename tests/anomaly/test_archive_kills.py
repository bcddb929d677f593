"""Kills while an archive is written, read in, and replayed from; and full disks.

Whatever a killed process leaves behind, the archive is one that can be read, and the
next process makes of it what one would have made that nobody disturbed.
"""

from __future__ import annotations

import gzip
import resource
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kappa_log import KappaLog, errors
from support.archives import contents, files
from support.logs import open_log, rows
from support.processes import Worker
from support.purchases import OLD, TOPIC, folded, registered
from support.worker import FIELDS

pytestmark = pytest.mark.usefixtures("uncovered")

LINES = 6_000
BEFORE = 2_500


@pytest.fixture(scope="module")
def lines(cdnow: Path) -> list[str]:
    """Return the first purchases of CDNOW."""
    with gzip.open(cdnow, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in islice(file, LINES)]


@pytest.fixture
def log(database_url: str, tmp_path: Path, lines: list[str]) -> Iterator[KappaLog]:
    """A log of which the first part is in the archive."""
    (tmp_path / "kappa_log.toml").write_text("[archive]\nsegment_events = 1000\n")
    with open_log(database_url, tmp_path, *registered([1])) as app:
        take(app, lines[:BEFORE])
        app.export()
        take(app, lines[BEFORE:])
        yield app


def take(app: KappaLog, lines: list[str]) -> None:
    """Ingest lines."""
    file = app.config.folder / "purchases.jsonl"
    with file.open("a", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in lines)
    app.ingest(file, topic=TOPIC, fields=FIELDS)


@pytest.fixture
def task(database_url: str, tmp_path: Path) -> dict[str, Any]:
    """Return what every worker must be told."""
    return {"url": database_url, "folder": str(tmp_path)}


def test_a_killed_export_leaves_the_archive_that_was(
    log: KappaLog, task: dict[str, Any], tmp_path: Path
) -> None:
    """Between a file and its name, wherever; what was ready is not made again."""
    archive = tmp_path / "archive"
    before = files(archive)
    for die_at in (0, 3, 7):
        with Worker(**task, work="export", die_at=die_at) as worker:
            assert worker.died() == -signal.SIGKILL
        left = files(archive)
        assert {path: left[path] for path in before} == before
        assert log.archive().manifest.position == BEFORE
        assert log.verify_archive().findings == []
    assert any(path.endswith(".tmp") for path in files(archive))

    done = log.export()

    assert (done.position, log.verify_archive().findings) == (LINES, [])
    assert 0 < done.segments_written < 4
    kept = files(archive)
    log.export(str(tmp_path / "fresh"))
    assert kept == files(tmp_path / "fresh")


def test_a_killed_import_leaves_an_empty_log(
    log: KappaLog,
    task: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    database_url: str,
) -> None:
    """All of it comes in, or nothing; then it can be imported again."""
    log.export()
    kind = "postgresql_url" if database_url.startswith("sqlite") else "sqlite_url"
    task |= {"url": request.getfixturevalue(kind), "folder": str(tmp_path / "other")}
    (tmp_path / "other").mkdir()
    task |= {"work": "import", "archive": str(tmp_path / "archive")}
    with open_log(task["url"], tmp_path / "other", *registered([1])) as other:
        empty = contents(other)
        for steps in (2, 20):
            with Worker(**task, tell=True) as worker:
                worker.watch(steps)
                assert worker.kill()
            assert contents(other) == empty

        with Worker(**task) as worker:
            done = worker.result()

        assert done == {"position": LINES, "head": log.head().digest}
        assert contents(other) == contents(log)
        assert other.verify().findings == []
        other.project()
        log.project()
        assert rows(other, OLD.name) == rows(log, OLD.name)


def test_killed_replays_from_the_archive_resume(
    log: KappaLog, task: dict[str, Any], lines: list[str]
) -> None:
    """To the rows that a plain loop makes, over the seam into the database."""
    task |= {"page_events": 100, "tell": True}
    request = {"source": "archive"}
    with Worker(**task, work="replay", request=request) as worker:
        worker.watch(12)
        assert worker.kill()
    for steps in (5, 20):
        (left,) = log.replays(OLD.name, unfinished=True)
        with Worker(**task, work="resume", id=left.id) as worker:
            worker.watch(steps)
            assert worker.kill()
    task["tell"] = False
    (left,) = log.replays(OLD.name, unfinished=True)
    with Worker(**task, work="resume", id=left.id) as worker:
        assert worker.result() == {"outcome": "promoted"}

    wanted = folded(lines, 31)
    assert len(rows(log, OLD.name)) == len(wanted)
    assert log.verify(names=[OLD.name]).findings == []


def test_a_full_disk_leaves_the_archive_that_was(log: KappaLog, tmp_path: Path) -> None:
    """It is said, nothing half is left, and with room it goes on."""
    before = files(tmp_path / "archive")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(errors.ArchiveError, match="What it held before"):
            log.export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = files(tmp_path / "archive")
    assert {path: left[path] for path in before} == before
    assert not [path for path in left if path.endswith(".tmp")]

    assert log.export().position == LINES
    assert log.verify_archive().findings == []
