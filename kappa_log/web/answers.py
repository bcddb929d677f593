"""Answers: JSON text around payloads whose own text passes through unparsed.

A payload is sent as it was received: no digit is lost, no key reordered. So the JSON
of an event is written around its text, and never parsed on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from flask import Response, request

from kappa_log.codec import decode_json
from kappa_log.errors import DecodeError
from kappa_log.events import Event
from kappa_log.storage.lists import Failure

UNKNOWN_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""When a row was kept that came from a system which did not know; shown as null."""

_LINE_END = re.compile("[\r\n]")


def answer(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """Return a value as JSON."""
    return json_text(msgspec.json.encode(value).decode(), status, headers)


def json_text(
    text: str,
    status: int = 200,
    headers: Mapping[str, str] = {},
) -> Response:
    """Return JSON text as it stands."""
    return Response(text, status, headers, content_type="application/json")


def array(texts: Iterable[str]) -> str:
    """Return JSON texts as one array."""
    return f"[{','.join(texts)}]"


def moment(value: datetime | None) -> str | None:
    """Return a time in UTC to the millisecond, or finer where it is finer."""
    if value is None:
        return None
    unit = "microseconds" if value.microsecond % 1000 else "milliseconds"
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec=unit) + "Z"


def event_json(event: Event, sources: Mapping[int, str]) -> str:
    """Return an event: the members that it always had, then ours."""
    facts = {
        "id": event.position,
        "topic": event.topic,
        "group_id": event.group_id,
        "entity_id": event.entity_id,
        "event_time": moment(event.event_time),
        "event_type": event.event_type,
        "event_version": event.event_version,
        "checksum": event.checksum,
        "created_at": _kept_at(event.recorded_at),
        "source": sources.get(event.source_id),
        "partition": event.partition,
        "offset": event.offset,
        "key": event.key,
        "headers": event.headers,
        "timestamp": event.timestamp,
        "message_id": event.message_id,
        "raw": event.raw,
    }
    return _with_payload(facts, event.payload_text)


def failure_json(failure: Failure) -> str:
    """Return a failure: the members that it always had, then ours.

    A value that is no JSON is in ``value``, as base64; otherwise it is the payload.
    """
    text = _json_of(failure.value)
    facts = {
        "id": failure.id,
        "created_at": _kept_at(failure.first_at),
        "topic": failure.topic,
        "group_id": failure.group_id,
        "entity_id": failure.entity_id,
        "event_time": moment(failure.event_time),
        "event_type": failure.event_type,
        "event_version": failure.event_version,
        "checksum": failure.checksum,
        "metadata": failure.metadata or _metadata(failure),
        "error_class": failure.error_class,
        "error_message": failure.error_message,
        "error_backtrace": failure.error_backtrace or None,
        "source": failure.source,
        "partition": failure.partition,
        "offset": failure.offset,
        "key": failure.key,
        "headers": failure.headers,
        "timestamp": failure.timestamp,
        "value": failure.value if text is None else None,
        "parked": failure.parked,
        "fingerprint": failure.fingerprint,
        "attempts": failure.attempts,
        "last_at": moment(failure.last_at),
    }
    return _with_payload(facts, text)


def link_to(**changes: str | int | None) -> dict[str, str]:
    """Return the header that leads to the next page: this one's query, changed."""
    query: dict[str, Any] = dict(request.args.items()) | changes
    given = {k: value for k, value in query.items() if value is not None}
    text = urlencode(given, doseq=True)
    return {"Link": f'<{quote(request.path)}?{text}>; rel="next"'}


def past(identifier: int | None) -> dict[str, str]:
    """Return the header that leads past an id; none where the list has ended."""
    return {} if identifier is None else link_to(after=identifier)


def _kept_at(value: datetime) -> str | None:
    return None if value == UNKNOWN_TIME else moment(value)


def _metadata(failure: Failure) -> dict[str, Any]:
    """Return what the handler was told beside the payload."""
    return {
        "group_id": failure.group_id,
        "topic": failure.topic,
        "key": failure.key,
        "partition": failure.partition,
        "offset": failure.offset,
        "timestamp": failure.timestamp,
        "headers": failure.headers,
        "checksum": failure.checksum,
        "retry_count": max(0, failure.attempts - 1),
    }


def _with_payload(facts: Mapping[str, Any], text: str | None) -> str:
    """Return facts as JSON, with a payload's text as it was received.

    Line ends in JSON stand between tokens only; as spaces they mean the same.
    """
    payload = "null" if text is None else _LINE_END.sub(" ", text)
    return f'{msgspec.json.encode(facts).decode()[:-1]},"payload":{payload}}}'


def _json_of(value: bytes | None) -> str | None:
    """Return a record's value as JSON text; None if it is none."""
    if value is None:
        return None
    try:
        return decode_json(value).text
    except DecodeError:
        return None
