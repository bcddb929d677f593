"""kappa-log events, duplicates, failures: what the log kept, and what it could not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from kappa_log.cli import output
from kappa_log.cli.params import (
    AFTER,
    IDENTIFIER,
    MOMENT,
    POSITION,
    Commands,
    json_option,
    limit_option,
    pass_app,
    reason_option,
    stop_on_signal,
)

if TYPE_CHECKING:
    from datetime import datetime

    from kappa_log.app import KappaLog
    from kappa_log.events import Event

_INGEST = "kappa-log ingest FILE --topic TOPIC"


@click.group(cls=Commands)
def events() -> None:
    """Look at the events of the log."""


@events.command("list")
@click.option("--topic", help="Only of this topic.")
@click.option("--group", help="Only of this consumer group.")
@click.option("--entity-id", help="Only of this entity.")
@click.option("--type", "event_type", help="Only of this type.")
@click.option("--after", type=AFTER, help="Only past this position, oldest first.")
@click.option("--before", type=POSITION, help="Only below this position.")
@click.option("--since", type=MOMENT, help="Only recorded at or after this time.")
@click.option("--oldest-first", is_flag=True, help="Begin at the start of the log.")
@limit_option(20)
@json_option
@pass_app
def list_events(
    app: KappaLog,
    /,
    *,
    as_json: bool,
    after: int | None,
    oldest_first: bool,
    **filters: Any,
) -> None:
    """List events, newest first."""
    found = app.events(
        after=after, oldest_first=oldest_first or after is not None, **filters
    )
    if as_json:
        sources = app.sources()
        for event in found:
            output.print_json(output.event_json(event, sources))
    elif found:
        _print_events(found)
    elif app.head().position:
        output.say("No event of the log matches.")
        output.next_steps("kappa-log events list")
    else:
        output.say("The log is empty.")
        output.next_steps(_INGEST)


@events.command("show")
@click.argument("position", type=POSITION)
@json_option
@pass_app
def show_event(app: KappaLog, /, *, position: int, as_json: bool) -> None:
    """Show all of the event at POSITION."""
    event = app.event(position)
    sources = app.sources()
    if as_json:
        output.print_json(output.event_json(event, sources))
        return
    output.print_fields(
        [
            ("position", event.position),
            ("topic", event.topic),
            ("group_id", event.group_id),
            ("source", sources.get(event.source_id)),
            ("partition", event.partition),
            ("offset", event.offset),
            ("entity_id", event.entity_id),
            ("event_type", event.event_type),
            ("event_version", event.event_version),
            ("event_time", event.event_time),
            ("recorded_at", event.recorded_at),
            ("timestamp", event.timestamp),
            ("key", event.key),
            *header_fields(event.headers),
            ("checksum", event.checksum),
            ("message_id", event.message_id),
            ("payload", event.payload_text),
        ]
    )


@events.command("retry")
@click.argument("position", type=POSITION)
@json_option
@pass_app
def retry_event(app: KappaLog, /, *, position: int, as_json: bool) -> None:
    """Hand the event at POSITION to its handler again; nothing is stored."""
    acknowledged = app.retry_event(position)
    if as_json:
        output.print_json(output.to_json({"acknowledged": acknowledged}))
        return
    outcome = "acknowledges it" if acknowledged else "would skip it now"
    output.line(f"event {position:,}: its handler {outcome}")


@events.command()
@click.option("--topic", help="Only of this topic.")
@click.option(
    "--after",
    type=AFTER,
    help="Begin past this position, instead of at the end of the log.",
)
@json_option
@pass_app
def tail(
    app: KappaLog, /, *, topic: str | None, after: int | None, as_json: bool
) -> int:
    """Print events as they come, until Ctrl-C."""
    sources: Mapping[int, str] = {}
    with stop_on_signal() as stop:
        for event in app.tail(after=after, topic=topic, stop=stop):
            if event.source_id not in sources:
                sources = app.sources()
            if as_json:
                output.print_json(output.event_json(event, sources))
            else:
                _print_tailed(event)
            output.stdout().flush()
    return stop.exit_code


def _print_events(found: Iterable[Event]) -> None:
    output.print_table(
        ("position", "time", "topic", "entity_id", "payload"),
        [
            (
                e.position,
                output.Uncut(_time_of(e, output.when)),
                e.topic,
                e.entity_id,
                e.payload_text,
            )
            for e in found
        ],
    )


def _time_of(event: Event, written: Callable[[datetime], str]) -> str:
    """Return an event's time; one that has none was recorded then, and that is said."""
    if event.event_time is not None:
        return written(event.event_time)
    return f"{written(event.recorded_at)} recorded"


def _print_tailed(event: Event) -> None:
    facts = (
        _time_of(event, output.moment),
        output.safe(event.topic),
        output.cell(event.entity_id),
        output.cell(event.payload_text),
    )
    output.line(f"{event.position:>10,}  {'  '.join(facts)}")


def header_fields(
    headers: Iterable[tuple[str, bytes | None]],
) -> list[tuple[str, object]]:
    """Return headers as names and values to print."""
    return [(f"header {output.safe(name)}", value) for name, value in headers]


# --- duplicates --------------------------------------------------------------


@click.group(cls=Commands)
def duplicates() -> None:
    """Look at dropped duplicates, and admit one after all."""


@duplicates.command("list")
@click.option("--after", type=AFTER, help="Only past this id.")
@limit_option(50)
@json_option
@pass_app
def list_duplicates(
    app: KappaLog, /, *, after: int | None, limit: int, as_json: bool
) -> None:
    """List what was not kept because the log had it already."""
    found = app.duplicates(limit=limit, after=after)
    if as_json:
        for duplicate in found:
            output.print_json(output.to_json(duplicate))
        return
    if not found:
        output.say("No duplicate was dropped: each record that came is new.")
        output.next_steps("kappa-log events list")
        return
    output.print_table(
        ("id", "topic", "source", "offset", "key", "repeats", "recorded_at"),
        [
            (
                d.id,
                d.topic,
                d.source,
                d.offset,
                d.key,
                d.repeats,
                output.when(d.recorded_at),
            )
            for d in found
        ],
    )
    output.next_steps(
        f"kappa-log events show {found[0].repeats}", "kappa-log duplicates admit ID"
    )


@duplicates.command()
@click.argument("identifier", metavar="ID", type=IDENTIFIER)
@reason_option
@json_option
@pass_app
def admit(
    app: KappaLog, /, *, identifier: int, reason: str | None, as_json: bool
) -> None:
    """Make the duplicate ID an event after all."""
    position = app.admit(identifier, reason)
    if as_json:
        output.print_json(output.to_json({"id": identifier, "position": position}))
        return
    output.line(f"duplicate {identifier} is the event at position {position:,} now")
    output.next_steps(f"kappa-log events show {position}", "kappa-log project")
