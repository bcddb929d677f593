"""What a process tells those who watch it: metrics over HTTP, logs as JSON."""

from __future__ import annotations

import json
import logging
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kappa_log.cli import output
from kappa_log.cli.kafka import serve_metrics
from kappa_log.config import LogConfig
from kappa_log.errors import UsageError
from kappa_log.telemetry import logs
from support.poison import Poisoned
from support.stops import Stop

BOOM = {"n": 3, "do": "raise"}


@pytest.fixture
def orders(sqlite_url: str, tmp_path: Path) -> Iterator[Poisoned]:
    """Give a log whose handler fails on demand."""
    with Poisoned(sqlite_url, tmp_path) as found:
        yield found


def test_a_run_answers_what_prometheus_asks(
    orders: Poisoned, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `--metrics-port`; of the log, and of the process; a taken port is told."""
    serve_metrics(orders.app, 0)
    orders.read(("a", {"n": 1}))

    (url,) = re.findall(r"http://127\.0\.0\.1:\d+/metrics", capsys.readouterr().err)
    with urllib.request.urlopen(url) as response:  # noqa: S310 - our own
        text = response.read().decode()

    assert "kappa_log_head_position 1.0" in text
    assert 'kappa_log_events_appended_total{topic="orders"}' in text
    assert "kappa_log_build_info" in text
    port = int(url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}"):
        serve_metrics(orders.app, port)


def test_a_signal_handler_may_end_who_follows_or_tails(orders: Poisoned) -> None:
    """It sets the event while they look for more; they never wait on that event."""
    orders.read(("a", {"n": 1}))
    following, tailing = Stop(), Stop()
    timers = [
        threading.Timer(0.5, following.set),
        threading.Timer(1.0, tailing.set),
    ]
    for timer in timers:
        timer.start()

    orders.app.follow(stop=following)
    found = list(orders.app.tail(stop=tailing, after=0))

    assert [event.position for event in found] == [1]


@pytest.fixture
def _quiet_afterwards() -> Iterator[None]:
    """Leave the process's logging as it was."""
    root, ours = logging.getLogger(), logging.getLogger(logs.OURS)
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before
    output.prepare()


@pytest.mark.usefixtures("_quiet_afterwards")
def test_as_json_all_that_is_told_is_a_line(
    orders: Poisoned, capsys: pytest.CaptureFixture[str]
) -> None:
    """Notices, errors, failures and what libraries warn of; stdout is for data.

    SEED X10.
    """
    subscriptions = output.log_by(LogConfig(format="json", level="debug"))
    try:
        output.say("orders partition 0 is ours")
        output.next_steps("kappa-log failures list")
        orders.read(("a", {"n": 1}), ("b", BOOM))
        logging.getLogger("some.library").warning("slow: %s", "disk")
        output.error("no cluster")
    finally:
        for subscription in subscriptions:
            subscription.cancel()

    captured = capsys.readouterr()
    told = [json.loads(line) for line in captured.err.splitlines()]
    assert captured.out == ""
    assert [(line["level"], line["event"]) for line in told] == [
        ("info", "orders partition 0 is ours"),
        ("debug", "batch committed"),
        ("warning", "record failed"),
        ("warning", "slow: disk"),
        ("error", "no cluster"),
    ]
    assert told[1]["acked"] == told[1]["failed"] == told[1]["last_position"] == 1
    assert told[2]["error_message"] == "no such order"
    assert (told[2]["topic"], told[2]["offset"]) == ("orders", 1)
    assert all(line["timestamp"].endswith("Z") for line in told)


@pytest.mark.usefixtures("_quiet_afterwards")
def test_for_people_what_is_told_stays_as_it_is(
    orders: Poisoned, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default; failures are counted at the end, not told one by one."""
    assert output.log_by(LogConfig()) == []
    output.say("orders partition 0 is ours")
    orders.read(("b", BOOM))

    assert capsys.readouterr().err == "orders partition 0 is ours\n"
