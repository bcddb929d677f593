"""Codec: received bytes → JSON text and value, strictly.

What enters the log must read the same everywhere: in Python, in both databases,
in Parquet and in a browser. So JSON here is strict: valid UTF-8 without a byte
order mark, no NaN or Infinity, no number beyond a double's range, no duplicate
keys, no lone surrogates, at most 512 levels. The text is kept byte for byte.

msgspec does nearly all of it at full speed and keeps integers of any size; what it
lets pass (duplicate keys, deep nesting) is ruled out by counting bytes first, and
only what counting cannot clear goes through the slow exact check.

Another format's values are written as JSON that loses nothing (`made`), and that text
is read back: handlers and folds see the same, now and in ten years.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import msgspec

from kappa_log.errors import DecodeError

MAX_DEPTH = 512
"""Levels of nesting; more is refused before anything recurses over it."""

MAX_ID_BYTES = 1024
"""Longest entity_id, event_type or event_version, in UTF-8 bytes."""


class Decoded(msgspec.Struct, frozen=True, gc=False):
    """What a decoder made of a value."""

    text: str | None
    """JSON text; None for a tombstone."""
    payload: Any
    raw: bytes | None
    """Received bytes, where the text was made from another format."""
    said: Any = None
    """An `Ack` with what the format itself says, for where the handler's is silent."""


Headers = Sequence[tuple[str, bytes | None]]

Decoder = Callable[[bytes, Headers], Decoded]
"""Makes JSON of a record's value; raises DecodeError where it is none of its format."""

_TOMBSTONE = Decoded(None, None, None)
# Only for valid JSON: over strings that never end it would take quadratic time.
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_decode = msgspec.json.Decoder().decode


def decode_json(value: bytes, headers: Headers = ()) -> Decoded:  # noqa: ARG001
    """Return the JSON text and value of received bytes; headers say nothing about it.

    Raises:
        DecodeError: They are not strict JSON; the message says what is wrong.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        msg = f"not UTF-8: byte {error.start} cannot be decoded"
        raise DecodeError(msg) from None
    try:
        payload = _decode(value)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        _refuse(value, error)
    # Each level takes two characters at least.
    if len(text) > 2 * MAX_DEPTH and text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _may_repeat_keys(text, payload):
        _check_exactly(text)
    return Decoded(text, payload, None)


def decode_bytes(value: bytes, headers: Headers = ()) -> Decoded:  # noqa: ARG001
    """Return received bytes as they are; what is kept is decided by `kept` later."""
    return Decoded(None, value, value)


def decode(decoder: Decoder, value: bytes | None, headers: Headers = ()) -> Decoded:
    """Return what a decoder makes of a value; a tombstone needs none."""
    return _TOMBSTONE if value is None else decoder(value, headers)


def made(value: Any, raw: bytes) -> Decoded:
    """Return a value of another format as JSON that loses nothing of it.

    Whole numbers are JSON numbers of any size; decimals are text with all their digits,
    bytes base64, times ISO 8601, UUIDs and enumerations text; what a float may be and
    JSON has no number for is ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``.

    Args:
        value: What was decoded.
        raw: The bytes that it was decoded from.

    Raises:
        DecodeError: JSON has no form for it.
    """
    try:
        text = msgspec.json.encode(_with_finite_numbers(value))
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"there is no JSON for it: {error}"
        raise DecodeError(msg) from None
    # What was decoded goes: from here on the text counts, and is strict JSON.
    found = decode_json(text)
    return Decoded(found.text, found.payload, raw)


def kept(received: Any, raw: bytes) -> Decoded:
    """Return what the log keeps where a handler is given bytes.

    Args:
        received: What `consume` received: JSON values if `around_consume` made such,
            else bytes, which are kept as base64 text.
        raw: The received bytes.
    """
    if received is None or received.__class__ is bytes:
        received = base64.b64encode(received or raw).decode()
    return made(received, raw)


def check_id(name: str, value: str | None) -> None:
    """Raise DecodeError for an identifier that one of the databases cannot index."""
    if value is None:
        return
    if "\0" in value:
        msg = f"{name} contains a NUL character"
        raise DecodeError(msg)
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        msg = f"{name} contains a lone surrogate (\\ud800 to \\udfff)"
        raise DecodeError(msg) from None
    if size > MAX_ID_BYTES:
        msg = f"{name} has {size} bytes; at most {MAX_ID_BYTES} are indexed"
        raise DecodeError(msg)


def _with_finite_numbers(value: Any) -> Any:
    """Return a value with text in place of floats that JSON has no number for."""
    kind = value.__class__
    if kind is float and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    if kind is dict:
        return {name: _with_finite_numbers(found) for name, found in value.items()}
    if kind is list:
        return [_with_finite_numbers(found) for found in value]
    return value


def _refuse(value: bytes, error: Exception) -> NoReturn:
    if not value.strip():
        msg = "not JSON: the value is empty"
    elif value.startswith(b"\xef\xbb\xbf"):
        msg = "not strict JSON: it starts with a byte order mark"
    elif isinstance(error, RecursionError):
        msg = f"not strict JSON: more than {MAX_DEPTH} levels of nesting"
    else:
        if b"\\u" in value:
            # Of a lone surrogate msgspec says that the input was truncated.
            _check_exactly(value.decode())
        msg = f"not strict JSON: {error}"
    raise DecodeError(msg) from None


def _check_depth(value: bytes) -> None:
    depth = 0
    for byte in _STRINGS.sub(b"", value):
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                msg = f"not strict JSON: more than {MAX_DEPTH} levels of nesting"
                raise DecodeError(msg)
        elif byte in b"]}":
            depth -= 1


def _may_repeat_keys(text: str, payload: Any) -> bool:
    """Tell whether a key may have been swallowed by a later one of its name.

    Each key in the text is followed by ``":``, so there are at most as many keys as
    such pairs. Finding that many distinct keys in the value proves none was lost.
    White space before a colon would escape the count: then the exact check runs.
    """
    # A search for one character is many times as fast as one for two, and most
    # texts have no such character.
    return (
        " :" in text
        or ("\t" in text and "\t:" in text)
        or ("\n" in text and "\n:" in text)
        or ("\r" in text and "\r:" in text)
        or text.count('":') != _count_keys(payload)
    )


def _count_keys(payload: Any) -> int:
    count = 0
    open_ = [payload]
    while open_:
        item = open_.pop()
        if item.__class__ is dict:
            count += len(item)
            item = item.values()
        elif item.__class__ is not list:
            continue
        for child in item:
            if child.__class__ is dict or child.__class__ is list:
                open_.append(child)  # noqa: PERF401 - a comprehension here is slower
    return count


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                msg = f"not strict JSON: duplicate key {key!r}"
                raise DecodeError(msg)
            seen.add(key)
    return found


def _check_exactly(text: str) -> None:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        msg = "not strict JSON: a lone surrogate (\\ud800 to \\udfff)"
        raise DecodeError(msg) from None
    except (ValueError, RecursionError) as error:
        msg = f"not strict JSON: {error}"
        raise DecodeError(msg) from None
