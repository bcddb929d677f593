"""CloudEvents 1.0 over Kafka: binary and structured mode become one JSON.

In structured mode the value is the event: JSON, kept byte for byte. In binary mode the
attributes are headers, ``ce_id`` and so on, and the value is the data; what is kept is
what structured mode would have sent, so handlers and folds read one form of both.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from kappa_log.codec import Decoded, Headers, decode_json
from kappa_log.errors import DecodeError
from kappa_log.handler import ack

STRUCTURED = "application/cloudevents"
PREFIX = "ce_"

_REQUIRED = ("id", "source", "specversion", "type")


def decode_cloudevent(value: bytes, headers: Headers = ()) -> Decoded:
    """Return an event of either mode, with its type and time as it says them.

    Raises:
        DecodeError: It is no CloudEvent, or lacks an attribute that each must have.
    """
    content_type = _text("content-type", _last(headers, "content-type") or b"")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith(STRUCTURED):
        return _structured(value, media_type)
    if not any(name.lower().startswith(PREFIX) for name, _ in headers):
        msg = (
            "no CloudEvent: there are neither ce_ headers nor a content-type of "
            f"{STRUCTURED}+json"
        )
        raise DecodeError(msg)
    return _binary(value, headers, content_type, media_type)


def _structured(value: bytes, media_type: str) -> Decoded:
    if media_type != f"{STRUCTURED}+json":
        msg = f"CloudEvents as {media_type} are not read; only {STRUCTURED}+json is"
        raise DecodeError(msg)
    found = decode_json(value)
    if not isinstance(found.payload, dict):
        msg = "no CloudEvent: its JSON is no object"
        raise DecodeError(msg)
    return Decoded(found.text, found.payload, None, _said(found.payload))


def _binary(
    value: bytes, headers: Headers, content_type: str, media_type: str
) -> Decoded:
    attributes = {
        name.lower().removeprefix(PREFIX): _text(name, given)
        for name, given in headers
        if name.lower().startswith(PREFIX) and given is not None
    }
    said = _said(attributes)
    if content_type:
        attributes["datacontenttype"] = content_type
    front = msgspec.json.encode(attributes).decode()
    if value:
        front = f"{front[:-1]},{_data(value, media_type)}}}"
    found = decode_json(front.encode())
    return Decoded(found.text, found.payload, value, said)


def _data(value: bytes, media_type: str) -> str:
    """Return the member that the data is: JSON to the digit, text, or base64."""
    is_json = not media_type or media_type.endswith(("/json", "+json"))
    if is_json:
        return f'"data":{decode_json(value).text}'
    if media_type.startswith("text/"):
        return f'"data":{msgspec.json.encode(_text("data", value)).decode()}'
    return f'"data_base64":"{base64.b64encode(value).decode()}"'


def _said(attributes: dict[str, Any]) -> Any:
    """Return what an event says of itself; kept if the handler does not say it."""
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            msg = f"no CloudEvent: attribute {name!r} is missing or is no text"
            raise DecodeError(msg)
    return ack(None, attributes.get("time"), attributes["type"])


def _last(headers: Headers, wanted: str) -> bytes | None:
    found = [value for name, value in headers if name.lower() == wanted]
    return found[-1] if found else None


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        msg = f"{name} is not UTF-8: byte {error.start} cannot be decoded"
        raise DecodeError(msg) from None
