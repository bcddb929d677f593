"""kappa-log demo: what it prints is true, and it never touches others' folders."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import pytest

from kappa_log import KappaLog, KappaLogError, UsageError
from kappa_log.demo import run, shop, tour
from kappa_log.demo.place import MARK, mended, unmended
from kappa_log.errors import DatabaseBusy, SourceDiverged

FAILED = 4
EVENTS = 500


@pytest.fixture(autouse=True)
def in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Work where nothing is; leave no module of the demo's folder in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {"projections", "handlers"}
    before = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in names}
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the demo works if it is not told."""
    return tmp_path / "kappa-log-demo"


def numbers(text: str, pattern: str) -> list[int]:
    """Return the numbers that a pattern's groups find, at its only place."""
    (found,) = re.findall(pattern, text)
    groups = found if isinstance(found, tuple) else (found,)
    return [int(group.replace(",", "")) for group in groups]


# --- the tour ----------------------------------------------------------------


def test_summary_says_what_the_database_holds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever looks after the demo must find the numbers that it printed."""
    assert run(events=EVENTS, once=True) == 0

    text = capsys.readouterr().out
    with closing(KappaLog.open(folder)) as app:
        assert numbers(text, r"kept +([\d,]+)  events") == [EVENTS]
        assert app.head().position == EVENTS
        assert numbers(text, r"duplicate +([\d,]+)  ") == [len(app.duplicates())]
        failures = app.failures()
        assert numbers(text, r"failed +([\d,]+)  ") == [len(failures)] == [FAILED]
        assert (failures[0].error_message or "none") in " ".join(text.split())
        for status in app.projections():
            if status.live is not None:
                live = [status.live.rows, status.live.number, status.live.version]
                assert numbers(text, rf"{status.view} +(\S+) +(\d+) +(\d+)") == live
        (replay,) = app.replays()
        changed = replay.progress["diff"]["changed"]
        assert numbers(text, r"the replay changed: ([\d,]+);") == [changed]
        assert changed > 0
        assert not app.projection("daily_revenue").stale


def test_every_line_of_the_file_is_accounted_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept, skipped, duplicate and failed are all there is."""
    run(events=EVENTS, once=True)

    text = capsys.readouterr().out
    (lines,) = numbers(text, r"What became of ([\d,]+) lines")
    words = ("kept", "skipped", "duplicate", "failed")
    counted = [numbers(text, rf"{word} +([\d,]+)  ")[0] for word in words]
    assert (
        lines
        == sum(counted)
        == len((folder / "orders.jsonl").read_bytes().split(b"\n")) - 1
    )
    assert all(counted)


def test_january_stays_as_it_was(folder: Path) -> None:
    """The replay has a start: days before it keep version 1's rows, bug and all."""
    run(events=EVENTS, once=True)

    with closing(KappaLog.open(folder)) as app:
        replayed = {row["key"]: row for row in app.rows("daily_revenue")}
        app.replay("daily_revenue")
        right = {row["key"]: row for row in app.rows("daily_revenue")}
    first = shop.SINCE.date()
    differing = {key for key in right if right[key] != replayed.get(key)}
    assert differing
    assert max(differing) < first


def test_lines_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """The width of a terminal that nobody widened."""
    run(once=True)

    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_demo_runs_twice_in_one_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run begins afresh: nothing of the first is left."""
    run(events=EVENTS, once=True)
    (folder / "left-over").touch()
    first = capsys.readouterr().out

    assert run(events=EVENTS, once=True) == 0

    timed = re.compile(r"in [\d.]+ s|head \w+")
    assert timed.sub("", capsys.readouterr().out) == timed.sub("", first)
    assert not (folder / "left-over").exists()


def test_commands_to_try_next_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are printed to be copied: a folder with a space in its name, too."""
    run(events=EVENTS, once=True, folder=Path("my demo"))

    _, _, text = capsys.readouterr().out.partition("To try next\n")
    change, *commands = text.splitlines()
    assert shlex.split(change) == ["cd", "my demo"]
    assert len(commands) == 5
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "kappa-log"
        subprocess.run(
            [sys.executable, "-m", "kappa_log", *arguments],
            cwd=tmp_path / "my demo",
            check=True,
            capture_output=True,
        )


