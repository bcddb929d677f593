"""Verify: recompute the chain, prove the ledger complete, fold views afresh.

What is proved: positions have no holes, each event's columns hash to the chain's
heads at every checkpoint, the ledger's ranges adjoin and account for each event. What
is not: who can rewrite events and heads alike is caught only by a head kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log import chain
from kappa_log.cursor import spans
from kappa_log.errors import KappaLogError
from kappa_log.events import ORIGIN, Position, to_micros
from kappa_log.fold import Folding, Projection, Registry
from kappa_log.project import PAGE_EVENTS, reader_of, stale
from kappa_log.records import Lane, checksum
from kappa_log.storage import builds, log
from kappa_log.storage.builds import Build, RowStore
from kappa_log.storage.database import Database
from kappa_log.storage.lists import sources

MAX_FINDINGS = 20
"""Findings are listed up to here; one is enough to know."""

OnStep = Callable[[str, int, int], None]
"""Called with what is verified, how far, and of how much."""


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be."""

    what: str
    position: Position | None
    message: str


class VerifyReport(msgspec.Struct, frozen=True):
    """What was verified and what was found."""

    ok: bool
    position: Position
    head: str
    """Head of the chain in hex; keep it elsewhere to catch whoever rewrites all."""
    events: int
    checkpoints: int
    findings: list[Finding]
    limits: list[str]
    projections: list[str]


def verify(
    database: Database,
    registry: Registry,
    *,
    head: str | None = None,
    names: Sequence[str] = (),
    on_step: OnStep | None = None,
) -> VerifyReport:
    """Verify the log, and the live rows of the projections named.

    Args:
        database: The log.
        registry: For the code of the projections.
        head: A head kept elsewhere, in hex, of now or of any earlier checkpoint.
        names: Projections whose live rows are compared with a fresh fold.
        on_step: Called as it goes on.
    """
    step = on_step or (lambda *_: None)
    check = _LogCheck(database, step)
    check.run()
    limits = [
        (
            "A head kept elsewhere was not given (--head): who can rewrite the whole "
            "database, heads included, would not be caught."
        )
    ]
    if head is not None:
        limits = []
        check.compare_head(head)
    if check.erased:
        limits.append(
            f"{check.erased:,} events were erased: their hashes are in the chain, "
            "their contents are not proved."
        )
    done: list[str] = []
    for name in names:
        limits += _check_projection(database, registry, name, check.findings, step)
        done.append(name)
    return VerifyReport(
        ok=not check.findings,
        position=check.head.position,
        head=check.head.digest.hex(),
        events=check.events,
        checkpoints=check.checkpoints,
        findings=check.findings[:MAX_FINDINGS],
        limits=limits,
        projections=done,
    )


