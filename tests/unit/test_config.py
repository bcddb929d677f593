"""Configuration: what is taken, from where, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from kappa_log.config import Config, load_config, masked, packaged, resolve_url
from kappa_log.errors import ConfigError

EXAMPLE = """
[database]
url = "postgresql+psycopg://ada:secret@db/shop"
[kafka]
"bootstrap.servers" = "localhost:9092"
"sasl.password" = "hush"
[[listeners]]
topic = "orders"
group_id = "billing"
handler = "handlers:OrdersHandler"
max_retries = 3
backoff = { min_ms = 50, max_ms = 100 }
park = "event"
[projections]
modules = ["shop.views"]
[ingest]
batch_size = 10
[archive]
url = "s3://bucket/archive"
[api]
host = "0.0.0.0"
port = 80
"""


def write(folder: Path, text: str) -> Path:
    """Write a configuration file, and return its folder."""
    (folder / "kappa_log.toml").write_text(text)
    return folder


def refusal(folder: Path, text: str) -> str:
    """Return the message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    return str(caught.value)


# --- what is taken -----------------------------------------------------------


def test_without_a_file_the_defaults_work_in_the_current_folder(tmp_path: Path) -> None:
    """SEED X2: the first command works without any configuration."""
    config = load_config(tmp_path)

    assert config.file is None
    assert config.folder == tmp_path
    assert config.database.url == f"sqlite:///{tmp_path}/kappa_log.db"
    assert config.projections.modules == []
    assert set(config.origins.values()) == {"default"}


def test_every_documented_key_is_taken(tmp_path: Path) -> None:
    """DESIGN's example file means what it says."""
    config = load_config(write(tmp_path, EXAMPLE))
    listener = config.listeners[0]

    assert config.database.url == "postgresql+psycopg://ada:secret@db/shop"
    assert config.kafka["bootstrap.servers"] == "localhost:9092"
    assert (listener.topic, listener.group_id) == ("orders", "billing")
    assert (listener.decoder, listener.dedupe) == ("json", "payload")
    assert (listener.max_retries, listener.park) == (3, "event")
    assert (listener.backoff.min_ms, listener.backoff.max_ms) == (50, 100)
    assert config.projections.modules == ["shop.views"]
    assert config.ingest.batch_size == 10
    assert config.archive.url == "s3://bucket/archive"
    assert (config.api.host, config.api.port) == ("0.0.0.0", 80)  # noqa: S104


def test_a_folder_of_projections_beside_the_configuration_is_found(
    tmp_path: Path,
) -> None:
    """Projections need no setting where everybody puts them."""
    (tmp_path / "projections").mkdir()

    assert load_config(tmp_path).projections.modules == ["projections"]


def test_the_file_is_found_upwards_and_its_folder_counts(tmp_path: Path) -> None:
    """SEED G1: a command typed in a subfolder means the same log."""
    inner = write(tmp_path, '[database]\nurl = "sqlite:///data/log.db"') / "a" / "b"
    inner.mkdir(parents=True)

    config = load_config(inner)

    assert config.file == tmp_path / "kappa_log.toml"
    assert config.folder == tmp_path
    assert config.database.url == f"sqlite:///{tmp_path}/data/log.db"


def test_the_folder_may_be_text_and_must_be_there(tmp_path: Path) -> None:
    """A log that is not found must not become a new one somewhere else."""
    write(tmp_path, '[database]\nurl = "sqlite:///x.db"')

    assert load_config(str(tmp_path)) == load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder .*/nowhere; give the"):
        load_config(tmp_path / "nowhere")


def test_kafka_keys_may_stand_without_quotes(tmp_path: Path) -> None:
    """TOML nests dotted keys; librdkafka's are flat."""
    config = load_config(write(tmp_path, '[kafka]\nbootstrap.servers = "b:9092"'))

    assert config.kafka == {"bootstrap.servers": "b:9092"}


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("sqlite:///log.db", "sqlite:////base/log.db"),
        ("sqlite+pysqlite:///a/b.db", "sqlite+pysqlite:////base/a/b.db"),
        ("sqlite:////tmp/log.db", "sqlite:////tmp/log.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://host/name", "postgresql://host/name"),
        ("nonsense", "nonsense"),
    ],
)
def test_only_a_relative_sqlite_file_is_resolved(url: str, resolved: str) -> None:
    """Every other URL is the database's own affair."""
    assert resolve_url(url, Path("/base")) == resolved


# --- where it comes from -----------------------------------------------------


