"""kappa-log import-phobos: the events and failures of the system before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kappa_log.cli import output
from kappa_log.cli.log import NEW_FAILURES, NOT_VERIFIED
from kappa_log.cli.params import dry_run_option, json_option, pass_app

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.phobos.importer import PhobosProgress, PhobosReport, TableReport


@click.command("import-phobos")
@click.argument("url")
@click.option("--source", help="Name of the source, instead of the old database's.")
@dry_run_option
@json_option
@pass_app
def import_phobos(
    app: KappaLog,
    /,
    *,
    url: str,
    source: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Bring a Phobos DB Checkpoint database in.

    URL is postgresql://USER@HOST/NAME or sqlite:///FILE; nothing in it is changed.
    Stop its consumers first. A run that was interrupted goes on where it was, and
    each run compares all that was imported with the old rows.
    """
    with output.Meter() as meter:

        def show(progress: PhobosProgress) -> None:
            meter.update(
                progress.phase,
                progress.done,
                progress.total,
                output.plural(progress.done, "row"),
            )

        report = app.import_phobos(
            url, source=source, dry_run=dry_run, on_progress=show
        )
    if as_json:
        output.print_json(output.to_json(report))
    else:
        _print_report(report)
    if not report.ok:
        return NOT_VERIFIED
    lost = any(found.failures for found in report.tables if found.table == "events")
    return NEW_FAILURES if lost else 0


def _print_report(report: PhobosReport) -> None:
    for found in report.tables:
        _print_table(found, dry_run=report.dry_run)
    for problem in report.problems:
        output.line(f"NOT AS IT WAS  {output.safe(problem)}")
    if report.dry_run:
        output.say("Nothing was imported.")
    elif report.ok:
        output.next_steps("kappa-log verify", "kappa-log failures list")


def _print_table(found: TableReport, *, dry_run: bool) -> None:
    would = "would import" if dry_run else "imported"
    output.line(
        f"{found.table}: {would} {output.plural(found.rows, 'row')} as "
        f"{output.safe(found.source)}; {found.before:,} were there before"
    )
    _print_odd(found, dry_run=dry_run)
    if dry_run:
        return
    if found.rows:
        output.line(
            f"  events {found.events:,}   duplicates {found.duplicates:,}   "
            f"failures {found.failures:,}"
        )
        output.line(
            f"  old checksums: {found.proved:,} are those of their payload, "
            f"{found.unproved:,} are not"
        )
    settled = f", {found.settled:,} settled since" if found.settled else ""
    output.line(f"  {output.plural(found.compared, 'row')} compared equal{settled}")


def _print_odd(found: TableReport, *, dry_run: bool) -> None:
    """Say which rows are kept in another way than people may think."""
    if found.not_utf8.rows:
        count = found.not_utf8.rows
        payloads = f"{output.plural(count, 'payload')} {'is' if count == 1 else 'are'}"
        where = "value" if found.table == "failures" else "raw"
        output.line(
            f"  {payloads} no UTF-8, kept byte for byte as {where}: "
            f"rows {found.not_utf8}"
        )
    if found.no_events.rows:
        rows = output.plural(found.no_events.rows, "row")
        become = "would become" if dry_run else "became"
        many = found.no_events.rows > 1
        output.line(
            f"  {rows} cannot be {'events' if many else 'an event'} here, and {become} "
            f"{'failures' if many else 'a failure'}: rows {found.no_events}"
        )
