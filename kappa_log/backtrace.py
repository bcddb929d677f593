"""Backtrace: an error of the user's code, as texts that are kept and shown.

Texts are capped, and hold nothing that one of the databases refuses. They begin where
our code called the user's.
"""

from __future__ import annotations

import importlib
import json
import os
import traceback
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from kappa_log.errors import message_of

BACKTRACE_BYTES = 64 * 1024
"""Most of a backtrace that is kept."""

_OURS = f"{Path(__file__).parent}{os.sep}"
"""What the files of our own code begin with."""


_MACHINERY = (_OURS, "<frozen importlib", str(importlib.__file__))
"""What the files begin with that lie between us and the user's code."""


class KeptError(NamedTuple):
    """An error in columns."""

    error_class: str
    error_message: str
    error_backtrace: str
    """JSON list of lines."""
    fingerprint: str
    """The same for errors of one class from one place."""


def kept(error: BaseException, most: int = BACKTRACE_BYTES) -> KeptError:
    """Return an error as it is kept, message and backtrace of at most so many bytes."""
    lines = _capped(_lines(error), most)
    return KeptError(
        type(error).__name__,
        storable(message_of(error), most),
        json.dumps([storable(line, most) for line in lines]),
        _fingerprint(error),
    )


def described(error: BaseException) -> str:
    """Return an error's class, message and the last line of others' code it passed."""
    text = message_of(error)
    found = f"{type(error).__name__}{': ' + text[:500] if text else ''}"
    frames = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_MACHINERY)
    ]
    # Of a syntax error the message itself names file and line.
    if isinstance(error, SyntaxError) or not frames:
        return found
    code, line = frames[-1]
    is_module = code.co_name == "<module>"
    place = Path(code.co_filename).name if is_module else code.co_name
    return f"{found} at {place}, line {line}"


def storable(text: str, most: int) -> str:
    """Return a text that both databases take: no NUL, no lone surrogates."""
    shown = text.replace("\0", "\\x00")[:most]
    return shown.encode(errors="backslashreplace").decode()


def _lines(error: BaseException) -> list[str]:
    """Return an error's backtrace.

    In a storm all errors are raised at one place, so its stack is formatted once.
    """
    trace = _of_others(error.__traceback__)
    if error.__cause__ or error.__context__ or isinstance(error, BaseExceptionGroup):
        return traceback.format_exception(type(error), error, trace)
    places = tuple(
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(trace)
    )
    head = "Traceback (most recent call last):\n"
    return [head, *_formatted(places), *traceback.format_exception_only(error)]


def _of_others(trace: TracebackType | None) -> TracebackType | None:
    """Return a stack from its first frame that is not ours on; whole if all are."""
    found = trace
    while found is not None and found.tb_frame.f_code.co_filename.startswith(_OURS):
        found = found.tb_next
    return found or trace


@lru_cache(maxsize=256)
def _formatted(places: tuple[tuple[str, int, str], ...]) -> list[str]:
    """Return the lines of a stack: file, line and function, and the line's text."""
    stack = [(file, line, name, None) for file, line, name in places]
    return traceback.StackSummary.from_list(stack).format()


def _fingerprint(error: BaseException) -> str:
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        place = f"{code.co_filename.rpartition('/')[2]}:{code.co_name}"
    text = f"{type(error).__module__}.{type(error).__qualname__}:{place}"
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _capped(lines: list[str], most: int) -> list[str]:
    found: list[str] = []
    size = 0
    for line in "".join(lines).splitlines():
        size += len(line)
        if size > most:
            found.append("… cut")
            break
        found.append(line)
    return found
