"""The ledger: which offsets became which positions, and who may move them.

An offset moves by compare-and-set on its value and the writer's epoch. A writer that
was replaced updates no row, and its batch rolls back: fenced by epoch, never by time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.errors import Fenced, UsageError
from kappa_log.events import Position
from kappa_log.records import Lane
from kappa_log.storage.bulk import insert_rows
from kappa_log.storage.database import Database


class Assignment(msgspec.Struct, frozen=True):
    """The right to move one lane's offset, until somebody else takes it."""

    source_id: int
    epoch: int
    next_offset: int
    content_digest: bytes | None
    """For a file: digest of what was read up to next_offset."""
    is_new: bool
    reached: int = 0
    """Highest offset that next_offset ever was; it is less after a rewind."""

    @property
    def reads_again(self) -> bool:
        """Tell whether what comes next was read before."""
        return self.next_offset < self.reached

    def moved(self, next_offset: int, digest: bytes | None = None) -> Assignment:
        """Return it with another next offset."""
        return Assignment(
            self.source_id,
            self.epoch,
            next_offset,
            digest,
            self.is_new,
            max(self.reached, next_offset),
        )


class Counts(msgspec.Struct):
    """What became of the records of a batch; their sum is the records seen."""

    acked: int = 0
    skipped: int = 0
    duplicate: int = 0
    failed: int = 0
    parked: int = 0

    @property
    def seen(self) -> int:
        """Return the number of records."""
        return self.acked + self.skipped + self.duplicate + self.failed + self.parked

    def count(self, name: str) -> None:
        """Count one more record under a name."""
        setattr(self, name, getattr(self, name) + 1)

    def add(self, other: Counts) -> None:
        """Add another batch's counts."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def source_id(
    connection: sa.Connection, database: Database, name: str, now: datetime
) -> int:
    """Return the id of a source, making it known if it is new."""
    table = database.tables.sources
    query = sa.select(table.c.id).where(table.c.name == name)
    found: int | None = connection.scalar(query)
    if found is None:
        _insert_if_new(connection, table, name=name, created_at=now)
        found = connection.scalar(query)
    assert found is not None
    return found


def _insert_if_new(connection: sa.Connection, table: sa.Table, **values: Any) -> bool:
    """Insert a row unless another process was first; wait for it, and tell."""
    # Imported one by one: each brings the code of all its drivers.
    insert: Any
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert
    else:
        from sqlalchemy.dialects.postgresql import insert
    statement = insert(table).values(**values).on_conflict_do_nothing()
    return connection.scalar(statement.returning(sa.literal(1))) is not None


class Reader(msgspec.Struct, frozen=True):
    """How a lane is read; stored with it, so that nobody reads on in another way."""

    dedupe: str
    fields: str | None
    """Field options as JSON; None under a listener."""


def assign(
    connection: sa.Connection,
    database: Database,
    lane: Lane,
    reader: Reader,
    now: datetime,
    *,
    start: int = 0,
) -> Assignment:
    """Take a lane over: bump its epoch, fencing whoever had it, and read its offset.

    Args:
        connection: Write transaction.
        database: The log.
        lane: What to take.
        reader: How it will be read.
        now: The clock.
        start: Offset of a lane that nobody read before.

    Raises:
        UsageError: The lane was read with other options; nothing was changed.
    """
    table = database.tables.offsets
    identifier = source_id(connection, database, lane.source, now)
    where = lane_is(table, lane, identifier)
    is_new = _insert_if_new(
        connection,
        table,
        source_id=identifier,
        group_id=lane.group_id,
        topic=lane.topic,
        partition=lane.partition,
        next_offset=start,
        reached=start,
        epoch=1,
        dedupe=reader.dedupe,
        fields=reader.fields,
        updated_at=now,
    )
    if is_new:
        return Assignment(identifier, 1, start, None, True, start)
    row = connection.execute(sa.select(table).where(where).with_for_update()).one()
    _check_options(row, lane, reader)
    connection.execute(
        table.update().where(where).values(epoch=row.epoch + 1, updated_at=now)
    )
    return _assignment(row, row.epoch + 1)


def _assignment(row: Any, epoch: int) -> Assignment:
    digest = None if row.content_digest is None else bytes(row.content_digest)
    return Assignment(row.source_id, epoch, row.next_offset, digest, False, row.reached)


def begin(
    connection: sa.Connection,
    database: Database,
    lane: Lane,
    reader: Reader,
    now: datetime,
    *,
    start: int,
) -> None:
    """Keep where a lane is to be begun, for whoever takes it; known lanes stay."""
    _insert_if_new(
        connection,
        database.tables.offsets,
        source_id=source_id(connection, database, lane.source, now),
        group_id=lane.group_id,
        topic=lane.topic,
        partition=lane.partition,
        next_offset=start,
        reached=start,
        epoch=0,
        dedupe=reader.dedupe,
        fields=reader.fields,
        updated_at=now,
    )


def known_lanes(
    connection: sa.Connection, database: Database, kind: str, group: str
) -> set[Lane]:
    """Return a group's lanes of sources whose names begin with ``kind``."""
    table, sources = database.tables.offsets, database.tables.sources
    query = (
        sa.select(sources.c.name, table.c.topic, table.c.partition)
        .join_from(table, sources)
        .where(table.c.group_id == group, sources.c.name.startswith(kind))
    )
    return {
        Lane(name, topic, group, partition)
        for name, topic, partition in connection.execute(query)
    }


