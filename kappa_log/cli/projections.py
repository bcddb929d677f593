"""kappa-log project and projections: fold on, look at rows, promote and undo."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from kappa_log.cli import output
from kappa_log.cli.log import NEW_FAILURES
from kappa_log.cli.params import (
    COUNT,
    IDENTIFIER,
    Commands,
    dry_run_option,
    json_option,
    limit_option,
    max_changed_option,
    on_error_option,
    pass_app,
    reason_option,
    require_consent,
    stop_on_signal,
    yes_option,
)
from kappa_log.cli.replay import print_diff, print_report, raise_all, show_progress
from kappa_log.errors import KappaLogError

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.app.folding import Explained
    from kappa_log.config import OnError
    from kappa_log.parked import ParkedRetry
    from kappa_log.project import ProjectReport

PEOPLE_ROWS = 20
"""Rows that are shown where people read; --json prints all."""

PEOPLE_STEPS = 100
"""Events of a row that are shown where people read; --json prints all."""

STALE = 2
"""Exit code when a build waits for a replay, as for any other stale code."""

_NONE = "No projection is registered, and none was built."


@click.command()
@click.argument("names", metavar="[PROJECTION]...", nargs=-1)
@click.option("--follow", is_flag=True, help="Go on as events come, until Ctrl-C.")
@on_error_option("the configuration's")
@json_option
@pass_app
def project(
    app: KappaLog,
    /,
    *,
    names: tuple[str, ...],
    follow: bool,
    on_error: OnError | None,
    as_json: bool,
) -> int:
    """Fold what is new into the live read models.

    Those of the PROJECTIONs that are named; of all, if none is. One that fails stops
    no other.
    """
    if follow:
        return _follow(app, names, on_error, as_json=as_json)
    failures: list[KappaLogError] = []
    with output.Meter() as meter:
        reports = app.project(
            names,
            on_progress=lambda p: show_progress(meter, p),
            on_error=on_error,
            on_failure=failures.append,
        )
    for report in reports:
        _print_project(report, as_json=as_json)
    raise_all(failures)
    if not reports:
        output.say(_NONE)
        output.next_steps("kappa-log init")
    if any(report.waiting for report in reports):
        return STALE
    return NEW_FAILURES if any(report.newly_parked for report in reports) else 0


def _follow(
    app: KappaLog, names: tuple[str, ...], on_error: OnError | None, *, as_json: bool
) -> int:
    """Print what is folded as it is folded, and once where each build stands."""
    waiting: dict[str, str | None] = {}
    failures: set[str] = set()

    def show(report: ProjectReport) -> None:
        told = waiting.get(report.projection, "") == report.waiting
        waiting[report.projection] = report.waiting
        if report.events or not told:
            _print_project(report, as_json=as_json)
            output.stdout().flush()

    def complain(error: KappaLogError) -> None:
        if str(error) not in failures:
            failures.add(str(error))
            output.error(str(error))

    with stop_on_signal() as stop:
        app.follow(
            names, stop=stop, on_report=show, on_error=on_error, on_failure=complain
        )
    return stop.exit_code


def _print_project(report: ProjectReport, *, as_json: bool) -> None:
    if as_json:
        output.print_json(output.to_json(report))
        return
    label = f"{report.projection} v{report.version}, build {report.build}"
    if report.waiting:
        output.line(f"{label}: waits at position {report.to_position:,}")
        output.say(report.waiting)
    elif report.to_position <= report.from_position or not report.events:
        output.line(f"{label}: nothing new, at position {report.to_position:,}")
    else:
        unkeyed = f", {report.unkeyed:,} without a key" if report.unkeyed else ""
        output.line(
            f"{label}: {output.plural(report.events, 'event')}{unkeyed}, "
            f"{output.plural(report.rows_changed, 'row')} written in "
            f"{output.duration(report.seconds)}, at position {report.to_position:,}"
        )
    if report.parked and not report.waiting:
        new = f", {report.newly_parked:,} of them now" if report.newly_parked else ""
        output.line(
            f"  {output.plural(report.parked, 'key')} parked{new}: the fold failed, "
            "and what came after waits"
        )
        output.next_steps(f"kappa-log projections parked {report.projection}")


@click.group(cls=Commands)
def projections() -> None:
    """Look at projections and their builds."""


@projections.command("list")
@json_option
@pass_app
def list_projections(app: KappaLog, /, *, as_json: bool) -> None:
    """List projections: what is live, how many rows, how far behind."""
    found = app.projections()
    if as_json:
        for status in found:
            output.print_json(output.to_json(status))
        return
    if not found:
        output.say(_NONE)
        output.next_steps("kappa-log init")
        return
    output.print_table(
        ("projection", "version", "build", "rows", "position", "behind", "state"),
        [_listed(status) for status in found],
    )
    known = [status for status in found if status.version is not None]
    steps = []
    if any(status.live is None for status in known):
        steps.append("kappa-log project")
    elif any(status.stale for status in known):
        steps.append("kappa-log replay")
    lost = [status.name for status in found if status.version is None]
    if lost:
        output.say("Of what is not registered, restore the code, or drop all of it.")
        steps += [f"kappa-log projections drop {name} --all" for name in lost]
    if steps:
        output.next_steps(*steps)


def _listed(status: Any) -> tuple[object, ...]:
    live = status.live
    if live is None:
        return (status.name, status.version, *[None] * 4, _state(status))
    behind = status.lag.events if status.lag else None
    return (
        status.name,
        live.version,
        live.number,
        live.rows,
        live.cursor,
        behind,
        _state(status),
    )


def _state(status: Any) -> str:
    if status.version is None:
        return "not registered"
    if status.live is None:
        return "not built yet"
    if status.stale:
        waits = f"; {status.live.parked:,} parked" if status.live.parked else ""
        return f"changed: {', '.join(status.stale)}{waits}"
    told = ["mixed"] if status.live.mixed else []
    if status.live.parked:
        told.append(f"{output.plural(status.live.parked, 'key')} parked")
    return ", ".join(told) or "ok"


@projections.command()
@click.argument("name")
@json_option
@pass_app
def show(app: KappaLog, /, *, name: str, as_json: bool) -> None:
    """Show all that is known of the projection NAME, and its builds."""
    status = app.projection(name)
    if as_json:
        output.print_json(output.to_json(status))
        return
    output.print_fields(
        [
            ("projection", status.name),
            ("version", status.version),
            ("doc", (status.doc or "").partition("\n")[0] or None),
            ("topics", ", ".join(status.topics)),
            ("view", status.view),
            ("columns", ", ".join(status.columns)),
            ("behind", status.lag.events if status.lag else None),
            ("state", _state(status)),
        ]
    )
    if not status.builds:
        output.next_steps("kappa-log project")
        return
    output.line()
    output.print_table(
        (
            "build",
            "version",
            "role",
            "position",
            "rows",
            "unkeyed",
            "parked",
            "updated",
        ),
        [
            (
                b.number,
                b.version,
                b.role,
                b.cursor,
                b.rows,
                b.unkeyed,
                b.parked,
                output.when(b.updated_at),
            )
            for b in status.builds
        ],
    )
    for build in status.builds:
        if build.mixed:
            base, start = build.mixed.base_build, build.mixed.from_position
            output.say(
                f"Build {build.number} is mixed: build {base}, but for keys touched "
                f"since position {start:,}, which were folded anew."
            )


@projections.command()
@click.argument("name")
@click.option("--key", help="Only this key; parts of a key are joined by /.")
@click.option("--build", type=IDENTIFIER, help="Of this build, not the live one.")
@click.option(
    "--limit",
    type=COUNT,
    help=f"Most to print.  [default: {PEOPLE_ROWS}; with --json all]",
)
@json_option
@pass_app
def rows(
    app: KappaLog,
    /,
    *,
    name: str,
    key: str | None,
    build: int | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Print rows of the read model NAME, in the order of their keys."""
    if as_json:
        for row in app.rows(name, key=key, build=build, limit=limit):
            output.print_json(output.to_json(row))
        return
    most = limit or PEOPLE_ROWS
    found = list(app.rows(name, key=key, build=build, limit=most + 1))
    if not found:
        output.say("There is no such row." if key else f"{name} has no rows.")
        output.next_steps(f"kappa-log projections show {name}")
        return
    output.print_table(list(found[0]), [list(row.values()) for row in found[:most]])
    if len(found) > most:
        output.say(f"These are the first {most:,}; --limit N shows more, --json all.")


