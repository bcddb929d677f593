"""Check: an archive proved by itself, and against the log that it is of.

By itself: each file hashes to what the manifest says, positions have no holes, and the
chain over all events comes to the heads in the manifest. What lies beside the events
is held against them: the ledger, what the manifest tells of segments and read models.
Against the log: the last of the heads is the log's own at that position. So an archive
may be trusted as far as the head that it ends in; keep that elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kappa_log import chain
from kappa_log.archive import layout, proof
from kappa_log.archive.export import require_same_log
from kappa_log.archive.ledger import Checkpoint, LastEvent, Ledger
from kappa_log.archive.manifest import NAME, Rows, Segment
from kappa_log.archive.reader import Archive, open_archive_in
from kappa_log.archive.scan import SLICE, batches, scan
from kappa_log.archive.store import Store
from kappa_log.errors import ArchiveDamaged, ArchiveDiverged, VerificationError
from kappa_log.events import Position
from kappa_log.storage import log, transfer
from kappa_log.storage.builds import POSITION_COLUMN
from kappa_log.storage.database import Database
from kappa_log.storage.transfer import ARCHIVED
from kappa_log.verify import MAX_FINDINGS, Finding, OnStep

_FOLDED_TO = pa.schema([pa.field(POSITION_COLUMN, pa.int64(), nullable=False)])


class ArchiveReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified of an archive, and what was found."""

    ok: bool
    url: str
    position: Position | None
    """Last event in it, as the manifest says; None if nobody can read that."""
    head: str
    """Head of the chain in hex; keep it elsewhere."""
    events: int
    """Events that hashed to the heads in the manifest."""
    checkpoints: int
    """Checkpoints that were held against the events."""
    files: int
    bytes: int
    compared: bool
    """Whether the log was there to compare with."""
    behind: int | None
    """Events that the log has and the archive lacks; None if it was not compared, or
    is not of the log."""
    kept_head: Position | None
    """Where the head is that was kept elsewhere; None if it is not there, or there is
    none."""
    findings: list[Finding]
    """``what`` is the file, ``log``, or ``head`` for the one that was given."""
    limits: list[str]


def check_archive(
    store: Store,
    database: Database | None,
    *,
    head: str | None = None,
    step: OnStep = lambda *_: None,
) -> ArchiveReport:
    """Verify an archive.

    Args:
        store: Where it is.
        database: The log to compare with; None verifies the archive alone.
        head: A head kept elsewhere, in hex: of its end, of a checkpoint, or of the end
            of a segment.
        step: Called as it goes on.

    Raises:
        ArchiveMissing: There is none.
        ArchiveNewer: A later version of kappa_log wrote it.
        ArchiveError: It cannot be read now, which is no damage.
    """
    try:
        archive = open_archive_in(store)
    except ArchiveDamaged as error:
        return ArchiveReport(
            ok=False,
            url=store.url,
            position=None,
            head="",
            events=0,
            checkpoints=0,
            files=1,
            bytes=0,
            compared=False,
            behind=None,
            kept_head=None,
            findings=[Finding(NAME, None, error.reason)],
            limits=[],
        )
    kept = None if head is None else bytes.fromhex(head)
    return _Check(archive, kept, step).run(database)


