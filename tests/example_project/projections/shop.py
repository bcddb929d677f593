"""What customers bought, and what was shipped."""

from dataclasses import dataclass

from kappa_log import Event, projection, sql_projection


@dataclass(frozen=True)
class Customer:
    """The orders of one customer."""

    orders: int = 0
    pieces: int = 0


@projection(topics=["orders"], version=1)
def customers(state: Customer | None, event: Event) -> Customer:
    """Count a customer's orders."""
    state = state or Customer()
    return Customer(state.orders + 1, state.pieces + event.payload["pieces"])


shipments = sql_projection(
    name="shipments_of_orders",
    version=1,
    topics=["shipments"],
    columns={"times": "count(*)", "shipped_at": "max(event_time)"},
)


@dataclass(frozen=True)
class Payment:
    """What was paid for one order."""

    amount: str
    currency: str


@projection(
    topics=["payments"],
    version=1,
    upcast={("order_paid", "1"): lambda old: {**old, "currency": "EUR"}},
)
def payments(_: Payment | None, event: Event) -> Payment:
    """Keep the last payment of an order; once all were in euros."""
    return Payment(event.payload["amount"], event.payload["currency"])
