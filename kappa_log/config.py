"""Configuration: defaults, then kappa_log.toml, then KAPPA_LOG__ variables, then flags.

All of it is checked before anything is opened or written, and each value knows
where it came from. An unknown key is an error, never ignored: a setting with a typo
would silently not apply.
"""

from __future__ import annotations

import difflib
import os
import random
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from typing_extensions import override

from kappa_log.errors import ConfigError

FILE_NAME = "kappa_log.toml"

ENV_PREFIX = "KAPPA_LOG__"

DEFAULT = "default"
"""Origin of a value that nobody set."""

MIN_CONNECTIONS = 5
"""Fewest that a process can do with: who holds a lock reads and writes beside it."""

OTHER_CONNECTIONS = 20
"""Of a process besides its consumers: requests of the API, its jobs, live folding,
locks that are connections of their own."""

CONSUMER_CONNECTIONS = 3
"""Of a consumer: it writes a batch, looks at its lanes, and takes others meanwhile."""

_CLIENTS = ("kafka", "producer", "registry")
"""Sections that are handed to a client as they stand, under its own dotted names."""

_CLIENT_KEY = re.compile(rf"(?:listeners\.)?(?:{'|'.join(_CLIENTS)})\.(.+)")
_SECRET_KEY = re.compile(r"password|secret|key|token|user\.info", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?<=://)([^/@:]*):([^/]*)@")
_URL_SECRET = re.compile(
    r"([?&][^=&]*(?:password|secret|key)[^=&]*)=[^&]*", re.IGNORECASE
)
_SQLITE_FILE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)(.+)", re.DOTALL)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatabaseConfig(_Section):
    """Where the log is kept."""

    url: str = "sqlite:///kappa_log.db"
    """SQLAlchemy URL; a relative SQLite file lies in the configuration's folder."""
    prefix: str = "kappa_log_"
    """First part of the name of each table."""
    pool_size: int | None = Field(default=None, ge=MIN_CONNECTIONS, le=1000)
    """Most connections of a process at once; None: all that the settings can use."""


class BackoffConfig(_Section):
    """How long to wait between two attempts at one record."""

    min_ms: int = Field(default=500, ge=1)
    max_ms: int = Field(default=10_000, le=3_600_000)

    @model_validator(mode="after")
    def _in_order(self) -> BackoffConfig:
        _check_order(self.min_ms, self.max_ms)
        return self

    def drawn(self, attempts: int) -> float:
        """Draw how many seconds to wait after so many attempts; 0: none was made.

        The longest wait doubles with each attempt, and the wait is drawn from all of
        that span, so that many records that wait for one service do not ask it all at
        once. What was not tried at all waits for people, so about the longest time.
        """
        longest = self.max_ms
        if attempts:
            longest = min(self.min_ms * 2 ** min(attempts - 1, 32), self.max_ms)
        return random.uniform(0, longest) / 1000  # noqa: S311


class RestartConfig(_Section):
    """What becomes of a listener that crashed, while it runs as a service."""

    min_ms: int = Field(default=1_000, ge=1)
    max_ms: int = Field(default=60_000, le=3_600_000)
    max: int | None = Field(default=None, ge=0)
    """How often in a row, with no batch committed between; None without end."""

    @model_validator(mode="after")
    def _in_order(self) -> RestartConfig:
        _check_order(self.min_ms, self.max_ms)
        return self


def _check_order(min_ms: int, max_ms: int) -> None:
    if min_ms > max_ms:
        msg = f"min_ms {min_ms} is above max_ms {max_ms}"
        raise ValueError(msg)


Start = Literal["earliest", "latest"] | Annotated[int, Field(ge=0)]


