"""The tour: each step does what a command does, shows the command, says what came.

Then a summary, and what to type next.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from kappa_log.app import KappaLog
from kappa_log.demo import place, shop
from kappa_log.demo.live import follow
from kappa_log.demo.place import NAMES
from kappa_log.demo.screen import Rows, Screen
from kappa_log.demo.stream import TOPIC, Pace, Stream
from kappa_log.kafka.embedded import PARTITIONS, EmbeddedBroker
from kappa_log.steps import ReplayReport
from kappa_log.storage.ledger import Counts
from kappa_log.verify import VerifyReport

NOT_VERIFIED = 4
"""Exit code if the log or a view is not what it should be."""

_LOOK_SECONDS = 0.05

PACE = Pace(500, 0.0)
"""As fast as the log takes records in."""


def tour(folder: Path, *, events: int, once: bool) -> int:
    """Run the demo in a folder; return the exit code."""
    screen = Screen()
    place.make(folder)
    screen.title("kappa-log demo", f"a tea shop's orders, in {folder}")
    happenings = shop.happenings(events)
    with EmbeddedBroker() as broker:
        with _opened(folder, broker) as app:
            records = shop.records(islice(happenings, events), events)
            counts = _fill(app, screen, records, events)
        _mend(screen, folder)
        # Opened anew, as by a new process: it finds the mended fold.
        with _opened(folder, broker) as app:
            replayed = _replay(app, screen)
            verified = _verify(app, screen)
            _summary(app, screen, counts, replayed, verified)
            screen.commands("To try next", _next(app, folder, events))
            if not once:
                follow(app, screen, happenings, counts)
    return 0 if verified.ok else NOT_VERIFIED


def _opened(folder: Path, broker: EmbeddedBroker) -> KappaLog:
    """Return the log with the folder's code as it is now: Python keeps what it read."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("projections", "handlers"):
            del sys.modules[name]
    kafka = {
        "bootstrap.servers": broker.bootstrap,
        # The embedded broker makes members of the classic protocol wait, and assigns
        # nothing to a group whose members have all left.
        "group.protocol": "consumer",
        # It answers a fetch that found nothing this much later, whatever came since.
        "fetch.wait.max.ms": 20,
    }
    return KappaLog.open(folder, {"kafka": kafka})


def _fill(
    app: KappaLog, screen: Screen, records: Iterable[shop.Record], events: int
) -> Counts:
    """Create the log, consume the orders, fold them; return what became of them."""
    screen.step("Create a log", "kappa-log db create")
    app.create_database()
    screen.say("kappa_log.db, beside kappa_log.toml, handlers.py and projections/")

    screen.step("Consume and fold what the till sends", "kappa-log run")
    screen.say(
        f"A Kafka broker runs in this process: topic {TOPIC}, {PARTITIONS} partitions"
    )
    started = time.monotonic()
    with Stream(app, records, PACE) as stream, screen.progress("events") as show:
        while not stream.wait(_LOOK_SECONDS):
            show(stream.counts.acked, events)
    counts, seconds = stream.counts, time.monotonic() - started
    screen.say(
        f"{counts.seen:,} records in {seconds:.1f} s: {counts.acked:,} events, "
        f"positions 1 to {app.head().position:,}"
    )
    screen.rows(Rows([(name, app.projection(name).doc or "") for name in NAMES]))
    return counts


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
    counts: Counts,
    replayed: ReplayReport,
    verified: VerifyReport,
) -> None:
    screen.heading(f"What became of {counts.seen:,} records")
    meanings = (
        ("kept", counts.acked, "events of the log"),
        ("skipped", counts.skipped, "heartbeats, which handlers.py leaves out"),
        ("duplicate", counts.duplicate, "came before; noted, and not kept twice"),
        ("failed", counts.failed, "kept whole, each with its error; the last:"),
    )
    rows = [(word, f"{n:,}", meaning) for word, n, meaning in meanings]
    screen.rows(Rows(rows, right="1"))
    screen.say(_failure(app), "dim")

    screen.heading("What can be queried")
    views = [
        (found.view, f"{live.rows:,}", f"{live.number}", f"{live.version}")
        for found in map(app.projection, NAMES)
        if (live := found.live) is not None
    ]
    screen.rows(Rows(views, ("view", "rows", "build", "version"), right="123"))
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
    where = f"Partition {last.partition}, offset {last.offset:,}"
    return f"{where}: {last.error_class}: {last.error_message}"


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
        screen.rows(Rows(rows, right="24"))


def _next(app: KappaLog, folder: Path, events: int) -> Iterator[str]:
    """Yield commands, each of which teaches something and succeeds without Kafka."""
    yield f"cd {shlex.quote(str(folder))}"
    yield "kappa-log projections rows product_sales"
    yield f"kappa-log projections explain orders {_refunded(events)}"
    yield f"kappa-log failures show {app.failures(limit=1)[0].id}"
    yield f"kappa-log replay {NAMES[2]} --reason 'January, too'"
    yield f"kappa-log verify {NAMES[2]}"


def _refunded(events: int) -> str:
    """Return the id of the first order that got its money back."""
    return next(
        str(found["order_id"])
        for found in shop.happenings(events)
        if found.get("refund_cents")
    )
