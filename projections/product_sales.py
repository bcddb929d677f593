"""How products sell: an order counts for each product in it.

The key function returns a list, and the fold runs once for each key with the same
event. It is not told which, so it adds what is true of all of them.
"""

from dataclasses import dataclass
from datetime import datetime

from kappa_log import Event, projection


@dataclass(frozen=True, slots=True)
class ProductSales:
    """The orders that one product is part of."""

    orders: int = 0
    order_cents: int = 0
    """What these orders came to, with all that is in them."""
    last_ordered: datetime | None = None


def products(event: Event) -> list[str]:
    """Return the products of a new order; no other event is for this projection."""
    if event.event_type != "order_placed":
        return []
    return [line["product"] for line in event.payload["lines"]]


@projection(topics=["orders"], version=1, key=products)
def product_sales(state: ProductSales | None, event: Event) -> ProductSales | None:
    """Count a product's orders, and what was spent on them."""
    state = state or ProductSales()
    spent = sum(line["quantity"] * line["cents"] for line in event.payload["lines"])
    return ProductSales(
        orders=state.orders + 1,
        order_cents=state.order_cents + spent,
        last_ordered=event.event_time,
    )
