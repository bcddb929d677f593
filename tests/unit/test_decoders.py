"""Decoders: what other formats become as JSON, and what of them is refused."""

from __future__ import annotations

import json
import struct
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import count
from typing import Any

import pytest
from confluent_kafka.schema_registry import (
    Schema,
    SchemaReference,
    SchemaRegistryClient,
)
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, timestamp_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from kappa_log.codec import Decoder, kept, made
from kappa_log.decoders import NAMES, decoder_named, registry
from kappa_log.decoders.cloudevents import decode_cloudevent
from kappa_log.errors import ConfigError, DecodeError, RegistryUnavailable

NOON = datetime(2026, 2, 1, 12, tzinfo=UTC)

_SCOPES = count(1)


class Registry:
    """A registry in this process, its client shared with the decoders."""

    def __init__(self) -> None:
        """Take a scope that nobody has."""
        self.settings = {"url": f"mock://decoders-{next(_SCOPES)}"}
        self.client: SchemaRegistryClient = registry.client_of(self.settings)

    def decoder(self, name: str) -> Decoder:
        """Return a decoder that asks this registry."""
        return decoder_named(name, self.settings)


@pytest.fixture
def schemas() -> Registry:
    """An empty schema registry."""
    return Registry()


def written(serializer: Any, value: Any) -> bytes:
    """Return a value as a producer's serializer frames it."""
    where = SerializationContext("t", MessageField.VALUE, [])
    data: bytes = serializer(value, where)
    return data


# --- Avro --------------------------------------------------------------------

ORDER = {
    "type": "record",
    "name": "Order",
    "namespace": "shop",
    "fields": [
        {"name": "id", "type": "long"},
        {
            "name": "price",
            "type": {
                "type": "bytes",
                "logicalType": "decimal",
                "precision": 30,
                "scale": 2,
            },
        },
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "ref", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "blob", "type": "bytes"},
        {"name": "weight", "type": ["null", "double"]},
        {"name": "tags", "type": {"type": "map", "values": "string"}},
    ],
}

ORDER_VALUE = {
    "id": 2**63 - 1,
    "price": Decimal("1234567890123456789012345.60"),
    "at": NOON,
    "day": date(2026, 2, 1),
    "ref": uuid.UUID(int=5),
    "blob": b"\0\xff",
    "weight": float("-inf"),
    "tags": {"ä": "☃"},
}


def test_avro_becomes_json_that_loses_nothing(schemas: Registry) -> None:
    """Numbers exact, decimals with all digits, bytes base64, times ISO; raw is kept."""
    data = written(AvroSerializer(schemas.client, json.dumps(ORDER)), ORDER_VALUE)

    found = schemas.decoder("avro")(data, ())

    assert found.payload == {
        "id": 2**63 - 1,
        "price": "1234567890123456789012345.60",
        "at": "2026-02-01T12:00:00Z",
        "day": "2026-02-01",
        "ref": str(uuid.UUID(int=5)),
        "blob": "AP8=",
        "weight": "-Infinity",
        "tags": {"ä": "☃"},
    }
    assert found.raw == data
    assert found.text is not None
    assert json.loads(found.text) == found.payload


def test_each_avro_value_is_read_by_the_schema_that_wrote_it(schemas: Registry) -> None:
    """A topic's schema moves on; what came before keeps what it was."""
    fields = [{"name": "id", "type": "int"}]
    first = {"type": "record", "name": "R", "fields": fields}
    new = {"name": "note", "type": "string", "default": ""}
    second = {"type": "record", "name": "R", "fields": [*fields, new]}
    old = written(AvroSerializer(schemas.client, json.dumps(first)), {"id": 1})
    young = written(
        AvroSerializer(schemas.client, json.dumps(second)), {"id": 2, "note": "n"}
    )
    decode = schemas.decoder("avro")

    assert decode(old, ()).payload == {"id": 1}
    assert decode(young, ()).payload == {"id": 2, "note": "n"}
    assert old[1:5] != young[1:5]


def test_avro_schemas_may_refer_to_others(schemas: Registry) -> None:
    """Types that several topics share are registered once."""
    inner = {
        "type": "record",
        "name": "shop.Id",
        "fields": [{"name": "n", "type": "int"}],
    }
    schemas.client.register_schema("id", Schema(json.dumps(inner), "AVRO"))
    outer = {
        "type": "record",
        "name": "shop.Outer",
        "fields": [{"name": "a", "type": "shop.Id"}, {"name": "b", "type": "shop.Id"}],
    }
    schema = Schema(json.dumps(outer), "AVRO", [SchemaReference("shop.Id", "id", 1)])
    value = {"a": {"n": 1}, "b": {"n": 2}}
    data = written(AvroSerializer(schemas.client, schema), value)

    assert schemas.decoder("avro")(data, ()).payload == value