@projections.command()
@click.argument("name")
@click.argument("key")
@click.option(
    "--limit",
    type=COUNT,
    help=f"Only the last so many.  [default: {PEOPLE_STEPS}; with --json all]",
)
@json_option
@pass_app
def explain(
    app: KappaLog, /, *, name: str, key: str, limit: int | None, as_json: bool
) -> None:
    """Show each event of the row KEY of NAME, and the row after it.

    The row of a parked key ends before the event at which its fold failed.
    """
    steps = app.explain(name, key)
    if as_json and limit is None:
        _print_json_steps(app, steps)
        return
    most = limit or PEOPLE_STEPS
    found = _Last(steps, most)
    if as_json:
        _print_json_steps(app, found.steps[-most:])
    else:
        _print_steps(found.steps, most)
    if found.error is not None:
        raise found.error
    if not found.count and not as_json:
        output.say(f"No event of the log belongs to the key {key} of {name}.")
        output.next_steps(f"kappa-log projections rows {name}")
    elif found.count > most and not as_json:
        output.say(
            f"These are the last {most:,} of {found.count:,} events; --limit N shows "
            "more, --json all."
        )


class _Last:
    """The last steps of a row, and the one before them, which they are held against.

    Args:
        steps: All of them; an error ends them, and is kept.
        most: How many.
    """

    def __init__(self, steps: Iterator[Explained], most: int) -> None:
        kept: deque[Explained] = deque(maxlen=most + 1)
        self.count = 0
        self.error: KappaLogError | None = None
        try:
            for step in steps:
                kept.append(step)
                self.count += 1
        except KappaLogError as error:
            self.error = error
        self.steps = list(kept)


