"""The tour: each step does what a command does, shows the command, says what came.

Then a summary, and what to type next.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from kappa_log.app import KappaLog
from kappa_log.demo import place, shop
from kappa_log.demo.screen import Screen
from kappa_log.errors import KappaLogError
from kappa_log.events import Event
from kappa_log.ingest import IngestReport
from kappa_log.steps import ReplayReport
from kappa_log.verify import VerifyReport

NAMES = ("orders", "product_sales", "daily_revenue")
"""The projections over the shop's orders."""

NOT_VERIFIED = 4
"""Exit code if the log or a view is not what it should be."""

SHOWN = 6
"""Events in the live view."""

A_SECOND = 2
"""Events that happen in a second of the live view."""


def tour(folder: Path, *, events: int, once: bool) -> int:
    """Run the demo in a folder; return the exit code."""
    screen = Screen()
    happenings = shop.happenings(events)
    written = place.make(folder, shop.lines(islice(happenings, events), events))
    screen.title("kappa-log demo", f"a tea shop's orders, in {folder}")
    with _opened(folder) as app:
        ingested = _fill(app, screen, folder, written)
    _mend(screen, folder)
    # Opened anew, as by a new process: it finds the mended fold.
    with _opened(folder) as app:
        replayed = _replay(app, screen)
        verified = _verify(app, screen)
        _summary(app, screen, ingested, replayed, verified)
        screen.commands("To try next", _next(app, folder))
        if not once:
            _follow(app, screen, folder, happenings)
    return 0 if verified.ok else NOT_VERIFIED


