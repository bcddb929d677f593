"""What commands are given: the open log, times, coordinates, consent."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import click
from typing_extensions import override

from kappa_log.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from kappa_log.app import KappaLog

P = ParamSpec("P")
R = TypeVar("R")

_DIGEST = re.compile("[0-9a-f]{64}")

MAX_POSITION = 2**63 - 1
"""The last position that a database can hold."""


class Options(NamedTuple):
    """Options of the root command."""

    url: str | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that flags give; a relative file lies in the current folder."""
        from kappa_log.config import resolve_url

        if self.url is None:
            return {}
        return {"database.url": resolve_url(self.url, Path.cwd())}


class Commands(click.Group):
    """A group that lists its commands in the order in which they are used."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def pass_app(
    command: Callable[Concatenate[KappaLog, P], R],
) -> Callable[P, R]:
    """Open the log that is configured, hand it to a command, close it."""

    @functools.wraps(command)
    def opened(*args: P.args, **kwargs: P.kwargs) -> R:
        from kappa_log.app import KappaLog

        options = click.get_current_context().find_object(Options) or Options()
        with KappaLog.open(overrides=options.overrides) as app:
            return command(app, *args, **kwargs)

    return opened


class Moment(click.ParamType[datetime]):
    """A date, which is its midnight in UTC, or a time with an offset."""

    name = "time"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            found = _instant(value)
        except (ValueError, OverflowError) as error:
            why = "" if "isoformat" in str(error) else f" ({error})"
            self.fail(f"'{value}' is no time{why}. {EXAMPLE}", param, ctx)
        if found is None:
            self.fail(
                f"'{value}' has no offset, so it is no instant. Type for instance "
                f"'{value}Z' if it is UTC, or '{value}+01:00'.",
                param,
                ctx,
            )
        return found


def _instant(value: str) -> datetime | None:
    """Return the instant that was typed; None if no offset says which it is."""
    from kappa_log.events import in_utc

    with contextlib.suppress(ValueError):
        return datetime.combine(date.fromisoformat(value), time.min, UTC)
    moment = datetime.fromisoformat(value)
    return None if moment.utcoffset() is None else in_utc(moment)


EXAMPLE = (
    "Type a date, for instance 1998-01-01 (its midnight in UTC), or a time with an "
    "offset, for instance 1998-01-01T09:30+01:00."
)


class Coordinates(click.ParamType[tuple[str, int, int]]):
    """TOPIC:PARTITION:OFFSET; the topic may hold colons itself."""

    name = "topic:partition:offset"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int, int]:
        if isinstance(value, tuple):
            return value
        rest, _, offset = str(value).rpartition(":")
        topic, _, partition = rest.rpartition(":")
        if not (topic and _is_whole(partition) and _is_whole(offset)):
            self.fail(
                f"'{value}' is not TOPIC:PARTITION:OFFSET, for instance orders:0:1500.",
                param,
                ctx,
            )
        return topic, int(partition), int(offset)


class Whole(click.ParamType[int]):
    """A whole number that a database can hold."""

    def __init__(self, name: str, least: int = 1) -> None:
        self.name = name
        self._least = least

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        if not _is_whole(value) or int(value) < self._least:
            self.fail(
                f"'{value}' is no whole number from {self._least} on.", param, ctx
            )
        return int(value)


class Dedupe(click.ParamType[str]):
    """What makes a later record a duplicate."""

    name = "mode"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        from kappa_log.records import check_dedupe

        try:
            return check_dedupe(value)
        except ConfigError as error:
            self.fail(f"{error}.", param, ctx)


class Digest(click.ParamType[str]):
    """A head of the chain: 32 bytes in hex."""

    name = "hex"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value).strip().lower()
        if not _DIGEST.fullmatch(text):
            self.fail(f"'{value}' is no head: 64 digits of 0-9 and a-f.", param, ctx)
        return text


class MaxChanged(click.ParamType[str]):
    """A number of rows, or a percentage of the live rows."""

    name = "N|P%"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        share = text.removesuffix("%")
        whole, _, fraction = share.partition(".")
        is_share = (
            text != share and _is_whole(whole) and (not fraction or _is_whole(fraction))
        )
        if not (is_share or _is_whole(text)):
            self.fail(
                f"'{value}' is neither rows, for instance 100, nor a part of the live "
                "rows, for instance 5%.",
                param,
                ctx,
            )
        return text


def _is_whole(text: str) -> bool:
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_POSITION))
    return digits and int(text) <= MAX_POSITION


MOST_LISTED = 10_000

MOMENT = Moment()
COORDINATES = Coordinates()
MAX_CHANGED = MaxChanged()
POSITION = Whole("position")
AFTER = Whole("position", least=0)
IDENTIFIER = Whole("id")
DIGEST = Digest()
DEDUPE = Dedupe()
COUNT = Whole("n")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, and do nothing."
)
reason_option = click.option(
    "--reason", metavar="TEXT", help="Why; kept in the audit trail."
)
max_changed_option = click.option(
    "--max-changed",
    type=MAX_CHANGED,
    help="Promote only if no more rows differ.",
)


def on_error_option(default: str) -> Callable[[Any], Any]:
    """Return an option that says what a fold that raises does."""
    return click.option(
        "--on-error",
        type=click.Choice(["park", "stop"]),
        help=f"Where a fold raises: park its key, or stop.  [default: {default}]",
    )


def limit_option(default: int) -> Callable[[Any], Any]:
    """Return an option that bounds how much is listed."""
    return click.option(
        "--limit",
        type=click.IntRange(1, MOST_LISTED),
        default=default,
        show_default=True,
        help="Most to list.",
    )


def require_consent(question: str, *, yes: bool) -> None:
    """Ask before something is lost; where nobody can be asked, --yes is needed.

    Raises:
        UsageError: There is no terminal to ask on, and no --yes.
        click.ClickException: The answer was no.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        msg = "this loses data and there is no terminal to ask on; add --yes to do it."
        raise UsageError(msg)
    if not click.confirm(question, err=True):
        msg = "nothing was changed."
        raise click.ClickException(msg)


class Stop(threading.Event):
    """Set when the process is asked to end."""

    exit_code = 0
    """130 after Ctrl-C; 0 after SIGTERM or SIGQUIT, as supervisors stop services."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turn Ctrl-C, SIGTERM and SIGQUIT into a request to stop after the batch at hand.

    Who asks a second time does not want to wait: the process ends on the spot, and
    what is not committed rolls back.
    """
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            os._exit(130)
        stop.exit_code = 130 if number == signal.SIGINT else 0
        stop.set()

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
