"""What each customer of CDNOW bought: the smallest useful projection."""

from dataclasses import dataclass

from kappa_log import Event, projection


@dataclass(frozen=True, slots=True)
class CustomerTotal:
    """One customer's purchases."""

    orders: int = 0
    cds: int = 0
    amount: float = 0.0


@projection(topics=["cdnow"], version=1)
def customer_totals(state: CustomerTotal | None, event: Event) -> CustomerTotal | None:
    """Count a customer's orders, CDs and dollars."""
    state = state or CustomerTotal()
    return CustomerTotal(
        orders=state.orders + 1,
        cds=state.cds + event.payload["quantity"],
        amount=state.amount + event.payload["amount"],
    )
