"""Rewind: a topic read again from an offset on; the log keeps what it has, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from kappa_log.cli import run
from kappa_log.errors import SourceDiverged, SourceGap, UsageError
from kappa_log.kafka import consume
from support.logs import execute
from support.topics import Shop

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker


@pytest.fixture
def shop(kafka_broker: RealBroker, database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener that has read a topic of every kind of record."""
    with Shop(kafka_broker, kafka_broker.new_topic(2), database_url, tmp_path) as found:
        kafka_broker.produce(found.topic, RECORDS)
        report = found.consume()
        counts = report.counts
        assert (counts.acked, counts.skipped) == (4, 1)
        assert (counts.duplicate, counts.failed) == (1, 2)
        yield found


@pytest.fixture
def one_shop(
    kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path
) -> Iterator[Shop]:
    """A listener that has read a topic of two records, a partition each."""
    with Shop(kafka_broker, kafka_broker.new_topic(2), sqlite_url, tmp_path) as found:
        kafka_broker.produce(found.topic, [order(1), order(2, partition=1)])
        found.consume()
        yield found


def order(number: int, partition: int = 0, **more: Any) -> tuple[Any, ...]:
    """Return an order."""
    return json.dumps({"id": number} | more).encode(), None, partition


RECORDS = [
    order(0),
    order(1, do="skip"),
    order(2, do="raise"),
    order(0),
    (b"nonsense", None, 0),
    (None, None, 0),
    order(6),
    order(7, partition=1),
]
"""Kept, skipped, failed, repeated, failed, kept (no payload), kept; kept elsewhere.

None has a key, or what came after the first failure would wait behind it.
"""


def rows(shop: Shop) -> dict[str, list[Any]]:
    """Return all rows of the log, but for where reading stands and its ledger."""
    tables = shop.app.database.tables
    with shop.app.database.read() as connection:
        return {
            table.name: [
                tuple(row)
                for row in connection.execute(
                    sa.select(table).order_by("id" if "id" in table.c else "position")
                )
            ]
            for table in (tables.events, tables.duplicates, tables.failures)
        }


def ledger(shop: Shop, partition: int = 0) -> list[tuple[str, int, int]]:
    """Return kind and range of each of a partition's checkpoints."""
    table = shop.app.database.tables.checkpoints
    query = (
        sa.select(table.c.kind, table.c.from_offset, table.c.to_offset)
        .where(table.c.partition == partition)
        .order_by(table.c.id)
    )
    with shop.app.database.read() as connection:
        return [(kind, first, last) for kind, first, last in connection.execute(query)]


# --- what is read again -----------------------------------------------------------


def test_what_is_kept_is_kept_once(shop: Shop) -> None:
    """Events, duplicates and failures are known by their coordinates, and counted."""
    before = rows(shop)

    moved = shop.app.rewind(shop.topic, 0, 0)
    report = shop.consume()

    assert moved == (7, 0)
    assert rows(shop) == before
    counts = report.counts
    assert (counts.acked, counts.skipped) == (0, 1)
    # Three events, and the duplicate that it was.
    assert (counts.duplicate, counts.failed) == (4, 2)
    assert shop.offsets() == {(shop.topic, 0): 7, (shop.topic, 1): 1}
    assert ("rewind", 0, 0) in ledger(shop)
    assert ledger(shop, 1) == [("batch", 0, 1)]
    assert shop.app.verify().ok


def test_a_rewind_begins_where_it_is_told_and_may_be_repeated(shop: Shop) -> None:
    """From the middle, to the very place where it stands, and twice in a row."""
    before = rows(shop)

    assert shop.app.rewind(shop.topic, 0, 5) == (7, 5)
    assert shop.app.rewind(shop.topic, 0, 2) == (5, 2)
    assert shop.consume().counts.seen == 5
    assert shop.app.rewind(shop.topic, 0, 7) == (7, 7)
    assert shop.consume().counts.seen == 0

    assert rows(shop) == before
    assert [kind for kind, *_ in ledger(shop)].count("rewind") == 2
    assert shop.app.verify().ok


def test_a_handler_that_changed_its_mind_keeps_what_it_skipped(shop: Shop) -> None:
    """That is what rewinds are for; failures stay for a retry to settle."""
    shop.want(skip="keep", **{"raise": "keep"})
    before = rows(shop)
    shop.app.rewind(shop.topic, 0, 0)

    report = shop.consume()

    assert (report.counts.acked, report.counts.failed) == (1, 2)
    kept = shop.events()[-1]
    assert (kept.entity_id, kept.offset, kept.position) == ("1", 1, 5)
    assert rows(shop)["kappa_log_failures"] == before["kappa_log_failures"]
    assert shop.app.verify().ok
    shop.app.rewind(shop.topic, 0, 0)
    assert shop.consume().counts.acked == 0


