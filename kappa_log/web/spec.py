"""The OpenAPI document: what is answered is described by the types that are sent.

Events and failures are written around their payloads' text, so their descriptions
stand here; all else comes from the structures of the engine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kappa_log.failures import BulkRetry
from kappa_log.parked import ParkedRetry
from kappa_log.plan import ReplayPlan
from kappa_log.status import ProjectionStatus
from kappa_log.steps import ReplayReport
from kappa_log.storage.diff import Diff
from kappa_log.storage.failures import FailureGroup
from kappa_log.storage.lists import Checkpointed, Duplicate
from kappa_log.storage.parked import ParkedKey
from kappa_log.swap import Swap
from kappa_log.trial import Trial
from kappa_log.verify import VerifyReport

REF = "#/components/schemas/"

Schema = dict[str, Any]

SENT = (
    BulkRetry,
    Checkpointed,
    Diff,
    Duplicate,
    FailureGroup,
    ParkedKey,
    ParkedRetry,
    ProjectionStatus,
    ReplayPlan,
    ReplayReport,
    Swap,
    Trial,
    VerifyReport,
)
"""Structures of the engine that are answered as they are."""


def _maybe(kind: str, **more: Any) -> Schema:
    return {"type": [kind, "null"], **more}


_TIME = _maybe("string", format="date-time")
_BYTES = _maybe("string", contentEncoding="base64")
_HEADERS = {
    "type": "array",
    "items": {"type": "array", "items": _maybe("string")},
    "description": "Name and value as base64, in order; names may repeat.",
}
_RECORD: Schema = {
    "id": {"type": "integer", "minimum": 1},
    "created_at": _TIME,
    "topic": {"type": "string"},
    "group_id": {"type": "string"},
    "entity_id": _maybe("string"),
    "event_time": _TIME,
    "event_type": _maybe("string"),
    "event_version": _maybe("string"),
    "checksum": _maybe("string"),
    "payload": {"description": "Any JSON value, digit by digit as it was received."},
    "source": _maybe("string"),
    "partition": {"type": "integer"},
    "offset": {"type": "integer"},
    "key": _BYTES,
    "headers": _HEADERS,
    "timestamp": _maybe("integer"),
}


def _object(properties: Schema, **more: Any) -> Schema:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, **more}


_OURS: dict[str, Schema] = {
    "Event": _object(
        _RECORD | {"message_id": {"type": "string"}, "raw": _BYTES},
        description="An acknowledged record; its id is its position in the log.",
    ),
    "Failure": _object(
        _RECORD
        | {
            "metadata": {"type": "object"},
            "error_class": _maybe("string"),
            "error_message": _maybe("string"),
            "error_backtrace": _maybe("array", items={"type": "string"}),
            "value": _BYTES,
            "parked": {"type": "boolean"},
            "fingerprint": _maybe("string"),
            "attempts": {"type": "integer"},
            "last_at": _TIME,
        },
        description="A record that could not become an event. A value that is no "
        "JSON is in 'value', else it is the payload.",
    ),
    "Acknowledged": _object({"acknowledged": {"type": "boolean"}}),
    "Retried": _object(
        {
            "acknowledged": {"type": "boolean"},
            "outcome": {
                "enum": ["acked", "skipped", "duplicate", "failed", "waits", "gone"]
            },
            "position": _maybe("integer"),
        },
        description="What became of a failure. A dry run says by further members, "
        "those of Trial, what would become of it; the last three outcomes are its own.",
    ),
    "Count": _object({"count": {"type": "integer", "minimum": 0}}),
    "Admitted": _object({"id": {"type": "integer"}, "position": {"type": "integer"}}),
    "Row": {"type": "object", "description": "Key columns, then the state's fields."},
    "Step": _object(
        {
            "event": {"$ref": f"{REF}Event"},
            "state": {"type": ["object", "null"]},
            "error": _maybe("string"),
        },
        description="An event of a row, and the row after it; null is no row. With an "
        "error the key is parked there, and the row is that before it.",
    ),
    "Replay": _object(
        {
            "id": _maybe("integer"),
            "projection": {"type": "string"},
            "build": _maybe("integer"),
            "state": {"enum": ["running", "unfinished", "ended"]},
            "phase": {"type": "string"},
            "outcome": _maybe("string"),
            "position": _maybe("integer"),
            "target": _maybe("integer"),
            "events": {"type": "integer"},
            "request": {"type": "object"},
            "plan": {"type": "object"},
            "diff": _maybe("object"),
            "reason": _maybe("string"),
            "error": _maybe("string"),
            "created_at": _TIME,
            "updated_at": _TIME,
        },
        description="A replay. It is 'unfinished' when nothing of this server works "
        "on it: it was interrupted, or another process does.",
    ),
    "Alive": _object({"alive": {"const": True}}),
    "Ready": _object(
        {
            "ready": {"type": "boolean"},
            "checks": _maybe("object", additionalProperties={"type": "string"}),
        }
    ),
    "Problem": _object(
        {
            "error": {"const": True},
            "message": {"type": "string"},
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "instance": {"type": "string"},
        },
        description="What went wrong (RFC 9457).",
    ),
}

EXAMPLES: dict[str, Any] = {
    "Event": {
        "id": 4117,
        "topic": "orders",
        "group_id": "billing",
        "entity_id": "order-7",
        "event_time": "2026-01-31T09:30:00.000Z",
        "event_type": "order_placed",
        "event_version": "1",
        "checksum": "9c2b3f0d5a7e4c11b0a2d4e6f8091a2b",
        "created_at": "2026-01-31T09:30:01.250Z",
        "source": "orders.jsonl",
        "partition": 0,
        "offset": 4116,
        "key": "b3JkZXItNw==",
        "headers": [],
        "timestamp": None,
        "message_id": "5f0c8a1e2b3d4c5f60718293a4b5c6d7",
        "raw": None,
        "payload": {"order": "order-7", "total": 12.50},
    },
    "Acknowledged": {"acknowledged": True},
    "Retried": {"acknowledged": True, "outcome": "acked", "position": 4118},
    "Count": {"count": 3},
    "Admitted": {"id": 2, "position": 4119},
    "Row": {"entity_id": "order-7", "orders": 1, "total": 1250},
    "Alive": {"alive": True},
    "Ready": {"ready": True, "checks": {"database": "ok", "cursors": "ok"}},
    "Problem": {
        "error": True,
        "message": "event not found",
        "type": "urn:kappa-log:problem:not-found",
        "title": "Not Found",
        "status": 404,
        "detail": "event 999 not found",
        "instance": "/v1/events/999",
    },
    "ParkedKey": {
        "key": "order-7",
        "position": 4117,
        "error_class": "KeyError",
        "error_message": "'amount'",
        "error_backtrace": ["KeyError: 'amount'"],
        "fingerprint": "a1b2c3d4",
        "attempts": 1,
        "first_at": "2026-01-31T09:30:00.000Z",
        "last_at": "2026-01-31T09:30:00.000Z",
        "waiting": 3,
    },
    "ParkedRetry": {
        "projection": "orders",
        "build": 1,
        "dry_run": False,
        "folded": 1,
        "failed": 0,
        "lost": 0,
        "keys": [
            {
                "key": "order-7",
                "outcome": "folded",
                "events": 3,
                "position": 4130,
                "error": None,
            }
        ],
    },
    "FailureGroup": {
        "fingerprint": "a1b2c3d4",
        "error_class": "KeyError",
        "message": "'amount'",
        "count": 12,
        "parked": 3,
        "first_at": "2026-01-31T09:30:00.000Z",
        "last_at": "2026-01-31T10:30:00.000Z",
        "example_id": 12,
    },
}

LINK = {
    "Link": {
        "description": 'The next page, if there may be one: <…>; rel="next".',
        "schema": {"type": "string"},
    }
}
LOCATION = {
    "Location": {
        "description": "Where its progress is.",
        "schema": {"type": "string", "format": "uri-reference"},
    }
}


def one(name: str) -> Schema:
    """Return the content of an answer that is one of a kind."""
    return _content({"$ref": REF + name}, EXAMPLES.get(name))


def many(name: str) -> Schema:
    """Return the content of an answer that is an array of a kind."""
    example = [EXAMPLES[name]] if name in EXAMPLES else None
    return _content({"type": "array", "items": {"$ref": REF + name}}, example)


def text(kind: str, example: str) -> Schema:
    """Return the content of an answer that is no JSON."""
    return {kind: {"schema": {"type": "string"}, "example": example}}


def operation(
    name: str,
    content: Schema,
    headers: Schema | None = None,
    **others: tuple[str, Schema, Schema],
) -> dict[str, Any]:
    """Return what APIFlask's ``doc`` takes about one operation.

    Args:
        name: The operation's id.
        content: Content of its 200.
        headers: Headers of its 200.
        others: ``status_202`` = description, content and headers of another success.
    """
    responses: Schema = {"200": _response("Done.", content, headers)}
    for status, (said, other, more) in others.items():
        responses[status.removeprefix("status_")] = _response(said, other, more)
    responses["4XX"] = _response("It cannot be done as asked.", one("Problem"))
    responses["503"] = _response("The database is away or busy.", one("Problem"))
    return {"operation_id": name, "responses": responses}


def readiness() -> dict[str, Any]:
    """Return the description of /readyz, whose 503 is no problem but its answer."""
    found = operation("ready", one("Ready"))
    found["responses"]["503"] = _response("It is not ready.", one("Ready"))
    return found


def complete(document: Schema, *, needs_token: bool) -> Schema:
    """Add to the generated document what its generator does not know."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(_OURS | _of_structures())
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    if needs_token:
        document["security"] = [{"token": []}]
    for operations in document["paths"].values():
        for found in operations.values():
            for parameter in found.get("parameters", []):
                _tell_type(parameter)
    return document


def _tell_type(parameter: Schema) -> None:
    if parameter["in"] == "path" and parameter["name"] == "identifier":
        parameter["schema"] = {"type": "integer", "minimum": 1, "examples": [1]}
    # OpenAPI has no null among the texts of a query: what is absent is absent.
    options = [o for o in parameter["schema"].get("anyOf", []) if o != {"type": "null"}]
    if len(options) == 1:
        kept = {k: v for k, v in parameter["schema"].items() if k == "description"}
        parameter["schema"] = options[0] | kept


def _of_structures() -> dict[str, Schema]:
    _, found = msgspec.json.schema_components(SENT, ref_template=REF + "{name}")
    # Headers are pairs, which readers of documents seldom understand.
    found["Duplicate"]["properties"]["headers"] = _HEADERS
    return found


def _response(said: str, content: Schema, headers: Schema | None = None) -> Schema:
    return {"description": said, "content": content, "headers": headers or {}}


def _content(schema: Schema, example: Any) -> Schema:
    found: Schema = {"schema": schema}
    if example is not None:
        found["example"] = example
    return {"application/json": found}
