"""A phobos.yml as kappa_log.toml: each key it has is set, or stands in a comment.

The keys are those of SEED §8 (G8) and §11 (X6 to X9), and whatever else Phobos handed
to its Kafka client. A key that has no setting here is listed with the reason, and one
that nobody knows too: nothing is left out in silence. A value that a key cannot have is
refused with its line, as is whatever `load_config` would refuse of the whole. Secrets
are not copied: the file is likely to be committed, so they become variables to be set.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kappa_log.config import Config, masked
from kappa_log.errors import ConfigError
from kappa_log.listeners import sections_named

Lines = list[str]

Kind = tuple[Callable[[Any], bool], str]
"""What a value must be, and how that is said."""

_RUBY_CLASS = re.compile(r"(?:::)?[A-Z]\w*(?:::[A-Z]\w*)*", re.ASCII)
_ERB = re.compile(r"<%")
_SECRET = re.compile("pass|secret|token|credential|cert_key", re.IGNORECASE)
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


class Translated(msgspec.Struct, frozen=True):
    """What became of a phobos.yml."""

    text: str
    """Of kappa_log.toml; `load_config` takes it."""
    notes: Lines
    """Keys without a setting here, and why."""
    variables: Lines
    """Those that secrets are to be set in, and what they were."""
    handlers: Lines
    """``module:Class`` of each handler to be written."""


def translated(file: Path) -> Translated:
    """Return the kappa_log.toml that does what a phobos.yml did.

    Raises:
        ConfigError: It cannot be read, is no YAML, has Ruby code in it (ERB), or values
            that cannot be; the message has a line for each of these.
    """
    found, lines = _read(file)
    translation = _Translation(found, file.name, lines)
    made = translation.made()
    if translation.bad:
        wrong = "\n".join(f"  {line}" for line in translation.bad)
        msg = f"{file} has values that cannot be; nothing was written:\n{wrong}"
        raise ConfigError(msg)
    _check_whole(file, made.text)
    return made


def _check_whole(file: Path, text: str) -> None:
    """Refuse what no command would take later.

    Raises:
        ConfigError: The message says what it is.
    """
    try:
        text.encode()
        config = Config(**tomllib.loads(text))
        if config.listeners:
            sections_named(config, ())
    except (ValueError, ConfigError) as error:
        why = " ".join(str(error).split())
        msg = f"what {file} says cannot be set here: {why}; nothing was written"
        raise ConfigError(msg) from None


def _read(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what a file says, and the line that each of its keys is on."""
    try:
        import yaml
    except ImportError:
        msg = (
            "reading YAML needs one more package; run: pip install "
            "'kappa-log[phobos]', from a checkout pip install '.[phobos]'"
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
        lines = dict(_key_lines(yaml.compose(text, Loader=yaml.SafeLoader), ""))
    except yaml.YAMLError as error:
        msg = f"{file} is no YAML: {' '.join(str(error).split())}; nothing was written"
        raise ConfigError(msg) from None
    if not isinstance(found, dict):
        msg = f"{file} has no sections; is it a phobos.yml? Nothing was written"
        raise ConfigError(msg)
    return found, lines


MAX_LEVELS = 5
"""No key of Phobos lies deeper; a YAML that holds itself has no end."""


def _key_lines(node: Any, path: str, level: int = 0) -> Iterator[tuple[str, int]]:
    """Yield the dotted keys below a node of YAML, and their lines."""
    if node is None or level == MAX_LEVELS:
        return
    if node.id == "sequence":
        for number, item in enumerate(node.value):
            yield f"{path}[{number}]", item.start_mark.line + 1
            yield from _key_lines(item, f"{path}[{number}]", level + 1)
    if node.id == "mapping":
        merged = [value for key, value in node.value if key.value == "<<"]
        for value in merged:
            yield from _key_lines(value, path, level + 1)
        for key, value in node.value:
            name = f"{path}.{key.value}".removeprefix(".")
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, name, level + 1)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Return the kind of whole numbers within two bounds, both in."""

    def check(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    limit = "" if most == 2**31 - 1 else f" to {most:,}"
    return check, f"a whole number from {least}{limit or ' on'}"


def _one_of(*names: str) -> Kind:
    shown = f"{', '.join(names[:-1])} or {names[-1]}"
    return lambda value: str(value).lower() in names, f"one of {shown}"


_BOOLEAN: Kind = (lambda value: isinstance(value, bool), "true or false")
_NUMBER: Kind = (lambda value: _is_number(value) and value >= 0, "a number from 0 on")
_SECOND_COUNT: Kind = (
    lambda value: _is_number(value) and 0 < value <= 86_400,  # noqa: PLR2004 - a day
    "a number of seconds",
)
_TEXT: Kind = (
    lambda value: (
        (isinstance(value, str) and bool(value.strip())) or type(value) is int
    ),
    "a text",
)
_SECTION: Kind = (lambda value: isinstance(value, dict), "a section with keys")
_LIST: Kind = (lambda value: isinstance(value, list), "a list, each with a dash")
_BROKERS: Kind = (
    lambda value: (
        bool(value)
        and all(map(_TEXT[0], value if isinstance(value, list) else [value]))
    ),
    "brokers, as HOST:PORT",
)
_CLASS: Kind = (
    lambda value: isinstance(value, str) and _RUBY_CLASS.fullmatch(value) is not None,
    "a Ruby class, as Shop::OrdersHandler",
)
_LEVEL = _one_of("debug", "info", "warn", "warning", "error", "fatal", "unknown")
_CODEC = _one_of("none", "gzip", "snappy", "lz4", "zstd")
_BACKOFF = {"min_ms": _whole(1, 3_600_000), "max_ms": _whole(1, 3_600_000)}


class _Translation:
    """One file's sections, each taken in turn."""

    def __init__(
        self, found: Mapping[str, Any], name: str, lines: Mapping[str, int]
    ) -> None:
        self._found = found
        self._name = name
        self._line_of = lines
        self._kafka: dict[str, Any] = {}
        self._notes: Lines = []
        self._variables: Lines = []
        self._handlers: Lines = []
        self.bad: Lines = []
        """Values that cannot be: where, key, value, and what it must be."""
        self._producer: dict[str, Any] = {}
        self._log: dict[str, Any] = {}
        self._max_retries: int | None = None
        self._backoff: dict[str, Any] = {}

    def made(self) -> Translated:
        """Return what is made of it, if nothing is bad."""
        sections: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "kafka": self._take_kafka,
            "consumer": self._take_consumer,
            "producer": self._take_producer,
            "logger": self._take_logger,
            "backoff": self._take_backoff,
            "db_checkpoint": self._take_checkpoint,
        }
        for name, section in self._found.items():
            take = sections.get(name)
            if name == "listeners" or section is None:
                continue
            if take is None:
                self._note(str(name), section)
            elif name == "logger" and section is False:
                self._note(name, section)
            elif self._is(name, section, _SECTION):
                take(section)
        text = "\n".join(self._lines(list(self._listeners())))
        return Translated(
            text, self._notes, self._variables, list(dict.fromkeys(self._handlers))
        )

    # --- sections -------------------------------------------------------------

    def _take_kafka(self, found: Mapping[str, Any]) -> None:
        for key, value in _said(found):
            name = f"kafka.{key}"
            if key in SECRETS:
                self._secret(name, SECRETS[key])
            elif key not in _KAFKA:
                self._take_seconds("kafka", key, value)
            elif self._is(name, value, _KAFKA[key]):
                self._take_kafka_key(key, value)
        self._set_protocol(found)

    def _take_kafka_key(self, key: str, value: Any) -> None:
        if key == "seed_brokers":
            self._kafka["bootstrap.servers"] = _brokers(value)
        elif key == "ssl_verify_hostname":
            setting = "ssl.endpoint.identification.algorithm"
            self._kafka[setting] = "https" if value else "none"
        elif key not in _ASKED:
            self._take_text(key, str(value))

    def _take_text(self, key: str, value: str) -> None:
        """Take a name, or a certificate or key, or the path of one."""
        is_text = "-----BEGIN" in value
        if key in _RENAMED:
            self._kafka[_RENAMED[key]] = value
        elif is_text and key == "ssl_client_cert_key":
            self._secret(f"kafka.{key}", SSL_TEXTS[key])
        elif is_text:
            self._kafka[SSL_TEXTS[key]] = value
        else:
            self._kafka[SSL_FILES[f"{key}_file_path"]] = value

    def _take_seconds(self, section: str, key: str, value: Any) -> None:
        name = f"{section}.{key}"
        if key not in _SECONDS:
            self._note(name, value)
        elif self._is(name, value, _SECOND_COUNT):
            self._kafka[_SECONDS[key]] = _milliseconds(key, value)

    def _set_protocol(self, found: Mapping[str, Any]) -> None:
        """Set what librdkafka wants to be told, and Phobos found by itself."""
        is_tls = any(
            value and str(key).startswith("ssl_") and key != "ssl_verify_hostname"
            for key, value in found.items()
        ) or bool(found.get("sasl_over_ssl", True) and _mechanism(found))
        mechanism = _mechanism(found)
        if mechanism:
            self._kafka["sasl.mechanism"] = mechanism
        if is_tls or mechanism:
            names = ("SASL_" if mechanism else "") + ("SSL" if is_tls else "PLAINTEXT")
            self._kafka["security.protocol"] = names

    def _take_consumer(self, found: Mapping[str, Any]) -> None:
        for key, value in _said(found):
            self._take_seconds("consumer", key, value)

    def _take_producer(self, found: Mapping[str, Any]) -> None:
        for key, value in _said(found):
            name = f"producer.{key}"
            if key == "required_acks":
                self._take_acks(value)
            elif key in _PRODUCER:
                if self._is(name, value, _NUMBER):
                    setting, factor, least = _PRODUCER[key]
                    self._producer[setting] = max(least, int(value * factor))
            elif key == "compression_codec":
                if self._is(name, value, _CODEC):
                    self._producer["compression.type"] = str(value).lower()
            else:
                self._note(name, value)

    def _take_acks(self, value: Any) -> None:
        """Take it if it is what an idempotent producer needs."""
        if str(value) in ("all", "-1", ":all"):
            self._producer["acks"] = "all"
        else:
            self._note("producer.required_acks", value)

    def _take_logger(self, found: Mapping[str, Any]) -> None:
        for key, value in _said(found):
            name = f"logger.{key}"
            if key == "stdout_json":
                if self._is(name, value, _BOOLEAN):
                    self._log["format"] = "json" if value else "console"
            elif key == "level":
                if self._is(name, value, _LEVEL):
                    level = str(value).lower()
                    known = {"warn": "warning", "fatal": "error", "unknown": "error"}
                    self._log["level"] = known.get(level, level)
            else:
                self._note(name, value)

    def _take_backoff(self, found: Mapping[str, Any]) -> None:
        self._backoff = self._backoff_of("backoff", found)

    def _take_checkpoint(self, found: Mapping[str, Any]) -> None:
        for key, value in _said(found):
            name = f"db_checkpoint.{key}"
            if key != "max_retries":
                self._note(name, value)
            elif self._is(name, value, _whole(0)):
                self._max_retries = value

    # --- listeners ------------------------------------------------------------

    def _listeners(self) -> Iterator[str]:
        listeners = self._found.get("listeners")
        if listeners is None or not self._is("listeners", listeners, _LIST):
            return
        for number, found in enumerate(listeners):
            if self._is(f"listeners[{number}]", found, _SECTION):
                yield from self._listener(f"listeners[{number}]", found)

    def _listener(self, where: str, found: Mapping[str, Any]) -> Iterator[str]:
        for key in ("topic", "group_id", "handler"):
            if found.get(key) is None:
                near = difflib.get_close_matches(key, map(str, found), n=1)
                hint = f"; did you mean it by {near[0]}?" if near else ""
                self.bad.append(f"{self._at(where)}{where}.{key} is missing{hint}")
        for key, value in _said(found):
            if key in _LISTENER:
                self._is(f"{where}.{key}", value, _LISTENER[key])
            else:
                self._note(f"{where}.{key}", value)
        own = self._backoff_of(f"{where}.backoff", found.get("backoff") or {})
        if not self.bad:
            yield from self._listener_lines(found, self._backoff | own)

    def _listener_lines(
        self, found: Mapping[str, Any], backoff: Mapping[str, Any]
    ) -> Iterator[str]:
        name = found["handler"]
        handler = _handler(name)
        self._handlers.append(handler)
        yield ""
        yield "[[listeners]]"
        yield f"topic = {_toml(str(found['topic']))}"
        yield f"group_id = {_toml(str(found['group_id']))}"
        yield f"handler = {_toml(handler)}   # was {name}: write it there"
        if found.get("start_from_beginning") is False:
            yield 'start = "latest"'
        if self._max_retries is not None:
            yield f"max_retries = {self._max_retries}"
        if found.get("max_concurrency") is not None:
            yield f"max_concurrency = {found['max_concurrency']}"
        for name, table in (("backoff", backoff), ("kafka", _own_kafka(found))):
            if table:
                pairs = ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in table.items())
                yield f"{name} = {{ {pairs} }}"

    def _backoff_of(self, where: str, found: Any) -> dict[str, Any]:
        """Return the keys that are set, beside those that hold for all listeners."""
        backoff: dict[str, Any] = {}
        for key, value in _said(found if isinstance(found, dict) else {}):
            if key not in _BACKOFF:
                self._note(f"{where}.{key}", value)
            elif self._is(f"{where}.{key}", value, _BACKOFF[key]):
                backoff[key] = value
        whole = {"min_ms": 500, "max_ms": 10_000} | self._backoff | backoff
        if backoff and whole["min_ms"] > whole["max_ms"]:
            self.bad.append(
                f"{self._at(where)}{where}: min_ms {whole['min_ms']} is above max_ms "
                f"{whole['max_ms']}"
            )
        return backoff

    # --- what is written ------------------------------------------------------

    def _lines(self, listeners: Iterable[str]) -> Iterator[str]:
        yield f"# Made of {self._name} by kappa-log init --from-phobos."
        yield "# Handlers are Python now: each named below is a class to be written."
        yield from self._comments(
            "Set these in the environment; secrets are not written here:",
            self._variables,
        )
        yield from self._comments(
            f"What has no setting here, and why, by the lines of {self._name}:",
            self._notes,
        )
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
        yield from listeners
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
        name = key.rpartition(".")[2]
        reason = REASONS.get(name)
        if reason is None:
            section = re.sub(r"\[\d+\]", "", key.rpartition(".")[0])
            near = difflib.get_close_matches(name, _KNOWN.get(section, ()), n=1)
            reason = UNKNOWN + (f"; did you mean {near[0]}?" if near else "")
        self._notes.append(f"{self._at(key)}{_shown(key, value)}: {reason}")

    def _is(self, key: str, value: Any, kind: Kind) -> bool:
        """Tell whether a value can be that of its key; note it if not."""
        check, wanted = kind
        if check(value):
            return True
        self.bad.append(f"{self._at(key)}{_shown(key, value)} is not {wanted}")
        return False

    def _at(self, key: str) -> str:
        """Return the line of a key, or of the nearest that holds it."""
        while key and key not in self._line_of:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return f"line {self._line_of[key]}: " if key else ""


