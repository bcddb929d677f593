"""kappa-log demo: what it prints is true, and it never touches others' folders."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kappa_log import KappaLog, KappaLogError, UsageError
from kappa_log.config import Config
from kappa_log.demo import run, shop, stream
from kappa_log.demo.live import Board
from kappa_log.demo.place import MARK, NAMES, mended, unmended
from kappa_log.demo.stream import AHEAD, Pace, Stream
from kappa_log.errors import DatabaseBusy, SourceDiverged, SourceError
from kappa_log.kafka.consume import ConsumeProgress
from kappa_log.kafka.embedded import EmbeddedBroker
from kappa_log.storage.database import sqlite_module

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


def records_of(events: int) -> list[shop.Record]:
    """Return what the till sends in the tour."""
    return list(shop.records(islice(shop.happenings(events), events), events))


def test_every_record_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Kept, skipped, duplicate and failed are all there is."""
    run(events=EVENTS, once=True)

    text = capsys.readouterr().out
    (records,) = numbers(text, r"What became of ([\d,]+) records")
    words = ("kept", "skipped", "duplicate", "failed")
    counted = [numbers(text, rf"{word} +([\d,]+)  ")[0] for word in words]
    assert records == sum(counted) == len(records_of(EVENTS))
    assert all(counted)


def test_orders_come_by_several_partitions_each_in_order(folder: Path) -> None:
    """The order is the key, so what happened to it first is in the log first."""
    run(events=EVENTS, once=True)

    with closing(KappaLog.open(folder)) as app:
        events = app.events(limit=EVENTS, oldest_first=True)
    assert {event.partition for event in events} == {0, 1, 2, 3}
    kept: dict[str | None, list[Any]] = {}
    for event in events:
        kept.setdefault(event.entity_id, []).append(event.event_time)
    assert all(times == sorted(times) for times in kept.values())


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
    """The second run begins afresh, and what it tells does not hang on timing."""
    run(events=EVENTS, once=True)
    (folder / "left-over").touch()
    first = capsys.readouterr().out

    assert run(events=EVENTS, once=True) == 0

    timed = re.compile(r"in [\d.]+ s|head \w+|checkpoints \d+")
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
    """Without --once the log follows the till, and Ctrl-C ends it in peace."""
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    with demo_process(tmp_path, writer, "--events", "100") as demo:
        try:
            # A busy machine may show several orders at once: any number past 101.
            past = r" (?:10[2-9]|1[1-9]\d|[2-9]\d\d) (?: 20|events)"
            text = read_until(reader, past)
            demo.send_signal(signal.SIGINT)
            text += read_until(reader, r"Closed, at position [\d,]+[.]")
            _, errors = demo.communicate(timeout=30)
        finally:
            demo.kill()
    os.close(reader)

    assert (demo.returncode, errors) == (0, "")
    assert ("\x1b[2K" in text) == is_terminal, "only a terminal is drawn over"
    (position,) = numbers(text, r"Closed, at position ([\d,]+)\.")
    with closing(KappaLog.open(folder)) as app:
        assert app.head().position == position > 100
        for name in NAMES:
            live = app.projection(name).live
            assert live is not None
            assert live.cursor == position


