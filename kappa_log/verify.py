"""Verify: recompute the chain, prove the ledger complete, fold views afresh.

What is proved: positions have no holes, each event's columns hash to the chain's
heads at every checkpoint, the ledger's ranges adjoin and account for each event. What
is not: who can rewrite events and heads alike is caught only by a head kept elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from kappa_log import chain
from kappa_log.accounts import LANE, Accounts, LaneKey
from kappa_log.cursor import spans
from kappa_log.errors import DatabaseBusy, RegistrationError, StorageError
from kappa_log.events import ORIGIN, Position, to_micros
from kappa_log.fold import Folding, Projection, Registry
from kappa_log.project import stale
from kappa_log.readers import PAGE_EVENTS, pages, reader_of
from kappa_log.records import Lane, checksum
from kappa_log.storage import builds, log, parked, transfer
from kappa_log.storage.builds import Build
from kappa_log.storage.database import Database
from kappa_log.storage.rows import RowStore

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
        with _finding(name, database, check.found):
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


class _Unreadable(msgspec.Struct, frozen=True):
    """A row that is there but cannot be read."""

    key: int
    error: str


class _LogCheck:
    """One pass over the ledger, one over the events beside the heads in it.

    The ledger is read in one snapshot. Events up to its head never change, so they
    are read page by page, each in a snapshot of its own.
    """

    def __init__(self, database: Database, step: OnStep) -> None:
        self._database = database
        self._step = step
        self.findings: list[Finding] = []
        self.events = 0
        self.erased = 0
        self.checkpoints = 0
        self.head = log.Head(ORIGIN, chain.HEAD_OF_NOTHING, None)
        self._names: dict[int, str] = {}
        self._digests: dict[Any, chain.LaneDigest] = {}

    def run(self) -> None:
        """Check the ledger, then the events; what is found is in `findings`."""
        database = self._database
        with _finding("ledger", database, self.found), database.read() as connection:
            self.head = self._head(connection)
            self._names = self._sources(connection)
            self._check_ledger(connection)
        with _finding("log", database, self.found):
            self._check_events()
            self._check_end()

    def compare_head(self, text: str) -> None:
        """Find a head kept elsewhere among the checkpoints'."""
        try:
            kept = bytes.fromhex(text)
        except ValueError:
            kept = b""
        table = self._database.tables.checkpoints
        with self._database.read() as connection:
            query = sa.select(table.c.id).where(table.c.head == kept).limit(1)
            known = connection.scalar(query) is not None
        if not known and kept not in (chain.HEAD_OF_NOTHING, self.head.digest):
            self.found(
                "head",
                None,
                f"the head {text[:16]}… kept elsewhere is no head of this log: it was "
                "rewritten, cut, or is another log",
            )

    def found(self, what: str, position: Position | None, message: str) -> None:
        """Note a finding; after the first few no more, since one is enough."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(what, position, message))

    # --- reading what may be damaged ------------------------------------------

    def _head(self, connection: sa.Connection) -> log.Head:
        table = self._database.tables.head
        row = connection.execute(sa.select(table.c.position, table.c.digest)).first()
        if row is None:
            self.found("log", None, "the row of the log's head is gone")
            return log.Head(ORIGIN, chain.HEAD_OF_NOTHING, None)
        return log.Head(row.position, bytes(row.digest), None)

    def _sources(self, connection: sa.Connection) -> dict[int, str]:
        table = self._database.tables.sources
        names: dict[int, str] = {}
        for row in self._pages(connection, table.c.id, [table.c.id, table.c.name]):
            if isinstance(row, _Unreadable):
                self.found("log", None, f"source {row.key} {row.error}")
            else:
                names[row.id] = row.name
        return names

    def _pages(
        self, connection: sa.Connection, key: sa.Column[int], columns: Sequence[Any]
    ) -> Iterator[Any]:
        """Yield all rows of a table by a key that rises, a page at a time."""
        after = -(2**63)
        while True:
            query = sa.select(key).where(key > after).order_by(key)
            ends = connection.scalars(query.limit(PAGE_EVENTS)).all()
            if not ends:
                return
            until = ends[-1]
            yield from self._rows(connection, key, columns, after, until)
            after = until

    def _rows(
        self,
        connection: sa.Connection,
        key: sa.Column[int],
        columns: Sequence[Any],
        after: int,
        until: int,
    ) -> Sequence[Any]:
        """Return the rows in (after, until]; one by one if they cannot be read at once.

        A driver that chokes on a value gives nothing of the whole answer.
        """
        query = sa.select(*columns).order_by(key)
        within = key > after, key <= until
        try:
            with connection.begin_nested():
                return connection.execute(query.where(*within)).all()
        except Exception:  # noqa: BLE001 - which row it is, is found below
            _check_that_it_answers(self._database, connection)
        found: list[Any] = []
        for one in connection.scalars(sa.select(key).where(*within).order_by(key)):
            try:
                with connection.begin_nested():
                    found += connection.execute(query.where(key == one)).all()
            except Exception as error:  # noqa: BLE001 - it is a finding
                found.append(_Unreadable(one, _cannot_be_read(error)))
        return found

    # --- events ---------------------------------------------------------------

    def _check_events(self) -> None:
        """Prove that positions have no holes and that the chain comes to its heads."""
        digest = chain.HEAD_OF_NOTHING
        for after, until in spans(ORIGIN, self.head.position, PAGE_EVENTS):
            found = self._proved(after, until, digest)
            if found is None:
                found = self._looked_at(after, until, digest)
            if found is None:
                return
            digest = found
            self._step("log", until, self.head.position)
        if digest != self.head.digest:
            last = self.head.position
            self.found("chain", last, "the chain does not end in the stored head")

    def _looked_at(
        self, after: Position, until: Position, digest: bytes
    ) -> bytes | None:
        """Return the head after a page, looked at row by row; None if it has none."""
        expected = after
        rows, heads = self._page(after, until)
        for row in rows:
            expected += 1
            position = row.key if isinstance(row, _Unreadable) else row.position
            if position != expected:
                self.found("log", expected, f"position {expected} is missing")
                return None
            try:
                digest = chain.extend(digest, self._digest(row))
            except Exception as error:  # noqa: BLE001 - it is a finding
                message = _cannot_be_read(error)
                self.found("log", expected, f"the event at {expected} {message}")
                return None
            self.events += 1
            stored = heads.get(expected)
            if stored is not None and stored != digest:
                first = self._since_last_good(expected)
                self.found(
                    "chain",
                    first,
                    f"an event at positions {first} to {expected} is not what was "
                    "recorded: the chain differs from the checkpoint's head",
                )
                return None
        if expected != until:
            self.found("log", expected + 1, f"position {expected + 1} is missing")
            return None
        return digest

    def _proved(self, after: Position, until: Position, head: bytes) -> bytes | None:
        """Return the head after a page of which all is as it should be.

        This is several times as fast as looking at it row by row. None tells that
        this has to be done, since something may be wrong, or was erased.
        """
        try:
            with self._database.read() as connection:
                page = self._columns(connection, after, until)
                stored = self._heads(connection, after, until)
            if not self._have_checksums(page):
                return None
            quick = chain.Chain(self._names, after, head)
            heads = quick.extend(page, stored)
        except Exception:  # noqa: BLE001 - whatever it is, it is met again
            return None
        if heads != stored:
            return None
        self.events += until - after
        return quick.head

    def _columns(
        self, connection: sa.Connection, after: Position, until: Position
    ) -> chain.Lists:
        values = transfer.events(connection, self._database, after, until)
        page: chain.Lists = dict(zip(transfer.ARCHIVED, values, strict=True))
        if not self._database.is_sqlite:
            for name in ("event_time", "recorded_at"):
                page[name] = [
                    None if at is None else to_micros(at) for at in page[name]
                ]
        page["payload"] = [
            None if text is None else text.encode() for text in page["payload"]
        ]
        return page

    def _have_checksums(self, page: chain.Lists) -> bool:
        """Tell whether nothing was erased and each value has its checksum."""
        if any(page["payload_digest"]) or any(page["personal_digest"]):
            return False
        foreign = {id_ for id_, name in self._names.items() if _is_foreign(name)}
        values = zip(
            *(page[name] for name in ("source_id", "payload", "raw", "checksum")),
            strict=True,
        )
        return all(
            source in foreign or checksum(text if raw is None else raw) == found
            for source, text, raw, found in values
        )

    def _check_end(self) -> None:
        table = self._database.tables.events
        with self._database.read() as connection:
            beyond = connection.scalar(sa.select(sa.func.max(table.c.position))) or 0
            now = self._head(connection).position
        if beyond > now:
            self.found("log", beyond, f"an event lies beyond the head, position {now}")

    def _page(
        self, after: Position, until: Position
    ) -> tuple[Sequence[Any], dict[Position, bytes]]:
        """Return a page of events, and the heads of the checkpoints that end in it."""
        table = self._database.tables.events
        columns = [table.c[name] for name in transfer.ARCHIVED]
        with self._database.read() as connection:
            rows = self._rows(connection, table.c.position, columns, after, until)
            return rows, self._heads(connection, after, until)

    def _heads(
        self, connection: sa.Connection, after: Position, until: Position
    ) -> dict[Position, bytes]:
        ledger = self._database.tables.checkpoints
        found = connection.execute(
            sa.select(ledger.c.last_position, ledger.c.head).where(
                ledger.c.last_position > after,
                ledger.c.last_position <= until,
                ledger.c.head.is_not(None),
            )
        )
        return {row.last_position: bytes(row.head) for row in found}

    def _since_last_good(self, position: Position) -> Position:
        table = self._database.tables.checkpoints
        last = sa.func.max(table.c.last_position)
        with self._database.read() as connection:
            found = connection.scalar(
                sa.select(last).where(table.c.last_position < position)
            )
        return (found or ORIGIN) + 1

    def _digest(self, row: Any) -> bytes:
        if isinstance(row, _Unreadable):
            raise StorageError(row.error)
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
            self.found(
                "erased",
                row.position,
                f"the event at position {row.position} is marked as erased but has "
                "contents, which nothing proves",
            )

    def _check_checksum(self, row: Any, text: bytes | None) -> None:
        if _is_foreign(self._names.get(row.source_id, "")):
            # It is the old system's, of its own encoding; the chain covers it.
            return
        received = text if row.raw is None else row.raw
        if checksum(received) != row.checksum:
            self.found(
                "checksum",
                row.position,
                f"the payload at position {row.position} does not match its checksum",
            )

    # --- the ledger -----------------------------------------------------------

    def _check_ledger(self, connection: sa.Connection) -> None:
        """Prove that the ledger accounts for each offset, position and kept record."""
        tables = self._database.tables
        accounts = Accounts(self._names, lambda _, *found: self.found("ledger", *found))
        self._check_checkpoints(connection, accounts)
        accounts.ranges(self._position_ranges(connection), self.head.position)
        offsets = tables.offsets
        ends = (offsets.c.next_offset, offsets.c.reached)
        stored = self._by_lane(connection, offsets, *map(sa.func.max, ends))
        if stored is not None:
            accounts.offsets(stored)
        for what in ("duplicates", "failures"):
            table = getattr(tables, what)
            numbers = (sa.func.count(), sa.func.max(table.c.offset))
            stored = self._by_lane(connection, table, *numbers)
            if stored is not None:
                accounts.kept(what, stored)

    def _check_checkpoints(self, connection: sa.Connection, accounts: Accounts) -> None:
        """Prove that each lane's checkpoints begin at its start, adjoin and add up."""
        table = self._database.tables.checkpoints
        # Nothing is proved of recorded_at, and one out of range could not be read.
        columns = [column for column in table.c if column.name != "recorded_at"]
        for row in self._pages(connection, table.c.id, columns):
            self.checkpoints += 1
            if isinstance(row, _Unreadable):
                self.found("ledger", None, f"checkpoint {row.key} {row.error}")
            else:
                accounts.checkpoint(row)

    def _position_ranges(
        self, connection: sa.Connection
    ) -> Iterator[tuple[Position, Position]]:
        """Return the positions of the checkpoints that have some, in order."""
        table = self._database.tables.checkpoints
        query = (
            sa.select(table.c.first_position, table.c.last_position)
            .where(table.c.first_position.is_not(None))
            .where(table.c.last_position.is_not(None))
            .order_by(table.c.last_position, table.c.first_position)
            .execution_options(yield_per=PAGE_EVENTS)
        )
        return ((first, last) for first, last in connection.execute(query))

    def _by_lane(
        self, connection: sa.Connection, table: sa.Table, *values: Any
    ) -> dict[LaneKey, tuple[int, int]] | None:
        """Return lane → values; None, and a finding, if the table cannot be read."""
        lane = [table.c[name] for name in LANE]
        try:
            with connection.begin_nested():
                rows = connection.execute(sa.select(*lane, *values).group_by(*lane))
                return {tuple(row[:4]): tuple(row[4:]) for row in rows}
        except Exception as error:  # noqa: BLE001 - it is a finding
            _check_that_it_answers(self._database, connection)
            self.found("ledger", None, f"{table.name} {_cannot_be_read(error)}")
            return None