class _LogCheck:
    """One pass over events and ledger, side by side, in one snapshot a page."""

    def __init__(self, database: Database, step: OnStep) -> None:
        self._database = database
        self._step = step
        self.findings: list[Finding] = []
        self.events = 0
        self.erased = 0
        self.checkpoints = 0
        self._heads: dict[Position, bytes] = {}

    def run(self) -> None:
        database = self._database
        with database.read() as connection:
            self.head = log.head(connection, database)
            self._names = sources(connection, database)
            self._check_ledger(connection)
        digest, expected = chain.HEAD_OF_NOTHING, 0
        self._digests: dict[Any, chain.LaneDigest] = {}
        for after, until in spans(ORIGIN, self.head.position, PAGE_EVENTS):
            for row in self._rows(after, until):
                expected += 1
                if row[0] != expected:
                    self._found("log", expected, f"position {expected} is missing")
                    return
                digest = chain.extend(digest, self._digest(row))
                self.events += 1
                stored = self._heads.get(expected)
                if stored is not None and stored != digest:
                    first = self._since_last_good(expected)
                    self._found(
                        "chain",
                        first,
                        f"an event at positions {first} to {expected} is not what was "
                        "recorded: the chain differs from the checkpoint's head",
                    )
                    return
            self._step("log", until, self.head.position)
        if expected != self.head.position:
            self._found("log", expected + 1, f"position {expected + 1} is missing")
        elif digest != self.head.digest:
            self._found("chain", expected, "the chain does not end in the stored head")
        with database.read() as connection:
            beyond = connection.scalar(
                sa.select(sa.func.max(database.tables.events.c.position))
            )
            now = log.head(connection, database).position
        if (beyond or 0) > now:
            self._found("log", beyond, f"an event lies beyond the head, position {now}")

    def compare_head(self, text: str) -> None:
        """Find a head kept elsewhere among the checkpoints'."""
        try:
            kept = bytes.fromhex(text)
        except ValueError:
            kept = b""
        known = {chain.HEAD_OF_NOTHING, self.head.digest, *self._heads.values()}
        if kept not in known:
            self._found(
                "head",
                None,
                f"the head {text[:16]}… kept elsewhere is no head of this log: it was "
                "rewritten, cut, or is another log",
            )

    def _found(self, what: str, position: Position | None, message: str) -> None:
        self.findings.append(Finding(what, position, message))

    def _since_last_good(self, position: Position) -> Position:
        return max((p for p in self._heads if p < position), default=0) + 1

    def _rows(self, after: Position, until: Position) -> Sequence[Any]:
        table = self._database.tables.events
        columns = [table.c[name] for name in log.EVENT_COLUMNS]
        query = (
            sa.select(*columns, table.c.payload_digest, table.c.personal_digest)
            .where(table.c.position > after, table.c.position <= until)
            .order_by(table.c.position)
        )
        with self._database.read() as connection:
            return connection.execute(query).all()

    def _digest(self, row: Any) -> bytes:
        lane_key = (row.source_id, row.topic, row.group_id, row.partition)
        digests = self._digests.get(lane_key)
        if digests is None:
            lane = Lane(
                self._names.get(row.source_id, "?"),
                row.topic,
                row.group_id,
                row.partition,
            )
            digests = self._digests[lane_key] = chain.LaneDigest(lane)
        text = None if row.payload is None else row.payload.encode()
        if row.payload_digest is None:
            self._check_checksum(row, text)
        self._check_erased(row)
        parts = (row.payload_digest or chain.payload_digest(text)) + (
            row.personal_digest
            or chain.personal_digest(row.raw, row.key, row.headers, row.entity_id)
        )
        tail = chain.digest_tail(
            row.event_type, row.event_version, row.message_id, row.checksum, parts
        )
        return digests.of(
            row.position,
            to_micros(row.recorded_at),
            offset=row.offset,
            timestamp=row.timestamp,
            event_time=None if row.event_time is None else to_micros(row.event_time),
            tail=tail,
        )

    def _check_erased(self, row: Any) -> None:
        """Prove that part hashes stand for erased contents and beside none."""
        hashes = (row.payload_digest, row.personal_digest)
        self.erased += hashes != (None, None)
        has_payload = row.payload is not None or row.raw is not None
        has_more = not (row.raw is row.key is row.headers is None)
        if (row.payload_digest is not None and has_payload) or (
            row.personal_digest is not None and has_more
        ):
            self._found(
                "erased",
                row.position,
                f"the event at position {row.position} is marked as erased but has "
                "contents, which nothing proves",
            )

    def _check_checksum(self, row: Any, text: bytes | None) -> None:
        received = text if row.raw is None else row.raw
        if checksum(received) != row.checksum:
            self._found(
                "checksum",
                row.position,
                f"the payload at position {row.position} does not match its checksum",
            )

    def _check_ledger(self, connection: sa.Connection) -> None:
        """Prove that checkpoints adjoin and their positions cover the log once."""
        ranges, ends = self._check_offset_ranges(connection)
        self._check_position_ranges(ranges)
        self._check_offsets(connection, ends)

    def _check_offset_ranges(
        self, connection: sa.Connection
    ) -> tuple[list[tuple[Position, Position]], dict[Any, int]]:
        """Prove that each lane's checkpoints adjoin.

        Returns:
            First and last positions of the checkpoints, and lane → where it ends.
        """
        table = self._database.tables.checkpoints
        ranges: list[tuple[Position, Position]] = []
        ends: dict[Any, int] = {}
        for row in connection.execute(sa.select(table).order_by(table.c.id)):
            self.checkpoints += 1
            if row.acked:
                ranges.append((row.first_position, row.last_position))
                self._heads[row.last_position] = bytes(row.head)
            self._check_sum(row)
            lane = (row.source_id, row.group_id, row.topic, row.partition)
            if row.kind in ("batch", "gap"):
                if ends.get(lane, row.from_offset) != row.from_offset:
                    self._found(
                        "ledger",
                        row.first_position,
                        f"checkpoint {row.id} begins at offset {row.from_offset} of "
                        f"{row.topic}, the one before ended at {ends[lane]}",
                    )
                ends[lane] = row.to_offset
            elif row.kind == "rewind":
                ends[lane] = row.to_offset
        return ranges, ends

    def _check_sum(self, row: Any) -> None:
        """Prove that no more records are accounted for than there are offsets."""
        counts = (row.acked, row.skipped, row.duplicate, row.failed, row.parked)
        if sum(counts) > row.to_offset - row.from_offset:
            self._found(
                "ledger",
                row.first_position,
                f"checkpoint {row.id} accounts for {sum(counts)} records at offsets "
                f"{row.from_offset} to {row.to_offset - 1} of {row.topic}",
            )

    def _check_position_ranges(self, ranges: list[tuple[Position, Position]]) -> None:
        """Prove that the checkpoints' positions cover the log once."""
        covered = 0
        for first, last in sorted(ranges):
            if first != covered + 1:
                low, high = sorted((first, covered + 1))
                self._found(
                    "ledger",
                    low,
                    f"positions {low} to {high - 1} are accounted for by no "
                    "checkpoint, or by two",
                )
            covered = last
        if covered != self.head.position:
            self._found(
                "ledger",
                covered + 1,
                f"the ledger ends at position {covered}, the log at "
                f"{self.head.position}",
            )

    def _check_offsets(self, connection: sa.Connection, ends: dict[Any, int]) -> None:
        table = self._database.tables.offsets
        stored = {
            (row.source_id, row.group_id, row.topic, row.partition): row.next_offset
            for row in connection.execute(sa.select(table))
        }
        for lane, end in ends.items():
            if stored.get(lane) != end:
                _, group, topic, partition = lane
                self._found(
                    "ledger",
                    None,
                    f"the offset of {topic} partition {partition} for group {group} is "
                    f"{stored.get(lane, 'gone')}, its checkpoints end at {end}",
                )


