"""A phobos.yml as kappa_log.toml: each key is set, or named with the reason."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kappa_log.config import load_config
from kappa_log.errors import ConfigError
from kappa_log.phobos.settings import translated

EXAMPLE = """\
# As Phobos writes it (config/phobos.yml.example), and what people add.
logger:
  file: log/phobos.log
  stdout_json: true
  level: warn
  ruby_kafka:
    level: error
kafka:
  client_id: shop
  connect_timeout: 0.5
  socket_timeout: 15
  ssl_ca_cert: |
    -----BEGIN CERTIFICATE-----
    MIIB
    -----END CERTIFICATE-----
  ssl_client_cert_key_password: hush
  sasl_scram_username: kappa
  sasl_scram_password: swordfish
  sasl_scram_mechanism: sha512
  seed_brokers: [kafka+ssl://one:9093, two:9093]
  partitioner: murmur2
producer:
  ack_timeout: 5
  required_acks: all
  compression_codec: null
  max_queue_size: 1000
  delivery_threshold: 1
  delivery_interval: 2
  persistent_connections: true
consumer:
  session_timeout: 30
  offset_commit_interval: 10
  heartbeat_interval: 10
backoff: &backoff
  min_ms: 1000
  max_ms: 60000
db_checkpoint:
  max_retries: 3
listeners:
  - handler: Shop::OrdersHandler
    topic: orders
    group_id: billing
    max_concurrency: 2
    start_from_beginning: false
    max_bytes_per_partition: 524288
    min_bytes: 1
    max_wait_time: 5
    force_encoding: UTF-8
    delivery: batch
    backoff:
      <<: *backoff
      min_ms: 500
    session_timeout: 30
    offset_commit_interval: 15
    offset_commit_threshold: 5
    offset_retention_time: 172800
    heartbeat_interval: 20
  - handler: RefundsHandler
    topic: refunds
    group_id: billing
    colour: blue
    max_concurency: 3
statsd:
  host: localhost
  password: sesame
  url: redis://me:sesame@cache/1
"""


CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def written(folder: Path, text: str) -> str:
    """Return the translation of a phobos.yml, put where it is found, and loaded."""
    file = folder / "phobos.yml"
    file.write_text(text)
    made = translated(file).text
    (folder / "kappa_log.toml").write_text(made)
    load_config(folder)
    return made


def test_what_there_is_a_setting_for_is_set(tmp_path: Path) -> None:
    """SEED G8, X6, X8, X9: and the file loads, every key checked."""
    written(tmp_path, EXAMPLE)

    config = load_config(tmp_path)

    assert (
        config.kafka.items()
        >= {
            "client.id": "shop",
            "bootstrap.servers": "one:9093,two:9093",
            "socket.connection.setup.timeout.ms": 1000,
            "socket.timeout.ms": 15_000,
            "ssl.ca.pem": CERTIFICATE,
            "sasl.username": "kappa",
            "sasl.mechanism": "SCRAM-SHA-512",
            "security.protocol": "SASL_SSL",
            "session.timeout.ms": 30_000,
            "heartbeat.interval.ms": 10_000,
        }.items()
    )
    assert (
        config.producer.items()
        >= {
            "request.timeout.ms": 5000,
            "acks": "all",
        }.items()
    )
    assert (config.log.format, config.log.level) == ("json", "warning")
    orders, refunds = config.listeners
    assert (orders.topic, orders.group_id) == ("orders", "billing")
    assert orders.handler == "shop:OrdersHandler"
    assert (orders.start, orders.max_retries) == ("latest", 3)
    assert orders.max_concurrency == 2
    assert orders.kafka == {
        "max.partition.fetch.bytes": 524_288,
        "fetch.min.bytes": 1,
        "fetch.wait.max.ms": 5000,
        "session.timeout.ms": 30_000,
        "heartbeat.interval.ms": 20_000,
    }
    assert (orders.backoff.min_ms, orders.backoff.max_ms) == (500, 60_000)
    assert refunds.handler == "handlers:RefundsHandler"
    assert (refunds.start, refunds.backoff.min_ms) == ("earliest", 1000)


def test_what_there_is_no_setting_for_is_listed_with_the_reason(
    tmp_path: Path,
) -> None:
    """Nothing is left out in silence, not even what nobody knows.

    SEED L14, P1, P4.
    """
    made = written(tmp_path, EXAMPLE)

    for key, reason in {
        "listeners[0].offset_retention_time = 172800": "offsets are kept in SQL",
        "listeners[0].force_encoding": "payloads are UTF-8",
        "listeners[0].delivery": "records come in batches",
        "listeners[1].colour": "no key of Phobos that is known",
        "listeners[1].max_concurency = 3": "did you mean max_concurrency?",
        "statsd": "no key of Phobos that is known",
        "kafka.partitioner": "consistent_random",
        "producer.max_queue_size = 1000": "one queue: max_buffer_size",
        "producer.delivery_threshold = 1": "linger.ms",
        "producer.delivery_interval = 2": "linger.ms",
        "producer.persistent_connections = true": "librdkafka keeps its connections",
        'logger.file = "log/phobos.log"': "logs go to stderr",
    }.items():
        assert re.search(
            f"#   line \\d+: {re.escape(key)}.*: .*{re.escape(reason)}", made
        ), key


def test_secrets_become_variables(tmp_path: Path) -> None:
    """The file is likely to be committed."""
    made = written(tmp_path, EXAMPLE)

    assert "swordfish" not in made
    assert "hush" not in made
    assert "sesame" not in made
    assert "KAPPA_LOG__KAFKA__SASL_PASSWORD   (was kafka.sasl_scram_password)" in made
    assert "KAPPA_LOG__KAFKA__SSL_KEY_PASSWORD" in made


def test_each_key_of_the_example_is_in_what_is_made(tmp_path: Path) -> None:
    """Set, or in a comment: looked at by the value, which no other key has."""
    numbers = iter(range(1001, 2000))
    keys = re.sub(
        r"(?<!max_concurrency)(?<!min_ms)(: )[\d.]+$",
        lambda f: f"{f[1]}{next(numbers)}",
        EXAMPLE,
        flags=re.MULTILINE,
    )
    values = re.findall(r": (\d{4})$", keys, flags=re.MULTILINE)

    made = written(tmp_path, keys)

    assert len(values) > 15
    assert [value for value in values if value not in made] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kafka:\n  client_id: <%= ENV['ID'] %>\n", "line 2: Ruby code (ERB) cannot"),
        ("kafka: [", "is no YAML"),
        ("- 1\n", "has no sections"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """Guessing a value would connect to another cluster than was meant."""
    with pytest.raises(ConfigError, match=re.escape(words)):
        written(tmp_path, text)


LISTENER = "listeners:\n- {topic: orders, group_id: billing, handler: Orders%s}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LISTENER % ", start_from_beginning: 'no'", 'ing = "no" is not true or false'),
        (LISTENER % ", max_concurrency: 0", "ency = 0 is not a whole number from 1 to"),
        (LISTENER % ", topc: a, topic: ", "[0].topic is missing; did you mean it by"),
        (LISTENER % "::x", '[0].handler = "Orders::x" is not a Ruby class'),
        (LISTENER % ", backoff: {min_ms: 90000}", "min_ms 90000 is above max_ms 10000"),
        ("listeners: nope\n", 'line 1: listeners = "nope" is not a list'),
        ("listeners:\n- nope\n", 'line 2: listeners[0] = "nope" is not a section'),
        ("listeners:\n- topic: a\n", "line 2: listeners[0].handler is missing"),
        ("kafka: 1\n", "line 1: kafka = 1 is not a section"),
        ("kafka:\n  connect_timeout: soon\n", 'line 2: kafka.connect_timeout = "soon"'),
        ("kafka: {seed_brokers: []}\n", "kafka.seed_brokers = [] is not brokers"),
        (
            "db_checkpoint:\n  max_retries: two\n",
            'line 2: db_checkpoint.max_retries = "',
        ),
        ("logger:\n  level: trace\n", 'line 2: logger.level = "trace" is not one of'),
        ("producer: {max_retries: .nan}\n", "is not a number from 0 on"),
        (
            "listeners:\n" + 2 * (LISTENER % "").partition("\n")[2],
            "two listeners are billing-orders",
        ),
        ('kafka: {client_id: "\\x7f"}\n', "cannot be set here"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    """Not copied into a file that no command would take, nor left out."""
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        written(tmp_path, text)

    assert "nothing was written" in str(raised.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    """And where a value comes from elsewhere, the line of it that holds it."""
    text = "x: &x\n  max_concurrency: -1\nlisteners:\n- <<: *x\n  topic: a\n"

    with pytest.raises(ConfigError) as raised:
        written(tmp_path, text)

    missing, another, wrong = str(raised.value).splitlines()[1:]
    assert missing == "  line 4: listeners[0].group_id is missing"
    assert another == "  line 4: listeners[0].handler is missing"
    assert wrong.startswith(
        "  line 2: listeners[0].max_concurrency = -1 is not a whole"
    )


def test_a_commented_line_of_ruby_is_no_code(tmp_path: Path) -> None:
    """It does nothing there, and nothing here."""
    made = written(tmp_path, "kafka:\n  client_id: a # <%= x %>\n")

    assert tomllib.loads(made)["kafka"] == {"client.id": "a"}


def test_without_the_yaml_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """It is an extra: most projects never need it."""
    monkeypatch.setitem(sys.modules, "yaml", None)

    with pytest.raises(ConfigError, match=re.escape("kappa-log[phobos]")):
        written(tmp_path, EXAMPLE)
