"""kappa-log failures: what could not become an event, why, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from kappa_log.cli import output
from kappa_log.cli.log import NEW_FAILURES
from kappa_log.cli.params import (
    IDENTIFIER,
    Commands,
    dry_run_option,
    json_option,
    limit_option,
    pass_app,
    reason_option,
    require_consent,
    yes_option,
)
from kappa_log.cli.reading import header_fields

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.failures import BulkRetry
    from kappa_log.trial import Trial


@click.group(cls=Commands)
def failures() -> None:
    """Look at failures, retry or discard them."""


@failures.command("list")
@limit_option(50)
@json_option
@pass_app
def list_failures(app: KappaLog, /, *, limit: int, as_json: bool) -> None:
    """List failures, newest first."""
    found = app.failures(limit=limit)
    if as_json:
        for failure in found:
            output.print_json(output.to_json(failure))
        return
    if not found:
        output.say("There is no failure: each record became an event or was skipped.")
        output.next_steps("kappa-log events list")
        return
    output.print_table(
        ("id", "topic", "source", "offset", "attempts", "error"),
        [
            (
                f.id,
                f.topic,
                f.source,
                f.offset,
                f.attempts,
                _error(f),
            )
            for f in found
        ],
    )
    output.next_steps(
        f"kappa-log failures show {found[0].id}",
        "kappa-log failures groups",
        f"kappa-log failures retry {found[0].id}",
    )


@failures.command("show")
@click.argument("identifier", metavar="ID", type=IDENTIFIER)
@json_option
@pass_app
def show_failure(app: KappaLog, /, *, identifier: int, as_json: bool) -> None:
    """Show all of the failure ID: its record, and its error."""
    failure = app.failure(identifier)
    if as_json:
        output.print_json(output.to_json(failure))
        return
    output.print_fields(_failure_fields(failure))
    for text in failure.error_backtrace:
        output.line(f"  {output.safe_lines(text.rstrip())}")


def _failure_fields(failure: Any) -> Iterable[tuple[str, object]]:
    last: dict[str, object] = {
        "key": failure.key,
        "value": failure.value,
        "error": _error(failure),
    }
    plain = (
        "id", "topic", "group_id", "source", "partition", "offset", "timestamp",
        "entity_id", "event_type", "event_version", "event_time", "parked",
        "attempts", "first_at", "last_at", "fingerprint", "checksum",
    )  # fmt: skip
    yield from ((name, getattr(failure, name)) for name in plain)
    yield from header_fields(failure.headers)
    yield from last.items()


def _error(failure: Any) -> str:
    if failure.error_class is None:
        return "waits behind a failure of its key"
    return f"{failure.error_class}: {failure.error_message}"


@failures.command("groups")
@limit_option(20)
@json_option
@pass_app
def list_groups(app: KappaLog, /, *, limit: int, as_json: bool) -> None:
    """List failures by error and place, the largest groups first."""
    found = app.failure_groups(limit=limit)
    if as_json:
        for group in found:
            output.print_json(output.to_json(group))
        return
    if not found:
        output.say("There is no failure.")
        return
    output.print_table(
        ("fingerprint", "failures", "wait", "last", "error"),
        [
            (
                output.Uncut(group.fingerprint),
                group.count,
                group.parked,
                output.when(group.last_at),
                f"{group.error_class}: {group.message}",
            )
            for group in found
        ],
    )
    output.next_steps(
        f"kappa-log failures show {found[0].example_id}",
        f"kappa-log failures retry --fingerprint {found[0].fingerprint}",
    )


def _choice(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which failures are meant."""
    for option in reversed(
        (
            click.argument("ids", metavar="[ID]...", nargs=-1, type=IDENTIFIER),
            click.option("--all", "every", is_flag=True, help="All failures."),
            click.option("--fingerprint", help="Those of a group."),
            click.option("--topic", help="Those of a topic."),
            click.option("--group", help="Those of a consumer group."),
            click.option("--error-class", help="Those with an error of this class."),
        )
    ):
        command = option(command)
    return command


def _chosen(
    app: KappaLog, ids: tuple[int, ...], *, every: bool, **chosen: str | None
) -> dict[str, Any]:
    """Return what is meant as a filter; each ID must be there."""
    given = {name: value for name, value in chosen.items() if value is not None}
    if bool(ids or given) == every:
        msg = "say which failures: IDs, a filter such as --fingerprint, or --all."
        raise click.UsageError(msg)
    for name, value in given.items():
        _check_text(f"--{name.replace('_', '-')}", value)
    for identifier in ids:
        app.failure(identifier)
    return given | ({"ids": ids} if ids else {})