_ASKED: dict[str, Kind] = {
    "sasl_over_ssl": _BOOLEAN,
    "sasl_scram_mechanism": _one_of("sha256", "sha512"),
    "ssl_ca_certs_from_system": _BOOLEAN,
}
"""Keys that the protocol is told by."""

_KAFKA: dict[str, Kind] = {
    "seed_brokers": _BROKERS,
    "ssl_verify_hostname": _BOOLEAN,
    **_ASKED,
    **dict.fromkeys((*_RENAMED, *SSL_TEXTS), _TEXT),
}
"""Keys of the cluster that there are settings for, beside times and secrets."""

_LISTENER: dict[str, Kind] = {
    "handler": _CLASS,
    "topic": _TEXT,
    "group_id": _TEXT,
    "start_from_beginning": _BOOLEAN,
    "backoff": _SECTION,
    "max_concurrency": _whole(1, 100),
    **dict.fromkeys(_FETCH, _NUMBER),
    **dict.fromkeys(_SECONDS, _SECOND_COUNT),
}
"""Keys of a listener that there are settings for."""

_KNOWN: dict[str, tuple[str, ...]] = {
    "": ("logger", "kafka", "producer", "consumer", "backoff", "db_checkpoint",
         "listeners"),
    "logger": ("stdout_json", "level", "file", "ruby_kafka"),
    "kafka": ("partitioner", *_KAFKA, *SECRETS, *_SECONDS),
    "producer": ("required_acks", "compression_codec", *_PRODUCER),
    "consumer": tuple(_SECONDS),
    "backoff": tuple(_BACKOFF),
    "db_checkpoint": ("max_retries",),
    "listeners": tuple(_LISTENER),
    "listeners.backoff": tuple(_BACKOFF),
}  # fmt: skip
"""Section → keys that a typo may have meant."""


def _said(found: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield what a section says; null says nothing."""
    for key, value in found.items():
        if value is not None:
            yield key, value


def _shown(key: str, value: Any) -> str:
    """Return a key and its value on one line; secrets are not shown."""
    return f"{' '.join(key.split())} = {_toml(_masked(key, value))}"


def _masked(key: str, value: Any, level: int = 0) -> Any:
    """Return a value without the secrets that it has or holds, however it is called."""
    is_key = isinstance(value, str) and "PRIVATE KEY" in value
    if is_key or _SECRET.search(key) or level == MAX_LEVELS:
        return "…"
    if isinstance(value, dict):
        return {str(k): _masked(str(k), v, level + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked("", item, level + 1) for item in value]
    return masked(key, value)


def _own_kafka(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what librdkafka is told for this listener alone."""
    fetching = {
        name: int(found[key] * factor)
        for key, (name, factor) in _FETCH.items()
        if found.get(key) is not None
    }
    return fetching | {
        name: _milliseconds(key, found[key])
        for key, name in _SECONDS.items()
        if found.get(key) is not None
    }


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
    *modules, kind = name.removeprefix("::").split("::")
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
