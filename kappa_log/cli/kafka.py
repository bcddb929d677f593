"""kappa-log consume, run, lag and produce: topics into the log, and how far that is."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from kappa_log.cli import output
from kappa_log.cli.log import NEW_FAILURES, counted
from kappa_log.cli.params import (
    COORDINATES,
    COUNT,
    Stop,
    json_option,
    pass_app,
    stop_on_signal,
)
from kappa_log.cli.serve import host_option, listening, port_option
from kappa_log.errors import UsageError

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.kafka.consume import ConsumeProgress, ConsumeReport
    from kappa_log.kafka.lag import PartitionLag
    from kappa_log.kafka.produce import ProduceProgress, ProduceReport

listener_option = click.option(
    "--listener",
    "listeners",
    metavar="ID",
    multiple=True,
    help="Only this listener; may be given several times.  [default: all]",
)
gap_option = click.option(
    "--accept-gap",
    is_flag=True,
    help="Go on where the broker deleted records before they were read.",
)


metrics_option = click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Answer /metrics on this port of api.host; 0 takes a free one.",
)


def serve_metrics(app: KappaLog, port: int | None) -> None:
    """Answer what Prometheus asks, in a thread that ends with the process.

    Raises:
        UsageError: The port is taken.
    """
    if port is None:
        return
    from prometheus_client import start_http_server

    from kappa_log.web.collector import registry_of

    host = app.config.api.host
    try:
        server, _ = start_http_server(port, host, registry_of(app))
    except OSError as error:
        msg = f"cannot listen on {host} port {port}: {error.strerror}"
        raise UsageError(msg) from None
    output.say(f"metrics: http://{host}:{server.server_port}/metrics")


@click.command()
@listener_option
@click.option("--until-end", is_flag=True, help="End when all is read.")
@click.option(
    "--from-offset",
    "rewinds",
    type=COORDINATES,
    metavar="T:P:O",
    multiple=True,
    help="First go back to this offset of a topic's partition.",
)
@click.option("--group", help="Group of --from-offset, if its topic has several.")
@gap_option
@metrics_option
@json_option
@pass_app
def consume(
    app: KappaLog,
    /,
    *,
    listeners: tuple[str, ...],
    until_end: bool,
    rewinds: tuple[tuple[str, int, int], ...],
    group: str | None,
    accept_gap: bool,
    metrics_port: int | None,
    as_json: bool,
) -> int:
    """Take records of Kafka topics in, until Ctrl-C.

    The offsets are kept in the log's own database, so a run goes on where the last
    one ended, however that ended.
    """
    output.log_by(app.config.log)
    serve_metrics(app, metrics_port)
    for topic, partition, offset in rewinds:
        before, now = app.rewind(
            topic, partition, offset, group=group, accept_gap=accept_gap
        )
        output.say(
            f"{topic} partition {partition}: goes back from offset {before} to {now}"
        )
    with stop_on_signal() as stop, _Board(as_json=as_json) as board:
        reports = app.consume(
            listeners,
            stop=stop,
            until_end=until_end,
            accept_gap=accept_gap,
            on_notice=board.say,
            on_progress=board.show,
        )
    return _ended(reports, stop, as_json=as_json)


@click.command()
@listener_option
@gap_option
@click.option("--serve", "serves", is_flag=True, help="Serve the HTTP API, too.")
@host_option
@port_option
@metrics_option
@json_option
@pass_app
def run(
    app: KappaLog,
    /,
    *,
    listeners: tuple[str, ...],
    accept_gap: bool,
    serves: bool,
    host: str | None,
    port: int | None,
    metrics_port: int | None,
    as_json: bool,
) -> int:
    """Consume topics and fold projections, until Ctrl-C.

    A projection that fails is left where it is, and told; all else goes on. With
    --serve one process also answers HTTP requests, as `kappa-log serve` does, and
    prints its address first.
    """
    if not serves and (host, port) != (None, None):
        msg = "--host and --port are for --serve."
        raise click.UsageError(msg)
    output.log_by(app.config.log)
    serve_metrics(app, metrics_port)
    with contextlib.ExitStack() as context:
        stop = context.enter_context(stop_on_signal())
        if serves:
            server = listening(app, host, port)
            _print_address(server.url, as_json=as_json)
            context.enter_context(server.beside(stop))
        board = context.enter_context(_Board(as_json=as_json))
        reports = app.run(
            listeners,
            stop=stop,
            accept_gap=accept_gap,
            on_notice=board.say,
            on_progress=board.show,
        )
    return _ended(reports, stop, as_json=as_json)


def _print_address(url: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json(output.to_json({"url": url}))
    else:
        output.line(url)
    output.stdout().flush()


def _ended(reports: list[ConsumeReport], stop: Stop, *, as_json: bool) -> int:
    for report in reports:
        if as_json:
            output.print_json(output.to_json(report))
        else:
            _print_report(report)
    if any(report.counts.failed or report.counts.parked for report in reports):
        if not as_json:
            output.next_steps("kappa-log failures list")
        return NEW_FAILURES
    return stop.exit_code if stop.is_set() else 0


def _print_report(report: ConsumeReport) -> None:
    seen = report.counts.seen
    speed = output.number(round(seen / max(report.seconds, 1e-3)))
    output.line(
        f"{output.safe(report.listener)}: {output.plural(seen, 'record')} in "
        f"{output.duration(report.seconds)} ({speed}/s)"
    )
    if seen:
        output.line(f"  {counted(report.counts)}")
    if report.first_position is not None:
        output.line(
            f"  positions {report.first_position:,} to {report.last_position:,}"
        )
    for lane in report.lanes:
        output.line(
            f"  {output.safe(lane.topic)} partition {lane.partition}: "
            f"next offset {lane.next_offset:,}"
        )


class _Board:
    """What listeners tell while they run: notices, and a line of progress."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._seen: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def say(self, notice: str) -> None:
        with self._lock:
            self._clear()
            output.say(notice)

    def show(self, progress: ConsumeProgress) -> None:
        """Show a line on a terminal, else one every ten seconds."""
        with self._lock:
            self._seen[progress.listener] = progress.counts.seen
            elapsed = time.monotonic() - self._told
            is_terminal = output.is_terminal()
            if elapsed < (_REDRAW_SECONDS if is_terminal else output.LINE_SECONDS):
                return
            self._told = time.monotonic()
            text = (
                f"{sum(self._seen.values()):,} records, position "
                f"{progress.last_position or 0:,}, {progress.behind:,} behind"
            )
            if is_terminal:
                output.redraw(text)
            else:
                output.say(text)

    def _clear(self) -> None:
        if output.is_terminal():
            output.redraw("")