def test_a_schema_id_may_stand_in_a_header(schemas: Registry) -> None:
    """As newer serializers can be told to write it, by a GUID or a number."""
    data = written(AvroSerializer(schemas.client, '"long"'), 5)

    found = schemas.decoder("avro")(data[5:], ((registry.HEADER, data[:5]),))

    assert found.payload == 5


def _bad(data: bytes) -> Iterator[tuple[bytes, str]]:
    yield b"", "no schema id: the value begins with nothing"
    yield b'{"id": 1}', "no schema id: the value begins with 7b"
    yield data[:3], "error"
    yield data[:1] + struct.pack(">I", 999) + data[5:], "not in the registry"
    yield data[:-1], "EOFError"
    yield data + b"x", "1 bytes are left"


def test_what_is_no_avro_of_a_known_schema_is_the_record_s_fault(
    schemas: Registry,
) -> None:
    """A failure with its bytes; an unknown schema id among them (DESIGN §5)."""
    data = written(
        AvroSerializer(schemas.client, '{"type": "array", "items": "string"}'), ["ab"]
    )
    decode = schemas.decoder("avro")

    for value, message in _bad(data):
        with pytest.raises(DecodeError, match=message):
            decode(value, ())


def test_a_registry_that_does_not_answer_is_nobody_s_fault() -> None:
    """The error may pass, and says where nobody answers, without its password."""
    decode = decoder_named("avro", {"url": "http://me:hush@127.0.0.1:9"})

    with pytest.raises(
        RegistryUnavailable, match=r"registry 127\.0\.0\.1:9 "
    ) as caught:
        decode(b"\0\0\0\0\1\2", ())

    assert caught.value.retryable
    assert "hush" not in str(caught.value)


# --- JSON Schema -------------------------------------------------------------

POSITIVE = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Order",
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 1}},
    "required": ["id"],
}


def test_json_behind_a_schema_id_is_kept_to_the_byte(schemas: Registry) -> None:
    """Spaces and long numbers too; the schema's id is in raw."""
    serializer = JSONSerializer(json.dumps(POSITIVE), schemas.client)
    front = written(serializer, {"id": 1})[:5]
    text = b'{ "id":1, "big":123456789012345678901234567890 }'

    found = schemas.decoder("jsonschema")(front + text, ())

    assert found.text == text.decode()
    assert found.payload["big"] == 123456789012345678901234567890
    assert found.raw == front + text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"id": 0}', "less than the minimum"),
        (b"{}", "required property"),
        (b'{"id": 1, "id": 2}', "duplicate key"),
        (b'{"id": NaN}', "strict JSON"),
        (b"", "value is empty"),
    ],
)
def test_json_that_its_schema_forbids_is_refused(
    schemas: Registry, text: bytes, message: str
) -> None:
    """And so is what is no strict JSON."""
    serializer = JSONSerializer(json.dumps(POSITIVE), schemas.client)
    front = written(serializer, {"id": 1})[:5]

    with pytest.raises(DecodeError, match=message):
        schemas.decoder("jsonschema")(front + text, ())


# --- Protobuf ----------------------------------------------------------------

_FIELD = descriptor_pb2.FieldDescriptorProto


