"""Where each order stands: one row an order, gone if it expires unpaid.

Each event type has a payload type, so the fold matches on types and a type checker
knows their fields. Fields that are not declared here are not decoded at all.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum

import msgspec

from kappa_log import Event, projection


class Line(msgspec.Struct):
    """So many pieces of one product."""

    product: str
    quantity: int
    cents: int
    """Price of one piece."""


class Placed(msgspec.Struct):
    """A customer ordered something."""

    customer: str
    lines: list[Line]


class Paid(msgspec.Struct):
    """The money came."""

    cents: int


class Shipped(msgspec.Struct):
    """The goods went."""


class Cancelled(msgspec.Struct):
    """Somebody called it off; what was paid goes back."""

    refund_cents: int


class Expired(msgspec.Struct):
    """It was not paid in time."""


class Status(Enum):
    """What happened to an order last; stored as its text."""

    PLACED = "placed"
    PAID = "paid"
    SHIPPED = "shipped"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Order:
    """A row: one column a field, beside the key, which is the event's entity_id."""

    status: Status
    customer: str
    total_cents: int
    paid_cents: int
    placed_at: datetime | None


@projection(
    topics=["orders"],
    version=1,
    payload={
        "order_placed": Placed,
        "order_paid": Paid,
        "order_shipped": Shipped,
        "order_cancelled": Cancelled,
        "order_expired": Expired,
    },
)
def orders(state: Order | None, event: Event) -> Order | None:
    """Follow an order from its placing to its end."""
    match event.payload, state:
        case Placed(customer, lines), _:
            total = sum(line.quantity * line.cents for line in lines)
            return Order(Status.PLACED, customer, total, 0, event.event_time)
        case Paid(cents), Order():
            return replace(state, status=Status.PAID, paid_cents=cents)
        case Shipped(), Order():
            return replace(state, status=Status.SHIPPED)
        case Cancelled(refund), Order():
            left = state.paid_cents - refund
            return replace(state, status=Status.CANCELLED, paid_cents=left)
        case Expired(), _:
            return None  # deletes the row
    return state  # not ours, or its placing is not in the log
