"""Diff: what differs between the rows of two builds at one position."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log.events import Position
from kappa_log.state import FLOAT_SHARE
from kappa_log.storage.builds import Build, table_of
from kappa_log.storage.database import Database
from kappa_log.storage.rows import count_rows, plain_rows

EXAMPLES = 5
"""How many rows of each kind a diff shows."""


class RowDiff(msgspec.Struct, frozen=True):
    """One row that differs: its key, and its columns before and after."""

    key: dict[str, Any]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Diff(msgspec.Struct, frozen=True):
    """Rows of a new build against those of the old one, both at one position."""

    position: Position
    old_build: int
    new_build: int
    old_rows: int
    new_rows: int
    added: int
    removed: int
    changed: int
    columns_added: list[str]
    columns_removed: list[str]
    examples: list[RowDiff]

    @property
    def total(self) -> int:
        """Number of rows that differ."""
        return self.added + self.removed + self.changed


def compare(
    connection: sa.Connection, database: Database, old: Build, new: Build
) -> Diff:
    """Return the diff of two builds of one projection.

    A row is changed when a column that both builds have differs. Columns that only
    one has are named once, not counted for each row.

    Args:
        connection: A transaction that sees one snapshot, with both cursors equal.
        database: The log.
        old: Usually the live build.
        new: Usually the shadow.
    """
    old_fields = {c.name: c.kind for c in old.layout.fields}
    new_fields = {c.name: c.kind for c in new.layout.fields}
    magnitudes = [
        {c.name: c.magnitude for c in build.layout.fields if c.magnitude}
        for build in (old, new)
    ]
    shared = [n for n in old_fields if new_fields.get(n) == old_fields[n]]
    old_rows = count_rows(connection, database, old)
    new_rows = count_rows(connection, database, new)
    examples: list[RowDiff] = []
    if _keys(old) != _keys(new):
        added, removed, changed = new_rows, old_rows, 0
    else:
        a, b = table_of(database, old).alias("a"), table_of(database, new).alias("b")
        names = [c.name for c in old.layout.keys]
        same_key = sa.and_(*(a.c[n] == b.c[n] for n in names))
        differs = sa.or_(
            sa.false(),
            *(
                _differs(
                    a.c[n],
                    b.c[n],
                    old_fields[n],
                    [
                        side.c[of[n]]
                        for side, of in zip((a, b), magnitudes, strict=True)
                        if n in of
                    ],
                )
                for n in shared
            ),
        )
        missing = {
            "added": (b, a.c[names[0]].is_(None), sa.outerjoin(b, a, same_key)),
            "removed": (a, b.c[names[0]].is_(None), sa.outerjoin(a, b, same_key)),
            "changed": (a, differs, sa.join(a, b, same_key)),
        }
        counts = {}
        for kind, (side, condition, joined) in missing.items():
            counts[kind] = (
                connection.scalar(
                    sa.select(sa.func.count()).select_from(joined).where(condition)
                )
                or 0
            )
            if counts[kind]:
                keys = connection.execute(
                    sa.select(*(side.c[n] for n in names))
                    .select_from(joined)
                    .where(condition)
                    .order_by(*(side.c[n] for n in names))
                    .limit(EXAMPLES)
                ).all()
                examples += [
                    _example(
                        connection, database, old, new, dict(zip(names, k, strict=True))
                    )
                    for k in keys
                ]
        added, removed, changed = (counts[k] for k in ("added", "removed", "changed"))
    return Diff(
        position=new.cursor,
        old_build=old.number,
        new_build=new.number,
        old_rows=old_rows,
        new_rows=new_rows,
        added=added,
        removed=removed,
        changed=changed,
        columns_added=[n for n in new_fields if n not in shared],
        columns_removed=[n for n in old_fields if n not in shared],
        examples=examples,
    )


def _keys(build: Build) -> list[tuple[str, str]]:
    return [(c.name, c.kind) for c in build.layout.keys]


def _differs(
    left: sa.ColumnElement[Any],
    right: sa.ColumnElement[Any],
    kind: str,
    magnitudes: list[sa.ColumnElement[Any]],
) -> sa.ColumnElement[bool]:
    """Return whether a column differs; sums of floats may in their last digits."""
    if kind == "decimal":
        # 1.10 and 1.1 are different rows: SQLite keeps decimals as text.
        left, right = sa.cast(left, sa.Text), sa.cast(right, sa.Text)
    differs = left.is_distinct_from(right)
    if not magnitudes:
        return differs
    apart = sa.func.abs(left - right)
    is_close = sa.or_(*(apart <= FLOAT_SHARE * of for of in magnitudes))
    return sa.and_(differs, sa.not_(sa.func.coalesce(is_close, sa.false())))


def _example(
    connection: sa.Connection,
    database: Database,
    old: Build,
    new: Build,
    key: dict[str, Any],
) -> RowDiff:
    found = [
        next(iter(plain_rows(connection, database, build, where=key, limit=1)), None)
        for build in (old, new)
    ]
    before, after = (
        None if row is None else {n: v for n, v in row.items() if n not in key}
        for row in found
    )
    if before is not None and after is not None:
        same = [n for n in before if n in after and before[n] == after[n]]
        before = {n: v for n, v in before.items() if n not in same}
        after = {n: v for n, v in after.items() if n not in same}
    shown = next(row for row in reversed(found) if row is not None)
    return RowDiff({name: shown[name] for name in key}, before, after)