def _proto() -> descriptor_pb2.FileDescriptorProto:
    """Return a file with a message in a message, as protoc would."""
    file = descriptor_pb2.FileDescriptorProto(
        name="shop.proto",
        package="shop",
        syntax="proto3",
        dependency=["google/protobuf/timestamp.proto"],
    )
    file.message_type.add(name="Unused")
    order = file.message_type.add(name="Order")
    plain = [
        ("order_id", _FIELD.TYPE_INT64, _FIELD.LABEL_OPTIONAL, ""),
        ("sums", _FIELD.TYPE_UINT64, _FIELD.LABEL_REPEATED, ""),
        ("blob", _FIELD.TYPE_BYTES, _FIELD.LABEL_OPTIONAL, ""),
        ("weight", _FIELD.TYPE_DOUBLE, _FIELD.LABEL_OPTIONAL, ""),
        (
            "placed_at",
            _FIELD.TYPE_MESSAGE,
            _FIELD.LABEL_OPTIONAL,
            ".google.protobuf.Timestamp",
        ),
        ("lines", _FIELD.TYPE_MESSAGE, _FIELD.LABEL_REPEATED, ".shop.Order.Line"),
        ("stock", _FIELD.TYPE_MESSAGE, _FIELD.LABEL_REPEATED, ".shop.Order.StockEntry"),
    ]
    for number, (name, kind, label, of) in enumerate(plain, 1):
        order.field.add(
            name=name, number=number, type=kind, label=label, type_name=of or None
        )
    line = order.nested_type.add(name="Line")
    line.field.add(
        name="cents", number=1, type=_FIELD.TYPE_INT64, label=_FIELD.LABEL_OPTIONAL
    )
    entry = order.nested_type.add(name="StockEntry")
    entry.options.map_entry = True
    for number, (name, kind) in enumerate(
        [("key", _FIELD.TYPE_STRING), ("value", _FIELD.TYPE_INT64)], 1
    ):
        entry.field.add(
            name=name, number=number, type=kind, label=_FIELD.LABEL_OPTIONAL
        )
    return file


@pytest.fixture(scope="module")
def messages() -> dict[str, Any]:
    """Message classes as protoc generates them, by name."""
    pool = DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(_proto())
    names = ("shop.Order", "shop.Order.Line")
    return {n: GetMessageClass(pool.FindMessageTypeByName(n)) for n in names}


def test_protobuf_becomes_json_with_numbers_as_numbers(
    schemas: Registry, messages: dict[str, Any]
) -> None:
    """Long ones too, in lists, maps and messages; no generated code is needed."""
    order = messages["shop.Order"](
        order_id=2**63 - 1, sums=[2**64 - 1], blob=b"\xff", weight=float("nan")
    )
    order.placed_at.FromDatetime(NOON)
    order.lines.add(cents=-5)
    order.stock["mug"] = 7
    data = written(ProtobufSerializer(type(order), schemas.client), order)

    found = schemas.decoder("protobuf")(data, ())

    assert found.payload == {
        "order_id": 2**63 - 1,
        "sums": [2**64 - 1],
        "blob": "/w==",
        "weight": "NaN",
        "placed_at": "2026-02-01T12:00:00Z",
        "lines": [{"cents": -5}],
        "stock": {"mug": 7},
    }
    assert found.raw == data


def test_protobuf_defaults_are_there_and_what_is_unset_is_not(
    schemas: Registry, messages: dict[str, Any]
) -> None:
    """A fold reads zero as zero; a message inside another may be absent."""
    inner = messages["shop.Order.Line"]()
    data = written(ProtobufSerializer(type(inner), schemas.client), inner)
    empty = messages["shop.Order"]()
    outer = written(ProtobufSerializer(type(empty), schemas.client), empty)
    decode = schemas.decoder("protobuf")

    assert decode(data, ()).payload == {"cents": 0}
    assert "placed_at" not in decode(outer, ()).payload
    assert decode(outer, ()).payload["order_id"] == 0


def test_protobuf_bytes_that_are_none_are_refused(
    schemas: Registry, messages: dict[str, Any]
) -> None:
    """Also an index of a message that its schema lacks."""
    order = messages["shop.Order"](order_id=1)
    data = written(ProtobufSerializer(type(order), schemas.client), order)
    decode = schemas.decoder("protobuf")

    for value in (data + b"\xff", data[:5] + b"\2\x12" + data[7:]):
        with pytest.raises(DecodeError):
            decode(value, ())


# --- CloudEvents -------------------------------------------------------------

CE = (
    ("ce_specversion", b"1.0"),
    ("ce_id", b"7"),
    ("ce_source", b"/shop"),
    ("ce_type", b"order.placed"),
    ("ce_time", b"2026-02-01T12:00:00Z"),
)
JSON_TYPE = ("content-type", b"application/json; charset=utf-8")
STRUCTURED = ("content-type", b"application/cloudevents+json")


