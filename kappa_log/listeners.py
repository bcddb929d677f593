"""Listeners: who decides about the records of a topic, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kappa_log.codec import Decoder, decode_json
from kappa_log.config import BackoffConfig, Config, ListenerConfig
from kappa_log.decoders import decoder_named
from kappa_log.errors import ConfigError, UsageError
from kappa_log.handler import (
    FieldHandler,
    FieldOptions,
    FunctionHandler,
    Handler,
    check_option,
    load_handler,
    split_path,
)
from kappa_log.imports import forget_strangers, importing_from
from kappa_log.records import check_dedupe

T = TypeVar("T")

DEFAULT_GROUP = "kappa-log"
"""Group of a topic that is ingested without a listener."""


class Listener(msgspec.Struct, frozen=True):
    """Who decides about the records of a topic, and how they are read."""

    id: str
    topic: str
    group_id: str
    handler: Handler
    decoder: Decoder
    dedupe: str
    key_path: tuple[str, ...] = ()
    """Field of the payload that becomes the key; for files alone."""
    park: str = "key"
    max_retries: int | None = None
    """How often a record is tried again in its place; None for ever."""
    backoff: BackoffConfig = BackoffConfig()
    told: Mapping[str, Any] = {}
    """What handlers are told of a record that was imported: what they were told then,
    where that says listener_id, checksum, partition or offset."""

    @property
    def handler_name(self) -> str:
        """``module:Class``, or ``module:function``, of its handler."""
        found: Any = type(self.handler)
        if isinstance(self.handler, FunctionHandler):
            found = self.handler.function
        name = getattr(found, "__qualname__", type(found).__qualname__)
        return f"{found.__module__}:{name}"


def listener_for(
    config: Config,
    topic: str,
    group: str | None = None,
    fields: FieldOptions | None = None,
    dedupe: str | None = None,
) -> tuple[Listener, str | None]:
    """Return who decides about a topic, and the field options to store with it.

    Raises:
        UsageError: The options contradict the topic's listener, or do not pick one.
        ConfigError: The listener's handler, decoder or dedupe mode is not there.
    """
    if not topic:
        msg = "the topic is empty"
        raise UsageError(msg)
    check_option("topic", topic)
    check_option("group", group)
    check_option("dedupe", dedupe)
    if not any(found.covers(topic) for found in config.listeners):
        chosen = fields or FieldOptions()
        listener = field_listener(
            topic, group or DEFAULT_GROUP, chosen, dedupe or "payload"
        )
        return listener, msgspec.json.encode(chosen).decode()
    section = section_for(config, topic, group)
    if dedupe is not None or (fields or FieldOptions()) != FieldOptions():
        msg = (
            f"topic '{topic}' has a listener, whose handler says entity, time, type "
            "and key; leave the field options and --dedupe out"
        )
        raise UsageError(msg)
    return configured_listener(section, config), None


def section_for(config: Config, topic: str, group: str | None) -> ListenerConfig:
    """Return the one listener that is configured for a topic and group.

    Raises:
        UsageError: There is none, or several.
    """
    of_topic = [found for found in config.listeners if found.covers(topic)]
    if not of_topic:
        msg = f"topic '{topic}' has no listener in kappa_log.toml"
        raise UsageError(msg)
    configured = [found for found in of_topic if group in (None, found.group_id)]
    if len(configured) == 1:
        return configured[0]
    # None may be a typo: then nobody's handler would decide, and nobody notice.
    groups = ", ".join(found.group_id for found in of_topic)
    none = "" if configured else f", none for {group!r}"
    msg = (
        f"topic '{topic}' has listeners for the groups {groups}{none}; "
        "pick one by --group"
    )
    raise UsageError(msg)


def sections_named(config: Config, ids: Sequence[str]) -> list[ListenerConfig]:
    """Return the configured listeners with these ids; all of them if none is given.

    Raises:
        UsageError: There is no such listener, or none at all.
        ConfigError: Two listeners of one group read the same topic.
    """
    if not config.listeners:
        msg = (
            "no listener is configured: add [[listeners]] with topic, group_id and "
            "handler to kappa_log.toml"
        )
        raise UsageError(msg)
    known = {found.id: found for found in config.listeners}
    if len(known) < len(config.listeners):
        twice = [i for i in known if sum(c.id == i for c in config.listeners) > 1]
        msg = f"two listeners are {twice[0]}: one topic of a group has one listener"
        raise ConfigError(msg)
    _check_patterns(config.listeners)
    for wanted in ids:
        if wanted not in known:
            msg = f"there is no listener '{wanted}'; there are: {', '.join(known)}"
            raise UsageError(msg)
    return [known[wanted] for wanted in ids or known]


def _check_patterns(listeners: Sequence[ListenerConfig]) -> None:
    """Refuse a topic that a pattern of the same group has already.

    Kafka gives its partitions to either, so chance would choose the handler.
    """
    for one, other in permutations(listeners, 2):
        is_topic = not other.is_pattern
        if is_topic and one.group_id == other.group_id and one.covers(other.topic):
            msg = (
                f"listeners {one.id} and {other.id} both read topic {other.topic}: one "
                "topic of a group has one listener"
            )
            raise ConfigError(msg)


def field_listener(
    topic: str, group: str, fields: FieldOptions, dedupe: str
) -> Listener:
    """Return a listener that keeps every record, by the options of a command."""
    return Listener(
        id=f"ingest-{topic}",
        topic=topic,
        group_id=group,
        handler=FieldHandler(fields),
        decoder=decode_json,
        dedupe=check_dedupe(dedupe),
        key_path=split_path("--key", fields.key),
    )


def configured_listener(found: ListenerConfig, config: Config) -> Listener:
    """Return the listener that a section of the configuration declares.

    Raises:
        ConfigError: Its handler, decoder or dedupe mode cannot work; the message has
            a line for each that is wrong.
    """
    wrong: list[str] = []

    def checked(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except ConfigError as error:
            wrong.append(str(error))
            return None

    handler = checked(lambda: _handler_of(found, config.folder))
    decoder = checked(lambda: decoder_named(found.decoder, config.registry))
    dedupe = checked(lambda: check_dedupe(found.dedupe))
    if handler is None or decoder is None or dedupe is None:
        raise ConfigError("\n".join(f"listener {found.id}: {why}" for why in wrong))
    return Listener(
        id=found.id,
        topic=found.topic,
        group_id=found.group_id,
        handler=handler,
        decoder=decoder,
        dedupe=dedupe,
        park=found.park,
        max_retries=found.max_retries,
        backoff=found.backoff,
    )


def _handler_of(found: ListenerConfig, folder: Path) -> Handler:
    forget_strangers(found.handler.partition(":")[0].partition(".")[0], folder)
    with importing_from(folder):
        return load_handler(found.handler)
