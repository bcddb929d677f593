"""Actor: whom the audit trail names, in this thread."""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Iterator
from contextvars import ContextVar

_actor: ContextVar[str | None] = ContextVar("actor", default=None)


@contextlib.contextmanager
def acting_as(who: str) -> Iterator[None]:
    """Let the audit trail name somebody, in this thread, not the machine's user."""
    before = _actor.set(who)
    try:
        yield
    finally:
        _actor.reset(before)


def user() -> str:
    """Return who acts: whoever was named, else the user of the machine."""
    actor = _actor.get()
    if actor is not None:
        return actor
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
