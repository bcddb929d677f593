"""Tallies: a projection whose fold raises on some events, and what must come of it.

An event is good, or ``bad``: then a broken fold spoils the state in its place and
raises. A ``late`` one makes it return a state that no column holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kappa_log import Event, KappaLog, Projection, projection
from kappa_log.fold import Registry

Made = list[dict[str, Any]]
"""Events as objects for `append`: id, n, and perhaps bad or late."""


@dataclass
class Tally:
    """What came, in a state that can be changed in its place."""

    n: int = 0
    seen: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    """The same without a list, in a state that cannot."""

    n: int = 0


def tallies(
    name: str,
    *,
    broken: bool = True,
    frozen: bool = False,
    key: Callable[[Event], Any] | None = None,
) -> Projection:
    """Return the projection: broken, or mended."""
    if frozen:

        def freeze(state: Frozen | None, event: Event) -> Frozen | None:
            return Frozen((state or Frozen()).n + _checked(event, broken=broken))

        return projection(topics=[name], version=1, name=name, key=key)(freeze)

    def tally(state: Tally | None, event: Event) -> Tally | None:
        found = state or Tally()
        found.n += event.payload["n"]
        found.seen.append(event.payload["n"])
        found.n += 0 * _checked(event, broken=broken)
        return found

    return projection(topics=[name], version=1, name=name, key=key)(tally)


def _checked(event: Event, *, broken: bool) -> Any:
    if broken and event.payload.get("bad"):
        msg = f"bad {event.payload['n']}"
        raise ValueError(msg)
    if broken and event.payload.get("late"):
        return 0.5
    return event.payload["n"]


def folded(made: Iterable[dict[str, Any]], *, broken: bool) -> dict[str, int]:
    """Return key → n, by a plain loop; a key ends before its first broken event."""
    found: dict[str, int] = {}
    ended: set[str] = set()
    for one in made:
        if broken and (one.get("bad") or one.get("late")):
            ended.add(one["id"])
        if one["id"] not in ended:
            found[one["id"]] = found.get(one["id"], 0) + one["n"]
    return found


def parked(made: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return key → position that it must be parked at."""
    found: dict[str, int] = {}
    for position, one in enumerate(made, start=1):
        if one.get("bad") or one.get("late"):
            found.setdefault(one["id"], position)
    return found


def sums(app: KappaLog, name: str, build: int | None = None) -> dict[str, int]:
    """Return key → n of the rows that users read."""
    rows = app.rows(name, build=build)
    return {str(row.get("entity_id", row.get("key"))): row["n"] for row in rows}


def stands(app: KappaLog, name: str, build: int | None = None) -> dict[str, int]:
    """Return key → position of the keys that are parked."""
    return {one.key: one.position for one in app.parked(name, build=build)}


def knows(app: KappaLog, *code: Projection, clock: Any = None) -> KappaLog:
    """Return the same log as a program sees it that has this code."""
    other = copy.copy(app)
    other.__dict__["registry"] = Registry(code)
    if clock is not None:
        other._clock = clock  # noqa: SLF001 - it shares the database
    return other
