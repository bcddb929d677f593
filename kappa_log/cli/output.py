"""What people and programs see: safe text, tables, JSON lines, progress.

On a terminal a table fits its width; in a pipe nothing is cut off. Everything that
came from outside passes `safe`, so a payload cannot move the cursor, change colours
or turn text around.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from kappa_log.archive.check import ArchiveReport
    from kappa_log.config import LogConfig
    from kappa_log.events import Event
    from kappa_log.telemetry.notices import Subscription
    from kappa_log.verify import VerifyReport

MIN_COLUMN = 8
"""Narrowest that a column of text becomes before a table turns into records."""

LINE_SECONDS = 10.0
"""Between two lines of progress where no bar can be drawn."""

# C0, DEL, C1, zero-width and line separators, bidirectional controls, surrogates.
_HOSTILE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


# --- text --------------------------------------------------------------------


def safe(value: object) -> str:
    """Return text of one line with control characters as visible escapes."""
    return _HOSTILE.sub(_escaped, str(value))


def safe_lines(text: str) -> str:
    """Return text of several lines, each of them safe."""
    return "\n".join(map(safe, text.split("\n")))


def number(value: float) -> str:
    """Return a number as people read it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def moment(value: datetime | None) -> str:
    """Return a time in UTC, with no fraction where there is none."""
    if value is None:
        return "-"
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ") + "Z"


class Uncut(str):
    """Text that a table never cuts off."""

    __slots__ = ()


def when(value: datetime) -> Uncut:
    """Return a time in UTC to the second, for lists."""
    return Uncut(moment(value.replace(microsecond=0)))


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:,.1f} h"


_MINUTE, _HOUR = 60, 3600


def cell(value: object) -> str:
    """Return any value as one line of safe text for people."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case datetime(tzinfo=None):
            text = value.isoformat(" ")
        case datetime():
            text = moment(value)
        case bytes():
            text = _bytes(value)
        case dict() | list():
            text = to_json(value)
        case _:
            text = str(value)
    return safe(text)


def _bytes(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"0x{value.hex()}"


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


# --- stderr ------------------------------------------------------------------


def log_by(settings: LogConfig) -> list[Subscription]:
    """Log as the settings say; as JSON, whatever else people are told too.

    Returns:
        What was subscribed to be logged.
    """
    from kappa_log.telemetry import logs

    _as_json.clear()
    if settings.format == "json":
        _as_json.append(logs.logger())
    return logs.configure(form=settings.format, level=settings.level)


_as_json: list[Any] = []
"""The logger that tells what people are told otherwise."""


def say(message: str) -> None:
    """Tell people something that is no data."""
    sys.stdout.flush()
    if _as_json:
        _as_json[-1].info(message)
        return
    click.echo(_wrapped(safe_lines(message)), err=True)


def is_terminal() -> bool:
    """Tell whether people watch what is told."""
    return sys.stderr.isatty() and not _as_json


def redraw(text: str) -> None:
    """Write one line over the last one that was drawn, on a terminal."""
    room = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r\x1b[2K{safe(text)[:room]}")
    sys.stderr.flush()


def next_steps(*commands: str) -> None:
    """Teach what to type next."""
    if not _as_json:
        say("\n".join(["Next:", *(f"  {command}" for command in commands)]))


def error(message: str, label: str = "Error") -> None:
    """Say what went wrong."""
    sys.stdout.flush()
    if _as_json:
        _as_json[-1].error(message)
        return
    label = style(f"{label}:", sys.stderr, fg="red", bold=True)
    click.echo(f"{label} {_wrapped(safe_lines(message))}", err=True, color=True)


def _wrapped(text: str) -> str:
    """Break lines between words where a terminal would break them anywhere.

    Elsewhere a message stays on its line: programs look for what it says.
    """
    if not sys.stderr.isatty():
        return text
    room = shutil.get_terminal_size().columns
    return "\n".join(_filled(line, room) for line in text.split("\n"))


def _filled(line: str, room: int, indent: str = "") -> str:
    return textwrap.fill(
        line,
        max(room, 2 * MIN_COLUMN),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def wrapped(line: str) -> str:
    """Return a line of data, broken between words where its place is limited."""
    room = terminal_width()
    return line if room is None else _filled(line, room, "  ")


def style(text: str, stream: Any, **how: Any) -> str:
    """Return text coloured where the stream is a terminal that wants colours."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, **how) if wanted and stream.isatty() else text


# --- stdout ------------------------------------------------------------------


