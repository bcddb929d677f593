"""The work: events of 200 bytes over 50,000 keys, made the same way every time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kappa_log import Event, projection, sql_projection

TOPIC = "bench"
KEYS = 50_000


@dataclass(frozen=True, slots=True)
class Total:
    """What one entity bought."""

    orders: int = 0
    amount: float = 0.0


@projection(topics=[TOPIC], version=1)
def totals(state: Total | None, event: Event) -> Total:
    """Count orders and amounts."""
    state = state or Total()
    return Total(state.orders + 1, state.amount + event.payload["amount"])


sql_totals = sql_projection(
    name="sql_totals",
    version=1,
    topics=[TOPIC],
    columns={"orders": "count(*)", "amount": "sum((payload->>'amount')::DOUBLE)"},
)
"""The same by SQL."""


def lines(events: int) -> Iterator[str]:
    """Yield that many JSON lines of about 200 bytes."""
    choose = random.Random(20261122)
    for number in range(events):
        minute, second = divmod(number, 60)
        hour, minute = divmod(minute, 60)
        day, hour = divmod(hour, 24)
        date = f"2024-01-{1 + day % 28:02d}"
        yield json.dumps(
            {
                "id": f"order-{number:010d}",
                "customer": f"c{choose.randrange(KEYS):06d}",
                "type": "order_placed",
                "time": f"{date}T{hour:02d}:{minute:02d}:{second:02d}Z",
                "amount": round(choose.random() * 100, 2),
                "note": "n" * 60,
            }
        )


def write_lines(file: Path, events: int) -> None:
    """Write the lines to a file, once."""
    if file.exists():
        return
    with file.open("w") as out:
        out.writelines(line + "\n" for line in lines(events))