class ListenerConfig(_Section):
    """One handler on one topic, for one consumer group."""

    topic: str = Field(min_length=1)
    """A topic, or with ``^`` in front a regular expression of topics."""
    group_id: str = Field(min_length=1)
    handler: str
    """``module:Class`` or ``module:function``, from the configuration's folder."""
    start: Start | dict[int, Start] = "earliest"
    """Where the very first run begins, for all partitions or by partition."""
    decoder: str = "json"
    dedupe: str = "payload"
    max_retries: int | None = Field(default=None, ge=0)
    """None retries for ever, in order."""
    backoff: BackoffConfig = BackoffConfig()
    park: Literal["key", "event"] = "key"
    max_concurrency: int = Field(default=1, ge=1, le=100)
    """Consumers of this process that share the topic's partitions, a thread each."""
    restart: RestartConfig = RestartConfig()
    kafka: dict[str, Any] = {}
    """librdkafka's settings for this listener alone, over those of ``[kafka]``."""

    @field_validator("kafka", mode="before")
    @classmethod
    def _join_kafka_keys(cls, value: object) -> object:
        return _joined(value)

    @field_validator("topic")
    @classmethod
    def _is_pattern(cls, topic: str) -> str:
        if topic.startswith("^"):
            try:
                with warnings.catch_warnings():
                    # What some later Python will read in another way.
                    warnings.simplefilter("error")
                    re.compile(topic)
            except (re.error, FutureWarning, DeprecationWarning) as error:
                msg = f"{topic!r} is no regular expression: {error}"
                raise ValueError(msg) from None
        return topic

    @field_validator("start", mode="before")
    @classmethod
    def _is_start(cls, start: Any) -> Any:
        """Refuse in one sentence what pydantic refuses in one for each alternative."""
        table = start if isinstance(start, dict) else {0: start}
        for partition, value in table.items():
            is_offset = type(value) is int and value >= 0
            is_start = is_offset or value in ("earliest", "latest")
            if not (is_start and str(partition).isdecimal()):
                msg = (
                    f"{start!r}; use earliest, latest, an offset from 0 on, or a table "
                    "of partitions with one of these for each"
                )
                raise ValueError(msg)
        return start

    @property
    def id(self) -> str:
        """What people call it by: group and topic."""
        return f"{self.group_id}-{self.topic}"

    @property
    def is_pattern(self) -> bool:
        """Tell whether it reads whatever topics there are of a pattern."""
        return self.topic.startswith("^")

    def covers(self, topic: str) -> bool:
        """Tell whether records of a topic are this listener's."""
        if self.is_pattern:
            return re.match(self.topic, topic) is not None
        return self.topic == topic


OnError = Literal["park", "stop"]
"""What a fold that raises does: it parks its key, or stops its projection."""


class ProjectionsConfig(_Section):
    """Where projections are declared, and what becomes of a fold that raises."""

    modules: list[str] = []
    """Packages, modules or folders; in the latter every module is imported."""
    on_error: OnError = "park"
    """Of live folding; a replay stops unless it is told otherwise."""


class IngestConfig(_Section):
    """How records become events."""

    batch_size: int = Field(default=2000, ge=1, le=100_000)
    """Records a transaction; bounds what is in memory and what a kill costs."""


class ArchiveConfig(_Section):
    """Where the log leaves as Parquet."""

    url: str = "archive"
    """A folder, from the configuration's, or for instance ``s3://BUCKET/FOLDER``."""
    segment_events: int = Field(default=1_000_000, ge=1, le=10_000_000)
    """Most events of a file, in an archive that is begun."""


class LogConfig(_Section):
    """What consume, run and serve log on stderr."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class ApiConfig(_Section):
    """Where the HTTP API listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535)
    hosts: list[str] = []
    """Names by which it may be called, besides those of loopback."""
    rate_per_second: float | None = Field(default=None, ge=0, le=1_000_000)
    """Requests a second of each token, and of each address that has none; 0 is no
    limit. None is 100 where tokens are needed, and no limit on loopback."""


