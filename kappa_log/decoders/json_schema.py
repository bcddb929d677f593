"""JSON Schema: JSON behind a schema's id, checked against that schema."""

from __future__ import annotations

from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.json_schema import JSONDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from kappa_log.codec import Decoded, Headers, decode_json
from kappa_log.decoders import registry

_KIND = "JSON"


class JsonSchemaDecoder:
    """Decodes JSON that a schema describes; the text is kept as received."""

    def __init__(self, client: SchemaRegistryClient) -> None:
        """Ask nothing yet."""
        self._client = client
        self._check = JSONDeserializer(
            None,
            schema_registry_client=client,
            # Subjects choose among schemas; the record's own id is all we go by.
            conf={"subject.name.strategy": lambda *_: None},
        )

    def __call__(self, value: bytes, headers: Headers = ()) -> Decoded:
        """Return a value's JSON behind the id, with the bytes that it came in."""
        with registry.translating(self._client):
            _, body = registry.opened(_KIND, value, headers)
            found = decode_json(body.read())
            where = SerializationContext("", MessageField.VALUE, list(headers))
            self._check(value, where)
            return Decoded(found.text, found.payload, value)
