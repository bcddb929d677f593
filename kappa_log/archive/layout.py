"""Layout: names, columns and encodings of the archive's Parquet files.

Events are cut at midnights (UTC, of recorded_at) and every N events of a date, so
where a segment begins and ends depends on positions and dates alone. Columns are the
log's own, under the same names; typed columns of payload fields may follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kappa_log.events import Position, kept_instant

VERSION = 1
"""Of the layout; an archive of a higher one is refused."""

ROW_GROUP = 122_880
"""Rows of a row group: the unit in which DuckDB spreads work over threads."""

ROW_GROUP_BYTES = 128 * 2**20
"""Contents at which a row group ends before that, so that one fits into memory."""

TIME = pa.timestamp("us", tz="UTC")

EVENTS = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("source_id", pa.int64(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("partition", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("headers", pa.binary()),
        pa.field("timestamp", pa.int64()),
        pa.field("entity_id", pa.string()),
        pa.field("event_time", TIME),
        pa.field("event_type", pa.string()),
        pa.field("event_version", pa.string()),
        pa.field("recorded_at", TIME, nullable=False),
        pa.field("checksum", pa.string()),
        pa.field("message_id", pa.binary(16), nullable=False),
        pa.field("payload", pa.string()),
        pa.field("raw", pa.binary()),
        pa.field("payload_digest", pa.binary()),
        pa.field("personal_digest", pa.binary()),
    ]
)
"""Columns of a segment. ``headers`` are MessagePack, as `records.encode_headers`
makes them; the digests stand for contents that were erased; ``timestamp`` is Kafka's,
in milliseconds."""

LEDGER = ("offsets", "checkpoints", "duplicates", "failures")
"""Tables that are kept whole beside the events, as of the same head."""

_REPEATING = [
    *("source_id", "topic", "group_id", "partition", "key", "headers"),
    *("entity_id", "event_type", "event_version"),
]
_RISING = ["position", "offset", "timestamp", "event_time", "recorded_at"]
_LOOKED_FOR = [*_REPEATING, *_RISING]


def segment_path(day: date, first: Position, last: Position, variant: str) -> str:
    """Return a segment's path in the archive; by name they sort as by position."""
    end = f"-{variant}" if variant else ""
    return f"events/date={day.isoformat()}/{first:012d}-{last:012d}{end}.parquet"


def ledger_path(table: str, digest: str) -> str:
    """Return the path of a table of the ledger with these contents."""
    return f"{table}/{digest[:32]}.parquet"


def rows_path(projection: str, build: int, position: Position) -> str:
    """Return the path of a build's rows at a position."""
    return f"projections/{projection}/build={build}/{position:012d}.parquet"


def variant_of(columns: Sequence[Any], erasure_epoch: int) -> str:
    """Return what tells segments of other contents at the same positions apart."""
    if not columns and not erasure_epoch:
        return ""
    told = repr((list(columns), erasure_epoch)).encode()
    return blake2b(told, digest_size=4).hexdigest()


def day_of(recorded_at: int) -> date:
    """Return the date of microseconds since 1970, in UTC; errors: `kept_instant`."""
    return kept_instant(recorded_at).date()


def event_options(rows: int) -> dict[str, Any]:
    """Return how a segment of so many events is written."""
    return OPTIONS | {
        "use_dictionary": _REPEATING,
        "column_encoding": dict.fromkeys(_RISING, "DELTA_BINARY_PACKED"),
        "write_statistics": _LOOKED_FOR,
        "bloom_filter_options": {
            "entity_id": {"ndv": min(rows, ROW_GROUP), "fpp": 0.05}
        },
        "sorting_columns": [pq.SortingColumn(0)],
    }


OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "write_page_index": True,
    # For readers that know no manifest: they notice a damaged page, too.
    "write_page_checksum": True,
}
"""How all files are written."""
