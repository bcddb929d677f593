"""Registry: the client of a schema registry, and its errors as ours.

A record of these formats names the schema that it was written by. A schema that the
registry does not know is the record's fault: it becomes a failure. A registry that
gives no answer is nobody's: nothing is decoded, and nothing passed, until it does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.common._httpx_compat import httpx
from confluent_kafka.schema_registry.error import OAuthTokenError, SchemaRegistryError
from confluent_kafka.schema_registry.serde import SchemaId

from kappa_log.codec import Headers
from kappa_log.errors import ConfigError, DecodeError, RegistryUnavailable

DEFAULTS: dict[str, Any] = {
    # The client would wait for ever, and sleep between tries of its own, maybe while a
    # handler's transaction is open. We wait ourselves, with the partition paused.
    "timeout": 5,
    "max.retries": 0,
}

HEADER = "__value_schema_id"
"""Header that some producers write the schema's id into."""

_NOT_FOUND = range(40400, 40500)
"""The registry's own codes of what is not there; a proxy's 404 has none."""

_clients: dict[str, SchemaRegistryClient] = {}
_making = threading.Lock()


def client_of(settings: Mapping[str, Any]) -> SchemaRegistryClient:
    """Return the client for a registry; the same for the same settings, with its cache.

    Raises:
        ConfigError: A setting is none of the client's, or is wrong.
    """
    name = json.dumps(dict(settings), sort_keys=True, default=str)
    with _making:
        if name not in _clients:
            try:
                _clients[name] = SchemaRegistryClient.new_client(
                    DEFAULTS | dict(settings)
                )
            except (OSError, TypeError, ValueError) as error:
                msg = f"[registry] is refused by its client: {error}"
                raise ConfigError(msg) from None
        return _clients[name]


def subjects(settings: Mapping[str, Any]) -> int:
    """Return how many subjects a registry has: to see whether it answers.

    Raises:
        RegistryUnavailable: It does not.
        ConfigError: A setting is wrong.
    """
    client = client_of(settings)
    with translating(client):
        return len(client.get_subjects())


@contextmanager
def translating(client: SchemaRegistryClient) -> Iterator[None]:
    """Turn whatever is raised into what it means for the record at hand.

    Raises:
        RegistryUnavailable: The registry gave no answer, or refuses us.
        DecodeError: Anything else: the record cannot be decoded.
    """
    try:
        yield
    except (DecodeError, RegistryUnavailable):
        raise
    except SchemaRegistryError as error:
        if error.http_status_code == 404 and error.error_code in _NOT_FOUND:  # noqa: PLR2004
            msg = f"its schema is not in the registry: {error.error_message}"
            raise DecodeError(msg) from None
        raise _unavailable(client, error) from error
    except (OAuthTokenError, httpx.HTTPError, OSError) as error:
        raise _unavailable(client, error) from error
    except Exception as error:  # noqa: BLE001 - formats raise whatever they meet
        msg = f"{type(error).__name__}: {error}"
        raise DecodeError(msg) from None


def schema_of(
    client: SchemaRegistryClient, found: SchemaId, form: str | None = None
) -> Schema:
    """Return the schema that a record was written by; asked once, then remembered."""
    if found.id is not None:
        return client.get_schema(found.id, fmt=form)
    return client.get_schema_by_guid(str(found.guid), fmt=form)


def referenced(
    client: SchemaRegistryClient, schema: Schema, form: str | None = None
) -> dict[str, str]:
    """Return name → text of what a schema refers to, in an order to read them."""
    found: dict[str, str] = {}
    for reference in schema.references or ():
        name, subject, version = reference.name, reference.subject, reference.version
        if name is None or subject is None or version is None:
            msg = f"its schema has a reference without a name or version: {reference}"
            raise DecodeError(msg)
        inner = client.get_version(subject, version, True, form).schema
        found |= referenced(client, inner, form)
        found[name] = inner.schema_str or ""
    return found


def opened(kind: str, value: bytes, headers: Headers) -> tuple[SchemaId, BytesIO]:
    """Return a record's schema id and what comes after it.

    The id stands in a header or, as a rule, in front of the value: a zero byte and four
    bytes of id, or a one and a GUID.

    Raises:
        DecodeError: There is none.
    """
    found = SchemaId(kind)
    named = next((v for name, v in headers if name == HEADER and v is not None), None)
    if named is not None:
        found.from_bytes(BytesIO(named))
        return found, BytesIO(value)
    if value[:1] not in (b"\0", b"\1"):
        msg = (
            f"no schema id: the value begins with {value[:1].hex() or 'nothing'}, not "
            "with 00 as a schema registry's serializers write it"
        )
        raise DecodeError(msg)
    return found, found.from_bytes(BytesIO(value))


def _unavailable(client: SchemaRegistryClient, error: Exception) -> RegistryUnavailable:
    config: dict[str, Any] = client.config()  # type: ignore[no-untyped-call]
    where = str(config.get("url")).rpartition("@")[2]
    why = str(error) or type(error).__name__
    return RegistryUnavailable(f"schema registry {where} gives no answer: {why}")
