"""Chain: each column and each order of events has its own head."""

from __future__ import annotations

from typing import Any

import pytest

from kappa_log.chain import (
    HEAD_OF_NOTHING,
    LaneDigest,
    digest_tail,
    extend,
    payload_digest,
    personal_digest,
)
from kappa_log.records import Lane

PLAIN: dict[str, Any] = {
    "source": "file:a",
    "topic": "t",
    "group": "g",
    "partition": 0,
    "position": 1,
    "recorded_at": 10,
    "offset": 3,
    "timestamp": None,
    "event_time": None,
    "event_type": None,
    "event_version": None,
    "message_id": b"m" * 16,
    "checksum": None,
    "payload": None,
    "raw": None,
    "key": None,
    "headers": None,
    "entity_id": None,
}

OTHER: dict[str, list[Any]] = {
    "source": ["file:b"],
    "topic": ["u"],
    "group": ["h"],
    "partition": [1],
    "position": [2],
    "recorded_at": [11],
    "offset": [4],
    "timestamp": [0, -1, 5],
    "event_time": [0, -1, 5],
    "event_type": ["", "x"],
    "event_version": ["", "x"],
    "message_id": [b"n" * 16],
    "checksum": ["", "ff"],
    "payload": [b"", b"null"],
    "raw": [b"", b"x"],
    "key": [b"", b"x"],
    "headers": [b"", b"x"],
    "entity_id": ["", "x"],
}


def _digest(**columns: Any) -> bytes:
    event = PLAIN | columns
    parts = payload_digest(event["payload"]) + personal_digest(
        event["raw"], event["key"], event["headers"], event["entity_id"]
    )
    lane = Lane(event["source"], event["topic"], event["group"], event["partition"])
    return LaneDigest(lane).of(
        event["position"],
        event["recorded_at"],
        offset=event["offset"],
        timestamp=event["timestamp"],
        event_time=event["event_time"],
        tail=digest_tail(
            event["event_type"],
            event["event_version"],
            event["message_id"],
            event["checksum"],
            parts,
        ),
    )


@pytest.mark.parametrize("column", PLAIN)
def test_each_column_is_in_the_digest(column: str) -> None:
    """A change of any of them, NULL to empty or to 0 too, is another digest."""
    digests = {_digest(), *(_digest(**{column: value}) for value in OTHER[column])}

    assert len(digests) == 1 + len(OTHER[column])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"event_type": "ab"}, {"event_type": "a", "event_version": "b"}),
        ({"raw": b"ab"}, {"raw": b"a", "key": b"b"}),
        ({"key": b"x"}, {"headers": b"x"}),
        ({"topic": "tg", "group": ""}, {"topic": "t", "group": "g"}),
        ({"timestamp": 5}, {"event_time": 5}),
    ],
)
def test_contents_cannot_move_between_columns(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    """Fields are framed, so neighbours cannot lend each other bytes."""
    assert _digest(**left) != _digest(**right)


def test_the_head_depends_on_the_order_and_on_all_events() -> None:
    """Swapping, dropping or repeating events shows."""
    a, b = _digest(position=1), _digest(position=2)

    heads = {
        extend(extend(HEAD_OF_NOTHING, a), b),
        extend(extend(HEAD_OF_NOTHING, b), a),
        extend(HEAD_OF_NOTHING, a),
        extend(HEAD_OF_NOTHING, b),
        extend(extend(extend(HEAD_OF_NOTHING, a), b), b),
        HEAD_OF_NOTHING,
    }

    assert len(heads) == 6
    assert {len(head) for head in heads} == {32}


def test_an_erased_event_verifies_from_its_part_hashes() -> None:
    """Payload and personal parts enter as hashes that can be kept without them."""
    kept = payload_digest(b"secret") + personal_digest(None, b"k", None, "ada")
    columns = PLAIN | {"payload": b"secret", "key": b"k", "entity_id": "ada"}

    again = LaneDigest(Lane("file:a", "t", "g")).of(
        1,
        10,
        offset=3,
        timestamp=None,
        event_time=None,
        tail=digest_tail(None, None, b"m" * 16, None, kept),
    )

    assert again == _digest(**columns)
