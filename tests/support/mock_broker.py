"""librdkafka's own mock cluster: brokers in this process that fail when they are told.

They start in milliseconds and speak enough of Kafka for producers, consumers, groups
and transactions. Their C API is not in Python's client, so it is called by ctypes; it
is experimental there, and each function used here has its test.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int16, c_int32, c_int64, c_size_t
from ctypes import c_void_p as pointer
from enum import IntEnum
from functools import cache
from typing import Any, Self

from confluent_kafka import KafkaError, KafkaException, cimpl

PRODUCER = 0
"""Kind of the client that a cluster needs to live in; it is never used as one."""

EVERY_BROKER = -1


class Api(IntEnum):
    """Requests of Kafka's protocol, by their keys."""

    PRODUCE = 0
    FETCH = 1
    LIST_OFFSETS = 2
    METADATA = 3
    OFFSET_COMMIT = 8
    OFFSET_FETCH = 9
    FIND_COORDINATOR = 10
    JOIN_GROUP = 11
    HEARTBEAT = 12
    LEAVE_GROUP = 13
    SYNC_GROUP = 14
    INIT_PRODUCER_ID = 22
    ADD_PARTITIONS_TO_TXN = 24
    END_TXN = 26
    CONSUMER_GROUP_HEARTBEAT = 68


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "conf_new": (pointer, []),
    "conf_set": (c_int, [pointer, c_char_p, c_char_p, c_char_p, c_size_t]),
    "new": (pointer, [c_int, pointer, c_char_p, c_size_t]),
    "destroy": (None, [pointer]),
    "mock_cluster_new": (pointer, [pointer, c_int]),
    "mock_cluster_destroy": (None, [pointer]),
    "mock_cluster_bootstraps": (c_char_p, [pointer]),
    "mock_group_initial_rebalance_delay_ms": (None, [pointer, c_int32]),
    "mock_topic_create": (c_int, [pointer, c_char_p, c_int, c_int]),
    "mock_topic_delete": (c_int, [pointer, c_char_p]),
    "mock_partition_delete_records": (c_int, [pointer, c_char_p, c_int32, c_int64]),
    "mock_partition_set_leader": (c_int, [pointer, c_char_p, c_int32, c_int32]),
    "mock_push_request_errors_array": (
        None,
        [pointer, c_int16, c_size_t, POINTER(c_int)],
    ),
    # The errors and delays of `...`, once: on Linux integers are passed alike.
    "mock_broker_push_request_error_rtts": (
        c_int,
        [pointer, c_int32, c_int16, c_size_t, c_int, c_int],
    ),
    "mock_clear_request_errors": (None, [pointer, c_int16]),
    "mock_broker_set_down": (c_int, [pointer, c_int32]),
    "mock_broker_set_up": (c_int, [pointer, c_int32]),
    "mock_broker_set_rtt": (c_int, [pointer, c_int32, c_int]),
    "mock_start_request_tracking": (None, [pointer]),
    "mock_get_requests": (POINTER(pointer), [pointer, POINTER(c_size_t)]),
    "mock_request_api_key": (c_int16, [pointer]),
    "mock_request_destroy_array": (None, [POINTER(pointer), c_size_t]),
}
"""Results and arguments of what is used of librdkafka, without `rd_kafka_`."""


@cache
def _librdkafka() -> dict[str, Any]:
    """Return the functions of the very library that the client uses."""
    # A library's handle finds the functions of those that it was linked with, too.
    library = ctypes.CDLL(cimpl.__file__)
    functions = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, f"rd_kafka_{name}")
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


class MockBroker:
    """A cluster of mock brokers, numbered from 1; use it in `with`.

    A topic that nobody created comes to be when a client asks for it.
    """

    def __init__(self, brokers: int = 1) -> None:
        """Start it; it listens at `bootstrap`."""
        self._call = _librdkafka()
        text = ctypes.create_string_buffer(512)
        conf = self._call["conf_new"]()
        # It would print each error that it was told to make.
        self._call["conf_set"](conf, b"log_level", b"0", text, len(text))
        self._client = self._call["new"](PRODUCER, conf, text, len(text))
        assert self._client, text.value.decode()
        self._cluster = self._call["mock_cluster_new"](self._client, brokers)
        assert self._cluster
        # Groups are there at once, and not after three seconds.
        self._call["mock_group_initial_rebalance_delay_ms"](self._cluster, 0)
        self._call["mock_start_request_tracking"](self._cluster)
        found: bytes = self._call["mock_cluster_bootstraps"](self._cluster)
        self.bootstrap = found.decode()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the brokers."""
        self._call["mock_cluster_destroy"](self._cluster)
        self._call["destroy"](self._client)

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic."""
        self._do("topic_create", name.encode(), partitions, 1)

    def delete_topic(self, name: str) -> None:
        """Delete a topic."""
        self._do("topic_delete", name.encode())

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Delete a partition's records below an offset, as retention does."""
        self._do("partition_delete_records", topic.encode(), partition, before)

    def move_leader(self, topic: str, partition: int, broker: int) -> None:
        """Let a broker lead a partition, or none with -1."""
        self._do("partition_set_leader", topic.encode(), partition, broker)

    def fail(self, api: Api, *errors: int) -> None:
        """Answer the next requests of a kind with errors, one each.

        Args:
            api: The kind.
            errors: Codes of KafkaError; 0 answers well, _TRANSPORT hangs up.
        """
        codes = (c_int * len(errors))(*errors)
        self._call["mock_push_request_errors_array"](
            self._cluster, api, len(errors), codes
        )

    def delay(
        self, api: Api, milliseconds: int, error: int = 0, broker: int = 1
    ) -> None:
        """Answer a broker's next request of a kind late, well or with an error."""
        self._do("broker_push_request_error_rtts", broker, api, 1, error, milliseconds)

    def forgive(self, api: Api) -> None:
        """Forget the errors that requests of a kind were still to get."""
        self._call["mock_clear_request_errors"](self._cluster, api)

    def slow_down(self, milliseconds: int) -> None:
        """Answer everything so much later, from now on."""
        self._do("broker_set_rtt", EVERY_BROKER, milliseconds)

    def down(self, broker: int = EVERY_BROKER) -> None:
        """Hang up, and refuse connections."""
        self._do("broker_set_down", broker)

    def up(self, broker: int = EVERY_BROKER) -> None:
        """Accept connections again."""
        self._do("broker_set_up", broker)

    def requests(self, api: Api) -> int:
        """Return how many requests of a kind came so far, answered or not."""
        count = c_size_t()
        found = self._call["mock_get_requests"](self._cluster, ctypes.byref(count))
        kinds = [
            self._call["mock_request_api_key"](found[number])
            for number in range(count.value)
        ]
        self._call["mock_request_destroy_array"](found, count)
        return kinds.count(api)

    def _do(self, name: str, *arguments: object) -> None:
        code = self._call[f"mock_{name}"](self._cluster, *arguments)
        if code:
            raise KafkaException(KafkaError(code))
