"""A phobos.yml as kappa_log.toml: each key it has is set, or stands in a comment.

The keys are those of SEED §8 (G8) and §11 (X6 to X9), and whatever else Phobos handed
to its Kafka client. A key that has no setting here is listed with the reason, and one
that nobody knows too: nothing is left out in silence. Secrets are not copied: the file
is likely to be committed, so they become variables to be set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kappa_log.errors import ConfigError

Lines = list[str]

_ERB = re.compile(r"<%")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

SSL_FILES = {
    "ssl_ca_cert_file_path": "ssl.ca.location",
    "ssl_client_cert_file_path": "ssl.certificate.location",
    "ssl_client_cert_key_file_path": "ssl.key.location",
}
_RENAMED = SSL_FILES | {
    "client_id": "client.id",
    "sasl_plain_username": "sasl.username",
    "sasl_scram_username": "sasl.username",
    "sasl_gssapi_principal": "sasl.kerberos.principal",
    "sasl_gssapi_keytab": "sasl.kerberos.keytab",
}
SSL_TEXTS = {
    "ssl_ca_cert": "ssl.ca.pem",
    "ssl_client_cert": "ssl.certificate.pem",
    "ssl_client_cert_key": "ssl.key.pem",
}
SECRETS = {
    "ssl_client_cert_key_password": "ssl.key.password",
    "sasl_plain_password": "sasl.password",
    "sasl_scram_password": "sasl.password",
}
_SECONDS = {
    "connect_timeout": "socket.connection.setup.timeout.ms",
    "socket_timeout": "socket.timeout.ms",
    "session_timeout": "session.timeout.ms",
    "heartbeat_interval": "heartbeat.interval.ms",
}
"""Seconds there → milliseconds here."""

_FETCH = {
    "max_bytes_per_partition": ("max.partition.fetch.bytes", 1),
    "min_bytes": ("fetch.min.bytes", 1),
    "max_wait_time": ("fetch.wait.max.ms", 1000),
}
_PRODUCER = {
    "ack_timeout": ("request.timeout.ms", 1000, 1),
    "max_retries": ("message.send.max.retries", 1, 1),
    "retry_backoff": ("retry.backoff.ms", 1000, 1),
    "max_buffer_size": ("queue.buffering.max.messages", 1, 1),
}
"""Name, factor, and the least that librdkafka takes."""

OFFSETS = (
    "offsets are kept in SQL, with the events; Kafka's are written once a second for "
    "lag tools"
)
REASONS = {
    "offset_commit_interval": OFFSETS,
    "offset_commit_threshold": OFFSETS,
    "offset_retention_time": OFFSETS,
    "delivery": "records come in batches, and each is handed to its handler",
    "force_encoding": "payloads are UTF-8; what is not becomes a failure, kept whole",
    "required_acks": "the producer is idempotent, and so waits for all replicas",
    "kafka": "one cluster for consumers and producers: [kafka], [producer] over it",
    "max_queue_size": "librdkafka has one queue: max_buffer_size",
    "max_buffer_bytesize": "see queue.buffering.max.kbytes of librdkafka",
    "delivery_threshold": "librdkafka sends by linger.ms and batch.size",
    "delivery_interval": "librdkafka sends by linger.ms and batch.size",
    "persistent_connections": "librdkafka keeps its connections",
    "compression_threshold": "librdkafka compresses whole batches",
    "file": "logs go to stderr; whoever runs the service keeps them",
    "ruby_kafka": "troubles with Kafka are told among the other notices",
    "custom_logger": "log.format and log.level; Python's logging for more",
    "custom_kafka_logger": "troubles with Kafka are told among the other notices",
    "logger": "log.format and log.level",
    "partitioner": "the default of librdkafka: consistent_random",
    "transactional": "produce is idempotent",
    "transactional_timeout": "produce is idempotent",
    "idempotent": "it always is",
    "resolve_seed_brokers": "client.dns.lookup of librdkafka",
}
UNKNOWN = "no key of Phobos that is known; nothing is set for it"


def translated(file: Path) -> str:
    """Return the kappa_log.toml that does what a phobos.yml did.

    Raises:
        ConfigError: It cannot be read, is no YAML, or has Ruby code in it (ERB).
    """
    return _Translation(_read(file), file.name).text()


def _read(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        msg = (
            "reading YAML needs one more package; run: pip install 'kappa-log[phobos]'"
        )
        raise ConfigError(msg) from None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{file} cannot be read: {error}; nothing was written"
        raise ConfigError(msg) from None
    for number, line in enumerate(text.splitlines(), 1):
        if _ERB.search(line.partition("#")[0]):
            msg = (
                f"{file}, line {number}: Ruby code (ERB) cannot be run here: "
                f"{line.strip()}. Put its value there, or render the file with Ruby "
                "first: erb phobos.yml > rendered.yml. Nothing was written"
            )
            raise ConfigError(msg)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        msg = f"{file} is no YAML: {' '.join(str(error).split())}; nothing was written"
        raise ConfigError(msg) from None
    if not isinstance(found, dict):
        msg = f"{file} has no sections; is it a phobos.yml? Nothing was written"
        raise ConfigError(msg)
    return found


class _Translation:
    """One file's sections, each taken in turn."""

    def __init__(self, found: Mapping[str, Any], name: str) -> None:
        self._found = found
        self._name = name
        self._kafka: dict[str, Any] = {}
        self._notes: Lines = []
        """Keys without a setting, and why."""
        self._variables: Lines = []
        self._producer: dict[str, Any] = {}
        self._log: dict[str, Any] = {}
        self._max_retries: int | None = None
        self._backoff: dict[str, Any] = {}

    def text(self) -> str:
        """Return the whole file."""
        sections: dict[str, Callable[[Any], None]] = {
            "kafka": self._take_kafka,
            "consumer": self._take_consumer,
            "producer": self._take_producer,
            "logger": self._take_logger,
            "backoff": self._take_backoff,
            "db_checkpoint": self._take_checkpoint,
        }
        listeners = self._found.get("listeners") or []
        for name, section in self._found.items():
            if name == "listeners":
                continue
            take = sections.get(name)
            if take is None or (name != "logger" and not isinstance(section, dict)):
                self._note(name, section)
            else:
                take(section)
        return "\n".join(self._lines(listeners))

    # --- sections -------------------------------------------------------------

    def _take_kafka(self, found: Any) -> None:
        for key, value in found.items():
            if value is None or key in _ASKED:
                continue
            if key == "seed_brokers":
                self._kafka["bootstrap.servers"] = _brokers(value)
            elif key == "ssl_verify_hostname":
                name = "ssl.endpoint.identification.algorithm"
                self._kafka[name] = "https" if value else "none"
            elif key in _RENAMED:
                self._kafka[_RENAMED[key]] = value
            elif key in SECRETS:
                self._secret(f"kafka.{key}", SECRETS[key])
            elif key in SSL_TEXTS:
                self._take_certificate(key, str(value))
            else:
                self._take_seconds("kafka", key, value)
        self._set_protocol(found)

    def _take_certificate(self, key: str, value: str) -> None:
        """Take a certificate or key, or the path of one."""
        is_text = "-----BEGIN" in value
        if is_text and key == "ssl_client_cert_key":
            self._secret(f"kafka.{key}", SSL_TEXTS[key])
        elif is_text:
            self._kafka[SSL_TEXTS[key]] = value
        else:
            self._kafka[SSL_FILES[f"{key}_file_path"]] = value

    def _take_seconds(self, section: str, key: str, value: Any) -> None:
        if key in _SECONDS and isinstance(value, int | float):
            self._kafka[_SECONDS[key]] = _milliseconds(key, value)
        else:
            self._note(f"{section}.{key}", value)

    def _set_protocol(self, found: Mapping[str, Any]) -> None:
        """Set what librdkafka wants to be told, and Phobos found by itself."""
        is_tls = any(
            value and (key.startswith("ssl_") and key != "ssl_verify_hostname")
            for key, value in found.items()
        ) or bool(found.get("sasl_over_ssl", True) and _mechanism(found))
        mechanism = _mechanism(found)
        if mechanism:
            self._kafka["sasl.mechanism"] = mechanism
        if is_tls or mechanism:
            names = ("SASL_" if mechanism else "") + ("SSL" if is_tls else "PLAINTEXT")
            self._kafka["security.protocol"] = names

    def _take_consumer(self, found: Any) -> None:
        for key, value in found.items():
            if value is not None:
                self._take_seconds("consumer", key, value)

    def _take_producer(self, found: Any) -> None:
        for key, value in found.items():
            if value is None:
                continue
            if key == "required_acks":
                self._take_acks(value)
            elif key in _PRODUCER and isinstance(value, int | float):
                name, factor, least = _PRODUCER[key]
                self._producer[name] = max(least, int(value * factor))
            elif key == "compression_codec":
                self._producer["compression.type"] = str(value)
            else:
                self._note(f"producer.{key}", value)

    def _take_acks(self, value: Any) -> None:
        """Take it if it is what an idempotent producer needs."""
        if str(value) in ("all", "-1", ":all"):
            self._producer["acks"] = "all"
        else:
            self._note("producer.required_acks", value)

    def _take_logger(self, found: Any) -> None:
        if not isinstance(found, dict):
            self._note("logger", found)
            return
        for key, value in found.items():
            if key == "stdout_json":
                self._log["format"] = "json" if value else "console"
            elif key == "level" and isinstance(value, str):
                level = value.lower()
                known = {"warn": "warning", "fatal": "error", "unknown": "error"}
                self._log["level"] = known.get(level, level)
            else:
                self._note(f"logger.{key}", value)

    def _take_backoff(self, found: Any) -> None:
        self._backoff = self._backoff_of("backoff", found)

    def _take_checkpoint(self, found: Any) -> None:
        for key, value in found.items():
            if key == "max_retries" and isinstance(value, int):
                self._max_retries = value
            elif value is not None:
                self._note(f"db_checkpoint.{key}", value)

    # --- listeners ------------------------------------------------------------

    def _listener(self, number: int, found: Mapping[str, Any]) -> Iterator[str]:
        where = f"listeners[{number}]"
        yield ""
        yield "[[listeners]]"
        yield f"topic = {_toml(str(found.get('topic', '')))}"
        yield f"group_id = {_toml(str(found.get('group_id', '')))}"
        name = str(found.get("handler", ""))
        was = " ".join(name.split())
        yield f"handler = {_toml(_handler(name))}   # was {was}: write it there"
        if found.get("start_from_beginning") is False:
            yield 'start = "latest"'
        if self._max_retries is not None:
            yield f"max_retries = {self._max_retries}"
        backoff = self._backoff_of(f"{where}.backoff", found.get("backoff") or {})
        backoff = self._backoff | backoff
        if found.get("max_concurrency") is not None:
            yield f"max_concurrency = {_toml(found['max_concurrency'])}"
        for name, table in (("backoff", backoff), ("kafka", self._own_kafka(found))):
            if table:
                pairs = ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in table.items())
                yield f"{name} = {{ {pairs} }}"
        for key, value in found.items():
            if key not in _TAKEN and value is not None:
                self._note(f"{where}.{key}", value)

    def _own_kafka(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return what librdkafka is told for this listener alone."""
        fetching = {
            name: int(found[key] * factor)
            for key, (name, factor) in _FETCH.items()
            if isinstance(found.get(key), int | float)
        }
        return fetching | {
            name: _milliseconds(key, found[key])
            for key, name in _SECONDS.items()
            if isinstance(found.get(key), int | float)
        }

    def _backoff_of(self, where: str, found: Any) -> dict[str, Any]:
        backoff: dict[str, Any] = {}
        for key, value in (found if isinstance(found, dict) else {}).items():
            if key in ("min_ms", "max_ms") and isinstance(value, int):
                backoff[key] = value
            else:
                self._note(f"{where}.{key}", value)
        return backoff

    # --- what is written ------------------------------------------------------

    def _lines(self, listeners: Any) -> Iterator[str]:
        found = [listener for listener in listeners if isinstance(listener, dict)]
        sections = [
            list(self._listener(number, listener))
            for number, listener in enumerate(found)
        ]
        yield f"# Made of {self._name} by kappa-log init --from-phobos."
        yield "# Handlers are Python now: each named below is a class to be written."
        yield from self._comments(
            "Set these in the environment; secrets are not written here:",
            self._variables,
        )
        yield from self._comments("What has no setting here, and why:", self._notes)
        yield ""
        yield "[database]"
        yield 'url = "sqlite:///kappa_log.db"      # or postgresql+psycopg://…'
        for name, values in (
            ("kafka", self._kafka),
            ("producer", self._producer),
            ("log", self._log),
        ):
            if values:
                yield ""
                yield f"[{name}]"
                for key, value in values.items():
                    yield f"{_key(key)} = {_toml(value)}"
        for section in sections:
            yield from section
        yield ""

    def _comments(self, heading: str, lines: Lines) -> Iterator[str]:
        if lines:
            yield "#"
            yield f"# {heading}"
            for line in lines:
                yield f"#   {line}"

    def _secret(self, key: str, name: str) -> None:
        variable = f"KAPPA_LOG__KAFKA__{name.replace('.', '_').upper()}"
        self._variables.append(f"{variable}   (was {key})")

    def _note(self, key: str, value: Any) -> None:
        """List a key that is set to nothing here, with the reason."""
        reason = REASONS.get(key.rpartition(".")[2], UNKNOWN)
        shown = "…" if re.search("password|secret|token", key) else _toml(value)
        self._notes.append(f"{key} = {shown}: {reason}")


_ASKED = frozenset(
    {"sasl_over_ssl", "sasl_scram_mechanism", "ssl_ca_certs_from_system"}
)
"""Keys that the protocol is told by."""

_TAKEN = frozenset(
    {
        "handler", "topic", "group_id", "start_from_beginning", "backoff",
        "max_concurrency", *_FETCH, *_SECONDS,
    }
)  # fmt: skip


def _mechanism(found: Mapping[str, Any]) -> str | None:
    if found.get("sasl_scram_username"):
        size = "512" if "512" in str(found.get("sasl_scram_mechanism")) else "256"
        return f"SCRAM-SHA-{size}"
    if found.get("sasl_plain_username"):
        return "PLAIN"
    return "GSSAPI" if found.get("sasl_gssapi_principal") else None


def _milliseconds(key: str, seconds: float) -> int:
    """Return seconds in milliseconds, as many as librdkafka takes at least."""
    return max(int(seconds * 1000), 1000 if key == "connect_timeout" else 1)


def _brokers(value: Any) -> str:
    brokers = value if isinstance(value, list) else str(value).split(",")
    return ",".join(re.sub(r"^kafka(\+ssl)?://", "", str(b).strip()) for b in brokers)


def _handler(name: str) -> str:
    """Return where a Ruby class would be in Python: ``Shop::OrdersHandler``."""
    *modules, kind = name.split("::")
    folders = [_WORDS.sub("_", module).lower() for module in modules]
    return f"{'.'.join(folders) or 'handlers'}:{kind}"


def _key(name: str) -> str:
    return _toml(name) if "." in name else name


def _toml(value: Any) -> str:
    """Return a value as TOML on one line; whatever is no plain value as its text."""
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(str(value), ensure_ascii=False)
