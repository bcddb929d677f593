"""A project that uses all there is, from `init` to `verify` (SEED §1 to §3, §6 to §10).

Its files are in tests/example_project. It runs inside of this process, as in a program
of its users, on a real broker.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from kappa_log import Event, KappaLog, Notice, subscribe
from kappa_log.cli import run
from kappa_log.decoders.registry import client_of
from kappa_log.status import HeadStatus
from support.kafka_broker import RealBroker
from support.topics import Running

EXAMPLE = Path(__file__).parents[1] / "example_project"
TOPICS = ("catalogue", "orders", "shipments", "payments")
PARTITIONS = 4

CHECK, ACTION = "event_already_exists_check", "event_action"
ACKED, SKIPPED = "event_acknowledged", "event_skipped"
AGAIN, AROUND = "event_already_consumed", "around_consume"

AT = "2026-03-01T08:00:00+00:00"


def order(
    customer: str, number: int, product: str = "tea", **more: Any
) -> dict[str, Any]:
    """Return an order as tills publish it, three pieces of a product."""
    made = {"order": f"o{number}", "customer": customer, "product": product}
    return made | {"at": AT, "pieces": 3} | more


PLAIN = [order(f"c{n % 5}", n) for n in range(20)]
REPEATED = PLAIN[0]
TEST = order("c0", 30, is_test=True)
SLOW = order("c1", 31, is_slow=True)
UNKNOWN = order("late", 32, "pot")
BEHIND = order("late", 33)
OLD = {"sku": "mug", **order("c2", 34)}
del OLD["product"]
ORDERS = [*PLAIN, REPEATED, TEST, SLOW, UNKNOWN, BEHIND, OLD]
KEPT = sorted(order["order"] for order in [*PLAIN, SLOW, UNKNOWN, BEHIND, OLD])

FIELDS = [
    {"name": "order", "type": "string"},
    {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    {
        "name": "amount",
        "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
    },
]
PAYMENT = {"type": "record", "name": "Payment", "fields": FIELDS}
CURRENCY = {"name": "currency", "type": "string", "default": "EUR"}
PAYMENT_2 = {**PAYMENT, "fields": [*FIELDS, CURRENCY]}
"""The schema of payments, and what became of it: a reader of it reads the first."""

PAID = {"o1": ("13.50", "EUR"), "o2": ("13.50", "USD")}

Place = tuple[str, int, int]
"""Topic, partition and offset."""


class Told:
    """What a subscriber was told of each record, of the six names of old."""

    def __init__(self) -> None:
        self.of: dict[Place, list[str]] = defaultdict(list)
        self._raised: set[Place] = set()

    def __call__(self, notice: Notice) -> None:
        """Note a notice."""
        facts = notice.payload
        place = facts["topic"], facts["partition"], facts["offset"]
        (self._raised.add if "exception" in facts else self._raised.discard)(place)
        self.of[place].append(notice.name)

    def decided(self, places: list[Place]) -> bool:
        """Tell whether all that there is to be told of these records was."""
        return all(
            self.of[p][-1:] == [AROUND] and p not in self._raised for p in places
        )


class Project:
    """The example in a folder of its own, under topics of its own."""

    def __init__(
        self, broker: RealBroker, folder: Path, read: Callable[[], tuple[str, str]]
    ) -> None:
        """Name its topics, and make them."""
        self.folder = folder
        self.topics = {name: f"{name}-{uuid4().hex[:8]}" for name in TOPICS}
        for name, topic in self.topics.items():
            few = name in ("catalogue", "payments")
            broker.create_topic(topic, 1 if few else PARTITIONS)
        self._read = read

    def type(self, *arguments: str) -> str:
        """Run a command, which must go well; return what it printed."""
        code = run(arguments)
        out, err = self._read()
        assert code == 0, out + err
        return out

    def write(self, name: str, *, onto: str | None = None) -> None:
        """Put a file of the example here, or at the end of one that is here."""
        text = (EXAMPLE / name).read_text()
        for short, topic in self.topics.items():
            text = text.replace(f'"{short}"', f'"{topic}"')
        target = self.folder / (onto or name)
        before = target.read_text() if onto else ""
        target.write_text(before + text)

    def publish(
        self, app: KappaLog, name: str, *payloads: dict[str, Any]
    ) -> list[Place]:
        """Publish, each after the one before; return where each payload is."""
        with app.producer() as producer:
            records = [
                {
                    "topic": self.topics[name],
                    "payload": payload,
                    "key": payload.get("customer"),
                }
                for payload in payloads
            ]
            found = producer.publish_list(records)
        return [(one.topic, one.partition, one.offset) for one in found]

    def pay(
        self, app: KappaLog, schema: dict[str, Any], number: str, **more: Any
    ) -> None:
        """Publish a payment as tills do, by their serializer."""
        topic = self.topics["payments"]
        # A registry in memory is that of its client, which all in here share.
        registry = client_of(app.config.registry)
        serializer = AvroSerializer(registry, json.dumps(schema))
        value = {"order": number, "at": datetime.fromisoformat(AT), **more}
        value["amount"] = Decimal("13.50")
        framed = serializer(value, SerializationContext(topic, MessageField.VALUE, []))
        with app.producer() as producer:
            producer.publish(topic, framed, key=number)

    def events(self, app: KappaLog, name: str) -> list[Event]:
        """Return the events of a topic by position."""
        return app.events(topic=self.topics[name], limit=1000, oldest_first=True)


@pytest.fixture
def project(
    kafka_broker: RealBroker,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Project:
    """Make the project as its owner does, by commands and an editor."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DATABASE__URL": database_url,
        "KAFKA__BOOTSTRAP_SERVERS": kafka_broker.bootstrap,
        "KAFKA__FETCH_WAIT_MAX_MS": "10",
    }.items():
        monkeypatch.setenv(f"KAPPA_LOG__{name}", value)

    def read() -> tuple[str, str]:
        found = capsys.readouterr()
        return found.out, found.err

    made = Project(kafka_broker, tmp_path, read)
    made.type("init")
    for example in (tmp_path / "projections").glob("[!_]*.py"):
        example.unlink()
    made.write("listeners.toml", onto="kappa_log.toml")
    for name in ("handlers.py", "projections/shop.py", "seeds.py", "catalogue.jsonl"):
        made.write(name)
    made.type("migration", "add-products-and-invoices")
    (migration,) = (tmp_path / "migrations").glob("*_add_products_and_invoices.py")
    head, _, _ = migration.read_text().partition("def upgrade")
    migration.write_text(head + (EXAMPLE / "tables.py").read_text())
    made.type("db", "setup")
    made.type("db", "setup")
    return made


