"""Accounts: proof that a ledger accounts for each offset, position and kept record.

Checkpoints of a lane adjoin from its start to where its offset is; what they count is
what is kept; and their positions cover the log once. It is told rows and knows not
where they come from: the database's ledger and an archive's are proved alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from kappa_log.events import Position

LANE = ("source_id", "group_id", "topic", "partition")
"""Columns that tell lanes apart, in every table of the ledger."""

LaneKey = tuple[Any, ...]
"""Values of `LANE`."""

Found = Callable[[str, Position | None, str], None]
"""Called with a table of the ledger, a position if one is known, and what is wrong."""


class _Sums(msgspec.Struct):
    """What the checkpoints of one lane say in all."""

    end: int | None = None
    """Where its last range ends; None without any."""
    duplicates: int = 0
    """Duplicates dropped and not admitted since."""
    failures: int = 0
    is_rewound: bool = False
    """It was read again in part: what was kept before is counted twice."""


class Accounts:
    """One pass over a ledger: its checkpoints by id first, then what they account for.

    Args:
        names: source_id → name.
        found: Told what is not as it should be.
    """

    def __init__(self, names: Mapping[int, str], found: Found) -> None:
        self._names = names
        self._found = found
        self._lanes: dict[LaneKey, _Sums] = {}
        self._reached: dict[LaneKey, int] = {}

    def checkpoint(self, row: Any) -> None:
        """Prove that a checkpoint adds up, and begins where its lane's last one ended.

        Args:
            row: The next one by id; its columns are attributes.
        """
        self._check_sum(row)
        sums = self._lanes.setdefault(lane_of(row), _Sums())
        if row.kind == "admit":
            sums.duplicates -= row.acked
        elif row.kind == "retry":
            sums.failures -= row.acked + row.skipped + row.duplicate
            sums.duplicates += row.duplicate
        elif row.kind in ("batch", "rewind", "gap"):
            sums.duplicates += row.duplicate
            sums.failures += row.failed + row.parked
            start = self._start(row) if sums.end is None else sums.end
            if row.kind != "rewind" and row.from_offset != start:
                self._found(
                    "checkpoints",
                    row.first_position,
                    f"checkpoint {row.id} begins at offset {row.from_offset} of "
                    f"{self.named(lane_of(row))}, not at {start}, where the one "
                    "before it ended",
                )
            sums.end = row.to_offset
            sums.is_rewound |= row.kind == "rewind"

    def _check_sum(self, row: Any) -> None:
        """Prove that a checkpoint's numbers can be true together."""
        counts = (row.acked, row.skipped, row.duplicate, row.failed, row.parked)
        if sum(counts) > row.to_offset - row.from_offset or min(counts) < 0:
            self._found(
                "checkpoints",
                row.first_position,
                f"checkpoint {row.id} accounts for {sum(counts)} records at offsets "
                f"{row.from_offset} to {row.to_offset - 1} of "
                f"{self.named(lane_of(row))}",
            )
        first, last = row.first_position, row.last_position
        known = (first is not None, last is not None, row.head is not None)
        if known != (row.acked != 0,) * 3 or (
            all(known) and last - first + 1 != row.acked
        ):
            self._found(
                "checkpoints",
                first if last is None else last,
                f"checkpoint {row.id} of {self.named(lane_of(row))} kept {row.acked} "
                f"events, but has positions {first} to {last} and "
                f"{'a' if known[2] else 'no'} head",
            )

    def _start(self, row: Any) -> int:
        """Return where a lane's first range begins; a topic's may begin anywhere."""
        return 0 if self._is_file(row.source_id) else int(row.from_offset)

    def ranges(self, pairs: Iterable[tuple[Position, Position]], end: Position) -> None:
        """Prove that the checkpoints' positions cover the log once.

        Args:
            pairs: First and last position of each checkpoint that has them, rising.
            end: Last position of the log.
        """
        covered = 0
        for first, last in pairs:
            if first != covered + 1:
                low, high = sorted((first, covered + 1))
                self._found(
                    "checkpoints",
                    low,
                    f"positions {low} to {high - 1} are accounted for by no "
                    "checkpoint, or by two",
                )
            covered = last
        if covered != end:
            self._found(
                "checkpoints",
                covered + 1,
                f"the ledger ends at position {covered}, the log at {end}",
            )

    def offsets(self, stored: Mapping[LaneKey, tuple[int, int]]) -> None:
        """Prove that each lane's checkpoints end where its offset is.

        Args:
            stored: Lane → its next offset, and the highest that this ever was.
        """
        self._reached = {lane: reached for lane, (_, reached) in stored.items()}
        for lane in self._known_or_in(stored):
            end = self._lanes[lane].end if lane in self._lanes else None
            there = stored[lane][0] if lane in stored else None
            if end is None:
                # A file is read from 0 on; a topic may have been begun anywhere.
                end = 0 if self._is_file(lane[0]) else there
            if there != end:
                self._found(
                    "offsets",
                    None,
                    f"the offset of {self.named(lane)} is "
                    f"{'gone' if there is None else there}, its checkpoints end at "
                    f"{end}",
                )

    def kept(self, what: str, stored: Mapping[LaneKey, tuple[int, int]]) -> None:
        """Prove that there are as many duplicates, or failures, as were counted.

        Args:
            what: Which of the two; offsets were proved before.
            stored: Lane → how many there are, and the highest of their offsets.
        """
        for lane in self._known_or_in(stored):
            sums = self._lanes.get(lane, _Sums())
            counted, (there, last) = getattr(sums, what), stored.get(lane, (0, -1))
            if there > counted if sums.is_rewound else there != counted:
                self._found(
                    what,
                    None,
                    f"{self.named(lane)} has {there} {what}, its checkpoints account "
                    f"for {counted}",
                )
            reached = self._reached.get(lane)
            if reached is not None and last >= reached:
                self._found(
                    what,
                    None,
                    f"{self.named(lane)} has {what} up to offset {last}, but was read "
                    f"only up to {reached - 1}",
                )

    def _known_or_in(self, stored: Mapping[LaneKey, Any]) -> list[LaneKey]:
        return [*self._lanes, *(stored.keys() - self._lanes.keys())]

    def _is_file(self, source: int) -> bool:
        return self._names.get(source, "").startswith("file:")

    def named(self, lane: LaneKey) -> str:
        """Return a lane as people are told of it."""
        source, group, topic, partition = lane
        return (
            f"{topic} partition {partition} of {self._names.get(source, 'no source')} "
            f"for group {group}"
        )


def lane_of(row: Any) -> LaneKey:
    """Return the lane of a row of the ledger."""
    return (row.source_id, row.group_id, row.topic, row.partition)
