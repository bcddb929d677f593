"""Handler and ack: the user's decision about each record of a topic and group.

A handler is called at least once for a record: a kill or a fenced writer repeats
it. What it returns decides: `ack(...)` makes the record an event, anything else
skips it, an exception makes it a Failure, kept whole. It is a class with hooks, or a
plain function ``(payload, metadata)``, which is a class with nothing but `consume`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
from typing_extensions import override

from kappa_log.backtrace import described
from kappa_log.codec import check_id
from kappa_log.errors import ConfigError, DecodeError, UsageError
from kappa_log.events import Event, Header, to_micros

Proceed = Callable[..., Any]
"""``proceed(payload)`` or ``proceed(payload, metadata)``: what `consume` returns."""


class Metadata(msgspec.Struct, frozen=True):
    """What is known of a record besides its payload; fresh for every attempt."""

    listener_id: str
    group_id: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    timestamp: int | None
    headers: tuple[Header, ...]
    retry_count: int
    """0 at the first attempt."""
    checksum: str | None
    message_id: str
    """Hex; the idempotency key for effects outside the log's database."""
    effects: Any = None
    """Behind `connection`."""

    @property
    def connection(self) -> Any:
        """SQLAlchemy's connection in the transaction that keeps this record.

        What is written through it takes effect exactly once: with the event, or not
        at all. It begins and ends no transaction itself.

        Raises:
            UsageError: There is no such transaction, as in tests of a handler.
        """
        if self.effects is None:
            msg = "metadata.connection: there is no transaction here"
            raise UsageError(msg)
        return self.effects.connection()


class Ack(msgspec.Struct, frozen=True, gc=False):
    """The decision to keep a record as an event; made by `ack`."""

    entity_id: str | None
    event_time: int | None
    """Microseconds since 1970 UTC."""
    event_type: str | None
    event_version: str | None


def ack(
    entity_id: str | int | None,
    event_time: datetime | str | None,
    event_type: str | None = None,
    event_version: str | int | None = None,
) -> Ack:
    """Return the decision to keep the record as an event.

    Args:
        entity_id: What the event is about; an int becomes text.
        event_time: When it happened: an aware datetime, ISO 8601 text with an
            offset, or None.
        event_type: For instance ``order_placed``.
        event_version: Version of the payload's schema.

    Raises:
        DecodeError: A value that the log cannot keep: a naive or impossible time,
            an identifier with NUL or over 1,024 UTF-8 bytes, another type.
    """
    entity = _identifier("entity_id", entity_id)
    return Ack(
        entity,
        None if event_time is None else _instant(event_time),
        None if event_type is None else _identifier("event_type", event_type),
        None if event_version is None else _identifier("event_version", event_version),
    )


class Handler:
    """Base of handlers: override `consume`, and what else you need."""

    def consume(self, payload: Any, metadata: Metadata) -> object:
        """Return ``ack(...)`` to keep the record; anything else skips it."""
        raise NotImplementedError

    def around_consume(
        self, payload: Any, metadata: Metadata, proceed: Proceed
    ) -> object:
        """Wrap `consume`; what is passed to ``proceed`` is what it receives.

        ``proceed(payload)`` hands on this metadata, ``proceed(payload, metadata)``
        what is given.
        """
        return proceed(payload)

    def retry_consume(
        self, event: Event, metadata: Metadata, exception: BaseException
    ) -> bool:
        """Tell whether a record whose `consume` raised is tried again in its place.

        Without this hook the listener's ``max_retries`` decides. Records of files,
        and those that cannot be decoded, are not tried again.

        Args:
            event: The record as an event would have it, with no position yet.
            metadata: Of the attempt; ``retry_count`` is 0 at the first.
            exception: What `consume` raised.
        """
        return True

    def entity_id(self, payload: Any) -> str | int | None:
        """Return the entity of a record that failed, if it can be told."""
        return None

    def event_time(self, payload: Any) -> datetime | str | None:
        """Return the event time of a record that failed, if it can be told."""
        return None

    def event_type(self, payload: Any) -> str | None:
        """Return the event type of a record that failed, if it can be told."""
        return None

    def event_version(self, payload: Any) -> str | int | None:
        """Return the event version of a record that failed, if it can be told."""
        return None

    def start(self) -> None:
        """Prepare before the first record of a run."""

    def stop(self) -> None:
        """Clean up after the last record of a run."""


