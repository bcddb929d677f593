"""kappa-log db: the engine's tables, up, down and away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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
    from kappa_log.storage.own import OwnState


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
@pass_app
def setup(app: KappaLog, /) -> None:
    """Create, upgrade and seed; harmless where that was done."""
    seeded = app.setup_database()
    state = app.database_state()
    output.line(f"set up  {state.database}, revision {state.found}")
    _say_seeded(app, seeded=seeded)


@db.command()
@pass_app
def seed(app: KappaLog, /) -> None:
    """Let the project's seeds.py fill the log."""
    seeded = app.seed_database()
    _say_seeded(app, seeded=seeded)


def _say_seeded(app: KappaLog, *, seeded: bool) -> None:
    from kappa_log.seeds import FILE

    file = output.safe(app.config.folder / FILE)
    if seeded:
        output.line(f"seeded  {file}")
    else:
        output.say(f"There is no {file}: define seed(log) in it.")


@db.command()
@click.argument("file", default="schema.sql")
@pass_app
def dump(app: KappaLog, /, *, file: str) -> None:
    """Write the tables, without rows, as SQL to FILE or - for stdout."""
    text = app.dump_schema()
    if file == "-":
        output.line(text.rstrip("\n"))
        return
    target = Path(file)
    known = target.exists()
    target.write_text(text, encoding="utf-8")
    output.line(f"{'replace' if known else 'create'}  {output.safe(target)}")


@db.command()
@click.argument("file", default="schema.sql", type=click.File("r", encoding="utf-8"))
@pass_app
def load(app: KappaLog, /, *, file: TextIO) -> None:
    """Make the tables that FILE says, where there are none."""
    app.load_schema(file.read())
    state = app.database_state()
    output.line(f"load  {state.database}, revision {state.found}")


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
    before, own = app.database_state(), app.own_state()
    if not dry_run:
        app.upgrade_database(revision)
        output.line(_moved(before, app.database_state()))
        _print_own(own, app.own_state())
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
    before, own = app.database_state(), app.own_state()
    if dry_run:
        output.line(f"would downgrade  {before.database}, {before.found} → {revision}")
        return
    require_consent(f"Downgrade {_contents(app)} to {revision}?", yes=yes)
    app.downgrade_database(revision)
    output.line(_moved(before, app.database_state()))
    _print_own(own, app.own_state())


@db.command()
@yes_option
@dry_run_option
@pass_app
def reset(app: KappaLog, /, *, yes: bool, dry_run: bool) -> None:
    """Drop everything and set it up anew, seeded if there is a seeds.py."""
    what = _contents(app)
    if not dry_run:
        require_consent(f"Drop {what}, and begin with an empty log?", yes=yes)
        app.reset_database()
        app.seed_database()
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
    own = app.own_state()
    if own is not None:
        facts |= {
            "project_found": own.found,
            "project_wanted": own.wanted,
            "project_verdict": own.verdict,
        }
    if as_json:
        output.print_json(output.to_json(facts))
        return
    output.print_fields(facts.items())
    if state.verdict == "current" and own is not None and own.verdict == "behind":
        output.next_steps("kappa-log db upgrade")
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
    rows = [
        (r.owner, r.revision, "current" if r.is_current else "", r.title)
        for r in revisions
    ]
    output.print_table(("of", "revision", "state", "title"), rows)


def _print_own(before: OwnState | None, after: OwnState | None) -> None:
    """Say where the project's own migrations are now."""
    old, new = (state and state.found for state in (before, after))
    if old != new:
        output.line(f"moved  the project's own, {old or 'none'} → {new or 'none'}")


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