# --- going on ----------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [False, True])
def test_orders_go_on_until_ctrl_c(
    tmp_path: Path, folder: Path, *, is_terminal: bool
) -> None:
    """Without --once the log follows the file, and Ctrl-C ends it in peace."""
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    command = "from kappa_log.demo import run; raise SystemExit(run(events=100))"
    with subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TERM": "xterm"},
        stdout=writer,
    ) as demo:
        os.close(writer)
        try:
            # A busy machine may show several orders at once: any number past 101.
            text = read_until(reader, " 1(?:0[2-9]|[1-9][0-9])  ")
            demo.send_signal(signal.SIGINT)
            text += read_until(reader, "Closed, at position 1..[.]")
            demo.wait(timeout=30)
        finally:
            demo.kill()
    os.close(reader)

    assert demo.returncode == 0
    assert ("\x1b[2K" in text) == is_terminal, "only a terminal is drawn over"
    (position,) = numbers(text, r"Closed, at position (\d+)\.")
    with closing(KappaLog.open(folder)) as app:
        assert app.head().position == position > 100
        for name in tour.NAMES:
            live = app.projection(name).live
            assert live is not None
            assert live.cursor == position


def read_until(reader: int, pattern: str) -> str:
    """Return what comes until a pattern is found in it."""
    text = ""
    while not re.search(pattern, text):
        new = b""
        with suppress(OSError):  # so a terminal says that nobody writes any more
            new = os.read(reader, 65536)
        assert new, f"the demo ended without {pattern!r}: {text}"
        text += new.decode(errors="replace")
    return text


def test_a_second_in_which_the_log_is_locked_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command in another terminal may hold the database; what is damaged stays so."""
    run(events=100, once=True)
    errors: list[KappaLogError] = [DatabaseBusy("held"), SourceDiverged("rewritten")]

    def fail(*_: object, **__: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(KappaLog, "ingest", fail)
    with closing(KappaLog.open(folder)) as app:
        assert tour.catch_up(app, folder) == "held"
        with pytest.raises(SourceDiverged):
            tour.catch_up(app, folder)


# --- whose folder ------------------------------------------------------------


def test_folder_of_somebody_else_is_refused(folder: Path) -> None:
    """The demo empties a folder only if a demo made it."""
    folder.mkdir()
    (folder / "kappa_log.toml").write_text("[database]\n")

    with pytest.raises(UsageError, match="not made by the demo"):
        run(once=True)

    assert [path.name for path in folder.iterdir()] == ["kappa_log.toml"]
    assert (folder / "kappa_log.toml").read_text() == "[database]\n"


def test_file_in_the_place_of_the_folder_is_refused(folder: Path) -> None:
    """Nothing is written over."""
    folder.write_bytes(b"precious")

    with pytest.raises(UsageError, match="is a file"):
        run(once=True)

    assert folder.read_bytes() == b"precious"


def test_settings_that_are_no_text_are_somebody_else_s(folder: Path) -> None:
    """What cannot be read cannot be the demo's."""
    folder.mkdir()
    (folder / "kappa_log.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(UsageError, match="not made by the demo"):
        run(once=True)


def test_links_in_the_folder_are_cut_and_not_followed(
    tmp_path: Path, folder: Path
) -> None:
    """What a link leads to is somebody else's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    folder.mkdir()
    (folder / "kappa_log.toml").write_text(MARK)
    (folder / "link").symlink_to(elsewhere)

    run(events=100, once=True)

    assert (elsewhere / "precious").exists()
    assert not (folder / "link").exists()


def test_variables_that_lead_elsewhere_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go before the file, so the demo would fill that database."""
    monkeypatch.setenv("KAPPA_LOG__DATABASE__URL", "sqlite:///precious.db")

    with pytest.raises(UsageError, match="KAPPA_LOG__DATABASE__URL"):
        run(once=True)

    assert not folder.exists()


# --- the shop ----------------------------------------------------------------


def test_shop_makes_the_same_lines_every_time() -> None:
    """From a seed and no clock."""
    first, second = (
        list(shop.lines(islice(shop.happenings(300), 300), 300)) for _ in range(2)
    )

    assert first == second


@pytest.mark.parametrize("events", [100, 137, 300, 1000, 5000])
def test_replay_has_something_to_change_at_any_size(
    events: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A diff of nothing would teach nothing."""
    run(events=events, once=True)

    text = capsys.readouterr().out
    assert numbers(text, r"the replay changed: ([\d,]+);")[0] > 0
    assert folder.is_dir()


def test_bug_that_the_demo_mends_is_in_no_other_place() -> None:
    """What users are given by init is the mended fold; the demo takes the fix out."""
    before = unmended(mended())

    assert "version=1" in before
    assert "order_cancelled" not in before
    compile(before, "daily_revenue.py", "exec")
