"""The example projections: folds are functions, so a test is a call with events.

Written as users would test their own: nothing here but the public names.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from kappa_log import Event, Projection, make_event
from projections.customer_totals import CustomerTotal, customer_totals
from projections.daily_revenue import DailyRevenue, daily_revenue, day
from projections.orders import (
    Cancelled,
    Expired,
    Line,
    Order,
    Paid,
    Placed,
    Shipped,
    Status,
    orders,
)
from projections.product_sales import ProductSales, product_sales, products

NOON = datetime(2026, 2, 1, 12, tzinfo=UTC)

PLACED = Placed("c-1", [Line("mug", 2, 1_250), Line("assam", 1, 890)])


def fold(projection: Projection, *events: Event) -> Any:
    """Return the state after some events of one key."""
    state = None
    for event in events:
        state = projection(state, event)
    return state


def typed(*payloads: object) -> list[Event]:
    """Return events with payloads as the engine decodes them, an hour apart."""
    return [
        make_event(n, payload, entity_id="o-1", event_time=NOON.replace(hour=n))
        for n, payload in enumerate(payloads, 1)
    ]


def happened(kind: str, **payload: Any) -> Event:
    """Return an event of a type with a plain payload."""
    return make_event(payload=payload, event_type=kind, event_time=NOON)


# --- orders ------------------------------------------------------------------


def test_an_order_is_worth_all_its_lines() -> None:
    """Quantity times price, added up in whole cents."""
    assert fold(orders, *typed(PLACED)) == Order(
        Status.PLACED, "c-1", 3_390, 0, NOON.replace(hour=1)
    )


def test_an_order_keeps_what_was_paid_when_it_is_shipped() -> None:
    """A later event changes what it is about and nothing else."""
    state = fold(orders, *typed(PLACED, Paid(3_390), Shipped()))

    assert (state.status, state.paid_cents) == (Status.SHIPPED, 3_390)


def test_a_cancelled_order_gives_its_money_back() -> None:
    """The row stays, and says that nothing of the money is left."""
    state = fold(orders, *typed(PLACED, Paid(3_390), Cancelled(3_390)))

    assert (state.status, state.paid_cents) == (Status.CANCELLED, 0)


def test_an_expired_order_has_no_row() -> None:
    """None deletes the row."""
    assert fold(orders, *typed(PLACED, Expired())) is None


def test_an_order_whose_placing_failed_has_no_row() -> None:
    """A fold must live with what the log lacks: a Failure can be retried later."""
    assert fold(orders, *typed(Paid(3_390), Shipped(), Cancelled(0))) is None


def test_an_event_type_that_the_fold_does_not_know_changes_nothing() -> None:
    """The shop may send new types before anybody reads them."""
    (placed,) = typed(PLACED)
    before = fold(orders, placed)

    assert orders(before, happened("order_praised", stars=5)) is before


# --- product_sales -----------------------------------------------------------


def test_an_order_belongs_to_each_of_its_products() -> None:
    """A key function may return several keys."""
    lines = [{"product": "mug"}, {"product": "assam"}]

    assert products(happened("order_placed", lines=lines)) == ["mug", "assam"]
    assert products(happened("order_paid", cents=1)) == []


def test_a_product_counts_its_orders_and_what_they_came_to() -> None:
    """Each order counts in full for each product in it."""
    line = {"product": "mug", "quantity": 2, "cents": 1_250}
    order = happened("order_placed", lines=[line])

    assert fold(product_sales, order, order) == ProductSales(2, 5_000, NOON)


# --- daily_revenue -----------------------------------------------------------


def test_a_day_earns_what_was_paid_less_what_went_back() -> None:
    """The version 1 of this fold forgot what went back; the demo shows the fix."""
    state = fold(
        daily_revenue,
        happened("order_paid", cents=3_390),
        happened("order_paid", cents=890),
        happened("order_cancelled", refund_cents=890),
    )

    assert state == DailyRevenue(payments=2, cents=3_390)


def test_a_day_on_which_no_money_moved_has_no_row() -> None:
    """An order that was cancelled unpaid moves none."""
    cancelled = happened("order_cancelled", refund_cents=0)

    assert fold(daily_revenue, happened("order_placed"), cancelled) is None


def test_a_day_is_that_of_the_event_in_utc() -> None:
    """An event without a time is on no day."""
    assert day(happened("order_paid")) == date(2026, 2, 1)
    assert day(make_event()) is None


# --- customer_totals ---------------------------------------------------------


def test_a_customer_s_purchases_add_up() -> None:
    """Orders, CDs, and dollars as CDNOW's data has them: in floats."""
    bought = happened("purchase", quantity=2, amount=23.54)

    assert fold(customer_totals, bought, bought) == CustomerTotal(2, 4, 47.08)