def test_both_modes_of_cloudevents_become_one_form() -> None:
    """A handler reads the same whichever way a producer sends."""
    data = b'{"big":123456789012345678901234567890}'
    binary = decode_cloudevent(data, (*CE, JSON_TYPE))
    assert binary.text is not None
    structured = decode_cloudevent(binary.text.encode(), (STRUCTURED,))

    assert binary.payload == structured.payload
    assert binary.payload == {
        "specversion": "1.0",
        "id": "7",
        "source": "/shop",
        "type": "order.placed",
        "time": "2026-02-01T12:00:00Z",
        "datacontenttype": "application/json; charset=utf-8",
        "data": {"big": 123456789012345678901234567890},
    }
    assert (binary.raw, structured.raw) == (data, None)
    assert binary.said == structured.said
    assert binary.said.event_type == "order.placed"
    assert binary.said.event_time == int(NOON.timestamp()) * 1_000_000


@pytest.mark.parametrize(
    ("content_type", "data", "member"),
    [
        ("text/plain", "ä".encode(), {"data": "ä"}),
        ("image/png", b"\x89P", {"data_base64": "iVA="}),
        ("application/vnd.x+json", b"[1]", {"data": [1]}),
        ("application/json", b"", {}),
    ],
)
def test_data_of_other_types_is_kept_as_cloudevents_json_has_it(
    content_type: str, data: bytes, member: dict[str, Any]
) -> None:
    """Text as text, everything else as base64."""
    header = ("content-type", content_type.encode())
    found = decode_cloudevent(data, (*CE, header)).payload

    assert {n: v for n, v in found.items() if n.startswith("data")} == member | {
        "datacontenttype": content_type
    }


@pytest.mark.parametrize(
    ("value", "headers", "message"),
    [
        (b"{}", (), "neither ce_ headers nor a content-type"),
        (b"{}", CE[1:], "attribute 'specversion' is missing"),
        (b"{}", (*CE, ("ce_id", b"")), "attribute 'id' is missing"),
        (b"{}", (*CE, ("ce_time", b"noon")), "no ISO 8601 time"),
        (b"{", CE, "not strict JSON"),
        (b"{}", (*CE, ("ce_x", b"\xff")), "ce_x is not UTF-8"),
        (b"[]", (STRUCTURED,), "its JSON is no object"),
        (b'{"id":1}', (STRUCTURED,), "attribute 'id'"),
        (b"[]", (("content-type", b"application/cloudevents-batch+json"),), "batch"),
    ],
)
def test_what_is_no_cloudevent_is_refused(
    value: bytes, headers: Any, message: str
) -> None:
    """The message says what it lacks."""
    with pytest.raises(DecodeError, match=message):
        decode_cloudevent(value, headers)


# --- bytes, and what all share -----------------------------------------------


def test_bytes_are_kept_as_base64_or_as_what_was_made_of_them() -> None:
    """SEED H21: what an around_consume made is what is stored, and the bytes too."""
    raw = b"\0\xff"

    assert decoder_named("bytes")(raw, ()).payload == raw
    assert kept(raw, raw).payload == kept(None, raw).payload == "AP8="
    assert kept({"n": Decimal("1.50")}, raw).text == '{"n":"1.50"}'
    assert kept({"n": 1}, raw).raw == raw


@pytest.mark.parametrize("value", [object(), {"x": {1: {2}}.keys()}, "\ud800"])
def test_what_json_has_no_form_for_is_refused(value: Any) -> None:
    """It would be kept as something else."""
    with pytest.raises(DecodeError, match=r"no JSON for it"):
        made(value, b"")


def test_a_decoder_that_is_not_there_is_refused_with_those_there_are() -> None:
    """A typo in the configuration is told with what can be written instead."""
    with pytest.raises(ConfigError, match=f"'jsn' is not known.*{', '.join(NAMES)}"):
        decoder_named("jsn")
    with pytest.raises(ConfigError, match=r"needs a schema registry: set url"):
        decoder_named("avro", {})
    with pytest.raises(ConfigError, match=r"\[registry\] is refused.*orl"):
        decoder_named("avro", {"url": "http://x", "orl": 1})


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("avro", "fastavro", "avro"),
        ("protobuf", "google.protobuf.descriptor", "protobuf"),
        ("jsonschema", "confluent_kafka.schema_registry.json_schema", "json"),
        ("avro", "confluent_kafka.schema_registry", "avro"),
    ],
)
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str, extra: str
) -> None:
    """Whoever names the decoder learns what to install."""
    for module in [m for m in sys.modules if m.startswith("kappa_log.decoders.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ConfigError, match=rf"pip install 'kappa-log\[{extra}\]'"):
        decoder_named(name, {"url": "mock://x"})