def test_a_project_of_a_user_of_the_old_system_works(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """Each order is an event, an invoice and a shipment once, whatever went wrong."""
    caplog.set_level(logging.INFO, "shop")
    told = Told()
    with KappaLog.open(project.folder) as app:
        with (
            subscribe("db_checkpoint.event_*", told),
            subscribe("around_consume", told),
            Running(app, "run", {}) as running,
        ):
            wait_for_both(project, running)
            places = project.publish(app, "orders", *ORDERS)
            running.wait_for(lambda: told.decided(places), "all orders")
            _check_what_failed(app)
            project.pay(app, PAYMENT, "o1")
            project.pay(app, PAYMENT_2, "o2", currency="USD")
            mend(project, app, running)
            running.wait_for(lambda: _is_all_there(project, app), "shipments and folds")
        _check_what_was_told(dict(zip(_ids(ORDERS), places, strict=True)), told)
        before = _check_what_there_is(project, app)

        again = Told()
        for partition in range(PARTITIONS):
            app.rewind(project.topics["orders"], partition, 0)
        with subscribe("around_consume", again), Running(app, "run", {}) as running:
            wait_for_both(project, running)
            running.wait_for(lambda: again.decided(places), "all orders once more")

        assert _check_what_there_is(project, app) == before
    # Two consumers, twice; and the retry.
    opened = [record.message for record in caplog.records if record.name == "shop"]
    assert (opened.count("open"), opened.count("closed")) == (5, 5)
    project.type("verify", "customers", "shipments_of_orders", "payments")


def wait_for_both(project: Project, running: Running) -> None:
    """Wait until both consumers of the orders have partitions of their own.

    Whoever is stopped while partitions are being shared out is missed by the broker
    only later, and then the next run waits for that.
    """
    listener = f"billing-{project.topics['orders']}"
    for name in (listener, f"{listener}#2"):
        running.wait_for(
            lambda name=name: running.told(f"{name}: assigned"),  # type: ignore[misc]
            f"partitions of {name}",
        )


def mend(project: Project, app: KappaLog, running: Running) -> None:
    """Add the product that an order could not find, and retry, while it runs."""
    project.publish(app, "catalogue", {"product": "pot", "cents": 2500})
    running.wait_for(lambda: len(project.events(app, "catalogue")) == 3, "the product")
    assert "kept 2 " in project.type("failures", "retry", "--all")


def _ids(orders: list[dict[str, Any]]) -> list[str]:
    """Return what the orders are called here; the repeated one has another name."""
    return ["again" if one is orders[20] else one["order"] for one in orders]


def _check_what_failed(app: KappaLog) -> None:
    """An order without a product, with what its handler tells; one waits behind it."""
    waiting, failed = sorted(app.failures(), key=lambda failure: failure.offset)[::-1]
    assert (failed.parked, waiting.parked) == (False, True)
    assert (failed.error_class, failed.attempts) == ("LookupError", 1)
    assert failed.error_message == "no product pot"
    assert failed.event_time is not None
    said = (failed.entity_id, failed.event_time.isoformat())
    assert said == ("late", AT)
    assert (failed.event_type, failed.event_version) == ("order_placed", "1")


def _is_all_there(project: Project, app: KappaLog) -> bool:
    head = app.head().position
    live = [app.projection(name).live for name in app.registry.names]
    wanted = {"shipments": len(KEPT), "payments": len(PAID)}
    return all(len(project.events(app, t)) == n for t, n in wanted.items()) and all(
        build is not None and build.cursor == head for build in live
    )


def _check_what_was_told(places: dict[str, Place], told: Told) -> None:
    """In the order of old, each attempt and each retry (SEED I3 to I6)."""
    kept = [CHECK, ACTION, ACKED, AROUND]
    wanted = {
        "o1": kept,
        "o34": kept,
        "again": [CHECK, AGAIN, AROUND],
        "o30": [CHECK, ACTION, SKIPPED, AROUND],
        "o31": [CHECK, ACTION, AROUND, *kept],
        "o32": [CHECK, ACTION, SKIPPED, AROUND, *kept],
    }
    assert {name: told.of[places[name]] for name in wanted} == wanted
    assert told.of[places["o33"]][-4:] == kept


def _check_what_there_is(project: Project, app: KappaLog) -> HeadStatus:
    """Compare events, rows and effects with the orders; return the log's head."""
    orders, shipments = project.events(app, "orders"), project.events(app, "shipments")
    assert sorted(event.payload["order"] for event in orders) == KEPT
    assert sorted(str(event.entity_id) for event in shipments) == KEPT
    assert {event.event_type for event in shipments} == {"order_shipped"}
    dropped = {duplicate.topic for duplicate in app.duplicates()}
    assert dropped == {project.topics["orders"], project.topics["shipments"]}
    assert app.failures() == []

    query = sa.text("SELECT order_id, cents FROM invoices")
    with app.database.read() as connection:
        invoices = sorted(map(tuple, connection.execute(query)))
    cents = {"o32": 2500, "o34": 990}
    assert invoices == [(number, cents.get(number, 450)) for number in KEPT]

    customers = {row["entity_id"]: row["pieces"] for row in app.rows("customers")}
    assert customers == {f"c{n}": 12 for n in range(5)} | {
        "c1": 15,
        "c2": 15,
        "late": 6,
    }
    rows = list(app.rows("shipments_of_orders"))
    assert [row["times"] for row in rows] == [1] * len(KEPT)
    assert {row["shipped_at"].isoformat() for row in rows} == {AT}

    payments = {row["entity_id"]: row for row in app.rows("payments")}
    paid = {n: (row["amount"], row["currency"]) for n, row in payments.items()}
    assert paid == PAID
    # What was received is kept as it came, each by the schema that wrote it.
    kept = project.events(app, "payments")
    assert [event.event_version for event in kept] == ["1", "2"]
    assert all(event.raw is not None and event.raw[:1] == b"\0" for event in kept)
    return app.head()