class Config(BaseSettings):
    """All settings, checked; `load_config` gathers them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    database: DatabaseConfig = DatabaseConfig()
    kafka: dict[str, Any] = {}
    """Handed to librdkafka as it stands."""
    listeners: list[ListenerConfig] = []
    producer: dict[str, Any] = {}
    """librdkafka's settings for producers alone, over those of ``[kafka]``."""
    registry: dict[str, Any] = {}
    """Handed to the schema registry's client as it stands; ``url`` is where it is."""
    projections: ProjectionsConfig = ProjectionsConfig()
    ingest: IngestConfig = IngestConfig()
    archive: ArchiveConfig = ArchiveConfig()
    api: ApiConfig = ApiConfig()
    log: LogConfig = LogConfig()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _file: Path | None = PrivateAttr(default=None)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the file is, or would be; user code is imported from here."""
        return self._folder

    @property
    def file(self) -> Path | None:
        """The configuration file; None when the defaults are used."""
        return self._file

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key → default, kappa_log.toml, a variable's name, or a flag."""
        keys = [key for key, _ in _flat(self.model_dump(mode="json"))]
        return {key: self._origins.get(key, DEFAULT) for key in keys}

    @property
    def shown(self) -> dict[str, Any]:
        """Dotted key → value as people may see it: secrets are masked."""
        return {k: masked(k, v) for k, v in _flat(self.model_dump(mode="json"))}

    @field_validator(*_CLIENTS, mode="before")
    @classmethod
    def _join_client_keys(cls, value: object) -> object:
        return _joined(value)

    @property
    def pool_size(self) -> int:
        """Most connections to the database that a process may hold at once."""
        if self.database.pool_size is not None:
            return self.database.pool_size
        consumers = sum(listener.max_concurrency for listener in self.listeners)
        return OTHER_CONNECTIONS + CONSUMER_CONNECTIONS * consumers

    def of_listener(self, listener: ListenerConfig) -> Config:
        """Return the settings as one listener has them: its ``kafka`` over all's."""
        if not listener.kafka:
            return self
        return self.model_copy(update={"kafka": self.kafka | listener.kafka})

    @override
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,
        **more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is passed and nothing else: `load_config` keeps origins."""
        return (init_settings,)


def load_config(
    folder: str | PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Gather all settings and check them.

    Args:
        folder: Where the search for kappa_log.toml starts, upwards; the current
            folder if not given.
        overrides: Dotted key → value, as given by flags; they win.

    Raises:
        ConfigError: There is no such folder, or a file, variable or flag is wrong; the
            message names it, its key, and what was probably meant.
    """
    start = Path(folder or Path.cwd()).absolute()
    if not start.is_dir():
        msg = (
            f"there is no folder {start}; give the one that {FILE_NAME} is in. Nothing "
            "was opened"
        )
        raise ConfigError(msg)
    file = _find(start)
    base = file.parent if file else start
    has_examples = (base / "projections").is_dir()
    layers = [
        _Layer({"projections": {"modules": ["projections"]}} if has_examples else {}),
        _Layer(_read(file), lambda _: FILE_NAME),
        _environment(),
        _Layer(_nested(overrides or {}), _flag),
    ]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        merged = _merge(merged, layer.values)
        origins |= layer.origins
    try:
        config = Config(**merged)
    except ValidationError as error:
        raise _refusal(error.errors(), origins, file) from None
    database = config.database
    absolute = resolve_url(database.url, base)
    resolved = config.model_copy(
        update={"database": database.model_copy(update={"url": absolute})}
    )
    resolved._folder, resolved._file, resolved._origins = base, file, origins  # noqa: SLF001
    return resolved


def resolve_url(url: str, folder: Path) -> str:
    """Return a database URL whose relative SQLite file is made absolute."""
    found = _SQLITE_FILE.fullmatch(url)
    return f"{found[1]}{folder.absolute() / found[2]}" if found else url


def masked(key: str, value: Any) -> Any:
    """Return a setting's value without the secrets in it.

    Passwords in URLs are hidden, and in what is handed to clients all that is called
    password, secret, key, token or user.info.
    """
    if isinstance(value, list):
        return [masked(key, found) for found in value]
    if isinstance(value, dict):
        return {name: masked(f"{key}.{name}", found) for name, found in value.items()}
    found = _CLIENT_KEY.fullmatch(key)
    if found and _SECRET_KEY.search(found[1]):
        return "***"
    if not isinstance(value, str):
        return value
    return _URL_SECRET.sub(r"\1=***", _URL_PASSWORD.sub(r"\1:***@", value))


def packaged(name: str) -> Path:
    """Return a folder that comes with kappa_log: ``migrations`` or ``projections``.

    In a checkout the top-level folder; an editable install's copy goes stale.
    """
    package = Path(__file__).parent
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return package / f"_{name}"


class _Layer:
    """Settings of one origin, and the dotted keys that they set."""

    def __init__(self, values: dict[str, Any], origin: Any = lambda _: DEFAULT) -> None:
        self.values = values
        self.origins = {key: origin(key) for key, _ in _flat(values)}


