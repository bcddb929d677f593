"""What the demo shows: plain lines of at most 80 columns, few colours, no boxes."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

WIDTH = 80

_INDENT = 3
"""Of all that stands below a step's title."""

_LINE_SECONDS = 5.0
"""How often a live view writes a line where nothing can be drawn over."""


class Rows(NamedTuple):
    """Rows that stand below each other."""

    cells: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    """Headings, if the rows need them."""
    right: str = ""
    """Indices of the columns whose cells stand right."""


class Screen:
    """The terminal, or the pipe, that the demo writes to."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, emoji=False, markup=False)
        self._console.width = min(self._console.width, WIDTH)
        self._steps = 0

    @property
    def is_terminal(self) -> bool:
        """Whether lines that were written can be drawn over."""
        return self._console.is_terminal

    def title(self, name: str, about: str) -> None:
        """Say what this is."""
        self._console.print(Text.assemble((name, "bold"), "  ", about))

    def step(self, name: str, command: str) -> None:
        """Begin the next step, with the command that does the same."""
        self._steps += 1
        title = Text.assemble((f"{self._steps}  {name}", "bold"))
        gap = self._console.width - title.cell_len - len(command)
        self._console.print()
        self._console.print(title + Text(" " * max(gap, 2)) + Text(command, "cyan"))

    def heading(self, name: str) -> None:
        """Begin a part of the summary."""
        self._console.print()
        self._console.print(Text(name, "bold"))

    def say(self, text: str, style: str = "") -> None:
        """Write a sentence."""
        indent = " " * _INDENT
        for line in wrap(text, self._console.width - _INDENT):
            self._console.print(Text(indent + line, style), soft_wrap=True)

    def rows(self, rows: Rows) -> None:
        """Write aligned rows."""
        self._console.print(_table(rows))

    def changed_lines(self, before: str, after: str) -> None:
        """Show the lines in which two versions of a file differ."""
        colours = {"-": "red", "+": "green"}
        for line in difflib.ndiff(before.splitlines(), after.splitlines()):
            if line[0] in colours:
                self._console.print(
                    Text(" " * _INDENT + line, colours[line[0]]), soft_wrap=True
                )

    def commands(self, name: str, commands: Iterable[str]) -> None:
        """Write commands to copy, each on a line of its own however long."""
        self.heading(name)
        for command in commands:
            self._console.print(Text(f"  {command}", "cyan"), soft_wrap=True)

    @contextmanager
    def progress(self, noun: str) -> Iterator[Callable[[int, int | None], None]]:
        """Give a function that shows how far something is, of how much."""
        columns = (TextColumn(" " * (_INDENT - 1)), BarColumn(), TextColumn(noun))
        with Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self.is_terminal,
        ) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def live(self) -> Iterator[Callable[[Iterable[Rows], Iterable[str], str], None]]:
        """Give a function that draws tables and notes over those before.

        Where nothing can be drawn over, it writes its last argument now and then.
        """
        last = -_LINE_SECONDS
        with Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as area:

            def show(tables: Iterable[Rows], notes: Iterable[str], line: str) -> None:
                nonlocal last
                if self.is_terminal:
                    parts = [part for rows in tables for part in (_table(rows), "")]
                    area.update(Group(*parts, *map(_note, notes)), refresh=True)
                elif time.monotonic() - last >= _LINE_SECONDS:
                    last = time.monotonic()
                    self.say(line)

            yield show


def _table(rows: Rows) -> Padding:
    cells = [[Text(cell) for cell in row] for row in rows.cells]
    table = Table(
        box=None,
        show_header=bool(rows.columns),
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    width = len(rows.columns or rows.cells[0])
    for index in range(width):
        table.add_column(
            rows.columns[index] if rows.columns else "",
            justify="right" if str(index) in rows.right else "left",
            no_wrap=index < width - 1,
        )
    for row in cells:
        table.add_row(*row)
    return Padding(table, (0, 0, 0, _INDENT), expand=False)


def _note(text: str) -> Padding:
    """Return one line, cut if it is longer: what is drawn over must not grow."""
    line = Text(" ".join(text.split()), "dim", no_wrap=True, overflow="ellipsis")
    return Padding(line, (0, _INDENT, 0, _INDENT), expand=False)
