"""A shop: what it makes of its catalogue, its orders and its shipments."""

import logging
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from typing_extensions import override

from kappa_log import Event, Handler, Metadata, Producer, ack

LOGGER = logging.getLogger("shop")

products = sa.table("products", sa.column("product"), sa.column("cents"))
invoices = sa.table("invoices", sa.column("order_id"), sa.column("cents"))


def stock(payload: dict[str, Any], metadata: Metadata) -> object:
    """Take a product into our own table."""
    metadata.connection.execute(products.insert().values(**payload))
    return ack(payload["product"], None, "product_added")


class Orders(Handler):
    """Writes an invoice for each order, and has the order shipped."""

    @override
    def start(self) -> None:
        self.producer = Producer()
        LOGGER.info("open")

    @override
    def stop(self) -> None:
        self.producer.close()
        LOGGER.info("closed")

    @override
    def around_consume(
        self, payload: Any, metadata: Metadata, proceed: Callable[[Any], object]
    ) -> object:
        if payload.get("is_test"):
            return None
        return proceed({"product": payload.get("sku"), **payload})  # old tills say sku

    @override
    def consume(self, payload: Any, metadata: Metadata) -> object:
        connection, product = metadata.connection, products.c.product
        price = sa.select(products.c.cents).where(product == payload["product"])
        cents = connection.scalar(price)
        if cents is None:
            msg = f"no product {payload['product']}"
            raise LookupError(msg)
        values = {"order_id": payload["order"], "cents": cents}
        connection.execute(invoices.insert().values(values))
        self.ship(payload, metadata)
        if payload.get("is_slow") and metadata.retry_count == 0:
            msg = "the bank gives no answer"
            raise ConnectionError(msg)  # the invoice goes; what is published stays
        return ack(payload["customer"], payload["at"], "order_placed", 1)

    @override
    def retry_consume(
        self, event: Event, metadata: Metadata, exception: BaseException
    ) -> bool:
        return isinstance(exception, ConnectionError)

    @override
    def entity_id(self, payload: Any) -> str:
        return str(payload["customer"])

    @override
    def event_time(self, payload: Any) -> str:
        return str(payload["at"])

    @override
    def event_type(self, payload: Any) -> str:
        return "order_placed"

    @override
    def event_version(self, payload: Any) -> int:
        return 1

    def ship(self, payload: Any, metadata: Metadata) -> None:
        """Publish a CloudEvent, whose id is the same however often we are called."""
        self.producer.publish(
            "shipments",
            {"order": payload["order"]},
            key=payload["customer"],
            headers={
                "ce_id": metadata.message_id,
                "ce_source": "/shop",
                "ce_specversion": "1.0",
                "ce_type": "order_shipped",
                "ce_time": payload["at"],
                "content-type": "application/json",
            },
        )


def shipped(payload: dict[str, Any], _: Metadata) -> object:
    """Keep a shipment; its time and type are those of the CloudEvent."""
    return ack(payload["data"]["order"], None)


def paid(payload: dict[str, Any], _: Metadata) -> object:
    """Keep a payment; since its second version it has a currency."""
    version = 2 if "currency" in payload else 1
    return ack(payload["order"], payload["at"], "order_paid", version)
