"""kappa-log export, import: the log as Parquet, and back."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from kappa_log.cli import output
from kappa_log.cli.params import dry_run_option, json_option, pass_app

if TYPE_CHECKING:
    from kappa_log import KappaLog
    from kappa_log.archive.check import ArchiveReport
    from kappa_log.archive.export import ExportReport


@click.command()
@click.option("--to", metavar="URL", help="A folder or s3://…, not the configured one.")
@click.option(
    "--columns",
    metavar="TOPIC.FIELD:TYPE",
    multiple=True,
    help="Make a typed column of a payload field; may be repeated.",
)
@click.option(
    "--columns-of",
    metavar="PROJECTION",
    multiple=True,
    help="Make columns of the fields of a projection's payload Struct.",
)
@click.option("--no-columns", is_flag=True, help="Make none of them any more.")
@dry_run_option
@json_option
@pass_app
def export(
    app: KappaLog,
    /,
    *,
    to: str | None,
    columns: tuple[str, ...],
    columns_of: tuple[str, ...],
    no_columns: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the log as Parquet: what is new, with a manifest.

    TYPE is int, float, decimal, str, bool, bytes, date, datetime or json, or a name
    of them in Arrow or SQL, such as double. Columns that were named once stay.
    """
    if no_columns and (columns or columns_of):
        msg = "--no-columns goes with no other columns."
        raise click.UsageError(msg)
    with output.Meter() as meter:
        report = app.export(
            to,
            columns=columns,
            columns_of=columns_of,
            no_columns=no_columns,
            dry_run=dry_run,
            on_step=meter.step,
        )
    if as_json:
        output.print_json(output.to_json(report))
    else:
        _print_export(report, to)


@click.command(name="import")
@click.argument("url", required=False)
@json_option
@pass_app
def import_(app: KappaLog, /, *, url: str | None, as_json: bool) -> None:
    """Bring an archive into an empty log.

    The one at URL, a folder or s3://…, or the configured one. Positions, chain,
    offsets, ledger, failures and duplicates are as they were; read models are made
    from them: kappa-log project.
    """
    with output.Meter() as meter:
        report = app.import_archive(
            url,
            on_step=meter.step,
        )
    if as_json:
        output.print_json(output.to_json(report))
        return
    output.line(f"{output.safe(report.url)} is in the log")
    output.print_fields(
        [
            ("events", report.position),
            ("head", report.head),
            ("sources", report.sources),
            ("checkpoints", report.checkpoints),
            ("duplicates", report.duplicates),
            ("failures", report.failures),
            ("took", output.duration(report.seconds)),
        ],
        indent="  ",
    )
    output.next_steps("kappa-log project", "kappa-log verify")


def print_archive(report: ArchiveReport, head: str | None) -> None:
    """Print what was verified of an archive, and a head that was given."""
    facts: list[tuple[str, object]] = [("archive", report.url)]
    if report.position is None:
        facts.append(("compared", "with nothing: its manifest cannot be read"))
    else:
        events = output.number(report.events)
        if report.events != report.position:
            events += f" proved, of {output.number(report.position)}"
        facts += [
            ("files", report.files),
            ("bytes", report.bytes),
            ("events", events),
            ("checkpoints", report.checkpoints),
            ("position", report.position),
            ("head", report.head),
            ("compared", _compared(report)),
        ]
        if head is not None and report.kept_head is not None:
            at = f"it is the one at position {output.number(report.kept_head)}"
            facts.append(("kept head", at))
    output.print_verdict(report, facts)


def _compared(report: ArchiveReport) -> str:
    """Return what its end was held against, and how far that is."""
    if not report.compared:
        return "with no log"
    said = "with the log"
    if report.events != report.position:
        said += " by what the manifest says"
    if report.behind is None:
        return f"{said}: it is not of it"
    if not report.behind:
        return f"{said}, which ends there"
    more = output.plural(report.behind, "event")
    return f"{said}, which has {more} more (kappa-log export)"


def _print_export(report: ExportReport, to: str | None) -> None:
    from kappa_log.archive.presence import told

    output.line(output.safe(report.url))
    new = output.plural(report.segments_written, "segment")
    written = f"{output.plural(report.events, 'event')} in {new}"
    names = ", ".join(report.projections)
    absent = ", ".join(found.column for found in report.absent)
    if not report.dry_run:
        written += f", {output.plural(report.bytes_written, 'byte')} in all"
    output.print_fields(
        [
            ("position", report.position),
            ("head", report.head),
            ("would write" if report.dry_run else "written", written),
            ("kept", output.plural(report.segments_kept, "segment")),
            *([] if report.dry_run else [("projections", names or None)]),
            *([("not found", absent)] if absent else []),
        ],
        indent="  ",
    )
    for name, count in report.nulls.items():
        values = output.plural(count, "value")
        output.say(f"{name}: {values} of another type became NULL.")
    for note in told(report.absent):
        output.say(f"Note: {note}")
    for note in report.notes:
        output.say(f"Note: {note}.")
    if report.dry_run:
        return
    prove = "kappa-log verify --archive"
    if to is not None:
        prove += f" {shlex.quote(to)}"
    if report.segments_kept:
        output.say(
            "Kept segments are there, as large as they were; they were not proved "
            f"anew: {prove} does it."
        )
    replay = ["kappa-log replay --from archive"] if to is None else []
    output.next_steps(prove, *replay)