def test_flags_win_over_variables_and_variables_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEED G1, G2, X5: what is said later and nearer counts."""
    write(tmp_path, "[ingest]\nbatch_size = 1\n[api]\nport = 1\n[archive]\nurl = 'f'")
    monkeypatch.setenv("KAPPA_LOG__INGEST__BATCH_SIZE", "2")
    monkeypatch.setenv("KAPPA_LOG__API__PORT", "2")

    config = load_config(tmp_path, {"api.port": 3})

    assert (config.api.port, config.ingest.batch_size) == (3, 2)
    assert config.archive.url == "f"
    assert config.origins["api.port"] == "--port"
    assert config.origins["ingest.batch_size"] == "KAPPA_LOG__INGEST__BATCH_SIZE"
    assert config.origins["archive.url"] == "kappa_log.toml"
    assert config.origins["api.host"] == "default"


def test_variables_reach_lists_and_kafka_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is configured by variables alone."""
    monkeypatch.setenv("KAPPA_LOG__PROJECTIONS__MODULES", '["one", "two"]')
    monkeypatch.setenv("KAPPA_LOG__KAFKA__BOOTSTRAP_SERVERS", "b:9092")

    config = load_config(tmp_path)

    assert config.projections.modules == ["one", "two"]
    assert config.kafka == {"bootstrap.servers": "b:9092"}
    origin = config.origins["kafka.bootstrap.servers"]
    assert origin == "KAPPA_LOG__KAFKA__BOOTSTRAP_SERVERS"


def test_a_config_made_in_python_reads_no_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a program says is what it gets."""
    monkeypatch.setenv("KAPPA_LOG__API__PORT", "1")

    assert Config().api.port == 8080


# --- secrets -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("database.url", "postgresql://a:b@h/n", "postgresql://a:***@h/n"),
        ("database.url", "postgresql://a:p@s:s@h/n", "postgresql://a:***@h/n"),
        (
            "database.url",
            "postgresql://h/n?password=x&a=1",
            "postgresql://h/n?password=***&a=1",
        ),
        ("database.url", "sqlite:////tmp/log.db", "sqlite:////tmp/log.db"),
        ("kafka.sasl.password", "hush", "***"),
        ("kafka.ssl.key.pem", "hush", "***"),
        ("kafka.client.secret", "hush", "***"),
        ("kafka.client.id", "me", "me"),
        ("api.port", 80, 80),
    ],
)
def test_secrets_are_not_shown(key: str, value: object, shown: object) -> None:
    """What config show prints is pasted into tickets."""
    assert masked(key, value) == shown


def test_shown_settings_hold_no_secret(tmp_path: Path) -> None:
    """No way around the masks."""
    text = str(load_config(write(tmp_path, EXAMPLE)).shown)

    assert "hush" not in text
    assert "secret" not in text


# --- what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[database]\nulr = "x"', "database.ulr is not a setting; did you mean url?"),
        ("[databse]\n", "databse is not a setting; did you mean database?"),
        ("zzz = 1", "there are: database, kafka, listeners"),
        ("ingest = 5", "ingest is a section"),
        ("[ingest]\nbatch_size = 0", "ingest.batch_size is 0: input should be greater"),
        ("[ingest]\nbatch_size = 'many'", "ingest.batch_size is 'many'"),
        ("[[listeners]]\ntopic = 'a'", "listeners[0].group_id is missing"),
        (
            "[[listeners]]\ntopic='a'\ngroup_id='g'\nhandler='h:H'\ntopik='b'",
            "listeners[0].topik is not a setting; did you mean topic?",
        ),
        (
            "[[listeners]]\ntopic='a'\ngroup_id='g'\nhandler='h:H'\npark='no'",
            "listeners[0].park is 'no': input should be 'key' or 'event'",
        ),
        (
            "[[listeners]]\ntopic='a'\ngroup_id='g'\nhandler='h:H'\nbackoff={max_ms=1}",
            "min_ms 500 is above max_ms 1",
        ),
        (
            "[[listeners]]\ntopic='a'\ngroup_id='g'\nhandler='h:H'\nbackoff={mn_ms=9}",
            "listeners[0].backoff.mn_ms is not a setting; did you mean min_ms?",
        ),
        ("[database]\nurl = = 1", "at line 2, column 7"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(
    tmp_path: Path, text: str, said: str
) -> None:
    """SEED L6, X5: the message says where, what, and what was probably meant."""
    message = refusal(tmp_path, text)

    assert str(tmp_path / "kappa_log.toml") in message
    assert said in message


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """Nobody likes to mend a file one error at a time."""
    message = refusal(tmp_path, "[api]\nprot = 1\n[ingest]\nbatch_size = 0")

    assert "api.prot" in message
    assert "ingest.batch_size" in message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Bytes of another encoding are said, not guessed."""
    (tmp_path / "kappa_log.toml").write_bytes(b"url = '\xff'")

    with pytest.raises(ConfigError, match="no UTF-8 text"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KAPPA_LOG__DATABSE__URL", "x", "did you mean KAPPA_LOG__DATABASE?"),
        ("KAPPA_LOG__DATABASE__ULR", "x", "did you mean url?"),
        ("KAPPA_LOG__INGEST__BATCH_SIZE", "x", "ingest.batch_size is 'x'"),
        ("KAPPA_LOG__PROJECTIONS__MODULES", "a,b", "'a,b' is no JSON"),
        ("KAPPA_LOG__LISTENERS", "5", "input should be a valid list"),
        ("KAPPA_LOG__INGEST", "5", "ingest is a section"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    said: str,
) -> None:
    """A variable with a typo would otherwise silently not apply."""
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)

    assert name in str(caught.value)
    assert said in str(caught.value)


