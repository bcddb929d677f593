"""kappa-log ingest and verify: into the log, and whether it is what it was."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kappa_log.cli import output
from kappa_log.cli.archive import print_archive
from kappa_log.cli.params import DEDUPE, DIGEST, json_option, pass_app

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.ingest import IngestProgress, IngestReport
    from kappa_log.storage.ledger import Counts
    from kappa_log.verify import VerifyReport

NEW_FAILURES = 3
"""Exit code of a run that came to its end and left records that failed."""

NOT_VERIFIED = 4
"""Exit code of a log or view that is not what it should be."""

_CONFIGURED = "\0"
"""``--archive`` without a URL; no argument of a process can be this."""


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--topic", required=True, help="Topic that the records belong to.")
@click.option(
    "--group", help="Consumer group.  [default: kappa-log, or the listener's]"
)
@click.option("--source", help="Name of the source, instead of the file's base name.")
@click.option("--entity-id", metavar="FIELD", help="Field with the entity's id.")
@click.option("--event-time", metavar="FIELD", help="Field with the time it happened.")
@click.option("--event-type", metavar="FIELD", help="Field with the event's type.")
@click.option("--event-version", metavar="FIELD", help="Field with the type's version.")
@click.option("--key", metavar="FIELD", help="Field that becomes the record's key.")
@click.option(
    "--dedupe",
    type=DEDUPE,
    help="What makes a duplicate: payload, offset, key+payload or header:NAME.",
)
@json_option
@pass_app
def ingest(
    app: KappaLog,
    /,
    *,
    files: tuple[str, ...],
    topic: str,
    group: str | None,
    source: str | None,
    dedupe: str | None,
    as_json: bool,
    **fields: str | None,
) -> int:
    """Take files of JSON lines into the log.

    A FILE is plain, gzipped (.gz), or - for stdin. A FIELD is a path of names
    joined by dots. A run that was interrupted goes on where it was; a file that has
    grown is read on.
    """
    if source is not None and len(files) > 1:
        msg = "--source names one source; give one FILE with it."
        raise click.UsageError(msg)
    reports = []
    for file in files:
        report = _ingest_file(
            app,
            file,
            topic=topic,
            group=group,
            source=source,
            dedupe=dedupe,
            fields=fields,
        )
        reports.append(report)
        if as_json:
            output.print_json(output.to_json(report))
        else:
            _print_report(report)
    failed = any(report.counts.failed or report.counts.parked for report in reports)
    if not as_json:
        _teach(reports, topic)
    return NEW_FAILURES if failed else 0


def _ingest_file(
    app: KappaLog, file: str, *, fields: dict[str, str | None], **how: Any
) -> IngestReport:
    from kappa_log.handler import FieldOptions

    options = FieldOptions(**fields) if any(fields.values()) else None
    with output.Meter() as meter:

        def show(progress: IngestProgress) -> None:
            meter.update(
                progress.file,
                progress.bytes_read,
                progress.bytes_total,
                output.plural(progress.lines, "line"),
            )

        return app.ingest(file, fields=options, on_progress=show, **how)


def _print_report(report: IngestReport) -> None:
    name = f"{output.safe(Path(report.file).name)} → {output.safe(report.topic)}"
    if report.lines == 0:
        before = output.plural(report.resumed_at, "line")
        output.line(f"{name}: nothing new; {before} of it read before")
    else:
        speed = output.number(round(report.lines / max(report.seconds, 1e-3)))
        output.line(
            f"{name}: {output.plural(report.lines, 'line')} in "
            f"{output.duration(report.seconds)} ({speed}/s)"
        )
        if report.resumed_at:
            output.line(f"  resumed at line {report.resumed_at + 1:,}")
        output.line(f"  {counted(report.counts, blank=report.blank)}")
        if report.first_position is not None:
            output.line(
                f"  positions {report.first_position:,} to {report.last_position:,}"
            )
    if report.held_back:
        output.line(
            "  the last line has no line end and is no JSON yet: left for the next run"
        )


def counted(counts: Counts, blank: int = 0) -> str:
    """Return what became of records, in one line."""
    parts = {
        "kept": counts.acked,
        "skipped": counts.skipped,
        "duplicate": counts.duplicate,
        "failed": counts.failed,
    }
    more = {"parked": counts.parked, "blank": blank}
    shown = parts | {name: count for name, count in more.items() if count}
    return "   ".join(f"{name} {count:,}" for name, count in shown.items())


def _teach(reports: list[IngestReport], topic: str) -> None:
    steps = []
    looking = f"kappa-log events list --topic {shlex.quote(topic)}"
    if any(report.counts.failed for report in reports):
        ids = [identifier for report in reports for identifier in report.failure_ids]
        steps.append("kappa-log failures list")
        steps += [f"kappa-log failures show {identifier}" for identifier in ids[:1]]
    if any(report.counts.duplicate for report in reports):
        steps.append("kappa-log duplicates list")
    if any(report.counts.acked for report in reports):
        steps += [looking, "kappa-log replay"]
    output.next_steps(*(steps or [looking]))


@click.command()
@click.argument("names", metavar="[PROJECTION]...", nargs=-1)
@click.option("--head", type=DIGEST, help="A head that was kept elsewhere.")
@click.option(
    "--archive",
    metavar="[URL]",
    is_flag=False,
    flag_value=_CONFIGURED,
    help="Verify the archive instead, and compare it with the log.",
)
@json_option
@pass_app
def verify(
    app: KappaLog,
    /,
    *,
    names: tuple[str, ...],
    head: str | None,
    archive: str | None,
    as_json: bool,
) -> int:
    """Recompute the chain of all events, and check the ledger.

    The live rows of each PROJECTION that is named are compared with a fresh fold.
    """
    if archive is not None:
        if names:
            msg = "--archive verifies an archive alone; give no PROJECTION."
            raise click.UsageError(msg)
        url = None if archive == _CONFIGURED else archive
        return _verify_archive(app, url, head, as_json=as_json)
    with output.Meter() as meter:
        report = app.verify(
            head=head,
            names=names,
            on_step=meter.step,
        )
    if as_json:
        output.print_json(output.to_json(report))
    else:
        _print_verdict(report)
    return 0 if report.ok else NOT_VERIFIED


def _verify_archive(
    app: KappaLog, url: str | None, head: str | None, *, as_json: bool
) -> int:
    with output.Meter() as meter:
        report = app.verify_archive(
            url,
            head=head,
            on_step=meter.step,
        )
    if as_json:
        output.print_json(output.to_json(report))
    else:
        print_archive(report, head)
    return 0 if report.ok else NOT_VERIFIED


def _print_verdict(report: VerifyReport) -> None:
    output.print_verdict(
        report,
        [
            ("events", report.events),
            ("checkpoints", report.checkpoints),
            ("position", report.position),
            ("head", report.head),
            ("projections", ", ".join(report.projections) or None),
        ],
    )