def prepare() -> None:
    """Let no character that the terminal's encoding lacks become an error."""
    _as_json.clear()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def close_stdout() -> None:
    """Let go of a stdout whose reader has gone, so that nothing fails at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stdout() -> TextIO:
    """Return the stream for data."""
    return sys.stdout


def line(text: str = "") -> None:
    """Write one line of data."""
    sys.stdout.write(text + "\n")


def write_new(target: Path, content: bytes) -> None:
    """Write a file unless there is one, and say which it was."""
    known = target.exists()
    if not known:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    line(f"{'exists' if known else 'create'}  {safe(target)}")


def to_json(value: Any) -> str:
    """Return JSON text: times in ISO 8601, Decimal as text, bytes as base64."""
    import msgspec

    return msgspec.json.encode(value).decode()


def print_json(text: str) -> None:
    """Write one JSON document as one line.

    On a terminal its control characters are escaped the JSON way: the same value.
    """
    if sys.stdout.isatty():
        text = _HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    line(text)


def event_json(event: Event, sources: Mapping[int, str]) -> str:
    """Return an event as JSON, its payload's text passed through: no digit is lost."""
    facts = {
        "position": event.position,
        "source": sources.get(event.source_id),
        "topic": event.topic,
        "group_id": event.group_id,
        "partition": event.partition,
        "offset": event.offset,
        "key": event.key,
        "headers": event.headers,
        "timestamp": event.timestamp,
        "entity_id": event.entity_id,
        "event_time": event.event_time,
        "event_type": event.event_type,
        "event_version": event.event_version,
        "recorded_at": event.recorded_at,
        "checksum": event.checksum,
        "message_id": event.message_id,
        "raw": event.raw,
    }
    # Line ends in JSON stand between tokens only; as spaces they mean the same.
    payload = re.sub("[\r\n]", " ", event.payload_text or "null")
    return f'{to_json(facts)[:-1]},"payload":{payload}}}'


def print_fields(fields: Iterable[tuple[str, object]], indent: str = "") -> None:
    """Write names and values below each other, aligned."""
    pairs = [(name, cell(value)) for name, value in fields]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        line(f"{indent}{name:<{width}}  {value}".rstrip())


def print_verdict(
    report: VerifyReport | ArchiveReport, fields: Iterable[tuple[str, object]]
) -> None:
    """Write whether something was verified, facts about it, and what is wrong."""
    verdict = "verified" if report.ok else "NOT VERIFIED"
    colour = "green" if report.ok else "red"
    line(style(verdict, stdout(), fg=colour, bold=True))
    print_fields(fields, indent="  ")
    for finding in report.findings:
        where = "" if finding.position is None else f" at position {finding.position:,}"
        line(f"  {finding.what}{where}: {safe(finding.message)}")
    for limit in report.limits:
        say(f"Not proved: {limit}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table; numbers stand right and are never cut off.

    Text is cut to the terminal's width. Where even that does not fit, each row is
    written as a block of names and values.
    """
    values = list(rows)
    cells = [[cell(value) for value in row] for row in values]
    numeric = [
        all(_is_number(row[index]) for row in values) for index in range(len(columns))
    ]
    elastic = [
        not (numeric[index] or all(isinstance(row[index], Uncut) for row in values))
        for index in range(len(columns))
    ]
    widths = _widths(columns, cells, elastic)
    if widths is None:
        for row in values:
            print_fields(zip(columns, row, strict=True))
            line()
        return
    heading = _joined(columns, widths, numeric)
    line(style(heading, sys.stdout, bold=True))
    for row in cells:
        line(_joined(row, widths, numeric))


def _is_number(value: object) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool)
    )


def _widths(
    columns: Sequence[str], cells: list[list[str]], elastic: list[bool]
) -> list[int] | None:
    """Return the columns' widths; None if they do not fit however much is cut."""
    from rich.cells import cell_len

    widths = [
        max(map(cell_len, (name, *(row[index] for row in cells))))
        for index, name in enumerate(columns)
    ]
    room = terminal_width()
    if room is None:
        return widths
    excess = sum(widths) + 2 * (len(widths) - 1) - room
    while excess > 0:
        texts = [index for index, may_shrink in enumerate(elastic) if may_shrink]
        widest = max(texts, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= MIN_COLUMN:
            return None
        widths[widest] -= 1
        excess -= 1
    return widths


def terminal_width() -> int | None:
    """Return how wide lines may be; None where nothing limits them."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"]) or None
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _joined(row: Sequence[str], widths: list[int], numeric: list[bool]) -> str:
    return "  ".join(map(_fitted, row, widths, numeric)).rstrip()


def _fitted(text: str, width: int, right: bool) -> str:
    from rich.cells import cell_len, set_cell_size

    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…"
    padding = " " * (width - length)
    return padding + text if right else text + padding


def changes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Return how a row changed, in one line."""
    if before is None or after is None:
        return ", ".join(f"{n} {cell(v)}" for n, v in (before or after or {}).items())
    names = [*before, *(name for name in after if name not in before)]
    return ", ".join(
        f"{name} {cell(before.get(name))} → {cell(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    )


# --- progress ----------------------------------------------------------------


class Meter:
    """Progress on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        """Draw nothing yet: what is known first may be said first."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, what: str, done: int, total: int | None, note: str) -> None:
        """Show how far it is; without a total nobody knows how much is left."""
        what, note = safe(what), safe(note)
        if sys.stderr.isatty():
            self._draw(description=what, completed=done, total=total, note=note)
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            share = f" {done / total:.0%}" if total else ""
            say(f"{what}:{share} {note}")

    def step(self, what: str, done: int, total: int) -> None:
        """Show how far a step is; one that is all or nothing has no numbers."""
        note = "" if (done, total) == (0, 1) else f"{done:,} of {total:,}"
        self.update(what, done, total, note)

    def _draw(self, **state: Any) -> None:
        if self._bar is None:
            self._bar = _bar()
            self._bar.add_task(**state)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], **state)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    plain: dict[str, Any] = {"markup": False}
    return Progress(
        TextColumn("{task.description}", **plain),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %", **plain),
        TextColumn("{task.fields[note]}", **plain),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )
