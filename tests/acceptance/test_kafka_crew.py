"""A listener's consumers: several of one, made anew after a crash, refused at once.

SEED L6 to L9 and X3: settings by listener, max_concurrency, restarts, validation.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from typing_extensions import override

from kappa_log import Handler
from kappa_log.cli import run
from kappa_log.decoders import registry
from kappa_log.errors import (
    ConfigError,
    HandlerError,
    RegistryUnavailable,
    SourceError,
)
from kappa_log.kafka import client
from kappa_log.telemetry.notices import NAMES, Notice, subscribe
from support.kafka_broker import RealBroker
from support.mock_broker import MockBroker
from support.topics import Shop

SOON = {"restart": {"min_ms": 5, "max_ms": 20}, "backoff": {"min_ms": 1, "max_ms": 20}}


@pytest.fixture
def shop(mock_broker: MockBroker, sqlite_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on topic ``t`` of four partitions, on a mock broker."""
    mock_broker.create_topic("t", 4)
    with Shop(mock_broker, "t", sqlite_url, tmp_path) as found:
        yield found


@pytest.fixture
def real(kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on a new topic of a real broker.

    Whoever joins a group of the mock that a member just left waits for that one's
    session to end.
    """
    topic = kafka_broker.new_topic(4)
    with Shop(kafka_broker, topic, sqlite_url, tmp_path) as found:
        yield found


def publish(shop: Shop, *numbers: int) -> None:
    """Publish orders of these numbers, over all partitions."""
    with shop.app.producer() as producer:
        producer.publish_list(
            {"topic": shop.topic, "payload": {"id": n}, "partition": n % 4}
            for n in numbers
        )


def raising(words: str, times: int) -> Callable[[Any], None]:
    """Return a callback that raises the first so many times it is told such words."""
    left = [times]

    def told(what: Any) -> None:
        if words in str(what) and left[0]:
            left[0] -= 1
            msg = "the screen is full"
            raise OSError(msg)

    return told


# --- crashes -----------------------------------------------------------------


def test_a_listener_that_crashed_goes_on_where_the_log_says(real: Shop) -> None:
    """SEED L8: each crash is told; nothing is lost or doubled, and all is counted."""
    shop = real
    shop.configure(SOON)
    publish(shop, *range(8))

    crashes: list[Notice] = []

    with (
        subscribe("listener_crashed", crashes.append),
        shop.running(on_progress=raising("", 2)) as running,
    ):
        running.wait_for(lambda: running.told("crashed: OSError") >= 1, "a crash")
        publish(shop, *range(8, 12))
        running.wait_for(lambda: len(shop.events()) == 12, "all of them")
        # Told to stop before, it would not be made anew.
        running.wait_for(lambda: len(crashes) == 2, "both crashes")

    assert sorted(map(int, filter(None, shop.ids()))) == list(range(12))
    assert running.told(": the screen is full at told, line ")
    (report,) = running.reports
    assert report.counts.acked == 12
    assert [crash.payload["exception"][0] for crash in crashes] == ["OSError"] * 2
    assert [crash.payload["retry_count"] for crash in crashes] == [1, 1]
    assert shop.app.verify().ok


def test_subscribers_are_told_of_starts_and_stops(
    real: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEED L3, L4, L5 and L9, in that order; P13: the wait that is told is waited.

    Each is told when it is true: a handler has started or stopped, a group is left.
    """
    shop = real
    done: list[str] = []

    class Leaving(confluent_kafka.Consumer):
        @override
        def close(self) -> None:
            super().close()
            done.append("left")

    monkeypatch.setattr(client, "Consumer", Leaving)
    monkeypatch.setattr(Handler, "start", lambda _: done.append("start"))
    monkeypatch.setattr(Handler, "stop", lambda _: done.append("stop"))
    hour = 3_600_000
    shop.configure({"max_retries": 1, "backoff": {"min_ms": hour, "max_ms": hour}})
    with shop.app.producer() as producer:
        producer.publish(topic=shop.topic, payload={"do": "raise"}, partition=2)
    told: list[Notice] = []

    with (
        subscribe("*", told.append),
        subscribe("*", lambda notice: done.append(notice.name)),
        shop.running() as running,
    ):
        running.wait_for(lambda: running.told("is tried again"), "the record waits")
        running.end()

    order = [what for what in done if what in (*OF_RUNS, "start", "stop", "left")]
    assert order == [
        *("start", "handler_started", "listener_started", "run_stopping"),
        *("listener_stopping", "retry_aborted", "stop", "handler_stopped"),
        *("left", "listener_stopped"),
    ]
    facts = {notice.name: notice.payload for notice in told}
    listener = {
        "listener_id": f"{shop.group}-{shop.topic}",
        "group_id": shop.group,
        "topic": shop.topic,
        "handler": facts["handler_started"]["handler"],
    }
    assert facts["run_stopping"] == {"listener_ids": [listener["listener_id"]]}
    for name in OF_RUNS - {"listener_crashed"}:
        if name not in ("run_stopping", "retry_aborted"):
            assert facts[name] == listener
    record = {"partition": 2, "offset": 0, "retry_count": 1}
    assert facts["retry_aborted"] == listener | record
    wait = facts["record_retried"]["waiting_time"]
    assert 0 < wait < 3_600
    assert running.told(f"in its place, in {wait:.1f} s")


OF_RUNS = {name for name in NAMES if name.startswith(("handler_", "listener_"))} | {
    "run_stopping",
    "retry_aborted",
}


def test_what_did_not_happen_is_not_told(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that never began has not stopped; at its end it was not asked to."""
    publish(shop, 1)
    told: list[str] = []

    def start(_: Handler) -> None:
        msg = "no settings"
        raise RuntimeError(msg)

    with subscribe("*", lambda notice: told.append(notice.name)):
        with monkeypatch.context() as patch:
            patch.setattr(Handler, "start", start)
            with pytest.raises(HandlerError, match="no settings"):
                shop.consume()
        assert OF_RUNS.intersection(told) == {"run_stopping"}
        shop.consume()

    assert [name for name in told if name in OF_RUNS - {"run_stopping"}] == [
        *("handler_started", "listener_started"),
        *("handler_stopped", "listener_stopped"),
    ]


@pytest.mark.parametrize(("most", "crashes"), [(0, 1), (1, 2)])
def test_a_listener_is_made_anew_so_often_in_a_row(
    real: Shop, most: int, crashes: int
) -> None:
    """Then its error ends the run, as a supervisor of processes wants it."""
    shop = real
    shop.configure({"restart": {"min_ms": 1, "max_ms": 2, "max": most}})
    told: list[str] = []
    crash = raising("assigned", 100)

    def notice(words: str) -> None:
        told.append(words)
        crash(words)

    with pytest.raises(OSError, match="the screen is full"):
        shop.app.consume(on_notice=notice)

    assert sum("assigned" in words for words in told) == crashes
    assert sum("begins again" in words for words in told) == crashes - 1


def test_a_run_until_the_end_is_not_supervised(shop: Shop) -> None:
    """Who waits for it wants to know."""
    publish(shop, 1)

    with pytest.raises(OSError, match="the screen is full"):
        shop.consume(on_progress=raising("", 1))


def test_being_stopped_does_not_wait_for_a_restart(shop: Shop) -> None:
    """SEED L9 slept one more backoff; what was done until then is reported."""
    shop.configure({"restart": {"min_ms": 3_600_000, "max_ms": 3_600_000}})
    publish(shop, 1)

    with shop.running(on_progress=raising("", 1)) as running:
        running.wait_for(lambda: running.told("begins again"), "the crash")

    (report,) = running.reports
    assert report.counts.acked == 1
    assert not report.reached_end


# --- several consumers -------------------------------------------------------


def test_a_listener_s_consumers_share_its_partitions(
    kafka_broker: RealBroker, postgresql_url: str, tmp_path: Path
) -> None:
    """One group, a thread and a handler each; every record is there once.

    SEED L2 (the id, which was random, is the group's and the topic's), L7.
    """
    topic = kafka_broker.new_topic(4)
    with Shop(kafka_broker, topic, postgresql_url, tmp_path) as shop:
        shop.configure({"max_concurrency": 2})
        with shop.running() as running:
            first = f"{shop.group}-{topic}: assigned {topic}"
            second = f"{shop.group}-{topic}#2: assigned {topic}"
            running.wait_for(lambda: running.told(first), "the first one's")
            running.wait_for(lambda: running.told(second), "the second one's")
            publish(shop, *range(40))
            running.wait_for(lambda: len(shop.events()) == 40, "all of them")

        reports = {report.listener: report for report in running.reports}
        assert list(reports) == [f"{shop.group}-{topic}", f"{shop.group}-{topic}#2"]
        assert sum(report.counts.acked for report in reports.values()) == 40
        assert all(report.counts.acked for report in reports.values())
        assert {call.listener_id for call in shop.calls} == {f"{shop.group}-{topic}"}
        assert shop.app.verify().ok


# --- settings ----------------------------------------------------------------


def test_a_listener_s_own_settings_go_over_those_of_all(shop: Shop) -> None:
    """SEED L1, L6: by librdkafka's names, also where the cluster is another one."""
    publish(shop, 1, 2)
    bootstrap = shop.app.config.kafka["bootstrap.servers"]
    own = {"bootstrap.servers": bootstrap, "max.partition.fetch.bytes": 500_000}
    shop.configure({"kafka": own}, kafka={"bootstrap.servers": "127.0.0.1:9"})

    assert shop.consume().counts.acked == 2
    assert sum(lag.records or 0 for lag in shop.app.lag()) == 0
    shop.configure({"kafka": {"fetch.wait.max.mss": 5}})
    with pytest.raises(ConfigError, match=r'No such .* property: "fetch\.wait\.max'):
        shop.consume()


WRONG = [
    {"handler": "no_such_module:Orders", "decoder": "jsn", "dedupe": "body"},
    {"topic": "u", "decoder": "avro"},
]


def test_all_that_is_wrong_is_told_at_the_start_and_by_doctor(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEED X3 told the first error alone; here each line names its listener."""
    shop.configure(*WRONG)
    with pytest.raises(ConfigError) as caught:
        shop.consume()

    one, two = f"listener {shop.group}-t: ", f"listener {shop.group}-u: "
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] + ": " for line in lines] == [one, one, one, two]
    for line, words in zip(
        lines,
        ("cannot be imported", "'jsn' is not known", "'body' is not known", "registry"),
        strict=True,
    ):
        assert words in line
    found = [c.detail for c in shop.app.doctor() if c.name.startswith("listener")]
    assert len(found) == 4
    assert not any(check.startswith("listener") for check in found)
    monkeypatch.chdir(shop.folder)
    assert run(["consume", "--until-end"]) == 78
    assert lines[3] in " ".join(capsys.readouterr().err.split())


def test_topics_that_are_missing_are_told_before_any_handler_starts(shop: Shop) -> None:
    """All of them, and nobody has begun who would have to end."""
    shop.configure({}, {"topic": "one"}, {"topic": "other", "max_concurrency": 2})
    told: list[Notice] = []

    with (
        subscribe("*_started", told.append),
        pytest.raises(SourceError) as caught,
    ):
        shop.app.run()

    assert told == []
    lines = str(caught.value).splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["'one'", "'other'"]


FUNCTION = """
from kappa_log import ack

def consume(payload, metadata):
    return ack(payload["id"], None, metadata.topic)
"""


def test_a_plain_function_consumes_a_topic(shop: Shop) -> None:
    """No class is needed for a decision."""
    (shop.folder / "plain_handlers.py").write_text(FUNCTION)
    shop.configure({"handler": "plain_handlers:consume"})
    publish(shop, 7)

    shop.consume()

    assert [(e.entity_id, e.event_type) for e in shop.events()] == [("7", "t")]


# --- a schema registry -------------------------------------------------------

SCHEMA = {"type": "record", "name": "R", "fields": [{"name": "id", "type": "int"}]}


class RegistryServer:
    """A schema registry that answers by HTTP as it is told.

    Attributes:
        answers: Statuses and bodies of the next answers; then it knows schema 1 alone.
    """

    def __init__(self) -> None:
        """Listen on a free port."""
        self.answers: list[tuple[int, str]] = []
        self.asked = 0
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                status, body = server.answer(self.path)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            @override
            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, str]:
        """Return what is answered to a request."""
        if self.answers:
            return self.answers.pop(0)
        if path.startswith("/schemas/ids/1"):
            return 200, json.dumps({"schema": json.dumps(SCHEMA)})
        return 404, json.dumps({"error_code": 40403, "message": "Schema not found"})

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    """A schema registry with one schema."""
    found = RegistryServer()
    yield found
    found.close()


def avro(number: int, schema_id: int = 1) -> bytes:
    """Return an order as a serializer of schema 1 frames it."""
    client: SchemaRegistryClient = registry.client_of({"url": f"mock://crew-{number}"})
    data: bytes = AvroSerializer(client, json.dumps(SCHEMA))(
        {"id": number}, SerializationContext("t", MessageField.VALUE, [])
    )
    return b"\0" + schema_id.to_bytes(4, "big") + data[5:]


def test_records_wait_for_a_registry_that_is_away_and_do_not_count_it(
    shop: Shop, server: RegistryServer
) -> None:
    """DESIGN §5: neither a failure nor an attempt, however it does not answer."""
    with shop.app.producer() as producer:
        for number in range(3):
            producer.publish("t", avro(number), partition=0)
    shop.configure({**SOON, "decoder": "avro"}, registry={"url": server.url})
    server.answers = [
        (503, "{}"),
        (401, '{"error_code": 401, "message": "who?"}'),
        (404, "no such page"),
    ]

    with shop.running() as running:
        running.wait_for(lambda: len(shop.events()) == 3, "the registry")

    looked = server.asked
    (seen,) = [check for check in shop.app.doctor() if check.name == "registry"]
    assert (seen.ok, server.asked) == (False, looked + 1)
    assert server.answers == []
    assert running.told("schema registry 127.0.0.1:", "gives no answer") == 1
    assert [call.retry_count for call in shop.calls] == [0, 0, 0]
    assert shop.app.failures() == []
    assert looked == 4


def test_a_record_of_an_unknown_schema_fails_and_is_retried_when_it_is_known(
    mock_broker: MockBroker, database_url: str, server: RegistryServer, tmp_path: Path
) -> None:
    """Kept whole with its bytes; a registry that is away then changes nothing."""
    mock_broker.create_topic("t", 4)
    with Shop(mock_broker, "t", database_url, tmp_path) as shop:
        shop.configure({"decoder": "avro"}, registry={"url": server.url})
        with shop.app.producer() as producer:
            producer.publish("t", avro(1), partition=0)
            producer.publish("t", avro(2, schema_id=2), partition=0)
        counts = shop.consume().counts
        (failure,) = shop.app.failures()
        server.answers = [(503, "{}")]
        with pytest.raises(RegistryUnavailable):
            shop.app.retry_failure(failure.id)
        unchanged = shop.app.failures()
        server.answers = [(200, json.dumps({"schema": json.dumps(SCHEMA)}))]

        assert (counts.acked, counts.failed) == (1, 1)
        assert "its schema is not in the registry" in (failure.error_message or "")
        assert failure.value == avro(2, schema_id=2)
        assert unchanged == [failure]
        assert shop.app.retry_failure(failure.id).outcome == "acked"
        first, second = shop.events()
        assert (first.payload_text, second.payload_text) == ('{"id":1}', '{"id":2}')
        assert (first.raw, second.raw) == (avro(1), failure.value)
        assert shop.app.retry_event(first.position)
        assert shop.app.verify().ok


def test_a_file_of_records_waits_for_no_registry(
    shop: Shop, server: RegistryServer, tmp_path: Path
) -> None:
    """What was committed is kept; the next run goes on from there."""
    server.answers = [(503, "{}")]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b"\n".join(avro(n) for n in (1, 2)) + b"\n")
    shop.configure({"decoder": "avro"}, registry={"url": server.url})

    with pytest.raises(RegistryUnavailable):
        shop.app.ingest(lines, topic="t")

    assert shop.app.ingest(lines, topic="t").counts.acked == 2