def test_a_wrong_flag_is_refused_by_name(tmp_path: Path) -> None:
    """The flag is what the user typed."""
    with pytest.raises(ConfigError, match=r"--port: api\.port is 'x'"):
        load_config(tmp_path, {"api.port": "x"})


# --- what comes along --------------------------------------------------------


@pytest.mark.parametrize("name", ["migrations", "projections"])
def test_what_comes_along_is_found(name: str) -> None:
    """Migrations and examples are there, in a checkout as in a wheel."""
    assert list(packaged(name).rglob("*.py"))


# --- what is handed to clients -----------------------------------------------

CLIENTS = """
[kafka]
"bootstrap.servers" = "b:9092"
linger.ms = 1
[producer]
"transactional.id" = "shop"
[registry]
url = "https://ada:secret@registry"
basic.auth.user.info = "ada:hush"
[[listeners]]
topic = "orders"
group_id = "billing"
handler = "handlers:consume"
max_concurrency = 3
restart = { min_ms = 5, max = 0 }
[listeners.kafka]
fetch.min.bytes = 9
"sasl.password" = "hush"
"""


def test_each_client_has_its_settings_under_its_own_names(tmp_path: Path) -> None:
    """SEED L1, L6, X7: a listener's go over those of all, and change no other's."""
    config = load_config(write(tmp_path, CLIENTS))
    listener = config.listeners[0]
    own = config.of_listener(listener)

    assert own.kafka == config.kafka | {"fetch.min.bytes": 9, "sasl.password": "hush"}
    assert "fetch.min.bytes" not in config.kafka
    assert (own.folder, own.file) == (config.folder, config.file)
    assert config.of_listener(listener.model_copy(update={"kafka": {}})) is config
    assert config.producer == {"transactional.id": "shop"}
    assert config.registry["basic.auth.user.info"] == "ada:hush"
    assert (listener.max_concurrency, listener.restart.min_ms) == (3, 5)
    assert (listener.restart.max_ms, listener.restart.max) == (60_000, 0)


def test_secrets_of_clients_are_masked_wherever_they_stand(tmp_path: Path) -> None:
    """Also in the table of a listener."""
    shown = load_config(write(tmp_path, CLIENTS)).shown

    assert shown["listeners"][0]["kafka"]["sasl.password"] == "***"
    assert shown["listeners"][0]["kafka"]["fetch.min.bytes"] == 9
    assert shown["registry.basic.auth.user.info"] == "***"
    assert shown["registry.url"] == "https://ada:***@registry"


def test_variables_of_clients_have_underscores_for_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password best comes this way; where it came from is known."""
    name = "KAPPA_LOG__REGISTRY__BASIC_AUTH_USER_INFO"
    monkeypatch.setenv(name, "ada:new")
    config = load_config(write(tmp_path, CLIENTS))

    assert config.registry["basic.auth.user.info"] == "ada:new"
    assert config.origins["registry.basic.auth.user.info"] == name


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_concurrency = 0", "listeners[0].max_concurrency is 0"),
        ("restart = { min_ms = 9, max_ms = 8 }", "min_ms 9 is above max_ms 8"),
        ("restart = { mx = 1 }", "restart.mx is not a setting; did you mean max?"),
    ],
)
def test_wrong_settings_of_a_listener_are_refused(
    tmp_path: Path, setting: str, said: str
) -> None:
    """SEED F5, X3: the message names the listener and the key."""
    listener = "[[listeners]]\ntopic = 'a'\ngroup_id = 'g'\nhandler = 'h:H'\n"

    assert said in refusal(tmp_path, listener + setting)