def _find(start: Path) -> Path | None:
    for folder in (start, *start.parents):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        msg = f"{file} is no TOML: {error}"
    except UnicodeDecodeError as error:
        msg = f"{file} is no UTF-8 text: {error.reason} at byte {error.start}"
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror}"
    raise ConfigError(msg)


class _NotJson(ValueError):
    """A variable's value that must be JSON is none."""


class _Variables(EnvSettingsSource):
    """The KAPPA_LOG__ variables; says which of them is no JSON."""

    @override
    def decode_complex_value(
        self, field_name: str, field: FieldInfo, value: Any
    ) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError as error:
            ours = [name for name in _our_variables() if os.environ[name] == value]
            msg = f"{', '.join(ours)}: {value!r} is no JSON ({error})"
            raise _NotJson(msg) from None


def _our_variables() -> list[str]:
    return sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX))


def _environment() -> _Layer:
    names = {name.lower(): name for name in _our_variables()}
    for lowered, name in names.items():
        section = lowered.removeprefix(ENV_PREFIX.lower()).partition("__")[0]
        if section not in Config.model_fields:
            known = [ENV_PREFIX + section.upper() for section in Config.model_fields]
            near = did_you_mean((ENV_PREFIX + section).upper(), known)
            msg = f"variable {name} sets nothing{near}"
            raise ConfigError(msg)
    try:
        values = _Variables(Config)()
    except SettingsError as error:
        msg = f"variable {error.__cause__ or error}"
        raise ConfigError(msg) from None
    for section in _CLIENTS:
        if isinstance(values.get(section), dict):
            # A variable's name has no dots; the clients' names have no underscores.
            values[section] = {
                name.replace("_", "."): value for name, value in values[section].items()
            }

    def origin(key: str) -> str:
        section, _, name = key.partition(".")
        separator = "_" if section in _CLIENTS else "__"
        whole = ENV_PREFIX.lower() + section
        wanted = f"{whole}__{name.replace('.', separator)}" if name else whole
        return names.get(wanted) or names.get(whole) or wanted.upper()

    return _Layer(values, origin)


def _flag(key: str) -> str:
    return "--" + key.rpartition(".")[2].replace("_", "-")


def _joined(value: object) -> object:
    """Take ``bootstrap.servers = …`` without quotes, which TOML nests, too."""
    return dict(_flat(value)) if isinstance(value, dict) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in dotted.items():
        for name in reversed(key.split(".")):
            value = {name: value}  # noqa: PLW2901 - wrapped once a level
        found = _merge(found, value)
    return found


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _refusal(
    errors: Iterable[ErrorDetails], origins: Mapping[str, str], file: Path | None
) -> ConfigError:
    lines = []
    for error in errors:
        loc = error["loc"]
        key = _dotted(loc)
        where = _origin(loc, origins)
        if where == FILE_NAME and file is not None:
            where = str(file)
        lines.append(f"{where}: {key} {_complaint(error)}")
    return ConfigError("\n".join(lines))


def _dotted(loc: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    return "".join(parts).removeprefix(".")


def _origin(loc: tuple[int | str, ...], origins: Mapping[str, str]) -> str:
    """Return who set the value, or the nearest that holds it or lies in it."""
    for end in range(len(loc), 0, -1):
        key = ".".join(map(str, loc[:end]))
        if key in origins:
            return origins[key]
    inside = _dotted(loc) + "."
    return next((o for k, o in origins.items() if k.startswith(inside)), FILE_NAME)


def _complaint(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        *path, name = error["loc"]
        known = _keys_at(path)
        return f"is not a setting{did_you_mean(str(name), known)}"
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "model_type":
        return "is a section; set the keys in it"
    if error["type"] == "value_error":
        return f"is wrong: {error['ctx']['error']}"
    message = error["msg"]
    return f"is {error['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys_at(path: list[int | str]) -> list[str]:
    """Return the keys that the section at a path may have."""
    model: type[BaseModel] = Config
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            inner = getattr(annotation, "__args__", (annotation,))[0]
            assert isinstance(inner, type)
            assert issubclass(inner, BaseModel)
            model = inner
    return list(model.model_fields)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about a name that is none of those known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