def _check_projection(
    database: Database,
    registry: Registry,
    name: str,
    findings: list[Finding],
    step: OnStep,
) -> list[str]:
    """Compare a live build's rows with a fresh fold; return what was not proved."""
    with database.read() as connection:
        build = builds.in_role(connection, database, name, "live")
    if build is None:
        registry.latest(name)
        return [f"'{name}' has no live build yet: kappa-log project {name}"]
    fold = registry.made_by(name, build.fingerprints)
    if fold is None:
        return [f"'{name}' was not verified: {stale(registry, build)}"]
    try:
        only, limits = _keys_to_check(database, fold, build)
        expected = _folded(database, fold, build.cursor, only, step)
    except KappaLogError as error:
        findings.append(Finding(name, getattr(error, "position", None), str(error)))
        return []
    with database.read() as connection:
        again = builds.get(connection, database, name, build.number)
        stored = RowStore(database, build, fold).load_all(connection)
    if again.cursor != build.cursor:
        return [*limits, f"'{name}' moved on while it was verified; run it again"]
    if only is not None:
        stored = {key: state for key, state in stored.items() if key in only}
    for finding in _differences(build, stored, expected):
        findings.append(finding)
        if len(findings) >= MAX_FINDINGS:
            break
    return limits


def _differences(
    build: Build, stored: dict[Any, Any], expected: dict[Any, Any]
) -> Iterator[Finding]:
    """Yield the rows that are not what a fresh fold makes them."""
    for key in sorted(expected.keys() | stored.keys(), key=repr):
        there, wanted = stored.get(key), expected.get(key)
        if there != wanted:
            yield Finding(
                build.projection,
                build.cursor,
                f"the row of key {key!r} in {build.label} is {there!r}, "
                f"a fresh fold makes it {wanted!r}",
            )


def _keys_to_check(
    database: Database, fold: Projection, build: Build
) -> tuple[set[Any] | None, list[str]]:
    if build.mixed is None:
        return None, []
    start = build.mixed.from_position
    keys: set[Any] = set()
    for page in _pages(database, fold, start - 1, build.mixed.head):
        keys.update(key for key, _ in fold.keyed(page)[0])
    limit = (
        f"{build.label} is mixed: only the {len(keys):,} keys touched since position "
        f"{start:,} were checked; the other rows came from build "
        f"{build.mixed.base_build}. A full replay ends this: "
        f"kappa-log replay {fold.name}"
    )
    return keys, [limit]


def _folded(
    database: Database,
    fold: Projection,
    upto: Position,
    only: set[Any] | None,
    step: OnStep,
) -> dict[Any, Any]:
    folding = Folding(fold, only=only)
    for page in _pages(database, fold, ORIGIN, upto, only):
        folding.apply(page)
        positions = page.column("position")
        step(fold.name, positions[-1] if positions else 0, upto)
    return {key: state for key, state in folding.states.items() if state is not None}


def _pages(
    database: Database,
    fold: Projection,
    after: Position,
    upto: Position,
    only: set[Any] | None = None,
) -> Iterator[Any]:
    reader = reader_of(database, fold, only)
    for start, until in spans(after, upto, PAGE_EVENTS):
        yield reader.page(start, until)
