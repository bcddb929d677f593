"""Clients: librdkafka's settings, those that are ours, and its errors as ours."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from kappa_log.config import Config
from kappa_log.errors import ConfigError, SourceError

OWNED: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "enable.partition.eof": True,
}
"""What the promises rest on; [kafka] may not say otherwise."""

DEFAULTS: dict[str, Any] = {
    "client.id": "kappa-log",
    "isolation.level": "read_committed",
    # A topic that is added, deleted or made anew is seen after this long.
    "topic.metadata.refresh.interval.ms": 10_000,
}

SECONDS = 10.0
"""How long a request to the cluster may take."""

FATAL = frozenset(
    {
        KafkaError._AUTHENTICATION,  # noqa: SLF001 - librdkafka's names for its own errors
        KafkaError._FATAL,  # noqa: SLF001
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.INCONSISTENT_GROUP_PROTOCOL,
        KafkaError.INVALID_SESSION_TIMEOUT,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
    }
)
"""Errors that waiting does not mend."""

# librdkafka writes to stderr what we tell in our own words.
_LOGGER = logging.getLogger("kappa_log.kafka")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.propagate = False

_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9._-]")

T = TypeVar("T")

OnError = Callable[[KafkaError], None]


def consumer(config: Config, group: str, member: str, on_error: OnError) -> Consumer:
    """Return a consumer of a group, by the settings of [kafka].

    Args:
        config: The settings.
        group: Id of the group.
        member: What tells this consumer from others of a static member's process.
        on_error: Called with what goes wrong in the background.

    Raises:
        ConfigError: A setting is none of librdkafka's, or is ours.
    """
    settings = _common(config) | OWNED | {"group.id": group, "error_cb": on_error}
    if settings.get("group.protocol", "classic") == "classic":
        settings.setdefault("partition.assignment.strategy", "cooperative-sticky")
    instance = settings.get("group.instance.id")
    if instance:
        # Two listeners of one group would be one static member, and fence each other.
        settings["group.instance.id"] = f"{instance}-{_NOT_IN_NAMES.sub('-', member)}"
    return _made(Consumer, settings)


def reader(config: Config) -> Consumer:
    """Return a consumer of no group, to look at records without consuming them."""
    settings = (
        _without_group(_common(config)) | OWNED | {"group.id": "kappa-log-reader"}
    )
    return _made(Consumer, settings)


def producer(
    config: Config, on_error: OnError, transactional_id: str | None = None
) -> Producer:
    """Return an idempotent producer, by the settings of [kafka] and [producer]."""
    settings = _without_group(_common(config)) | config.producer
    settings.pop("isolation.level")
    if transactional_id is not None:
        settings["transactional.id"] = transactional_id
    ours = {"enable.idempotence": True} | settings | {"error_cb": on_error}
    return _made(Producer, ours)


def admin(config: Config, on_error: OnError) -> AdminClient:
    """Return a client that looks at topics."""
    settings = _without_group(_common(config)) | {"error_cb": on_error}
    settings.pop("isolation.level")
    return _made(AdminClient, settings)


def refresh_seconds(config: Config) -> float:
    """Return how often the client asks which topics there are; it may be never."""
    name = "topic.metadata.refresh.interval.ms"
    milliseconds = float(config.kafka.get(name, DEFAULTS[name]))
    return math.inf if milliseconds < 0 else milliseconds / 1000


def is_cooperative(config: Config) -> bool:
    """Tell whether partitions come and go one by one, or all at once."""
    if config.kafka.get("group.protocol", "classic") == "consumer":
        return True
    strategy = config.kafka.get("partition.assignment.strategy", "cooperative-sticky")
    return bool(strategy == "cooperative-sticky")


def source_error(doing: str, error: BaseException | KafkaError) -> SourceError:
    """Return librdkafka's error as ours: what was done, to which cluster, why not."""
    found = error.args[0] if isinstance(error, KafkaException) else error
    text = found.str() if isinstance(found, KafkaError) else str(found)
    return SourceError(f"{doing}: {text or 'time ran out'}")


def is_fatal(error: KafkaError) -> bool:
    """Tell whether waiting will not mend an error."""
    return error.fatal() or error.code() in FATAL


def _common(config: Config) -> dict[str, Any]:
    settings = dict(config.kafka)
    if not settings.get("bootstrap.servers"):
        msg = (
            'no Kafka cluster is configured: set "bootstrap.servers" in [kafka] of '
            "kappa_log.toml, or KAPPA_LOG__KAFKA__BOOTSTRAP_SERVERS"
        )
        raise ConfigError(msg)
    if "group.id" in settings:
        msg = "kafka.group.id is not for [kafka]: each listener has its group_id"
        raise ConfigError(msg)
    for name, given in settings.items():
        if isinstance(given, list | dict):
            msg = f"kafka.{name} is {given!r}; librdkafka takes one text for it"
            raise ConfigError(msg)
    for name, ours in OWNED.items():
        given = settings.get(name, ours)
        if str(given).lower() != str(ours).lower():
            msg = (
                f"kafka.{name} must stay {str(ours).lower()}: the offsets are in SQL, "
                "and only there"
            )
            raise ConfigError(msg)
    return DEFAULTS | settings | {"logger": _LOGGER}


def _without_group(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those of group members, which other clients refuse."""
    prefixes = ("group.", "session.timeout", "heartbeat.", "partition.assignment")
    consumers = ("max.poll.interval.ms", "fetch.", "queued.", "max.partition.fetch")
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith((*prefixes, *consumers))
    }


def _made(kind: Callable[[dict[str, Any]], T], settings: dict[str, Any]) -> T:
    try:
        return kind(settings)
    except (KafkaException, ValueError, TypeError) as error:
        found = error.args[0] if isinstance(error, KafkaException) else error
        text = found.str() if isinstance(found, KafkaError) else str(found)
        msg = f"[kafka] is refused by librdkafka: {text}"
        raise ConfigError(msg) from None
