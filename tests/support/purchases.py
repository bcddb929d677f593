"""CDNOW's purchases: a projection in two versions, and what it must make of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kappa_log import Event, Projection, projection

TOPIC = "cdnow"


@dataclass(frozen=True, slots=True)
class Purchases:
    """A customer's purchases; the trail is another one if two of them swap."""

    orders: int = 0
    cds: int = 0
    amount: float = 0.0
    trail: int = 0


def added(
    state: Purchases | None, payload: dict[str, Any], factor: int
) -> Purchases | None:
    """Return the state after one more purchase; every twentieth order starts anew."""
    old = state or Purchases()
    if old.orders == 19:
        return None
    number = int(payload["purchase_id"][1:])
    return Purchases(
        orders=old.orders + 1,
        cds=old.cds + payload["quantity"],
        amount=old.amount + payload["amount"],
        trail=(old.trail * factor + number) % 1_000_003,
    )


@projection(topics=[TOPIC], version=1, name="purchases")
def OLD(state: Purchases | None, event: Event) -> Purchases | None:  # noqa: N802
    """Fold as the first version did."""
    return added(state, event.payload, 31)


@projection(topics=[TOPIC], version=2, name="purchases")
def NEW(state: Purchases | None, event: Event) -> Purchases | None:  # noqa: N802
    """Fold as the second version does."""
    return added(state, event.payload, 37)


@projection(topics=[TOPIC], version=1, name="purchases")
def BROKEN(state: Purchases | None, event: Event) -> Purchases | None:  # noqa: N802
    """Fold as the first version was meant to, but for large purchases."""
    if event.payload["quantity"] >= LARGE:
        raise ValueError(event.payload["purchase_id"])
    return added(state, event.payload, 31)


LARGE = 8


def registered(versions: Iterable[int]) -> list[Projection]:
    """Return the projections of these versions; 0 is the broken one."""
    return [{0: BROKEN, 1: OLD, 2: NEW}[version] for version in versions]


def parked(lines: Iterable[str]) -> dict[str, int]:
    """Return key → position that the broken one must park it at."""
    found: dict[str, int] = {}
    for position, line in enumerate(lines, start=1):
        payload = json.loads(line)
        if payload["quantity"] >= LARGE:
            found.setdefault(payload["customer_id"], position)
    return found


def folded(
    lines: Iterable[str], factor: int, states: dict[str, Any] | None = None
) -> dict[str, Purchases]:
    """Return what the projection must make of a file's lines, by a plain loop."""
    found: dict[str, Purchases | None] = dict(states or {})
    for line in lines:
        payload = json.loads(line)
        key = payload["customer_id"]
        found[key] = added(found.get(key), payload, factor)
    return {key: state for key, state in found.items() if state is not None}