def has_lane(connection: sa.Connection, database: Database, **of: str) -> bool:
    """Tell whether there is a lane of this topic or group_id."""
    table = database.tables.offsets
    query = sa.select(sa.literal(1)).select_from(table).filter_by(**of).limit(1)
    return connection.scalar(query) is not None


def reread(
    connection: sa.Connection, database: Database, lane: Lane, held: Assignment
) -> Assignment | None:
    """Return a lane that is held as it is now; None if somebody else took it."""
    table = database.tables.offsets
    query = sa.select(table).where(
        lane_is(table, lane, held.source_id), table.c.epoch == held.epoch
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else _assignment(row, held.epoch)


def peek(
    connection: sa.Connection, database: Database, lane: Lane
) -> sa.Row[Any] | None:
    """Return the offsets row of a lane without taking the lane."""
    table, sources = database.tables.offsets, database.tables.sources
    query = (
        sa.select(table)
        .join(sources)
        .where(
            sources.c.name == lane.source,
            table.c.group_id == lane.group_id,
            table.c.topic == lane.topic,
            table.c.partition == lane.partition,
        )
    )
    return connection.execute(query).one_or_none()


def advance(
    connection: sa.Connection,
    database: Database,
    lane: Lane,
    held: Assignment,
    reached: Assignment,
    now: datetime,
) -> None:
    """Move a lane's offset from what is held to what was reached.

    Raises:
        Fenced: The lane is no longer ours; the transaction must roll back.
    """
    table = database.tables.offsets
    result = connection.execute(
        table.update()
        .where(
            lane_is(table, lane, held.source_id),
            table.c.epoch == held.epoch,
            table.c.next_offset == held.next_offset,
        )
        .values(
            next_offset=reached.next_offset,
            reached=reached.reached,
            content_digest=reached.content_digest,
            updated_at=now,
        )
    )
    if result.rowcount != 1:
        msg = (
            f"another process took over {lane.topic} of {lane.source} for group "
            f"{lane.group_id}; this batch was rolled back, and what was committed "
            "is kept"
        )
        raise Fenced(msg)


def move(
    connection: sa.Connection,
    database: Database,
    lane: Lane,
    held: Assignment,
    to_offset: int,
    now: datetime,
) -> Assignment:
    """Move a lane's offset over no records: back, or forth over a gap.

    Returns:
        The lane as it is held now. The ledger has a row about it: of kind ``gap``
        over the offsets passed, or of kind ``rewind`` at the offset gone back to.

    Raises:
        Fenced: The lane is no longer ours; the transaction must roll back.
    """
    moved = held.moved(to_offset)
    advance(connection, database, lane, held, moved, now)
    is_gap = to_offset >= held.next_offset
    write_checkpoint(
        connection,
        database,
        lane,
        Checkpoint(
            kind="gap" if is_gap else "rewind",
            source_id=held.source_id,
            from_offset=held.next_offset if is_gap else to_offset,
            to_offset=to_offset,
            counts=Counts(),
            positions=None,
            head=None,
            recorded_at=now,
        ),
    )
    return moved


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the ledger: [from_offset, to_offset) and what became of it."""

    kind: str
    source_id: int
    from_offset: int
    to_offset: int
    counts: Counts
    positions: tuple[int, int] | None
    """First and last position of its events; None if there are none."""
    head: bytes | None
    """Head of the chain at the last position."""
    recorded_at: datetime


def write_checkpoint(
    connection: sa.Connection, database: Database, lane: Lane, row: Checkpoint
) -> None:
    """Write one row of the ledger."""
    first, last = row.positions or (None, None)
    connection.execute(
        database.tables.checkpoints.insert().values(
            kind=row.kind,
            source_id=row.source_id,
            group_id=lane.group_id,
            topic=lane.topic,
            partition=lane.partition,
            from_offset=row.from_offset,
            to_offset=row.to_offset,
            first_position=first,
            last_position=last,
            head=row.head,
            recorded_at=row.recorded_at,
            **msgspec.structs.asdict(row.counts),
        )
    )


RECEIVED = (
    "source_id",
    "group_id",
    "topic",
    "partition",
    "offset",
    "key",
    "headers",
    "timestamp",
)
"""Columns of a record that is kept outside the log."""

DUPLICATE_COLUMNS = (*RECEIVED, "repeats", "recorded_at")

FAILURE_COLUMNS = (
    *RECEIVED,
    "value",
    "checksum",
    "message_id",
    "entity_id",
    "event_time",
    "event_type",
    "event_version",
    "park_id",
    "parked",
    "error_class",
    "error_message",
    "error_backtrace",
    "fingerprint",
    "attempts",
    "first_at",
    "last_at",
    "metadata",
)


def keep_duplicates(
    connection: sa.Connection, database: Database, rows: Sequence[Sequence[Any]]
) -> None:
    """Keep dropped duplicates; rows in order of `DUPLICATE_COLUMNS`."""
    insert_rows(connection, database.tables.duplicates, DUPLICATE_COLUMNS, rows)


def keep_failures(
    connection: sa.Connection, database: Database, rows: Sequence[Sequence[Any]]
) -> None:
    """Keep failures; rows in order of `FAILURE_COLUMNS`."""
    insert_rows(connection, database.tables.failures, FAILURE_COLUMNS, rows)


def totals(connection: sa.Connection, database: Database) -> Counts:
    """Return what became of all records that were ever read."""
    table = database.tables.checkpoints
    names = Counts.__struct_fields__
    sums = (sa.func.coalesce(sa.func.sum(table.c[name]), 0) for name in names)
    row = connection.execute(sa.select(*sums)).one()
    return Counts(*(int(value) for value in row))


def last_of_topic(
    connection: sa.Connection, database: Database, topic: str
) -> Position:
    """Return the position of a topic's last event; 0 if it has none."""
    table = database.tables.checkpoints
    last = sa.func.max(table.c.last_position)
    return connection.scalar(sa.select(last).where(table.c.topic == topic)) or 0


def lanes(connection: sa.Connection, database: Database) -> Iterable[sa.Row[Any]]:
    """Return all offsets rows with the names of their sources."""
    table, sources = database.tables.offsets, database.tables.sources
    return connection.execute(
        sa.select(sources.c.name.label("source"), table)
        .join(sources)
        .order_by(table.c.topic, table.c.group_id, sources.c.name, table.c.partition)
    ).all()


def lane_is(table: sa.Table, lane: Lane, source: int) -> sa.ColumnElement[bool]:
    """Return the condition that a row is of a lane."""
    return sa.and_(
        table.c.source_id == source,
        table.c.group_id == lane.group_id,
        table.c.topic == lane.topic,
        table.c.partition == lane.partition,
    )


def _check_options(row: Any, lane: Lane, reader: Reader) -> None:
    if not lane.source.startswith("file:") and row.dedupe != reader.dedupe:
        msg = (
            f"topic {lane.topic} was read for group {lane.group_id} with dedupe "
            f"'{row.dedupe}', now with '{reader.dedupe}': what is in the log would not "
            "be known again. Set it back, or read under another group_id; nothing was "
            "changed"
        )
        raise UsageError(msg)
    for name, old, new in (
        ("--dedupe", row.dedupe, reader.dedupe),
        ("field options", row.fields, reader.fields),
    ):
        if old != new:
            msg = (
                f"{lane.source} was ingested into {lane.topic} (group "
                f"{lane.group_id}) with {name} {old or 'of a listener'}, now with "
                f"{new or 'of a listener'}; use the same, or another --source or "
                "--group; nothing was changed"
            )
            raise UsageError(msg)


def failure_ids(
    connection: sa.Connection,
    database: Database,
    lane: Lane,
    source: int,
    from_offset: int,
    limit: int = 5,
) -> list[int]:
    """Return the ids of the first failures of a lane from an offset on."""
    table = database.tables.failures
    return list(
        connection.scalars(
            sa.select(table.c.id)
            .where(lane_is(table, lane, source), table.c.offset >= from_offset)
            .order_by(table.c.offset)
            .limit(limit)
        )
    )