def _opened(folder: Path) -> KappaLog:
    """Return the log with the folder's code as it is now: Python keeps what it read."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("projections", "handlers"):
            del sys.modules[name]
    return KappaLog.open(folder)


def _fill(app: KappaLog, screen: Screen, folder: Path, written: int) -> IngestReport:
    """Create the log, take the orders in, fold them."""
    screen.step("Create a log", "kappa-log db create")
    app.create_database()
    screen.say("kappa_log.db, beside kappa_log.toml, handlers.py and projections/")

    screen.step("Take lines in", f"kappa-log ingest {place.ORDERS} --topic orders")
    with screen.progress("lines") as show:
        report = app.ingest(
            folder / place.ORDERS,
            topic="orders",
            on_progress=lambda p: show(p.bytes_read, p.bytes_total),
        )
    assert report.lines == written
    screen.say(
        f"{written:,} lines in {report.seconds:.1f} s: {report.counts.acked:,} events, "
        f"positions {report.first_position:,} to {report.last_position:,}"
    )

    screen.step("Fold them", f"kappa-log project {' '.join(NAMES)}")
    with screen.progress("events") as show:
        app.project(NAMES, on_progress=lambda p: show(p.cursor, p.target))
    screen.rows([(name, app.projection(name).doc or "") for name in NAMES])
    return report


def _mend(screen: Screen, folder: Path) -> None:
    screen.step("Mend one of them", f"$EDITOR {place.MENDED}")
    screen.say("It forgot that a cancelled order gives its money back.")
    before = (folder / place.MENDED).read_text("utf-8")
    place.mend(folder)
    screen.changed_lines(before, place.mended())


def _replay(app: KappaLog, screen: Screen) -> ReplayReport:
    since = shop.SINCE
    screen.step(
        "Replay it", f"kappa-log replay {NAMES[2]} --since {since:%F} --by event-time"
    )
    screen.say("January's books are closed, so only later days are folded again.")
    report = app.replay(
        NAMES[2],
        since=since,
        by="event-time",
        reason="cancelled orders give money back",
        on_plan=lambda plan: screen.say(plan.description),
    )
    screen.say(
        f"build {report.build}: compared with the live one, then {report.outcome}"
    )
    return report


def _verify(app: KappaLog, screen: Screen) -> VerifyReport:
    screen.step("Verify all", f"kappa-log verify {' '.join(NAMES)}")
    report = app.verify(names=list(NAMES))
    screen.say(
        "events hashed again, ledger added up, rows folded again: "
        f"{'no difference' if report.ok else 'DIFFERENCES, see below'}"
    )
    return report


# --- the summary -------------------------------------------------------------


def _summary(
    app: KappaLog,
    screen: Screen,
    ingested: IngestReport,
    replayed: ReplayReport,
    verified: VerifyReport,
) -> None:
    screen.heading(f"What became of {ingested.lines:,} lines")
    counts = ingested.counts
    meanings = (
        ("kept", counts.acked, "events of the log"),
        ("skipped", counts.skipped, "heartbeats, which handlers.py leaves out"),
        ("duplicate", counts.duplicate, "came before; noted, and not kept twice"),
        ("failed", counts.failed, "kept whole, each with its error; the last:"),
    )
    screen.rows([(word, f"{n:,}", meaning) for word, n, meaning in meanings], right="1")
    screen.say(_failure(app), "dim")

    screen.heading("What can be queried")
    found = [app.projection(name) for name in NAMES]
    screen.rows(
        [
            (f.view, f"{f.live.rows:,}", f"{f.live.number}", f"{f.live.version}")
            for f in found
            if f.live is not None
        ],
        columns=("view", "rows", "build", "version"),
        right="123",
    )
    _differences(screen, replayed)
    screen.heading(f"Verified: {'ok' if verified.ok else 'NOT ok'}")
    screen.say(
        f"events {verified.events:,}, checkpoints {verified.checkpoints:,}, "
        f"projections {len(verified.projections)}, head {verified.head[:16]}…"
    )
    for sentence in [f.message for f in verified.findings] + verified.limits:
        screen.say(sentence, "dim")


def _failure(app: KappaLog) -> str:
    last = app.failures(limit=1)[0]
    return f"Line {last.offset + 1:,}: {last.error_class}: {last.error_message}"


def _differences(screen: Screen, replayed: ReplayReport) -> None:
    found = replayed.diff
    assert found is not None, "the replayed projection had a live build"
    screen.heading(
        f"Rows of {replayed.projection} that the replay changed: {found.changed:,}; "
        f"added: {found.added:,}; removed: {found.removed:,}"
    )
    rows = [
        (
            "/".join(map(str, row.key.values())),
            name,
            f"{old}",
            "→",
            f"{row.after[name]}",
        )
        for row in found.examples
        if row.before is not None and row.after is not None
        for name, old in row.before.items()
        if old != row.after[name]
    ]
    if rows:
        screen.rows(rows, right="24")


def _next(app: KappaLog, folder: Path) -> Iterator[str]:
    """Yield commands, each of which teaches something and succeeds."""
    yield f"cd {shlex.quote(str(folder))}"
    yield "kappa-log projections rows product_sales"
    yield f"kappa-log projections explain orders {_refunded(app)}"
    yield f"kappa-log failures show {app.failures(limit=1)[0].id}"
    yield f"kappa-log replay {NAMES[2]} --reason 'January, too'"
    yield f"kappa-log verify {NAMES[2]}"


def _refunded(app: KappaLog) -> str:
    """Return the id of the last order that was cancelled, paid ones first."""
    found = app.events(event_type="order_cancelled", limit=100)
    paid = [event for event in found if event.payload["refund_cents"]]
    return str((paid or found)[0].entity_id)


# --- going on ----------------------------------------------------------------


def _follow(
    app: KappaLog,
    screen: Screen,
    folder: Path,
    happenings: Iterator[shop.Happening],
) -> None:
    """Let the shop go on and the log follow, a second at a time, until Ctrl-C."""
    screen.heading("The shop goes on; Ctrl-C closes it")
    shown: deque[Event] = deque(maxlen=SHOWN)
    cursor = app.head().position
    with _until_interrupt() as stop, screen.live() as show:
        while not stop.wait(1):
            place.append(folder, map(shop.as_line, islice(happenings, A_SECOND)))
            state = catch_up(app, folder)
            found = app.events(after=cursor, limit=SHOWN, oldest_first=True)
            cursor = found[-1].position if found else cursor
            shown.extend(found)
            show(_recent(shown), state)
    screen.say(f"Closed, at position {cursor:,}.")


@contextmanager
def _until_interrupt() -> Iterator[threading.Event]:
    """Give what Ctrl-C sets, however often: no transaction is cut in two."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def catch_up(app: KappaLog, folder: Path) -> str:
    """Take in and fold what is new; return how many rows that makes, or why none."""
    try:
        app.ingest(folder / place.ORDERS, topic="orders")
        waiting = [found.waiting for found in app.project(NAMES) if found.waiting]
    except KappaLogError as error:
        # Commands in another terminal may hold the log just now; a second later not.
        if not error.retryable:
            raise
        return str(error)
    return "\n".join(waiting) or f"rows: {', '.join(_rows(app))}"


def _rows(app: KappaLog) -> Iterator[str]:
    for name in NAMES:
        live = app.projection(name).live
        if live is not None:
            yield f"{live.rows:,} {name}"


def _recent(events: Iterable[Event]) -> list[tuple[str, ...]]:
    return [
        (
            f"{event.position:,}",
            f"{event.event_time:%F %T}",
            event.entity_id or "",
            event.event_type or "",
        )
        for event in events
    ]
