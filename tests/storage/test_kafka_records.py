"""Records of Kafka enter the log as they were, on both databases."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.kafka_process import wait_for
from support.topics import Shop

if TYPE_CHECKING:
    from support.kafka_broker import RealBroker

LARGE = 2_500_000
"""Bytes of a record that no default lets through."""


@pytest.fixture
def shop(kafka_broker: RealBroker, database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A listener on a new topic of two partitions."""
    with Shop(kafka_broker, kafka_broker.new_topic(2), database_url, tmp_path) as found:
        yield found


def order(number: object, **more: Any) -> bytes:
    """Return the payload of an order."""
    return json.dumps({"id": number} | more).encode()


# --- what a record has ------------------------------------------------------------


def test_no_key_and_an_empty_key_are_two_things(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """The log says which it was, and keeps bytes that are no text."""
    keys = [None, b"", b"\0\xff", b"k" * 5000]
    kafka_broker.produce(shop.topic, [(order(n), k, 0) for n, k in enumerate(keys)])

    shop.consume()

    assert [event.key for event in shop.events()] == keys
    assert shop.app.verify().ok


def test_a_tombstone_is_an_event_without_payload(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """Each is one of its own, whatever dedupe says; an empty value is none.

    SEED H12.
    """
    kafka_broker.produce(
        shop.topic, [(None, b"a", 0), (None, b"a", 0), (None, None, 1), (b"", b"a", 0)]
    )

    report = shop.consume()

    assert (report.counts.acked, report.counts.failed) == (3, 1)
    kept = {(e.payload, e.payload_text, e.checksum, e.raw) for e in shop.events()}
    assert kept == {(None, None, None, None)}
    assert shop.app.failures()[0].value == b""
    assert "the value is empty" in (shop.app.failures()[0].error_message or "")
    assert shop.app.verify().ok


def test_headers_keep_order_repeats_and_bytes(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """A list of pairs: names may come twice, values may be nothing or no text."""
    headers = (("a", b"1"), ("b", None), ("a", b"\xff\0"), ("", b""), ("ü\n", b"2"))
    kafka_broker.produce(
        shop.topic, [(order(1), None, 0, headers), (order(2), None, 0)]
    )

    shop.consume()

    with_headers, without = shop.events()
    assert with_headers.headers == list(headers)
    assert without.headers == []
    assert shop.calls[0].headers == headers


def test_a_thousand_headers_are_kept(shop: Shop, kafka_broker: RealBroker) -> None:
    """Nothing is cut off."""
    headers = tuple((f"h{n}", b"%d" % n) for n in range(1000))
    kafka_broker.produce(shop.topic, [(order(1), None, 0, headers)])

    shop.consume()

    assert shop.events()[0].headers == list(headers)


def test_timestamps_are_kept_as_they_were_given(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """Before 1970, none at all, and one that no calendar has."""
    given = [-5, -1, 1, 2**63 - 1, 253_402_300_800_000]
    topic = kafka_broker.new_topic(message_timestamp_after_max_ms=2**63 - 1)
    kafka_broker.produce(
        topic, [(order(n), None, 0, (), at) for n, at in enumerate(given)]
    )

    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        shop.consume()

        kept = [event.timestamp for event in shop.events()]
        assert kept == given
        assert shop.app.verify().ok
        assert shop.app.lag()[0].records == 0


def test_the_broker_may_set_the_time(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """Of a topic with LogAppendTime its time counts, not the producer's."""
    topic = kafka_broker.new_topic(message_timestamp_type="LogAppendTime")
    kafka_broker.produce(topic, [(order(1), None, 0, (), 1000)])

    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        shop.consume()

        (event,) = shop.events()
        assert event.timestamp is not None
        assert abs(event.timestamp / 1000 - time.time()) < 300
        assert shop.calls[0].timestamp == event.timestamp


def test_a_record_beyond_every_default_size_is_read(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """The broker hands out at least one record, however large it is."""
    topic = kafka_broker.new_topic(max_message_bytes=2 * LARGE)
    large = order(2, filler="x" * LARGE)
    kafka_broker.produce(
        topic,
        [(value, None, 0) for value in (order(1), large, order(3))],
        message_max_bytes=2 * LARGE,
    )

    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        shop.consume()

        assert shop.ids() == ["1", "2", "3"]
        assert (shop.events()[1].payload_text or "").encode() == large
        assert shop.app.verify().ok


def test_what_compaction_removed_is_no_gap(
    kafka_broker: RealBroker, database_url: str, tmp_path: Path
) -> None:
    """Offsets have holes; the next one is behind them, also behind one at the end."""
    topic = kafka_broker.new_topic(
        cleanup_policy="compact",
        segment_ms=100,
        min_cleanable_dirty_ratio="0.01",
        delete_retention_ms=0,
    )

    def write(numbers: range) -> None:
        records = [(order(n), b"%d" % (n % 3), 0) for n in numbers]
        kafka_broker.produce(topic, records)

    write(range(50))

    def is_compacted() -> bool:
        # A segment that is written to is not compacted: this begins another one.
        time.sleep(0.2)
        write(range(1000, 1001))
        return len(kafka_broker.read(topic)) < 40

    wait_for(is_compacted, "compaction")
    # A transaction's marker is a record that nobody sees.
    transactional = kafka_broker.transactional()
    transactional.send(topic, [(order(2000), b"last", 0)])
    transactional.commit()
    with Shop(kafka_broker, topic, database_url, tmp_path) as shop:
        before = {record.offset for record in kafka_broker.read(topic)}
        report = shop.consume()
        after = {record.offset for record in kafka_broker.read(topic)}

        (_, end) = kafka_broker.watermarks(topic)[0]
        # Compaction goes on meanwhile.
        assert after <= {event.offset for event in shop.events()} <= before
        assert report.counts.seen == len(shop.events()) < end
        assert shop.offsets() == {(topic, 0): end}
        assert shop.app.lag()[0].records == 0
        assert shop.app.verify().ok


BROKEN = [
    (b"nonsense", "not strict JSON"),
    (b"\xff\0", "not UTF-8: byte 0"),
    (b"\xc0\x80", "not UTF-8"),
    ('{"id":1}'.encode("utf-16"), "not UTF-8"),
    (b'\xef\xbb\xbf{"id":1}', "byte order mark"),
    (b'{"id":"\\ud800"}', "lone surrogate"),
    (b'{"id":NaN}', "not strict JSON"),
    (b'{"id":1,"id":2}', "duplicate key 'id'"),
    (b"[" * 10_000, "levels of nesting"),
    (b'{"id":1}{"id":2}', "not strict JSON"),
    (b"\0\0\0\0\x01ab", "not strict JSON"),
]


def test_what_is_no_json_is_kept_with_its_bytes(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """SEED H14: a failure each, with all that the record had; what follows is read."""
    headers = (("h", b"\xff"),)
    kafka_broker.produce(
        shop.topic,
        [
            # Each has its key: later ones would wait behind the first one's failure.
            *((v, b"\xff%d" % n, 1, headers, 1000) for n, (v, _) in enumerate(BROKEN)),
            (order(1), None, 1),
        ],
    )

    report = shop.consume()

    assert (report.counts.failed, report.counts.acked) == (len(BROKEN), 1)
    failures = sorted(shop.app.failures(), key=lambda failure: failure.offset)
    for number, (failure, (value, said)) in enumerate(
        zip(failures, BROKEN, strict=True)
    ):
        assert failure.value == value
        assert said in (failure.error_message or "")
        assert failure.key == b"\xff%d" % number
        assert failure.headers == [("h", b"\xff")]
        assert (failure.partition, failure.timestamp) == (1, 1000)
    assert shop.offsets()[shop.topic, 1] == len(BROKEN) + 1
    assert shop.app.verify().ok


def test_the_handler_is_told_where_a_record_is_from(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """SEED H20, P2: topic, partition, offset, key, group, and what identifies it."""
    kafka_broker.produce(shop.topic, [(order(1), b"k", 1)])

    shop.consume()

    (metadata,) = shop.calls
    (event,) = shop.events()
    assert (metadata.topic, metadata.partition, metadata.offset) == (shop.topic, 1, 0)
    assert (metadata.key, metadata.group_id) == (b"k", shop.group)
    assert metadata.listener_id == f"{shop.group}-{shop.topic}"
    assert metadata.message_id == event.message_id
    assert metadata.checksum == event.checksum
    (source,) = shop.app.sources().values()
    assert source.startswith("kafka:")
    assert source.endswith(f"/{kafka_broker.topic_id(shop.topic)}")


# --- which records are one message ------------------------------------------------

MODES = [
    ("payload", [0, 3, 6], [1, 2, 4, 5], []),
    ("offset", [0, 1, 2, 3, 4, 5, 6], [], []),
    ("key+payload", [0, 2, 3, 6], [1, 4, 5], []),
    ("header:id", [0, 4, 6], [1, 5], [2, 3]),
]


@pytest.mark.parametrize(("mode", "kept", "repeated", "failed"), MODES)
def test_dedupe_says_which_records_are_one_message(
    shop: Shop,
    kafka_broker: RealBroker,
    mode: str,
    kept: list[int],
    repeated: list[int],
    failed: list[int],
) -> None:
    """By the payload also across partitions and keys; by a header only if it agrees.

    SEED H6, H7.
    """
    one, two = (("id", b"1"),), (("id", b"2"),)
    records = [
        (order(1), b"a", 0, one),
        (order(1), b"a", 0, one),  # Again.
        (order(1), b"b", 0, ()),  # Another key; no header.
        (order(9), b"a", 0, one),  # Another payload under a header that is known.
        (order(1), b"a", 1, two),  # Another partition, another header.
        (order(1), b"a", 1, two),
        (None, b"a", 1, ()),  # Never a repetition.
    ]
    shop.configure({"dedupe": mode})
    # One partition after the other: their order among each other is by chance.
    places = []
    for partition in (0, 1):
        mine = [record for record in records if record[2] == partition]
        places += kafka_broker.produce(shop.topic, mine)
        shop.consume()

    def at(numbers: list[int]) -> list[tuple[int, int]]:
        return [places[number] for number in numbers]

    assert [(e.partition, e.offset) for e in shop.events()] == at(kept)
    duplicates = shop.app.duplicates()
    assert [(d.partition, d.offset) for d in duplicates] == at(repeated)
    failures = sorted(shop.app.failures(), key=lambda failure: failure.id)
    assert [(f.partition, f.offset) for f in failures] == at(failed)
    assert shop.app.verify().ok


def test_a_dropped_duplicate_can_be_admitted(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """SEED H7: dedupe loses nothing of a record from Kafka either."""
    kafka_broker.produce(
        shop.topic, [(order(1), b"a", 0), (order(1), b"b", 1, (("h", b"1"),))]
    )
    shop.consume()
    (duplicate,) = shop.app.duplicates()

    position = shop.app.admit(duplicate.id)

    event = shop.app.event(position)
    assert {e.payload_text for e in shop.events()} == {event.payload_text}
    assert {e.key for e in shop.events()} == {b"a", b"b"}
    assert shop.app.duplicates() == []
    assert shop.consume().counts.seen == 0
    assert shop.app.verify().ok


# --- several listeners ------------------------------------------------------------


def test_two_groups_of_one_process_read_one_topic(
    shop: Shop, kafka_broker: RealBroker
) -> None:
    """SEED H7: each has events, offsets and duplicates of its own."""
    shop.configure({}, {"group_id": f"{shop.group}-2"})
    kafka_broker.produce(shop.topic, [(order(n % 40), None, n % 2) for n in range(50)])

    reports = shop.app.consume(until_end=True)

    assert [report.group_id for report in reports] == [shop.group, f"{shop.group}-2"]
    for report in reports:
        assert (report.counts.acked, report.counts.duplicate) == (40, 10)
        ids = [event.entity_id for event in shop.events(group=report.group_id)]
        assert sorted(map(int, filter(None, ids))) == list(range(40))
    assert shop.app.verify().ok


def test_many_listeners_write_to_one_log(shop: Shop, kafka_broker: RealBroker) -> None:
    """Batches of all of them take turns; none is lost, and offsets keep their order."""
    topics = [kafka_broker.new_topic(2) for _ in range(3)]
    shop.configure(
        *({"topic": topic, "group_id": topic} for topic in topics),
        ingest={"batch_size": 20},
    )
    for topic in topics:
        kafka_broker.produce(topic, [(order(n), None, n % 2) for n in range(300)])

    reports = shop.app.consume(until_end=True)

    assert [report.counts.acked for report in reports] == [300, 300, 300]
    for topic in topics:
        for partition in (0, 1):
            found = [
                e.offset for e in shop.events(topic=topic) if e.partition == partition
            ]
            assert found == list(range(150))
    assert shop.app.head().position == 900
    assert shop.app.verify().ok