class FieldOptions(msgspec.Struct, frozen=True):
    """Which fields of a JSON record say what an event must know: dotted paths."""

    entity_id: str | None = None
    event_time: str | None = None
    event_type: str | None = None
    event_version: str | None = None
    key: str | None = None
    """Becomes the record's key, as UTF-8 bytes."""


class FieldHandler(Handler):
    """Keeps every record; the fields that the options name become its columns.

    A path that a record lacks is a Failure; a null is NULL.
    """

    def __init__(self, fields: FieldOptions) -> None:
        """Split the paths once."""
        self.fields = fields
        self._entity_id = split_path("--entity-id", fields.entity_id)
        self._event_time = split_path("--event-time", fields.event_time)
        self._event_type = split_path("--event-type", fields.event_type)
        self._event_version = split_path("--event-version", fields.event_version)

    @override
    def consume(self, payload: Any, metadata: Metadata) -> Ack:
        """Acknowledge the record with what its fields say."""
        return ack(
            pick(payload, self._entity_id),
            pick(payload, self._event_time),
            pick(payload, self._event_type),
            pick(payload, self._event_version),
        )


def key_of(payload: Any, path: tuple[str, ...]) -> bytes | None:
    """Return the record's key taken from a field of its payload."""
    found = pick(payload, path)
    if found is None:
        return None
    if found.__class__ not in (str, int):
        msg = f"field {'.'.join(path)!r} is no text or whole number, so it is no key"
        raise DecodeError(msg)
    return str(found).encode()


def pick(payload: Any, path: tuple[str, ...]) -> Any:
    """Return what a path leads to in a decoded payload; an empty path to None.

    Raises:
        DecodeError: The payload has no such field.
    """
    if not path:
        return None
    for name in path:
        try:
            payload = payload[name]
        except (KeyError, TypeError, IndexError):
            msg = f"the record has no field {'.'.join(path)!r}"
            raise DecodeError(msg) from None
    return payload


def is_overridden(handler: Handler, hook: str) -> bool:
    """Tell whether a handler's class replaces a hook of `Handler`."""
    return getattr(type(handler), hook) is not getattr(Handler, hook)


class FunctionHandler(Handler):
    """A plain function as a handler."""

    def __init__(self, function: Callable[[Any, Metadata], object]) -> None:
        """Keep the function; it is called as it is."""
        self.function = function

    @override
    def consume(self, payload: Any, metadata: Metadata) -> object:
        """Return what the function returns."""
        return self.function(payload, metadata)


def load_handler(path: str) -> Handler:
    """Return a new handler from ``module:Class`` or ``module:function``.

    Raises:
        ConfigError: There is no such thing, or it could not handle a record.
    """
    import importlib

    module_name, _, name = path.partition(":")
    if not module_name or not name:
        msg = f"handler {path!r} is not of the form module:Class or module:function"
        raise ConfigError(msg)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        why = f"module {module_name} cannot be imported: {described(error)}"
        msg = f"handler {path!r}: {why}"
        raise ConfigError(msg) from error
    found = getattr(module, name, None)
    if found is None:
        msg = f"handler {path!r}: module {module_name} has no {name}"
        raise ConfigError(msg)
    try:
        return handler_from(found)
    except ConfigError as error:
        msg = f"handler {path!r}: {error}"
        raise ConfigError(msg) from error
    except (Exception, SystemExit) as error:
        msg = f"handler {path!r} cannot be made: {described(error)}"
        raise ConfigError(msg) from error


