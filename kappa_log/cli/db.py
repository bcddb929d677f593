"""kappa-log db: the engine's tables, up, down and away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kappa_log.cli import output
from kappa_log.cli.params import (
    Commands,
    dry_run_option,
    json_option,
    pass_app,
    require_consent,
    yes_option,
)

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.storage.migrations import SchemaState


@click.group(cls=Commands)
def db() -> None:
    """Create, move and judge the tables of the log."""


@db.command()
@dry_run_option
@pass_app
def create(app: KappaLog, /, *, dry_run: bool) -> None:
    """Create the database and its tables; harmless where they are."""
    new = app.database_state().verdict == "empty" if dry_run else app.create_database()
    state = app.database_state()
    if new:
        output.line(
            f"{_would(dry_run)}create  {state.database}, revision {state.wanted}"
        )
        output.next_steps(
            *(["kappa-log run"] if app.config.listeners else []),
            "kappa-log ingest FILE --topic TOPIC",
        )
    else:
        output.line(f"exists  {state.database}, revision {state.found}")
        _advise(state)


@db.command()
@yes_option
@dry_run_option
@pass_app
def drop(app: KappaLog, /, *, yes: bool, dry_run: bool) -> None:
    """Remove the log, its projections and all that kappa-log made."""
    what = _contents(app)
    if not dry_run:
        require_consent(f"Drop {what}?", yes=yes)
        if not app.drop_database():
            output.say(f"There was nothing to drop in {app.database.label}.")
            return
    output.line(f"{_would(dry_run)}drop  {what}")


@db.command()
@click.argument("revision", default="head")
@dry_run_option
@pass_app
def upgrade(app: KappaLog, /, *, revision: str, dry_run: bool) -> None:
    """Move the tables up to REVISION, the newest if none is given."""
    before = app.database_state()
    if not dry_run:
        app.upgrade_database(revision)
        output.line(_moved(before, app.database_state()))
        return
    output.line(
        f"would upgrade  {before.database}, {before.found or 'empty'} → {revision}"
    )


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("revision", default="-1")
@yes_option
@dry_run_option
@pass_app
def downgrade(app: KappaLog, /, *, revision: str, yes: bool, dry_run: bool) -> None:
    """Move the tables down to REVISION: -1 is one step, base removes them."""
    before = app.database_state()
    if dry_run:
        output.line(f"would downgrade  {before.database}, {before.found} → {revision}")
        return
    require_consent(f"Downgrade {_contents(app)} to {revision}?", yes=yes)
    app.downgrade_database(revision)
    output.line(_moved(before, app.database_state()))


@db.command()
@yes_option
@dry_run_option
@pass_app
def reset(app: KappaLog, /, *, yes: bool, dry_run: bool) -> None:
    """Drop everything and create it anew, empty."""
    what = _contents(app)
    if not dry_run:
        require_consent(f"Drop {what}, and begin with an empty log?", yes=yes)
        app.reset_database()
    output.line(f"{_would(dry_run)}reset  {what}")


@db.command()
@json_option
@pass_app
def status(app: KappaLog, /, *, as_json: bool) -> None:
    """Say whether the tables are those that this version needs."""
    state = app.database_state()
    facts = {
        "database": state.database,
        "found": state.found,
        "wanted": state.wanted,
        "verdict": state.verdict,
    }
    if as_json:
        output.print_json(output.to_json(facts))
        return
    output.print_fields(facts.items())
    _advise(state)


@db.command()
@json_option
@pass_app
def version(app: KappaLog, /, *, as_json: bool) -> None:
    """Print the revision of the tables."""
    found = app.database_state().found
    if as_json:
        output.print_json(output.to_json({"revision": found}))
    else:
        output.line(found or "none")


@db.command()
@json_option
@pass_app
def history(app: KappaLog, /, *, as_json: bool) -> None:
    """List all revisions that this version knows, oldest first."""
    revisions = app.database_history()
    if as_json:
        for revision in revisions:
            output.print_json(output.to_json(revision))
        return
    rows = [(r.revision, "current" if r.is_current else "", r.title) for r in revisions]
    output.print_table(("revision", "state", "title"), rows)


def _would(dry_run: bool) -> str:
    return "would " if dry_run else ""


def _moved(before: SchemaState, after: SchemaState) -> str:
    if before.found == after.found:
        return f"nothing to move: {after.database} is at {after.found or 'no revision'}"
    return (
        f"moved  {after.database}, {before.found or 'empty'} → {after.found or 'empty'}"
    )


def _contents(app: KappaLog) -> str:
    state = app.database_state()
    if state.verdict != "current":
        return f"{state.database} ({state.verdict})"
    events = output.plural(app.head().position, "event")
    return f"{state.database} ({events}, and all read models)"


def _advise(state: SchemaState) -> None:
    advice = {
        "empty": ["kappa-log db create"],
        "behind": ["kappa-log db upgrade"],
        "ahead": [f"kappa-log db downgrade {state.wanted}, with the newer kappa-log"],
    }.get(state.verdict)
    if advice:
        output.next_steps(*advice)