class _Check:
    """One pass over all files of an archive."""

    def __init__(self, archive: Archive, kept: bytes | None, step: OnStep) -> None:
        self._archive = archive
        self._kept = kept
        self._kept_at = 0 if kept == chain.HEAD_OF_NOTHING else None
        self._behind: int | None = None
        self._manifest = archive.manifest
        self._step = step
        self._findings: list[Finding] = []
        self._ledger = Ledger(archive, self._findings.append)
        self._events = 0
        self._erased = 0

    def run(self, database: Database | None) -> ArchiveReport:
        """Check all of it."""
        manifest = self._manifest
        self._ledger.check()
        for rows in manifest.projections:
            self._check_rows(rows)
        self._check_segments()
        self._check_ends()
        if database is not None:
            self._compare(database)
        if self._kept is not None and self._kept_at is None:
            self._found("head", None, self._not_met(self._kept, database))
        return ArchiveReport(
            ok=not self._findings,
            url=self._archive.store.url,
            position=manifest.position,
            head=manifest.head,
            events=self._events,
            checkpoints=self._ledger.checkpoints,
            files=len(manifest.files) + 1,
            bytes=sum(file.bytes for file in manifest.files),
            compared=database is not None,
            behind=self._behind,
            kept_head=self._kept_at,
            findings=self._findings,
            limits=list(self._limits(database)),
        )

    def _found(self, what: str, position: Position | None, message: str) -> None:
        self._findings.append(Finding(what, position, message))

    def _found_in_manifest(self, position: Position, message: str) -> None:
        self._found(NAME, position, f"{message}. {self._manifest.remedy}")

    def _check_rows(self, rows: Rows) -> None:
        """Prove a file of a read model, and that its rows are of events that are here.

        Rows are at the build's cursor, which is never past the head of their moment.
        """
        end = self._manifest.position
        if rows.position > end:
            message = (
                f"it has the rows of '{rows.projection}' at position "
                f"{rows.position:,}, past the end of the archive, {end:,}"
            )
            self._found_in_manifest(rows.position, message)
        last = 0
        try:
            for batch in batches(self._archive.store, rows, _FOLDED_TO):
                last = max(last, pc.max(batch.column(0)).as_py() or 0)
        except ArchiveDamaged as error:
            self._found(error.path, None, error.reason)
        if last > rows.position:
            message = (
                f"a row was made by the event at position {last:,}, but the manifest "
                f"says that the rows are those at {rows.position:,}. Delete this "
                "file, and kappa-log export writes it anew"
            )
            self._found(rows.path, last, message)

    def _check_segments(self) -> None:
        """Prove the events, and hold the ledger against them as they go by."""
        before, recorded_at = chain.HEAD_OF_NOTHING, None
        with contextlib.closing(self._ledger.marks()) as found:
            marks = _Marks(found)
            for segment in self._manifest.segments:
                check = _SegmentCheck(
                    self._archive, segment, before, self._ledger, marks, self._kept
                )
                wrong = check.run(self._step)
                self._findings += wrong
                if not wrong:
                    self._events += segment.rows
                    self._erased += check.erased
                    if check.kept_at is not None:
                        self._kept_at = check.kept_at
                    for position, message in check.disagreements:
                        self._ledger.found("checkpoints", position, message)
                recorded_at = check.recorded_at
                # The manifest's: one damaged segment says nothing about later ones.
                before = bytes.fromhex(segment.head)
        is_whole = self._events == self._manifest.position
        if is_whole and recorded_at != self._manifest.recorded_at:
            message = "it does not say when the last event was recorded"
            self._found_in_manifest(self._manifest.position, message)

    def _check_ends(self) -> None:
        """Prove that the segments follow each other up to the manifest's end."""
        manifest = self._manifest
        expected, head = 1, chain.HEAD_OF_NOTHING.hex()
        for segment in manifest.segments:
            if segment.first != expected:
                message = f"{segment.path} does not begin at position {expected:,}"
                self._found_in_manifest(expected, message)
            expected, head = segment.last + 1, segment.head
        if (expected - 1, head) != (manifest.position, manifest.head):
            message = "its segments do not end at its position and head"
            self._found_in_manifest(manifest.position, message)

    def _compare(self, database: Database) -> None:
        try:
            with database.read() as connection:
                require_same_log(connection, database, self._archive)
                position = log.head(connection, database).position
        except ArchiveDiverged as error:
            self._found("log", None, str(error))
        else:
            self._behind = position - self._manifest.position

    def _not_met(self, kept: bytes, database: Database | None) -> str:
        """Return what to tell of a head that none of the files hashed to."""
        named = f"the head {kept.hex()[:16]}… kept elsewhere"
        later = None
        if database is not None and self._behind:
            with database.read() as connection:
                later = transfer.position_of(connection, database, kept)
        if later is not None and later > self._manifest.position:
            return (
                f"{named} is the log's at position {later:,}, past the end of the "
                f"archive, {self._manifest.position:,}. Bring it up (kappa-log export) "
                "and verify again, or give an earlier head"
            )
        if self._events < self._manifest.position or not self._ledger.is_readable:
            return f"{named} was not met in what is whole of this archive"
        return (
            f"{named} is no head of this archive: it was rewritten, ends before, or is "
            "of another log"
        )

    def _limits(self, database: Database | None) -> Iterator[str]:
        """Yield what was not proved."""
        if database is None and self._kept is None:
            yield (
                "There is no log to compare with: who can rewrite the whole archive "
                "would not be caught. Give a head that you kept elsewhere (--head)."
            )
        kept_at, end = self._kept_at, self._manifest.position
        if kept_at is not None and kept_at < end and database is None:
            yield (
                f"The head that was kept elsewhere is that of position {kept_at:,}: "
                "who can rewrite what lies behind it would not be caught."
            )
        if self._erased:
            yield (
                f"{self._erased:,} events were erased: their hashes are in the chain, "
                "their contents are not proved."
            )
        if self._manifest.projections or self._manifest.columns:
            yield (
                "Rows of read models and typed columns of payload fields are as they "
                "were written; they were not made anew from the events."
            )


