"""Avro: values written by a schema of a registry, as JSON.

Each value is read by the schema that it was written by, so that what is kept is what
was sent; folds bring older forms to the newest by their upcasters.
"""

from __future__ import annotations

import json
from typing import Any

from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from fastavro import parse_schema, schemaless_reader

from kappa_log.codec import Decoded, Headers, made
from kappa_log.decoders import registry
from kappa_log.errors import DecodeError

_KIND = "AVRO"


class AvroDecoder:
    """Decodes Avro values."""

    def __init__(self, client: SchemaRegistryClient) -> None:
        """Ask nothing yet."""
        self._client = client
        self._parsed: dict[Schema, Any] = {}

    def __call__(self, value: bytes, headers: Headers = ()) -> Decoded:
        """Return a value as JSON, with the bytes that it came in."""
        with registry.translating(self._client):
            found, body = registry.opened(_KIND, value, headers)
            schema = self._schema(registry.schema_of(self._client, found))
            if schema == "bytes" or (
                isinstance(schema, dict) and schema["type"] == "bytes"
            ):
                # The registry's serializers write these without their length.
                return made(body.read(), value)
            read = schemaless_reader(body, schema, None)
            left = body.read()
            if left:
                msg = f"{len(left)} bytes are left after its Avro value"
                raise DecodeError(msg)
            return made(read, value)

    def _schema(self, schema: Schema) -> Any:
        if schema not in self._parsed:
            named: dict[str, Any] = {}
            for text in registry.referenced(self._client, schema).values():
                parse_schema(_loaded(text), named)
            self._parsed[schema] = parse_schema(_loaded(schema.schema_str), named)
        return self._parsed[schema]


def _loaded(text: str | None) -> Any:
    """Return a schema's JSON; a primitive's name may stand there without quotes."""
    text = (text or "").strip()
    return json.loads(text) if text[:1] in ("{", "[", '"') else text