def _check_that_it_answers(database: Database, connection: sa.Connection) -> None:
    """Raise if the database is gone or busy: then nothing was found out about it."""
    connection.execute(sa.select(database.tables.head.c.position))


@contextlib.contextmanager
def _finding(
    what: str, database: Database, found: Callable[[str, Position | None, str], None]
) -> Iterator[None]:
    """Make a finding of whatever damage raises in the block.

    Raises:
        DatabaseBusy: Nothing was found out.
        StorageError: The database is gone, which is not damage either.
        RegistrationError: What was asked for is not there.
    """
    try:
        yield
    except (DatabaseBusy, RegistrationError):
        raise
    except Exception as error:  # noqa: BLE001 - it is a finding
        with database.read() as connection:
            _check_that_it_answers(database, connection)
        text = str(error) or type(error).__name__
        found(what, getattr(error, "position", None), text)


def _is_foreign(source: str) -> bool:
    """Tell whether a source's checksums are another system's."""
    return source.startswith("phobos:")


def _cannot_be_read(error: Exception) -> str:
    origin = getattr(error, "orig", None) or error
    text = " ".join(str(origin).split())
    return text if text.startswith("cannot be read") else f"cannot be read: {text}"


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
        stopped = build and parked.positions(connection, database, build)
    if build is None:
        registry.latest(name)
        return [f"'{name}' has no live build yet: kappa-log project {name}"]
    fold = registry.made_by(name, build.fingerprints)
    if fold is None:
        return [f"'{name}' was not verified: {stale(registry, build)}"]
    only, limits = _keys_to_check(database, fold, build)
    folding = fold.folding(only=only)
    if stopped:
        folding.parked = stopped
        many = f"{len(stopped):,} parked key{'' if len(stopped) == 1 else 's'}"
        limits.append(
            f"{build.label} has {many}; such a row was checked up to where its key is "
            f"parked. Look: kappa-log projections parked {name}"
        )
    expected = _folded(database, folding, build.cursor, only, step)
    with database.read() as connection:
        again = builds.get(connection, database, name, build.number)
        stored = RowStore(database, build, fold).load_all(connection)
    if (again.cursor, again.epoch) != (build.cursor, build.epoch):
        return [*limits, f"'{name}' moved on while it was verified; run it again"]
    if only is not None:
        stored = {key: state for key, state in stored.items() if key in only}
    for finding in _differences(build, fold, stored, expected):
        findings.append(finding)
        if len(findings) >= MAX_FINDINGS:
            break
    return limits


def _differences(
    build: Build, fold: Projection, stored: dict[Any, Any], expected: dict[Any, Any]
) -> Iterator[Finding]:
    """Yield the rows that are not what a fresh fold makes them."""
    for key in sorted(expected.keys() | stored.keys(), key=repr):
        there, wanted = stored.get(key), expected.get(key)
        if not fold.is_same(there, wanted):
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
    folding: Folding,
    upto: Position,
    only: set[Any] | None,
    step: OnStep,
) -> dict[Any, Any]:
    fold = folding.projection
    for page in _pages(database, fold, ORIGIN, upto, only):
        folding.apply(page)
        positions = page.column("position")
        step(fold.name, positions[-1] if positions else 0, upto)
    folded = folding.drain().items()
    return {key: state for key, (state, _) in folded if state is not None}


def _pages(
    database: Database,
    fold: Projection,
    after: Position,
    upto: Position,
    only: set[Any] | None = None,
) -> Iterator[Any]:
    reader = reader_of(database, fold, only)
    return (page for _, page in pages(reader, fold, after, upto))
