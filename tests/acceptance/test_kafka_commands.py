"""consume, run, lag and produce as people type them: what they print, how they end."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from kappa_log.cli import run
from kappa_log.kafka import client
from support.topics import QUICK, Shop

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker

PROJECTIONS = '''
from kappa_log import projection

@projection(topics=["{topic}"], version=1)
def totals(state: int | None, event) -> int | None:
    """Count the events of an entity."""
    return (state or 0) + 1

@projection(topics=["{topic}"], version=1)
def broken(state: int | None, event) -> int | None:
    """Fail on one event."""
    if event.entity_id == "2":
        raise ValueError("two is too many")
    return 1
'''


class Typed(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> list[Any]:
        """The JSON lines of stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


Type = Callable[..., Typed]


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Type:
    """Type commands in the shop's folder."""
    monkeypatch.chdir(tmp_path)
    # Nobody waits long here for a cluster that is away.
    monkeypatch.setattr(client, "SECONDS", 1.0)

    def typing(*arguments: str) -> Typed:
        code = run(arguments)
        found = Typed(code, *capsys.readouterr())
        assert "Traceback" not in found.out + found.err
        return found

    return typing


@pytest.fixture
def shop(kafka_broker: RealBroker, sqlite_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on a new topic of two partitions."""
    with Shop(kafka_broker, kafka_broker.new_topic(2), sqlite_url, tmp_path) as found:
        found.app.create_database()
        yield found


def orders(*numbers: int, partition: int = 0, **more: Any) -> list[tuple[Any, ...]]:
    """Return orders of these numbers."""
    return [(json.dumps({"id": n} | more).encode(), None, partition) for n in numbers]


def lines(*objects: Any) -> str:
    """Return objects as JSON lines."""
    return "".join(json.dumps(found) + "\n" for found in objects)


# --- consume ----------------------------------------------------------------------


def test_consume_reads_to_the_end_and_says_what_it_did(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path, typed: Type
) -> None:
    """Counts, positions, next offsets; a second run finds nothing new."""
    topic = kafka_broker.new_topic(2)
    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        assert typed("consume", "--until-end").code == 78  # No tables yet.
        shop.app.create_database()
        kafka_broker.produce(topic, orders(1, 2, 3) + orders(4, partition=1))
        kafka_broker.produce(topic, orders(5, do="skip") + orders(2))

        first = typed("consume", "--until-end")
        again = typed("consume", "--until-end", "--json")

        assert first.code == again.code == 0
        listener = f"{shop.group}-{topic}"
        assert f"{listener}: assigned {topic} 0, 1\n" in first.err
        head, *rest = first.out.splitlines()
        assert head.startswith(f"{listener}: 6 records in ")
        assert rest == [
            "  kept 4   skipped 1   duplicate 1   failed 0",
            "  positions 1 to 4",
            f"  {topic} partition 0: next offset 5",
            f"  {topic} partition 1: next offset 1",
        ]
        (report,) = again.json
        assert report["listener"] == listener
        assert report["reached_end"]
        assert set(report["counts"].values()) == {0}
        assert [lane["next_offset"] for lane in report["lanes"]] == [5, 1]


def test_new_failures_exit_3(shop: Shop, kafka_broker: RealBroker, typed: Type) -> None:
    """And the next step is named; a run without new ones is a success again."""
    kafka_broker.produce(shop.topic, [(b"nonsense",), *orders(1)])

    failed = typed("consume", "--until-end")
    again = typed("consume", "--until-end", "--json")

    assert (failed.code, again.code) == (3, 0)
    assert "kept 1   skipped 0   duplicate 0   failed 1" in failed.out
    assert "kappa-log failures list" in failed.err


def test_some_listeners_are_consumed(
    shop: Shop, kafka_broker: RealBroker, typed: Type
) -> None:
    """One, two, or all of them; in the order in which they were asked for."""
    kafka_broker.produce(shop.topic, orders(1))
    groups = [f"{shop.group}-{letter}" for letter in "abc"]
    shop.configure(*({"group_id": group} for group in groups))
    ids = [f"{group}-{shop.topic}" for group in groups]

    two = typed(
        "consume", "--until-end", "--json", "--listener", ids[2], "--listener", ids[0]
    )
    every = typed("consume", "--until-end", "--json")

    assert [report["listener"] for report in two.json] == [ids[2], ids[0]]
    assert [report["counts"]["acked"] for report in two.json] == [1, 1]
    assert [report["listener"] for report in every.json] == ids
    assert [report["counts"]["acked"] for report in every.json] == [0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["consume", "--listener", "biling"], "there is no listener 'biling'; there"),
        (["lag", "--listener", "biling"], "there is no listener 'biling'; there are"),
        (["run", "--listener", "biling"], "there is no listener 'biling'; there are"),
        (["consume", "--untilend"], "--until-end"),
        (["consume", "--from-offset", "orders:1"], "for instance orders:0:1500"),
        (["consume", "--from-offset", "shoes:0:1"], "topic 'shoes' has no listener"),
        (["produce"], "Missing argument 'FILE'"),
        (["produce", "a.jsonl"], "Missing option '--topic'"),
        (["produce", "a", "--topic", "t", "--partitions", "0"], "'0' is no whole"),
    ],
)
def test_a_typo_exits_2(
    shop: Shop, typed: Type, arguments: list[str], said: str
) -> None:
    """What was meant is named, and nothing is read."""
    found = typed(*arguments)

    assert found.code == 2
    assert said in found.err
    assert shop.app.sources() == {}


def test_a_log_without_listeners_says_how_to_have_one(
    shop: Shop, typed: Type, tmp_path: Path
) -> None:
    """Nobody is left with an empty answer."""
    (tmp_path / "kappa_log.toml").write_text(f'[database]\nurl = "{shop.url}"\n')

    for work in ("consume", "run", "lag"):
        found = typed(work)
        assert found.code == 2
        assert "add [[listeners]] with topic, group_id and handler" in found.err


def test_a_topic_that_is_not_there_exits_69_and_names_the_nearest(
    shop: Shop, kafka_broker: RealBroker, typed: Type
) -> None:
    """A consumer that waited for a typo would wait for ever."""
    shop.configure({"topic": shop.topic[:-1]})

    for work in ("consume", "run", "lag"):
        found = typed(work)
        assert found.code == 69
        assert found.err == (
            f"Error: the Kafka cluster at {kafka_broker.bootstrap} has no topic "
            f"'{shop.topic[:-1]}'; did you mean {shop.topic}?\n"
        )


def test_a_name_that_no_topic_can_have_is_not_there(shop: Shop, typed: Type) -> None:
    """Some of them end the client's library, and so the process."""
    for name in ("or ders", "ö", "x" * 250):
        shop.configure({"topic": name})
        found = typed("consume", "--until-end")
        assert found.code == 69
        assert f"has no topic '{name}'" in found.err


@pytest.mark.parametrize("work", ["consume", "run", "lag", "produce"])
def test_a_cluster_that_is_away_exits_69_and_says_why(
    shop: Shop, typed: Type, tmp_path: Path, work: str
) -> None:
    """Not only that time ran out."""
    shop.configure(kafka={"bootstrap.servers": "127.0.0.1:9"})
    (tmp_path / "a.jsonl").write_text(lines({"id": 1}))
    more = ["a.jsonl", "--topic", "t"] if work == "produce" else []

    found = typed(work, *more)

    assert found.code == 69
    assert found.err.startswith("Error: the Kafka cluster at 127.0.0.1:9 gives no ")
    assert "Connection refused" in found.err
    assert len(found.err.splitlines()) == 1


SETTINGS = [
    ({"bootstrap.servers": ""}, 'set "bootstrap.servers" in [kafka] of kappa_log.toml'),
    ({"bootstrap.servers": ["a:1", "b:1"]}, "librdkafka takes one text for it"),
    ({"session.timeout": 6000}, 'No such configuration property: "session.timeout"'),
    ({"session.timeout.ms": "soon"}, 'Invalid value for configuration property "sess'),
    ({"max.poll.interval.ms": 100}, "must be >= `session.timeout.ms`"),
    ({"stats_cb": "print"}, "stats_cb"),
    ({"group.id": "billing"}, "each listener has its group_id"),
    ({"enable.auto.commit": True}, "kafka.enable.auto.commit must stay false"),
    ({"enable.auto.offset.store": "true"}, "enable.auto.offset.store must stay false"),
    ({"auto.offset.reset": "earliest"}, "kafka.auto.offset.reset must stay error"),
    ({"enable.partition.eof": False}, "kafka.enable.partition.eof must stay true"),
]


@pytest.mark.parametrize(("settings", "said"), SETTINGS)
def test_a_wrong_setting_of_the_client_exits_78(
    shop: Shop, typed: Type, settings: dict[str, Any], said: str
) -> None:
    """It is named, and so is what librdkafka says of it."""
    shop.configure(kafka=settings)

    found = typed("consume")

    assert found.code == 78
    assert said in found.err
    assert "[kafka]" in found.err or "kafka." in found.err


def test_settings_that_say_what_is_so_anyway_are_no_error(
    shop: Shop, kafka_broker: RealBroker, typed: Type
) -> None:
    """And those of group members do not disturb the other clients."""
    kafka_broker.produce(shop.topic, orders(1))
    shop.configure(
        kafka={
            "enable.auto.commit": "false",
            "auto.offset.reset": "error",
            "group.instance.id": "one",
            "fetch.min.bytes": 1,
            "partition.assignment.strategy": "range",
        }
    )

    assert typed("consume", "--until-end").code == 0
    assert typed("lag").code == 0
    assert shop.ids() == ["1"]


def test_a_setting_that_the_broker_refuses_ends_it(shop: Shop, typed: Type) -> None:
    """To try again for ever does not mend it."""
    shop.configure(kafka={"session.timeout.ms": 5})

    found = typed("consume")

    assert found.code == 69
    assert "Invalid session timeout" in found.err


LISTENERS = [
    ({"start": "newest"}, "'newest'; use earliest, latest, an offset from 0 on, or"),
    ({"start": -1}, "-1; use earliest"),
    ({"start": True}, "True; use earliest"),
    ({"start": {"a": 5}}, "a table of partitions"),
    ({"start": {"0": "newest"}}, "a table of partitions"),
    ({"topic": "^or(ders"}, "'^or(ders' is no regular expression: missing )"),
    ({"topic": "^[[:digit:]]"}, "is no regular expression: Possible nested set"),
    ({"dedupe": "payloads"}, "dedupe 'payloads' is not known; use payload"),
    ({"group_id": ""}, "group_id"),
]


@pytest.mark.parametrize(("listener", "said"), LISTENERS)
def test_a_wrong_listener_exits_78(
    shop: Shop, typed: Type, listener: dict[str, Any], said: str
) -> None:
    """One sentence says what may stand there."""
    shop.configure(listener)

    found = typed("consume", "--until-end")

    assert found.code == 78
    assert said in found.err
    assert len(found.err.splitlines()) == 1


def test_two_listeners_of_a_group_for_one_topic_are_refused(
    shop: Shop, typed: Type
) -> None:
    """Kafka would hand each partition to either: chance would choose the handler."""
    shop.configure({}, {})
    twice = typed("consume", "--until-end")
    shop.configure({"topic": f"^{shop.topic[:4]}"}, {})
    overlap = typed("consume", "--until-end")
    shop.configure({"topic": f"^{shop.topic[:4]}", "group_id": shop.topic}, {})
    other_group = typed("lag", "--listener", f"{shop.group}-{shop.topic}")

    assert twice.code == overlap.code == 78
    assert "one topic of a group has one listener" in twice.err
    assert f"both read topic {shop.topic}" in overlap.err
    assert other_group.code == 0


# --- lag --------------------------------------------------------------------------


def test_lag_tells_records_and_seconds(
    shop: Shop, kafka_broker: RealBroker, typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each partition, before the first run, behind, and at the end."""
    monkeypatch.setenv("COLUMNS", "80")
    kafka_broker.produce(shop.topic, orders(1, 2, 3))

    new = typed("lag", "--json")
    typed("consume", "--until-end")
    kafka_broker.produce(shop.topic, orders(4, 5, partition=1))
    behind = typed("lag", "--json")
    table = typed("lag")
    typed("consume", "--until-end")
    done = typed("lag")

    def told(found: Typed) -> list[tuple[Any, ...]]:
        names = ("partition", "next_offset", "end_offset", "records")
        return [tuple(one[name] for name in names) for one in found.json]

    assert told(new) == [(0, None, 3, 3), (1, None, 0, 0)]
    assert told(behind) == [(0, 3, 3, 0), (1, 0, 2, 2)]
    assert 0 < behind.json[1]["seconds"] < 60
    assert behind.json[0]["seconds"] == 0
    assert {one["listener"] for one in new.json} == {f"{shop.group}-{shop.topic}"}
    heading, zero, one = table.out.splitlines()
    assert heading.split() == [
        "group", "topic", "partition", "next", "end", "records", "seconds",
    ]  # fmt: skip
    assert zero.split()[:6] == [shop.group, shop.topic, "0", "3", "3", "0"]
    assert one.split()[:6] == [shop.group, shop.topic, "1", "0", "2", "2"]
    assert max(map(len, table.out.splitlines())) <= 80
    assert "kappa-log consume --until-end" in table.err
    assert done.err == ""


def test_lag_of_records_without_a_time_has_no_seconds(
    shop: Shop, kafka_broker: RealBroker, typed: Type
) -> None:
    """Some 56 years would be a lie."""
    kafka_broker.produce(shop.topic, [(b"{}", None, 0, (), -1)])

    assert [one["seconds"] for one in typed("lag", "--json").json] == [None, 0.0]


# --- produce ----------------------------------------------------------------------


def test_produce_makes_the_topic_and_sends_keys(
    shop: Shop, kafka_broker: RealBroker, typed: Type, tmp_path: Path
) -> None:
    """Lines in order, blank ones left out, the same key in the same partition."""
    topic = f"{shop.topic}-new"
    objects: list[Any] = [{"a": {"id": n % 3}, "n": n} for n in range(30)]
    text = lines(*objects[:20]) + "\n \n" + lines(*objects[20:])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)

    missing = typed("produce", "a.jsonl.gz", "--topic", topic)
    made = typed(
        "produce", "a.jsonl.gz", "--topic", topic, "--key", "a.id", "--partitions", "3",
        "--json",
    )  # fmt: skip
    again = typed("produce", "a.jsonl.gz", "--topic", topic, "--partitions", "7")

    assert (missing.code, made.code, again.code) == (2, 0, 0)
    assert "; make it by --partitions N" in missing.err
    (report,) = made.json
    assert (report["records"], report["blank"], report["held_back"]) == (30, 2, False)
    assert sum(report["partitions"].values()) == 30
    assert again.out.startswith(f"a.jsonl.gz → {topic}: 30 records in ")
    assert set(kafka_broker.watermarks(topic)) == {0, 1, 2}
    records = kafka_broker.read(topic)
    keyed = [record for record in records if record.key is not None]
    assert len(keyed) == len(records) - 30 == 30
    where = {(record.key, record.partition) for record in keyed}
    assert len(where) == len({record.key for record in keyed}) == 3
    for key in (b"0", b"1", b"2"):
        found = [json.loads(r.value or b"") for r in keyed if r.key == key]
        assert found == [one for one in objects if str(one["a"]["id"]).encode() == key]


def test_produce_reads_stdin_and_leaves_half_a_line_out(
    shop: Shop,
    kafka_broker: RealBroker,
    typed: Type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And says so: nobody believes that it was sent."""
    text = b'{"id":1}\r\nnot even JSON\n{"id":2'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    found = typed("produce", "-", "--topic", shop.topic)

    assert found.code == 0
    assert "2 records in" in found.out
    assert "the last line has no line end and is no JSON: left out" in found.out
    values = {record.value for record in kafka_broker.read(shop.topic)}
    assert values == {b'{"id":1}', b"not even JSON"}


BAD_LINES = [
    ('{"x":1}', 2, "line 3: the record has no field 'id'; the 2 lines before it"),
    ("nonsense", 2, "line 3: not strict JSON: JSON is malformed"),
    ('{"id":{}}', 2, "line 3: field 'id' is no text or whole number, so it is no key"),
    (
        f'{{"id":"{"x" * 2_000_000}"}}',
        69,
        "line 3: a record is not in topic {topic}: Unable to produce message: Broker",
    ),
]


@pytest.mark.parametrize(
    "bad", BAD_LINES, ids=["no key", "no JSON", "no text", "large"]
)
def test_a_line_that_cannot_be_produced_stops_there(
    shop: Shop,
    kafka_broker: RealBroker,
    typed: Type,
    tmp_path: Path,
    bad: tuple[str, int, str],
) -> None:
    """It is named, and so is what went before it."""
    line, code, said = bad
    text = lines({"id": 1}, {"id": 2}) + line + "\n" + lines({"id": 3})
    (tmp_path / "a.jsonl").write_text(text)

    found = typed("produce", "a.jsonl", "--topic", shop.topic, "--key", "id")

    assert found.code == code
    assert f"a.jsonl, {said.format(topic=shop.topic)}" in found.err
    assert found.err.endswith("; the 2 lines before it are in the topic\n")
    assert len(kafka_broker.read(shop.topic)) == 2


def test_a_file_that_was_cut_is_produced_as_far_as_it_goes(
    shop: Shop, kafka_broker: RealBroker, typed: Type, tmp_path: Path
) -> None:
    """The message counts what is in the topic, for the next run begins anew."""
    data = gzip.compress(lines(*range(5000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])

    cut = typed("produce", "a.jsonl.gz", "--topic", shop.topic)
    away = typed("produce", "b.jsonl", "--topic", shop.topic)

    there = len(kafka_broker.read(shop.topic))
    assert (cut.code, away.code) == (69, 69)
    assert 0 < there < 5000
    assert cut.err.startswith("Error: a.jsonl.gz cannot be read: Compressed file ended")
    assert cut.err.endswith(f"; {there:,} of its lines are in the topic\n")
    assert "b.jsonl cannot be read: No such file or directory; 0 of" in away.err


@pytest.mark.parametrize("name", ["", "or ders", "ö", "\udcff", "x" * 250])
def test_a_name_that_no_topic_can_have_is_not_made(
    shop: Shop, typed: Type, tmp_path: Path, name: str
) -> None:
    """Some of them end the client's library, and so the process."""
    (tmp_path / "a.jsonl").write_text(lines({"id": 1}))
    assert shop.folder == tmp_path

    found = typed("produce", "a.jsonl", "--topic", name, "--partitions", "1")

    assert found.code == 2
    assert "is no name of a topic: 1 to 249 of a-z" in found.err


def test_too_many_partitions_are_refused(
    shop: Shop, typed: Type, tmp_path: Path
) -> None:
    """By name, not as an unexpected error."""
    (tmp_path / "a.jsonl").write_text(lines({"id": 1}))

    found = typed(
        "produce", "a.jsonl", "--topic", f"{shop.topic}x", "--partitions", "999999"
    )

    assert found.code == 2
    assert f"topic {shop.topic}x cannot be made: " in found.err


# --- run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_error", "said"),
    [
        ("park", "projection 'broken': the fold failed for 1 key more"),
        ("stop", "'broken' failed on the event at position"),
    ],
)
def test_run_keeps_rows_up_with_the_topic(
    kafka_broker: RealBroker,
    database_url: str,
    tmp_path: Path,
    on_error: str,
    said: str,
) -> None:
    """A record is a row soon after; a fold that fails stops nothing else."""
    topic = kafka_broker.new_topic(2)
    (tmp_path / "views_of_it.py").write_text(PROJECTIONS.format(topic=topic))
    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        shop.configure(
            kafka=QUICK, projections={"modules": ["views_of_it"], "on_error": on_error}
        )

        def totals() -> dict[str, int]:
            if shop.app.projection("totals").live is None:
                return {}
            found = shop.app.rows("totals")
            return {row["entity_id"]: row["value"] for row in found}

        def come_to(total: int) -> bool:
            return sum(totals().values()) == total

        def totals_are(number: int) -> bool:
            return sum(totals().values()) == number

        with shop.running("run") as running:
            for total, numbers in ((2, (1, 2)), (4, (1, 3)), (7, (2, 2, 4))):
                made = [
                    (b'{"id":%d,"n":%d%d}' % (n, total, index),)
                    for index, n in enumerate(numbers)
                ]
                kafka_broker.produce(topic, made)
                running.wait_for(partial(come_to, total), "the rows")

        assert totals() == {"1": 2, "2": 3, "3": 1, "4": 1}
        assert running.told(said) == 1
        assert running.told("two is too many") == (on_error == "stop")
        assert shop.app.verify(names=["totals"]).ok


def test_run_refuses_projections_that_cannot_be_imported(
    shop: Shop, typed: Type, tmp_path: Path
) -> None:
    """SEED X2: before anything is read."""
    (tmp_path / "views_of_nothing.py").write_text("1 / 0\n")
    shop.configure(projections={"modules": ["views_of_nothing"]})

    found = typed("run")

    assert found.code == 2
    assert "views_of_nothing cannot be imported: ZeroDivisionError" in found.err
