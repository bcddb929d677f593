"""Duplicates: records that were dropped, and how one becomes an event after all.

Dedupe decides by a rule, and a rule can be wrong about one record. So nothing that
it dropped is gone: the payload is that of the event it repeats, and what may differ
(coordinates, key, headers, timestamp) was kept.
"""

from __future__ import annotations

from datetime import datetime

import msgspec
import sqlalchemy as sa

from kappa_log.decide import Acked, Decided, Failed, Portion, consume
from kappa_log.errors import NotFound, UsageError
from kappa_log.events import Position
from kappa_log.ingest import Clock, append
from kappa_log.listeners import Listener
from kappa_log.records import Identity, Lane, Record, checksum
from kappa_log.storage import ledger, lists, replays
from kappa_log.storage.database import Database
from kappa_log.storage.ledger import Assignment


def admit(
    database: Database,
    listener: Listener,
    duplicate: lists.Duplicate,
    *,
    clock: Clock,
    who: str,
    reason: str | None = None,
) -> Position:
    """Turn a dropped duplicate into an event; return its position.

    Args:
        database: The log.
        listener: Who decides about records of its topic and group.
        duplicate: What to admit.
        clock: The time that the event is recorded at.
        who: Whom the audit trail names.
        reason: Why, for the audit trail.

    Raises:
        NotFound: Another process admitted it first.
        UsageError: The handler raises on it or skips it; nothing was changed.
    """
    lane = Lane(
        duplicate.source, duplicate.topic, duplicate.group_id, duplicate.partition
    )
    with database.read() as connection:
        original = lists.event(connection, database, duplicate.repeats)
    text = original.payload_text
    value = original.raw
    if value is None and text is not None:
        value = text.encode()
    record = Record(
        duplicate.offset,
        value,
        duplicate.key,
        tuple(duplicate.headers),
        duplicate.timestamp,
    )
    portion = Portion(
        lane,
        Assignment(original.source_id, 0, duplicate.offset, None, is_new=False),
        listener,
        [record],
        duplicate.offset + 1,
    )
    message_id = Identity(listener.dedupe, lane).of_coordinates(duplicate.offset)
    outcome = consume(portion, record, message_id, checksum(record.value))
    if not isinstance(outcome, Acked):
        error = outcome.error if isinstance(outcome, Failed) else None
        why = f"raises {error!r}" if error else "skips it"
        msg = f"duplicate {duplicate.id} cannot be admitted: its handler {why}"
        raise UsageError(msg)
    act = replays.Audit(
        who=who, action="admit", subject=f"duplicate {duplicate.id}", reason=reason
    )
    return _append(database, portion, outcome, duplicate.id, act, clock())


def _append(
    database: Database,
    portion: Portion,
    acked: Acked,
    identifier: int,
    act: replays.Audit,
    now: datetime,
) -> Position:
    table = database.tables.duplicates
    with database.write() as connection:
        # The row count decides between two who admit at once.
        gone = connection.execute(sa.delete(table).where(table.c.id == identifier))
        if gone.rowcount != 1:
            raise NotFound("duplicate", identifier, "It was admitted already")
        source = ledger.source_id(connection, database, portion.lane.source, now)
        held = msgspec.structs.replace(portion.held, source_id=source)
        portion = msgspec.structs.replace(portion, held=held)
        decided = Decided(acked=[acked])
        done = append(connection, database, [portion], [decided], now, kind="admit")
        position = done.last_position
        assert position is not None
        replays.write_audit(
            connection,
            database,
            msgspec.structs.replace(act, detail={"position": position}),
            now,
        )
    return position