class _Marks:
    """Checkpoints in order of position, beside the events that go by."""

    def __init__(self, rows: Iterator[Checkpoint]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def within(self, after: Position, upto: Position) -> dict[Position, Checkpoint]:
        """Return those that end in (after, upto] by position; earlier ones are lost."""
        found = {}
        while (
            self._next is not None and (last := self._next.last_position or 0) <= upto
        ):
            if last > after:
                found[last] = self._next
            self._next = next(self._rows, None)
        return found


class _SegmentCheck:
    """Proves one segment, from the head before it to its own."""

    def __init__(
        self,
        archive: Archive,
        segment: Segment,
        before: bytes,
        ledger: Ledger,
        marks: _Marks,
        kept: bytes | None,
    ) -> None:
        self._store = archive.store
        self._segment = segment
        self._upto = archive.manifest.position
        self._remedy = archive.manifest.remedy
        self._ledger = ledger
        self._marks = marks
        self._kept = kept
        self.kept_at: Position | None = None
        """Where the head that was kept elsewhere is."""
        names = {source.id: source.name for source in archive.manifest.sources}
        self._chain = chain.Chain(names, segment.first - 1, before)
        self._lanes: set[tuple[str, str]] = set()
        self._dates: set[str] = set()
        self.recorded_at: int | None = None
        """Of the last event, in microseconds since 1970 UTC."""
        self.disagreements: list[tuple[Position, str]] = []
        """Where the ledger is wrong about it, if it is proved itself."""

    @property
    def erased(self) -> int:
        """How many of its events were erased."""
        return self._chain.erased

    def run(self, step: OnStep) -> list[Finding]:
        """Return what is wrong with it."""
        path, first = self._segment.path, self._segment.first
        try:
            for part in scan(self._store, [self._segment], ARCHIVED):
                for start in range(0, part.table.num_rows, SLICE):
                    self._page(proof.lists(part.table.slice(start, SLICE)))
                    step("events", self._chain.position, self._upto)
        except ArchiveDamaged as error:
            return [Finding(path, first, error.reason)]
        except VerificationError as error:
            why, first = str(error), self._chain.position + 1
            return [Finding(path, first, self._store.damaged(path, why).reason)]
        if self._chain.head.hex() != self._segment.head:
            why = "its events do not hash to the manifest's head"
            return [Finding(path, first, self._store.damaged(path, why).reason)]
        if self._chain.head == self._kept:
            self.kept_at = self._chain.position
        return list(self._told_wrongly())

    def _page(self, page: chain.Lists) -> None:
        """Move the chain on, and see what the manifest and the ledger say of it."""
        after = self._chain.position
        marks = self._marks.within(after, after + len(page["position"]))
        heads = self._chain.extend(page, marks)
        columns = [page[name] for name in LastEvent._fields[:-1]]
        for position, head in heads.items():
            if head == self._kept:
                self.kept_at = position
            facts = [column[position - after - 1] for column in columns]
            event = LastEvent._make([*facts, head])
            for message in self._ledger.disagreements(marks[position], event):
                if len(self.disagreements) < MAX_FINDINGS:
                    self.disagreements.append((position, message))
        self._lanes.update(zip(page["topic"], page["group_id"], strict=True))
        # Times never fall with position, so those between are of the same dates.
        for recorded_at in (page["recorded_at"][0], page["recorded_at"][-1]):
            self._dates.add(layout.day_of(recorded_at).isoformat())
            self.recorded_at = recorded_at

    def _told_wrongly(self) -> Iterator[Finding]:
        """Yield what the manifest says of the segment and is not so."""
        segment = self._segment
        told = (segment.rows, segment.date, list(map(tuple, segment.lanes)))
        rows = segment.last - segment.first + 1
        if told != (rows, ", ".join(sorted(self._dates)), sorted(self._lanes)):
            message = (
                f"it does not say truly of which date, topics and groups the {rows:,} "
                f"events in {segment.path} are: a replay might pass over some. "
                f"{self._remedy}"
            )
            yield Finding(NAME, segment.first, message)
