"""What the shop earned each day: the key is a date, money is whole cents.

The version is yours: raise it when the rows change their meaning, then replay.
"""

from dataclasses import dataclass
from datetime import date

from kappa_log import Event, projection


@dataclass(frozen=True, slots=True)
class DailyRevenue:
    """One day's money."""

    payments: int = 0
    cents: int = 0


def day(event: Event) -> date | None:
    """Return the day of an event in UTC; without a time it is for no row."""
    return event.event_time.date() if event.event_time else None


@projection(topics=["orders"], version=2, key=day)
def daily_revenue(state: DailyRevenue | None, event: Event) -> DailyRevenue | None:
    """Add what was paid; from version 2 on, take off what went back."""
    total = state or DailyRevenue()
    match event.event_type:
        case "order_paid":
            cents = total.cents + event.payload["cents"]
            return DailyRevenue(total.payments + 1, cents)
        case "order_cancelled" if event.payload["refund_cents"]:
            cents = total.cents - event.payload["refund_cents"]
            return DailyRevenue(total.payments, cents)
    return state