@failures.command("retry")
@_choice
@click.option(
    "--dry-run",
    is_flag=True,
    help="Call the handlers, say what would come of it, roll it back.",
)
@reason_option
@json_option
@pass_app
def retry_failures(
    app: KappaLog,
    /,
    *,
    ids: tuple[int, ...],
    every: bool,
    dry_run: bool,
    reason: str | None,
    as_json: bool,
    **chosen: str | None,
) -> int:
    """Hand failures to their handlers again, each key in the order of its records.

    What waits behind a failure follows it, until one fails again.

    --dry-run walks the first 500 in earnest and keeps nothing. Handlers are called:
    what they write by metadata.connection is rolled back, what they do elsewhere is
    done.
    """
    _check_text("--reason", reason)
    which = _chosen(app, ids, every=every, **chosen)
    with output.Meter() as meter:
        total = app.count_failures(**which)

        def show(done: BulkRetry) -> None:
            count = len(done.trials) or done.matched
            name = "try" if dry_run else "retry"
            meter.update(name, count, total, output.plural(count, "failure"))

        done = app.retry_failures(
            dry_run=dry_run, reason=reason, on_progress=show, **which
        )
    if as_json:
        output.print_json(output.to_json(done))
    elif not done.matched:
        output.line("nothing to retry")
    elif dry_run:
        _print_tried(done)
    else:
        _print_retried(done)
    return NEW_FAILURES if done.failed else 0


def _print_tried(done: BulkRetry) -> None:
    output.line(f"would retry {output.plural(done.matched, 'failure')}")
    output.print_table(
        ("id", "a retry"), [(trial.id, _said(trial)) for trial in done.trials]
    )
    output.line(
        f"would keep {done.acked:,}   skip {done.skipped:,}   "
        f"duplicate {done.duplicate:,}   fail again {done.failed:,}   "
        f"wait {done.waiting:,}"
    )
    if done.untried:
        output.line(
            f"  only the first {len(done.trials):,} were looked at: "
            f"{output.plural(done.untried, 'failure')} more would be retried"
        )


def _said(trial: Trial) -> str:
    """Return what would become of a failure, as a sentence without its subject."""
    if trial.outcome == "duplicate":
        if trial.position is None:
            return f"repeats failure {trial.repeats}, which becomes an event"
        return f"repeats the event at position {trial.position:,}"
    if trial.outcome == "failed":
        return f"fails again: {trial.error_class}: {trial.error_message}"
    if trial.outcome == "waits":
        return f"waits behind failure {trial.behind}"
    return _SAID[trial.outcome]


_SAID = {
    "acked": "becomes an event",
    "skipped": "is skipped",
    "gone": "is gone: somebody retried or discarded it just now",
}


def _print_retried(done: BulkRetry) -> None:
    output.line(
        f"kept {done.acked:,}   skipped {done.skipped:,}   "
        f"duplicate {done.duplicate:,}   failed again {done.failed:,}"
    )
    for error in done.errors:
        output.line(f"  {output.safe(error)}")
    if done.stopped_keys:
        keys = output.plural(done.stopped_keys, "key")
        wait = "waits" if done.stopped_keys == 1 else "wait"
        output.line(f"  {keys} still {wait} behind a failure")
    steps = ["kappa-log failures groups"] if done.failed else []
    output.next_steps(*(steps or ["kappa-log project"]))


@failures.command("discard")
@_choice
@dry_run_option
@click.option("--reason", metavar="TEXT", help="Why; kept in the audit trail.")
@yes_option
@json_option
@pass_app
def discard_failures(
    app: KappaLog,
    /,
    *,
    ids: tuple[int, ...],
    every: bool,
    dry_run: bool,
    reason: str | None,
    yes: bool,
    as_json: bool,
    **chosen: str | None,
) -> None:
    """Give failures up for good; a --reason is required.

    What waited behind one may then be retried.
    """
    _check_text("--reason", reason)
    which = _chosen(app, ids, every=every, **chosen)
    if dry_run:
        count = app.discard_failures(dry_run=True, **which)
    else:
        if not (reason or "").strip():
            msg = "say why these records are given up: --reason TEXT."
            raise click.UsageError(msg)
        count = app.count_failures(**which)
        if count:
            found = output.plural(count, "failure")
            require_consent(f"Discard {found} for good?", yes=yes)
        count = app.discard_failures(reason=reason, **which)
    if as_json:
        output.print_json(output.to_json({"discarded": count, "dry_run": dry_run}))
        return
    if not count:
        output.line("nothing to discard")
        return
    would = "would discard" if dry_run else "discarded"
    output.line(f"{would} {output.plural(count, 'failure')}")


def _check_text(option: str, value: str | None) -> None:
    """Raise UsageError for a text that a database cannot keep."""
    from kappa_log.handler import check_option

    check_option(option, value)
