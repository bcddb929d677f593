"""kappa-log replay: fold a range of the log anew, compare, promote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kappa_log.cli import output
from kappa_log.cli.log import NEW_FAILURES
from kappa_log.cli.params import (
    COORDINATES,
    IDENTIFIER,
    MOMENT,
    POSITION,
    dry_run_option,
    json_option,
    max_changed_option,
    on_error_option,
    pass_app,
    reason_option,
)
from kappa_log.errors import (
    AlreadyRunning,
    KappaLogError,
    ProjectionError,
    UsageError,
)

if TYPE_CHECKING:
    from kappa_log import KappaLog, ReplayPlan, ReplayReport
    from kappa_log.project import FoldProgress
    from kappa_log.storage.diff import Diff

REFUSED = 4
"""Exit code of a replay whose diff was larger than --max-changed."""

_DEFAULTS: dict[str, Any] = {
    "since": None,
    "from_position": None,
    "from_offset": None,
    "until": None,
    "by": "recorded",
    "promote": True,
    "max_changed": None,
    "on_error": None,
    "reason": None,
    "source": "sql",
}
_STARTS = ("since", "from_position", "from_offset")


@click.command()
@click.argument("names", metavar="[PROJECTION]...", nargs=-1)
@click.option("--since", type=MOMENT, help="Refold the keys touched since this time.")
@click.option("--from-position", type=POSITION, help="… since this position.")
@click.option("--from-offset", type=COORDINATES, help="… since this record.")
@click.option(
    "--by",
    type=click.Choice(["recorded", "event-time"]),
    default="recorded",
    show_default=True,
    help="Which clock --since and --until mean.",
)
@click.option(
    "--until", type=MOMENT, help="Build the state before this time, on the side."
)
@click.option(
    "--from",
    "source",
    type=click.Choice(["sql", "archive"]),
    default="sql",
    show_default=True,
    help="Where to read events; what the archive lacks comes from SQL.",
)
@dry_run_option
@click.option(
    "--no-promote",
    "promote",
    flag_value=False,
    default=True,
    help="Compare, and leave the live build live.",
)
@max_changed_option
@on_error_option("stop")
@reason_option
@click.option("--resume", type=IDENTIFIER, metavar="ID", help="Go on with a replay.")
@click.option("--cancel", type=IDENTIFIER, metavar="ID", help="End a replay, clean up.")
@click.option("--list", "as_list", is_flag=True, help="List replays, newest first.")
@json_option
@pass_app
def replay(
    app: KappaLog,
    /,
    *,
    names: tuple[str, ...],
    dry_run: bool,
    resume: int | None,
    cancel: int | None,
    as_list: bool,
    as_json: bool,
    **request: Any,
) -> int:
    """Rebuild read models, compare with the live ones, promote.

    Those of the PROJECTIONs that are named; of all, if none is. A TIME is a date,
    meaning its midnight in UTC, or a time with an offset.
    """
    _check_alone(
        names, request, dry_run=dry_run, resume=resume, cancel=cancel, as_list=as_list
    )
    _check_request(request)
    request["on_error"] = request["on_error"] or "stop"
    if as_list:
        return _list(app, as_json=as_json)
    if cancel is not None:
        return _cancel(app, cancel, as_json=as_json)
    if resume is not None:
        report = _watched(app, lambda show: app.resume(resume, on_progress=show))
        return print_report(report, as_json=as_json)
    if dry_run:
        return _plan(app, names, request, as_json=as_json)
    code = 0
    failures: list[KappaLogError] = []
    for name in _chosen(app, names):
        try:
            code = max(code, _replay(app, name, request, as_json=as_json))
        except (ProjectionError, AlreadyRunning) as error:
            # It concerns this one alone, as any other error would not.
            failures.append(error)
    raise_all(failures)
    return code


def raise_all(failures: Sequence[KappaLogError]) -> None:
    """End a command with its errors, if it met some: the last one has the exit code."""
    for error in failures[:-1]:
        output.error(str(error))
    for error in failures[-1:]:
        raise error


def _check_alone(
    names: Sequence[str], request: Mapping[str, Any], **modes: Any
) -> None:
    """Refuse options of which each says that the others are not meant."""
    given = [name for name, value in modes.items() if value and name != "dry_run"]
    spelled = ["--" + name.removeprefix("as_") for name in given]
    if len(given) > 1:
        msg = f"{' and '.join(spelled)} exclude each other."
        raise click.UsageError(msg)
    asked = [name for name, value in request.items() if value != _DEFAULTS[name]]
    if given and (names or asked or modes["dry_run"]):
        msg = f"{spelled[0]} goes alone: the replay itself knows what it replays."
        raise click.UsageError(msg)


def _check_request(request: Mapping[str, Any]) -> None:
    starts = [
        "--" + name.replace("_", "-") for name in _STARTS if request[name] is not None
    ]
    if len(starts) > 1:
        msg = f"{' and '.join(starts)} are two starts; give one."
        raise click.UsageError(msg)
    until = request["until"] is not None
    if until and starts:
        msg = (
            f"--until builds the state at a time from the whole log; {starts[0]} "
            "cannot go with it."
        )
        raise click.UsageError(msg)
    if request["by"] == "event-time" and request["since"] is None and not until:
        msg = "--by event-time says what --since or --until mean; give one of them."
        raise click.UsageError(msg)


def _chosen(app: KappaLog, names: Sequence[str]) -> list[str]:
    """Return what was named, or all that is registered."""
    chosen = list(dict.fromkeys(names))
    if not chosen:
        chosen = [
            found.name for found in app.projections() if found.version is not None
        ]
    if not chosen:
        msg = (
            "no projection is registered; put one into projections/ beside "
            "kappa_log.toml ('kappa-log init' writes examples)."
        )
        raise UsageError(msg)
    return chosen


def _replay(
    app: KappaLog, name: str, request: Mapping[str, Any], *, as_json: bool
) -> int:
    report = _watched(
        app,
        lambda show: app.replay(
            name,
            on_plan=lambda plan: output.say("\n".join(_planned(plan))),
            on_progress=show,
            **request,
        ),
    )
    return print_report(report, as_json=as_json)


def _watched(
    app: KappaLog, work: Callable[[Callable[[FoldProgress], None]], ReplayReport]
) -> ReplayReport:
    """Do work under a progress bar; after Ctrl-C say how to go on."""
    try:
        with output.Meter() as meter:
            return work(lambda progress: show_progress(meter, progress))
    except KeyboardInterrupt:
        if app.interrupted_replay is not None:
            output.say("\nInterrupted; what was folded is kept.")
            output.next_steps(
                f"kappa-log replay --resume {app.interrupted_replay}",
                f"kappa-log replay --cancel {app.interrupted_replay}",
            )
        raise


def show_progress(meter: output.Meter, progress: FoldProgress) -> None:
    """Show how far a fold is."""
    meter.update(
        f"{progress.projection} {progress.phase}",
        progress.cursor,
        progress.target,
        output.plural(progress.events, "event"),
    )


def print_report(report: ReplayReport, *, as_json: bool) -> int:
    """Print what a replay did; return the exit code that goes with it."""
    if as_json:
        output.print_json(output.to_json(report))
    else:
        _print_outcome(report)
    if report.outcome == "refused":
        return REFUSED
    return NEW_FAILURES if report.parked and not report.promoted else 0


def _plan(
    app: KappaLog, names: Sequence[str], request: Mapping[str, Any], *, as_json: bool
) -> int:
    for name in _chosen(app, names):
        plan = app.plan_replay(name, **request)
        if as_json:
            output.print_json(output.to_json(plan))
        else:
            for text in _planned(plan):
                output.line(output.wrapped(text))
    return 0


def _planned(plan: ReplayPlan) -> list[str]:
    said = [f"{plan.projection} v{plan.version}: {output.safe(plan.description)}"]
    if plan.archive is not None:
        said.append(f"  {_read(plan)} {output.safe(plan.archive)}")
    return said


def _read(plan: ReplayPlan) -> str:
    """Return where events are read, up to the address of the archive."""
    if not plan.archive_end:
        return "all is read from the database, since nothing is in the archive at"
    if plan.archive_end >= plan.head:
        return "all is read from the archive at"
    return (
        f"positions from {plan.archive_end + 1:,} on are read from the database, those "
        "before from the archive at"
    )


_OUTCOMES = {
    "promoted": "build {build} is live",
    "kept": "build {build} is ready beside the live one",
    "refused": "build {build} is kept, and not promoted",
    "side": "build {build} is ready on the side",
    "nothing": "nothing to do",
}


def _print_outcome(report: ReplayReport) -> None:
    outcome = _OUTCOMES.get(report.outcome, report.outcome).format(build=report.build)
    output.line(f"{report.projection} v{report.version}: {outcome}")
    if report.outcome != "nothing":
        _print_work(report)
    if report.diff is not None:
        print_diff(report.diff)
    if report.note and report.outcome != "nothing":
        output.say(report.note)
    _teach(report)


def _print_work(report: ReplayReport) -> None:
    speed = output.number(round(report.events_per_second))
    output.line(
        f"  {output.plural(report.events, 'event')} folded in "
        f"{output.duration(report.seconds)} ({speed}/s)"
    )
    output.line(
        f"  {output.plural(report.keys, _noun(report))}, "
        f"positions {report.from_position:,} to {report.to_position:,}"
    )

    if report.parked:
        output.line(
            f"  {output.plural(report.parked, 'key')} parked: the fold failed, and "
            "what came after waits"
        )


def _noun(report: ReplayReport) -> str:
    return "touched key" if report.kind == "since" else "row"


def print_diff(diff: Diff) -> None:
    """Print what differs between two builds, with examples."""
    output.line(
        f"  against build {diff.old_build} at position {diff.position:,}: "
        f"{diff.added:,} added, {diff.removed:,} removed, {diff.changed:,} changed"
    )
    for sign, columns in (("+", diff.columns_added), ("-", diff.columns_removed)):
        if columns:
            output.line(f"  {sign} column {', '.join(columns)}")
    for row in diff.examples:
        sign = "+" if row.before is None else "-" if row.after is None else "~"
        key = "/".join(map(output.cell, row.key.values()))
        output.line(f"  {sign} {key}: {output.changes(row.before, row.after)}")


def _teach(report: ReplayReport) -> None:
    name = report.projection
    match report.outcome:
        case "promoted":
            steps = [f"kappa-log projections rows {name}"]
            if report.diff is not None:
                steps.append(f"kappa-log projections undo {name}")
        case "refused" if report.note:
            return  # The note names the commands.
        case "kept" | "refused":
            promote = f"kappa-log projections promote {name}"
            if report.parked:
                promote = f"kappa-log projections parked {name} --build {report.build}"
            steps = [
                f"kappa-log projections diff {name}",
                promote,
                f"kappa-log projections drop {name} {report.build}",
            ]
        case "side":
            steps = [f"kappa-log projections rows {name} --build {report.build}"]
        case _:
            steps = ["kappa-log projections list"]
    output.next_steps(*steps)


def _cancel(app: KappaLog, identifier: int, *, as_json: bool) -> int:
    row = app.cancel(identifier)
    if as_json:
        output.print_json(output.to_json(row))
    else:
        output.line(
            f"replay {row.id} of {row.projection} is cancelled; its build is gone"
        )
    return 0


def _list(app: KappaLog, /, *, as_json: bool) -> int:
    found = app.replays()
    if as_json:
        for row in found:
            output.print_json(output.to_json(row))
        return 0
    if not found:
        output.say("There was no replay yet.")
        output.next_steps("kappa-log replay")
        return 0
    output.print_table(
        ("id", "projection", "build", "state", "started", "reason"),
        [
            (
                r.id,
                r.projection,
                r.build,
                r.outcome or f"{'failed' if r.failure else 'unfinished'}: {r.phase}",
                output.when(r.created_at),
                r.reason,
            )
            for r in found
        ],
    )
    unfinished = next((row.id for row in found if row.outcome is None), None)
    if unfinished is not None:
        output.next_steps(
            f"kappa-log replay --resume {unfinished}",
            f"kappa-log replay --cancel {unfinished}",
        )
    return 0