def handler_from(found: Any) -> Handler:
    """Return a handler: of a class a new one, of a function one that calls it.

    Raises:
        ConfigError: It could not handle a record; all that is wrong is named.
    """
    handler: Any = found
    if isinstance(found, type):
        handler = found() if issubclass(found, Handler) else None
    elif callable(found) and not isinstance(found, Handler):
        handler = FunctionHandler(found)
    if not isinstance(handler, Handler):
        name = getattr(found, "__name__", repr(found))
        msg = f"{name} is no subclass of kappa_log.Handler, and no function"
        raise ConfigError(msg)
    wrong = _wrong_in(handler)
    if wrong:
        raise ConfigError("; ".join(wrong))
    return handler


_HOOKS = {
    "consume": ("payload", "metadata"),
    "around_consume": ("payload", "metadata", "proceed"),
    "retry_consume": ("event", "metadata", "exception"),
    "entity_id": ("payload",),
    "event_time": ("payload",),
    "event_type": ("payload",),
    "event_version": ("payload",),
    "start": (),
    "stop": (),
}
"""Hook → what it is called with."""


def _wrong_in(handler: Handler) -> list[str]:
    """Return why a handler could not do its work, in words; nothing is called."""
    if isinstance(handler, FunctionHandler):
        return _wrong_with(handler.function, _HOOKS["consume"])
    if not is_overridden(handler, "consume"):
        return [f"{type(handler).__name__} has no method consume(payload, metadata)"]
    wrong: list[str] = []
    for hook, arguments in _HOOKS.items():
        if is_overridden(handler, hook):
            wrong += _wrong_with(getattr(handler, hook), arguments)
    return wrong


def _wrong_with(call: Any, arguments: tuple[str, ...]) -> list[str]:
    name = getattr(call, "__qualname__", repr(call))
    if not callable(call):
        return [f"{name} is no method"]
    if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call):
        # What it returns would be no ack: each record would be skipped in silence.
        return [f"{name} is async or yields; it must return what it decides"]
    try:
        inspect.signature(call).bind(*arguments)
    except TypeError as error:
        return [f"{name} cannot be called with ({', '.join(arguments)}): {error}"]
    except ValueError:
        return []  # Of C: it has no signature that one could look at.
    return []


def split_path(option: str, path: str | None) -> tuple[str, ...]:
    """Return the names of a dotted path that an option gives.

    Raises:
        UsageError: A name between the dots is empty, or is no text that a database
            keeps; the message names the option.
    """
    if path is None:
        return ()
    check_option(option, path)
    names = tuple(path.split("."))
    if not all(names):
        msg = f"{option}: field path {path!r} is not names joined by dots"
        raise UsageError(msg)
    return names


def check_option(option: str, value: str | None) -> None:
    """Raise UsageError for an option's text that one of the databases cannot keep.

    What a shell passes on need not be text: bytes that are not become surrogates.
    """
    try:
        check_id(option, value)
    except DecodeError as error:
        raise UsageError(str(error)) from None


def _identifier(name: str, value: object) -> str | None:
    if value is None:
        return None
    kind = value.__class__
    if kind is int:
        value = str(value)
    if not isinstance(value, str):
        msg = f"{name} is {kind.__name__}, not text or a whole number"
        raise DecodeError(msg)
    check_id(name, value)
    return value


def _instant(value: object) -> int:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError as error:
            msg = f"event_time {value[:64]!r} is no ISO 8601 time: {error}"
            raise DecodeError(msg) from None
    elif isinstance(value, datetime):
        moment = value
    else:
        msg = f"event_time is {type(value).__name__}, not a datetime or ISO 8601 text"
        raise DecodeError(msg)
    try:
        return to_micros(moment)
    except ValueError as error:
        msg = f"event_time: {error}"
        raise DecodeError(msg) from None