def _print_json_steps(app: KappaLog, steps: Iterable[Explained]) -> None:
    sources = app.sources()
    for step in steps:
        event = output.event_json(step.event, sources)
        error = "" if step.error is None else f',"error":{output.to_json(step.error)}'
        output.print_json(
            f'{{"event":{event},"state":{output.to_json(step.state)}{error}}}'
        )


def _print_steps(steps: list[Explained], most: int) -> None:
    before = steps[-most - 1].state if len(steps) > most else None
    for step in steps[-most:]:
        event = step.event
        when = output.moment(event.event_time or event.recorded_at)
        output.line(f"{event.position:,}  {when}  {output.cell(event.event_type)}")
        output.line(f"  {output.cell(event.payload_text)}")
        if step.error is not None:
            output.line(f"  ✗ {output.safe(step.error)}: parked here")
        elif step.state is None:
            output.line("  → no row")
        else:
            changed = output.changes(before, step.state) or "as before"
            output.line(f"  → {changed}")
        before = step.state


@projections.command("parked")
@click.argument("name")
@click.option("--build", type=IDENTIFIER, help="Of this build, not the live one.")
@limit_option(50)
@json_option
@pass_app
def list_parked(
    app: KappaLog, /, *, name: str, build: int | None, limit: int, as_json: bool
) -> None:
    """List the keys of NAME whose fold failed, and what waits behind them."""
    found = app.parked(name, build=build, limit=limit)
    if as_json:
        for parked in found:
            output.print_json(output.to_json(parked))
        return
    if not found:
        output.say(f"No key of {name} is parked: each fold went through.")
        output.next_steps(f"kappa-log projections rows {name}")
        return
    output.print_table(
        ("key", "position", "waiting", "attempts", "last", "error"),
        [
            (
                p.key,
                p.position,
                p.waiting,
                p.attempts,
                output.when(p.last_at),
                f"{p.error_class}: {p.error_message}",
            )
            for p in found
        ],
    )
    if len(found) == limit:
        output.say(f"These are the first {limit:,}; --limit N shows more.")
    steps = [f"kappa-log projections retry {name} --all --dry-run"]
    if build is not None:
        steps = [f"kappa-log projections drop {name} {build}"]
    output.next_steps(*steps)


@projections.command("retry")
@click.argument("name")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All keys that are parked.")
@click.option(
    "--dry-run", is_flag=True, help="Fold them and tell what comes of it; keep nothing."
)
@reason_option
@json_option
@pass_app
def retry_parked(
    app: KappaLog,
    /,
    *,
    name: str,
    keys: tuple[str, ...],
    every: bool,
    dry_run: bool,
    reason: str | None,
    as_json: bool,
) -> int:
    """Fold parked KEYs of NAME on, from the event at which their fold failed.

    By the code that the live build was made by: changed code must have been declared
    compatible. A replay folds all keys anew and needs no retry.
    """
    if bool(keys) == every:
        msg = "say which keys: KEYs, or --all."
        raise click.UsageError(msg)
    done = app.retry_parked(
        name, None if every else keys, dry_run=dry_run, reason=reason
    )
    if as_json:
        output.print_json(output.to_json(done))
    else:
        _print_retried(done)
    return NEW_FAILURES if done.failed else 0