def demo_process(folder: Path, output: int, *options: str) -> subprocess.Popen[str]:
    """Start the demo as a person would, with its output going to a file descriptor."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "kappa_log", "demo", *options],
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TERM": "xterm"},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(output)
    return demo


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


def test_second_ctrl_c_waits_for_nothing(tmp_path: Path, folder: Path) -> None:
    """The first one waits for the last orders, here for a database that is held."""
    reader, writer = os.pipe()
    with demo_process(tmp_path, writer, "--events", "100") as demo:
        try:
            read_until(reader, "behind")
            holder = sqlite_module().connect(
                str(folder / "kappa_log.db"), isolation_level=None
            )
            holder.execute("BEGIN IMMEDIATE")
            time.sleep(1)  # orders that the log cannot take in
            demo.send_signal(signal.SIGINT)
            time.sleep(0.7)
            assert demo.poll() is None
            demo.send_signal(signal.SIGINT)
            _, errors = demo.communicate(timeout=1.5)
        finally:
            demo.kill()
            holder.close()
    os.close(reader)

    assert (demo.returncode, errors.strip()) == (130, "")


# --- the till and the log ----------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> Iterator[KappaLog]:
    """Give a log whose settings lead to an embedded broker."""
    with EmbeddedBroker() as broker:
        config = Config(kafka={"bootstrap.servers": broker.bootstrap})
        url = f"sqlite:///{tmp_path / 'log.db'}"
        with KappaLog(url, config=config, projections=[]) as log:
            yield log


def idle(_: KappaLog, *, stop: threading.Event, **__: object) -> None:
    """Take nothing in."""
    stop.wait()


def settled(read: Callable[[], int]) -> int:
    """Return what a number is once it has risen, and stood still for a while."""
    before = 0
    while not before or read() != before:
        before = read()
        time.sleep(0.5)
    return before


@pytest.mark.parametrize(
    ("records", "sent"),
    [
        ((shop.Record("2026-01-0", f"o-{n}", "{}") for n in range(50_000)), AHEAD + 10),
        ((shop.Record(f"2026-01-{n // 7}", "o", "{}") for n in range(50)), 7),
    ],
    ids=["so-many", "so-many-days"],
)
def test_till_waits_for_the_log(
    app: KappaLog,
    monkeypatch: pytest.MonkeyPatch,
    records: Iterable[shop.Record],
    sent: int,
) -> None:
    """The broker forgets what is not read in time; later days come later in the log."""
    monkeypatch.setattr(KappaLog, "run", idle)

    with Stream(app, records, Pace(10, 0.0)) as found:
        assert settled(lambda: found.behind) == sent


def test_stream_is_over_when_all_is_folded(
    folder: Path, app: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed next comes from the projections."""
    run(events=100, once=True)
    placed = next(record for record in records_of(200) if "placed" in record.value)
    Path("orders.jsonl").write_text(placed.value)

    def take_in(
        log: KappaLog,
        *,
        stop: threading.Event,
        on_progress: Callable[[ConsumeProgress], None],
        **_: object,
    ) -> None:
        counts = log.ingest("orders.jsonl", topic="orders").counts
        on_progress(ConsumeProgress("shop-orders", 4, counts, 101, 0))
        stop.wait()

    monkeypatch.setattr(KappaLog, "run", take_in)
    with (
        closing(KappaLog.open(folder, {"kafka": app.config.kafka})) as log,
        Stream(log, [placed], Pace(1, 0.0)) as found,
    ):
        while not found.counts.seen:
            assert not found.wait(0.1)
        assert not found.wait(0.5)
        log.project(NAMES)
        assert found.wait(0.1)


def flow(app: KappaLog, records: Iterable[shop.Record]) -> None:
    """Let records flow until there are no more."""
    with Stream(app, records, Pace(10, 0.0)) as found:
        while not found.wait(0.01):
            pass


def broken() -> Iterator[shop.Record]:
    """Fail at once, as a till may that cannot reach the broker."""
    raise SourceError("no till")
    yield


def test_error_of_the_till_ends_the_demo(app: KappaLog) -> None:
    """A view that stands still would tell nobody why."""
    with pytest.raises(SourceError, match="no till"):
        flow(app, broken())


def test_error_of_the_log_ends_the_demo(
    app: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the command ends with its message and its exit code."""

    def fail(*_: object, **__: object) -> None:
        raise SourceDiverged("rewritten")

    monkeypatch.setattr(KappaLog, "run", fail)
    endless = iter(lambda: shop.Record("2026-01-0", "o", "{}"), None)
    with pytest.raises(SourceDiverged):
        flow(app, endless)


def test_till_that_was_closed_waits_for_a_log_that_hangs_only_so_long(
    app: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the demo within seconds, whoever holds the database."""
    monkeypatch.setattr(KappaLog, "run", idle)
    monkeypatch.setattr(stream, "CLOSING_SECONDS", 0.5)
    record = shop.Record("2026-01-0", "o", "{}")

    with Stream(app, [record] * 5, Pace(10, 0.0)) as found:
        assert not found.wait(0.1)
        found.close()
        began = time.monotonic()
        while not found.wait(0.01):
            found.close()
        assert time.monotonic() - began < 2


def test_board_shows_what_it_last_saw_while_the_log_is_locked(
    folder: Path, app: KappaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command in another terminal may hold the database; what is damaged stays so."""
    run(events=100, once=True)
    errors: list[KappaLogError] = [DatabaseBusy("held"), SourceDiverged("rewritten")]

    def fail(*_: object, **__: object) -> None:
        raise errors.pop(0)

    with closing(KappaLog.open(folder)) as log:
        board = Board(log, Stream(app, [], Pace(1, 0.0)))
        before, notes, _ = board.look()
        assert [rows.columns[0] for rows in before] == [
            "records",
            "projection",
            "position",
        ]
        assert notes[0].startswith("Failed last: partition ")
        monkeypatch.setattr(KappaLog, "events", fail)
        tables, notes, _ = board.look()
        assert (tables[1:], notes) == (before[1:], ["held"])
        with pytest.raises(SourceDiverged):
            board.look()


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


def test_shop_makes_the_same_records_every_time() -> None:
    """From a seed and no clock."""
    assert records_of(300) == records_of(300)


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
