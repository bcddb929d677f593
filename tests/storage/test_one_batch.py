"""One batch: its records in their order, and all of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import QueuePool

from support.kinds import on_both
from support.poison import Poisoned


@pytest.fixture
def orders(url: str, tmp_path: Path) -> Iterator[Poisoned]:
    """Give a log whose handler fails on demand."""
    with Poisoned(url, tmp_path) as found:
        yield found


def stands(orders: Poisoned) -> list[Any]:
    """Return the offset that comes next, as others see it, and the events."""
    query = sa.select(orders.app.database.tables.offsets.c.next_offset)
    with orders.app.database.read() as connection:
        return [list(connection.scalars(query)), orders.order()]


@on_both
def test_records_come_in_order_and_their_offset_is_moved_once(
    orders: Poisoned,
) -> None:
    """SEED P7: behind the whole batch; until then nobody sees a part of it."""
    seen: list[Any] = []
    orders.during_call(lambda: seen.append(stands(orders)), n=0)
    orders.during_call(lambda: seen.append(stands(orders)), n=3)

    orders.read(*((f"k{n}", {"n": n}) for n in range(4)))

    assert [n for n, _ in orders.calls] == [0, 1, 2, 3]
    assert seen == [[[0], []]] * 2
    assert stands(orders) == [[4], [0, 1, 2, 3]]


@on_both
def test_no_connection_is_held_by_or_after_a_record(orders: Poisoned) -> None:
    """SEED H18: whatever came of it; handlers may take as long as they need."""
    pool = orders.app.database.engine.pool
    assert isinstance(pool, QueuePool)
    held: list[int] = []
    for n, do in enumerate(("ack", "skip", "raise")):
        orders.during_call(lambda: held.append(pool.checkedout()))
        orders.read(("a", {"n": n, "do": do}))
        held.append(pool.checkedout())

    assert held == [0] * 6