def _print_retried(done: ParkedRetry) -> None:
    if not done.keys:
        output.say(f"No key of {done.projection} is parked.")
        return
    would = "would be " if done.dry_run else ""
    lost = f"   retried by somebody else {done.lost:,}" if done.lost else ""
    output.line(
        f"{would}folded on {done.folded:,}   failed again {done.failed:,}{lost}"
    )
    shown = [one for one in done.keys if one.outcome == "failed" or done.dry_run]
    for one in shown[:PEOPLE_ROWS]:
        said = (
            f"at position {one.position:,}: {output.safe(one.error)}"
            if one.error is not None
            else f"{output.plural(one.events, 'event')} to position {one.position:,}"
        )
        output.line(f"  {output.cell(one.key)}  {said}")
    if len(shown) > PEOPLE_ROWS:
        output.say(f"These are the first {PEOPLE_ROWS}; --json prints all.")
    name = done.projection
    if done.dry_run:
        output.next_steps(f"kappa-log projections retry {name} --all")
    elif done.failed:
        output.next_steps(f"kappa-log projections parked {name}")


@projections.command()
@click.argument("name")
@click.argument("old", type=IDENTIFIER, required=False)
@click.argument("new", type=IDENTIFIER, required=False)
@json_option
@pass_app
def diff(
    app: KappaLog, /, *, name: str, old: int | None, new: int | None, as_json: bool
) -> None:
    """Compare two builds of NAME: by default the live one and its shadow."""
    found = app.diff(name, old, new)
    if as_json:
        output.print_json(output.to_json(found))
        return
    output.line(f"{name}: build {found.new_build}")
    print_diff(found)


@projections.command()
@click.argument("name")
@max_changed_option
@reason_option
@json_option
@pass_app
def promote(app: KappaLog, /, *, name: str, as_json: bool, **how: Any) -> int:
    """Make the build of NAME live that a replay left beside the live one."""
    return print_report(app.promote(name, **how), as_json=as_json)


@projections.command()
@click.argument("name")
@click.option("--behind", is_flag=True, help="Even if it cannot be caught up first.")
@reason_option
@json_option
@pass_app
def undo(app: KappaLog, /, *, name: str, as_json: bool, **how: Any) -> None:
    """Make the retired build of NAME live again; with parked keys only --behind."""
    swap = app.undo(name, **how)
    if as_json:
        output.print_json(output.to_json(swap))
        return
    behind = f", {output.plural(swap.behind, 'event')} behind" if swap.behind else ""
    output.line(
        f"{name}: build {swap.live} is live again{behind}; {swap.retired} is retired"
    )
    output.next_steps(f"kappa-log projections show {name}")


@projections.command()
@click.argument("name")
@click.argument("build", type=IDENTIFIER, required=False)
@click.option("--all", "every", is_flag=True, help="All, of one that has no code.")
@reason_option
@yes_option
@dry_run_option
@pass_app
def drop(
    app: KappaLog,
    /,
    *,
    name: str,
    build: int | None,
    every: bool,
    reason: str | None,
    yes: bool,
    dry_run: bool,
) -> None:
    """Remove BUILD of the projection NAME; the live one stays.

    With --all nothing stays: all builds and the view of a projection whose code is
    not registered any more. Its events stay in the log.
    """
    if (build is not None) == every:
        msg = "say which: a BUILD, or --all."
        raise click.UsageError(msg)
    if build is None:
        _drop_all(app, name, reason, yes=yes, dry_run=dry_run)
        return
    if dry_run:
        output.line(f"would drop  build {build} of {name}")
        return
    require_consent(f"Drop build {build} of {name}?", yes=yes)
    app.drop_build(name, build, reason=reason)
    output.line(f"drop  build {build} of {name}")


def _drop_all(
    app: KappaLog, name: str, reason: str | None, *, yes: bool, dry_run: bool
) -> None:
    found = app.drop_projection(name, dry_run=True)
    if not dry_run:
        what = output.plural(len(found), "build")
        require_consent(f"Drop all of {name}: {what}, and its view?", yes=yes)
        found = app.drop_projection(name, reason=reason)
    for build in found:
        done = "would drop" if dry_run else "drop"
        output.line(f"{done}  build {build.number} of {name}, which is {build.role}")


@projections.command()
@click.argument("name")
@reason_option
@json_option
@pass_app
def compatible(
    app: KappaLog, /, *, name: str, reason: str | None, as_json: bool
) -> None:
    """Declare that the changed code of NAME means the same rows."""
    parts = app.compatible(name, reason=reason)
    if as_json:
        output.print_json(output.to_json({"projection": name, "compatible": parts}))
    elif parts:
        output.line(f"{name}: compatible in {', '.join(parts)}")
        live = app.projection(name).live
        steps = [f"kappa-log project {name}"]
        if live is not None and live.parked:
            steps.append(f"kappa-log projections retry {name} --all --dry-run")
        output.next_steps(*steps)
    else:
        output.line(f"{name}: nothing was changed; its code is that of its live build")
