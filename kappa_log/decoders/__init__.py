"""Decoders: what makes JSON of a record's value, by the name that a listener gives it.

Each is imported when a listener first names it, so that nobody pays for a format, or
needs the libraries of one, that no topic of theirs has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kappa_log.codec import Decoder, decode_bytes, decode_json
from kappa_log.errors import ConfigError

EXTRAS = {"avro": "avro", "jsonschema": "json", "protobuf": "protobuf"}
"""Decoders that need a schema registry → the extra that brings their libraries."""

NAMES = ("json", "avro", "protobuf", "jsonschema", "cloudevents", "bytes")


def decoder_named(name: str, registry: Mapping[str, Any] | None = None) -> Decoder:
    """Return the decoder of that name.

    Args:
        name: One of `NAMES`.
        registry: Settings of the schema registry; only those of `EXTRAS` look there,
            and only when a record comes.

    Raises:
        ConfigError: There is none, its libraries are not installed, or the registry's
            settings are wrong; the message says what to do.
    """
    if name == "json":
        return decode_json
    if name == "bytes":
        return decode_bytes
    if name == "cloudevents":
        from kappa_log.decoders.cloudevents import decode_cloudevent

        return decode_cloudevent
    if name in EXTRAS:
        return _by_registry(name, registry or {})
    msg = f"decoder {name!r} is not known; use one of: {', '.join(NAMES)}"
    raise ConfigError(msg)


def _by_registry(name: str, settings: Mapping[str, Any]) -> Decoder:
    try:
        from kappa_log.decoders.registry import client_of

        if name == "avro":
            from kappa_log.decoders.avro import AvroDecoder as Chosen
        elif name == "protobuf":
            from kappa_log.decoders.protobuf import (  # type: ignore[assignment]
                ProtobufDecoder as Chosen,
            )
        else:
            from kappa_log.decoders.json_schema import (  # type: ignore[assignment]
                JsonSchemaDecoder as Chosen,
            )
    except ImportError as error:
        msg = (
            f"decoder '{name}' needs libraries that are not installed ({error}): "
            f"pip install 'kappa-log[{EXTRAS[name]}]', from a checkout "
            f"'.[{EXTRAS[name]}]'"
        )
        raise ConfigError(msg) from None
    if not settings.get("url"):
        msg = (
            f"decoder '{name}' needs a schema registry: set url in [registry] of "
            "kappa_log.toml, or KAPPA_LOG__REGISTRY__URL"
        )
        raise ConfigError(msg)
    return Chosen(client_of(settings))