_REDRAW_SECONDS = 0.1


@click.command()
@listener_option
@json_option
@pass_app
def lag(app: KappaLog, /, *, listeners: tuple[str, ...], as_json: bool) -> None:
    """Show how far the log is behind its topics."""
    found = app.lag(listeners)
    if as_json:
        for partition in found:
            output.print_json(output.to_json(partition))
        return
    output.print_table(
        ("group", "topic", "partition", "next", "end", "records", "seconds"),
        [_lagging(partition) for partition in found],
    )
    if any(partition.records for partition in found):
        output.next_steps("kappa-log consume --until-end")


def _lagging(found: PartitionLag) -> tuple[object, ...]:
    seconds = None if found.seconds is None else round(found.seconds, 1)
    return (
        found.group_id,
        found.topic,
        found.partition,
        found.next_offset,
        found.end_offset,
        found.records,
        seconds,
    )


@click.command()
@click.argument("file")
@click.option("--topic", required=True, help="Topic to produce into.")
@click.option("--key", metavar="FIELD", help="Field that becomes the record's key.")
@click.option(
    "--partitions", type=COUNT, metavar="N", help="Make the topic if it is not there."
)
@json_option
@pass_app
def produce(
    app: KappaLog,
    /,
    *,
    file: str,
    topic: str,
    key: str | None,
    partitions: int | None,
    as_json: bool,
) -> None:
    """Produce the lines of FILE into a topic, in order.

    FILE is plain, gzipped (.gz), or - for stdin. A FIELD is a path of names joined
    by dots; records with the same key go to the same partition.
    """
    with output.Meter() as meter:

        def show(progress: ProduceProgress) -> None:
            meter.update(
                progress.file,
                progress.bytes_read,
                progress.bytes_total,
                output.plural(progress.records, "record"),
            )

        report = app.produce(
            file, topic=topic, key=key, partitions=partitions, on_progress=show
        )
    if as_json:
        output.print_json(output.to_json(report))
    else:
        _print_produced(report)


def _print_produced(report: ProduceReport) -> None:
    speed = output.number(round(report.records / max(report.seconds, 1e-3)))
    output.line(
        f"{output.safe(Path(report.file).name)} → {output.safe(report.topic)}: "
        f"{output.plural(report.records, 'record')} in "
        f"{output.duration(report.seconds)} ({speed}/s)"
    )
    for partition, records in report.partitions.items():
        output.line(f"  partition {partition}: {records:,}")
    if report.held_back:
        output.line("  the last line has no line end and is no JSON: left out")
    output.next_steps("kappa-log lag", "kappa-log consume --until-end")
