"""The shop: a tea shop's orders, made up from a seed and no clock.

The same number of events gives the same records on every machine. As from any real
till, some are broken, and some come twice.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any, NamedTuple

Happening = dict[str, Any]
"""One thing that happened to an order, as it goes into a record's JSON."""


class Record(NamedTuple):
    """What the till sends."""

    days: str
    """When it is sent: a date without its last digit, so about ten days of a month."""
    key: str
    """The order, so that all that happens to it is in one partition."""
    value: str


START = datetime(2026, 1, 1, 8, tzinfo=UTC)
"""When the shop opens."""

SINCE = datetime(2026, 2, 1, tzinfo=UTC)
"""January's books are closed."""

DAYS = 59
"""How long it takes until all events have happened, more or less."""

REPEATED = 3
"""Records that come again when the till loses its connection."""

POISON = (
    ("o-76", '{"type": "order_placed", "order_id": "o-76", "time": "2026-01-1'),
    ("o-77", '{"type": "order_paid", "order_id": "o-77", "order_id": "o-78"}'),
    ("o-79", '{"type": "order_shipped", "time": "2026-02-03T11:00:00Z"}'),
    ("o-80", '{"type": "order_paid", "order_id": "o-80", "time": "2026-02-30T12:00Z"}'),
)
"""Cut off; a key twice; without an order; on a day that there is not."""

_SEED = 2026
_EVENTS_AN_ORDER = 2.88
_PRICES = {
    "assam": 890,
    "biscuits": 450,
    "darjeeling": 1_320,
    "kettle": 4_900,
    "mug": 1_250,
    "oolong": 1_640,
    "sencha": 1_150,
    "strainer": 680,
    "teapot": 3_450,
}
_FATES = {"shipped": 76, "sold out": 12, "second thoughts": 6, "forgotten": 6}
"""What becomes of 100 orders."""


def happenings(events: int) -> Iterator[Happening]:
    """Yield what happens in the shop, for ever, in the order of time.

    Args:
        events: How many of them the first `DAYS` days shall see, more or less.
    """
    chance = Random(_SEED)
    orders_a_second = events / _EVENTS_AN_ORDER / timedelta(days=DAYS).total_seconds()
    tickets = count()
    later: list[tuple[str, int, Happening]] = []
    placed = START
    for number in count(1001):
        placed += timedelta(seconds=round(chance.expovariate(orders_a_second)))
        for happening in _order(chance, f"o-{number}", placed):
            heappush(later, (happening["time"], next(tickets), happening))
        # Whatever comes is of this order or a later one, so not before its placing.
        while later and later[0][0] <= _text(placed):
            yield heappop(later)[2]


def records(found: Iterable[Happening], events: int) -> Iterator[Record]:
    """Yield happenings as records, and what else the till sends.

    Heartbeats come once a day; in each so many events there are `POISON` and repeated
    records at places of their own.
    """
    poison = {events * n // (len(POISON) + 1): bad for n, bad in enumerate(POISON, 1)}
    repeats = {events // 3, 2 * events // 3}
    last: deque[Record] = deque(maxlen=REPEATED)
    today = ""
    for number, happening in enumerate(found):
        if happening["time"][:10] != today:
            today = happening["time"][:10]
            beat = {"type": "heartbeat", "time": f"{today}T00:00:00Z"}
            yield Record(today[:-1], "till", json.dumps(beat))
        last.append(Record(today[:-1], happening["order_id"], json.dumps(happening)))
        yield last[-1]
        place = number % events + 1
        if place in poison:
            yield Record(today[:-1], *poison[place])
        if place in repeats:
            yield from last


def _order(chance: Random, order_id: str, placed: datetime) -> Iterator[Happening]:
    """Yield what happens to one order, from its placing to its end."""
    lines = _lines(chance)
    cents = sum(line["quantity"] * line["cents"] for line in lines)
    customer = f"c-{chance.randint(1, 200):03}"
    paid = placed + _hours(chance, 0.1, 12)

    def told(kind: str, at: datetime, **facts: Any) -> Happening:
        return {"type": kind, "order_id": order_id, "time": _text(at), **facts}

    yield told("order_placed", placed, customer=customer, lines=lines)
    match chance.choices(list(_FATES), list(_FATES.values()))[0]:
        case "forgotten":
            yield told("order_expired", placed + timedelta(days=5))
        case "second thoughts":
            yield told("order_cancelled", paid, refund_cents=0)
        case "sold out":
            yield told("order_paid", paid, cents=cents)
            off = paid + _hours(chance, 1, 30)
            yield told("order_cancelled", off, refund_cents=cents)
        case _:
            yield told("order_paid", paid, cents=cents)
            yield told("order_shipped", paid + _hours(chance, 6, 60))


def _lines(chance: Random) -> list[dict[str, Any]]:
    products = chance.sample(sorted(_PRICES), chance.choices((1, 2, 3), (5, 3, 2))[0])
    return [
        {"product": name, "quantity": chance.randint(1, 2), "cents": _PRICES[name]}
        for name in products
    ]


def _hours(chance: Random, least: float, most: float) -> timedelta:
    return timedelta(seconds=round(3600 * chance.uniform(least, most)))


def _text(moment: datetime) -> str:
    """Return ISO 8601 text of one length, which sorts as the times do."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
