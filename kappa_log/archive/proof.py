"""Proof: columns of a segment's events, as the chain of the log wants them.

An archive whose chain comes to the heads in its manifest, and whose last head is the
log's, holds the log's events and nothing else.
"""

from __future__ import annotations

import pyarrow as pa

from kappa_log.archive.layout import EVENTS
from kappa_log.chain import Lists
from kappa_log.storage.transfer import ARCHIVED

assert tuple(EVENTS.names) == ARCHIVED, "a column of the log has no place in segments"


def lists(table: pa.Table | pa.RecordBatch) -> Lists:
    """Return the log's columns of some events as lists."""
    found: Lists = {}
    for name in ARCHIVED:
        column = table.column(name)
        kind = EVENTS.field(name).type
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.int64())
        elif name == "payload":
            column = column.cast(pa.binary())
        found[name] = column.to_pylist()
    return found
