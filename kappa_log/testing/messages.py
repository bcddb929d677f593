"""Messages: one record on its whole way into a log, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import msgspec

from kappa_log.app import KappaLog
from kappa_log.codec import made
from kappa_log.config import Config
from kappa_log.decide import Portion
from kappa_log.decoders import decoder_named
from kappa_log.errors import UsageError
from kappa_log.events import Event
from kappa_log.handler import handler_from, load_handler
from kappa_log.ingest import Committed, ingest_batch, started_handler
from kappa_log.listeners import Listener, configured_listener, section_for
from kappa_log.records import Lane, Record, check_dedupe
from kappa_log.storage import ledger
from kappa_log.storage.lists import Failure
from kappa_log.testing.logs import temporary_log

SOURCE = "test"
"""Name of the source that messages of tests come from."""


class Processed(msgspec.Struct, frozen=True):
    """What became of a message."""

    outcome: Literal["acked", "skipped", "duplicate", "failed", "parked"]
    event: Event | None
    """What the log keeps; None if it was not acknowledged."""
    failure: Failure | None
    """What the log keeps with its error, if it failed or waits behind one that did."""


def process_message(  # noqa: PLR0913 - what a record has, by its names
    handler: Any,
    payload: Any,
    *,
    key: bytes | str | None = None,
    headers: Mapping[str, bytes | str] | None = None,
    topic: str = "test-topic",
    group_id: str = "test-group",
    partition: int = 0,
    timestamp: int | None = None,
    decoder: str = "json",
    dedupe: str = "payload",
    registry: Mapping[str, Any] | None = None,
    log: KappaLog | None = None,
) -> Processed:
    """Take one message the whole way into a log, and tell what became of it.

    What the handler raises makes it a failure, as in a file: nothing is tried again.

    Args:
        handler: A Handler, its class, a function, ``module:name``, or the id of a
            listener of ``log``'s configuration, whose settings count then.
        payload: Bytes and text as they are received, None as a tombstone; JSON is made
            of anything else.
        key: Of the record.
        headers: Of the record.
        topic: Of the record.
        group_id: Consumer group that the handler works for.
        partition: Of the record; its offset is the next one there.
        timestamp: Milliseconds since 1970, as Kafka has it.
        decoder: What makes the payload; ``registry`` has a schema registry's settings.
        dedupe: What makes a later message a duplicate.
        registry: As ``[registry]``; None takes the configuration's.
        log: Where to; the same for several messages that know of each other. A log for
            this message alone if None.

    Raises:
        ConfigError: The handler or the decoder cannot work.
    """
    with ExitStack() as stack:
        app = log or stack.enter_context(temporary_log())
        listener = _listener_of(app.config, handler) or Listener(
            id=f"{group_id}-{topic}",
            topic=topic,
            group_id=group_id,
            handler=load_handler(handler)
            if isinstance(handler, str)
            else handler_from(handler),
            decoder=decoder_named(
                decoder, app.config.registry if registry is None else registry
            ),
            dedupe=check_dedupe(dedupe),
        )
        own_topic = topic if listener.topic.startswith("^") else listener.topic
        lane = Lane(SOURCE, own_topic, listener.group_id, partition)
        stack.enter_context(started_handler(listener.handler))
        with app.database.write() as connection:
            held = ledger.assign(
                connection,
                app.database,
                lane,
                ledger.Reader(listener.dedupe, None),
                app.now(),
            )
        record = Record(
            held.next_offset,
            _value(payload),
            None if key is None else _bytes(key),
            tuple((name, _bytes(value)) for name, value in (headers or {}).items()),
            timestamp,
        )
        portion = Portion(lane, held, listener, [record], record.offset + 1)
        done = ingest_batch(app.database, [portion], app.now)
        return _processed(app, done)


def _listener_of(config: Config, handler: Any) -> Listener | None:
    """Return the configured listener of an id, if there is such a one."""
    if not isinstance(handler, str):
        return None
    for section in config.listeners:
        if section.id == handler:
            found = section_for(config, section.topic, section.group_id)
            return configured_listener(found, config)
    if ":" not in handler:
        known = ", ".join(section.id for section in config.listeners) or "none"
        msg = f"there is no listener '{handler}'; there are: {known}"
        raise UsageError(msg)
    return None


def _processed(app: KappaLog, done: Committed) -> Processed:
    counts = done.counts
    if counts.acked:
        assert done.last_position is not None
        return Processed("acked", app.event(done.last_position), None)
    if counts.failed or counts.parked:
        (failure,) = app.failures(limit=1)
        return Processed("failed" if counts.failed else "parked", None, failure)
    return Processed("duplicate" if counts.duplicate else "skipped", None, None)


def _value(payload: Any) -> bytes | None:
    if payload is None or isinstance(payload, bytes | str):
        return None if payload is None else _bytes(payload)
    return (made(payload, b"").text or "").encode()


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
