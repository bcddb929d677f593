"""kappa_log: Kafka events in an append-only log, every view rebuildable from it.

The public names load on first use, so that importing the package, and
``kappa-log --help``, open no database library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.errors import (
        DeliveryFailed,
        KappaLogError,
        ProjectionError,
        StorageError,
        UsageError,
    )
    from kappa_log.events import ORIGIN, Event, Position, make_event
    from kappa_log.fold import Projection, projection
    from kappa_log.handler import Ack, FieldOptions, Handler, Metadata, ack
    from kappa_log.kafka.producer import Producer
    from kappa_log.plan import ReplayPlan
    from kappa_log.sqlfold import sql_projection
    from kappa_log.steps import ReplayReport
    from kappa_log.telemetry.notices import Notice, Subscription, subscribe

__version__ = "0.1.0"

_HOMES = {
    "ORIGIN": "events",
    "Ack": "handler",
    "DeliveryFailed": "errors",
    "Event": "events",
    "FieldOptions": "handler",
    "Handler": "handler",
    "KappaLog": "app",
    "KappaLogError": "errors",
    "Metadata": "handler",
    "Notice": "telemetry.notices",
    "Position": "events",
    "Producer": "kafka.producer",
    "Projection": "fold",
    "ProjectionError": "errors",
    "ReplayPlan": "plan",
    "ReplayReport": "steps",
    "StorageError": "errors",
    "Subscription": "telemetry.notices",
    "UsageError": "errors",
    "ack": "handler",
    "make_event": "events",
    "projection": "fold",
    "sql_projection": "sqlfold",
    "subscribe": "telemetry.notices",
}

__all__ = [
    "ORIGIN",
    "Ack",
    "DeliveryFailed",
    "Event",
    "FieldOptions",
    "Handler",
    "KappaLog",
    "KappaLogError",
    "Metadata",
    "Notice",
    "Position",
    "Producer",
    "Projection",
    "ProjectionError",
    "ReplayPlan",
    "ReplayReport",
    "StorageError",
    "Subscription",
    "UsageError",
    "ack",
    "make_event",
    "projection",
    "sql_projection",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        msg = f"module 'kappa_log' has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    value = getattr(import_module(f"kappa_log.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