def test_new_records_after_a_rewind_are_kept(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """One pass goes over old offsets and on to new ones."""
    shop.app.rewind(shop.topic, 0, 4)
    kafka_broker.produce(shop.topic, [order(0), order(8)])

    report = shop.consume()

    assert (report.counts.acked, report.counts.duplicate) == (1, 3)
    assert len(shop.app.duplicates()) == 2
    assert shop.offsets()[shop.topic, 0] == 9
    assert shop.app.verify().ok


@pytest.mark.parametrize(
    "planted",
    [
        "UPDATE kappa_log_events SET checksum = 'other' WHERE \"offset\" = 6",
        "UPDATE kappa_log_failures SET checksum = 'other' WHERE \"offset\" = 4",
    ],
    ids=["event", "failure"],
)
def test_other_bytes_at_the_same_offset_stop_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """The cluster lost what it had acknowledged: nothing is written over."""
    assert execute(shop.app, planted) == 1
    before = rows(shop)
    shop.app.rewind(shop.topic, 0, 0)

    with pytest.raises(
        SourceDiverged,
        match=rf"{shop.topic} partition 0, offset \d: there are other bytes now than",
    ):
        shop.consume()

    assert rows(shop) == before
    assert shop.offsets()[shop.topic, 0] == 0
    monkeypatch.chdir(shop.folder)
    assert run(["consume", "--until-end"]) == 65


# --- while somebody reads ---------------------------------------------------------


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_rewind_reaches_a_consumer_that_runs(
    one_shop: Shop,
    kafka_broker: RealBroker,
    monkeypatch: pytest.MonkeyPatch,
    is_idle: bool,
) -> None:
    """It is fenced, takes the partition again, and reads again; an idle one looks."""
    shop = one_shop
    monkeypatch.setattr(consume, "LOOK_SECONDS", 0.2 if is_idle else 1000)

    def called(offset: int) -> int:
        return sum((m.partition, m.offset) == (0, offset) for m in shop.calls)

    with shop.running() as running:
        kafka_broker.produce(shop.topic, [order(3, do="skip")])
        running.wait_for(lambda: shop.offsets()[shop.topic, 0] == 2, "the new record")

        assert shop.app.rewind(shop.topic, 0, 1) == (2, 1)
        if not is_idle:
            kafka_broker.produce(shop.topic, [order(4)])
        running.wait_for(lambda: called(1) == 2, "the record again")
        end = 2 if is_idle else 3
        running.wait_for(lambda: shop.offsets()[shop.topic, 0] == end, "the end")

    assert called(0) == 1
    assert len(shop.events()) == end
    assert shop.app.verify().ok


# --- what cannot be gone back to --------------------------------------------------

WRONG: list[tuple[Callable[[Shop], tuple[Any, ...]], str]] = [
    (lambda shop: (shop.topic, 0, 2), r"is at offset 1 for group .*: offset 2 cannot"),
    (
        lambda shop: (shop.topic, 2, 0),
        r"has no partition 2 of topic '{topic}'; nothing",
    ),
    (lambda _: ("shoes", 0, 0), "topic 'shoes' has no listener in kappa_log.toml"),
    (lambda shop: (shop.topic, 2**31, 0), "has no partition 2147483648"),
]


@pytest.mark.parametrize(("where", "said"), WRONG)
def test_a_place_that_was_not_read_is_refused(
    one_shop: Shop, where: Callable[[Shop], tuple[Any, ...]], said: str
) -> None:
    """Nothing is changed: no epoch, no offset, no line in the ledger."""
    before = ledger(one_shop)

    with pytest.raises(UsageError, match=said.format(topic=one_shop.topic)):
        one_shop.app.rewind(*where(one_shop))

    assert ledger(one_shop) == before
    assert set(one_shop.offsets().values()) == {1}


def test_a_group_that_has_not_begun_cannot_go_back(
    one_shop: Shop,
) -> None:
    """And of several groups one must be named."""
    shop = one_shop
    shop.configure({}, {"group_id": f"{shop.group}-2"})

    with pytest.raises(UsageError, match="pick one by --group"):
        shop.app.rewind(shop.topic, 0, 0)
    with pytest.raises(UsageError, match=f"is not begun for group {shop.group}-2"):
        shop.app.rewind(shop.topic, 0, 0, group=f"{shop.group}-2")
    assert shop.app.rewind(shop.topic, 0, 0, group=shop.group) == (1, 0)


def test_an_offset_that_was_deleted_is_a_gap(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Named; with leave, the lowest one that is left is gone back to."""
    kafka_broker.delete_records(shop.topic, 0, before=3)

    with pytest.raises(
        SourceGap, match=rf"{shop.topic} partition 0: offsets 1 to 2 were deleted"
    ):
        shop.app.rewind(shop.topic, 0, 1)
    assert shop.offsets()[shop.topic, 0] == 7

    assert shop.app.rewind(shop.topic, 0, 1, accept_gap=True) == (7, 3)
    assert shop.consume().counts.seen == 4
    assert shop.app.verify().ok


def test_the_command_line_goes_back_and_reads_on(
    one_shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command for several partitions; it says from where to where."""
    shop = one_shop
    monkeypatch.chdir(shop.folder)
    places = [
        word
        for partition in (0, 1)
        for word in ("--from-offset", f"{shop.topic}:{partition}:0")
    ]

    code = run(["consume", "--until-end", *places])
    said = capsys.readouterr()

    assert code == 0
    for partition in (0, 1):
        assert (
            f"{shop.topic} partition {partition}: goes back from offset 1 to 0"
            in said.err
        )
    assert "kept 0   skipped 0   duplicate 2   failed 0" in said.out
    assert run(["consume", "--from-offset", f"{shop.topic}:0:9"]) == 2
    assert "cannot be gone back to; nothing was changed" in capsys.readouterr().err
