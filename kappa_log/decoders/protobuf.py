"""Protobuf: messages of a schema that a registry has, as JSON; no generated code.

The names are those of the ``.proto`` file, fields without presence are there with their
defaults, and 64-bit numbers are numbers: Protobuf's own JSON makes text of them, for
the sake of JavaScript. Google's well-known types are written as that JSON has them.
"""

from __future__ import annotations

from typing import Any

from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.common.protobuf import _init_pool, _str_to_proto
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from kappa_log.codec import Decoded, Headers, made
from kappa_log.decoders import registry
from kappa_log.errors import DecodeError

_KIND = "PROTOBUF"
_FILE = "kappa_log/decoded.proto"
"""What a schema is called among its imports; the registry gives it no name."""

_LONG = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)


class ProtobufDecoder:
    """Decodes Protobuf messages."""

    def __init__(self, client: SchemaRegistryClient) -> None:
        """Ask nothing yet."""
        self._client = client
        self._messages: dict[tuple[Schema, tuple[int, ...]], Descriptor] = {}

    def __call__(self, value: bytes, headers: Headers = ()) -> Decoded:
        """Return a message as JSON, with the bytes that it came in."""
        with registry.translating(self._client):
            found, body = registry.opened(_KIND, value, headers)
            schema = registry.schema_of(self._client, found, "serialized")
            kind = self._message(schema, tuple(found.message_indexes or (0,)))
            message = GetMessageClass(kind)()
            message.ParseFromString(body.read())
            pool = kind.file.pool
            plain = MessageToDict(
                message,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
                descriptor_pool=pool,
            )
            return made(_with_numbers(plain, kind), value)

    def _message(self, schema: Schema, indexes: tuple[int, ...]) -> Descriptor:
        """Return the message that indexes lead to: of the file, then of messages."""
        found = self._messages.get((schema, indexes))
        if found is None:
            pool = self._pool_of(schema)
            file = FileDescriptorProto()
            pool.FindFileByName(_FILE).CopyToProto(file)
            names, kinds = [file.package], file.message_type
            for index in indexes:
                if not 0 <= index < len(kinds):
                    msg = f"its schema has no message at {list(indexes)}"
                    raise DecodeError(msg)
                names.append(kinds[index].name)
                kinds = kinds[index].nested_type
            found = pool.FindMessageTypeByName(".".join(filter(None, names)))
            self._messages[schema, indexes] = found
        return found

    def _pool_of(self, schema: Schema) -> DescriptorPool:
        pool = DescriptorPool()
        _init_pool(pool)
        imported = registry.referenced(self._client, schema, "serialized")
        for name, text in (imported | {_FILE: schema.schema_str or ""}).items():
            if not _knows(pool, name):
                pool.Add(_str_to_proto(name, text))
        return pool


def _knows(pool: DescriptorPool, name: str) -> bool:
    """Tell whether a file comes with Protobuf itself, whoever else registered it."""
    try:
        pool.FindFileByName(name)
    except KeyError:
        return False
    return True


def _with_numbers(plain: Any, kind: Descriptor) -> Any:
    """Return a message's JSON values with numbers where it has whole numbers."""
    if kind.full_name.startswith("google.protobuf.") or not isinstance(plain, dict):
        return plain
    for field in kind.fields:
        if field.name in plain:
            plain[field.name] = _numbers_of(plain[field.name], field)
    return plain


def _numbers_of(value: Any, field: FieldDescriptor) -> Any:
    of = field.message_type
    if of is not None and of.GetOptions().map_entry:
        inner = of.fields_by_name["value"]
        return {name: _numbers_of(found, inner) for name, found in value.items()}
    if isinstance(value, list):
        return [_number_of(found, field) for found in value]
    return _number_of(value, field)


def _number_of(value: Any, field: FieldDescriptor) -> Any:
    if field.cpp_type in _LONG:
        return int(value)
    of = field.message_type
    return value if of is None else _with_numbers(value, of)
