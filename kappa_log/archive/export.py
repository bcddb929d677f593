"""Export: what the log has and the archive lacks becomes files, the manifest last.

One snapshot of the database says what the head is, and gives the ledger and the rows
as of then; events up to that head never change and are read page by page after it. On
the way the chain is recomputed: an export of a damaged log fails, and an archive that
is there proves the log it came from. A kill leaves the archive as it was; segments
that were ready are noted in a journal and not made again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta

import msgspec
import sqlalchemy as sa

from kappa_log import chain
from kappa_log.archive import layout
from kappa_log.archive.manifest import (
    FORMAT,
    NAME,
    File,
    Manifest,
    PayloadColumn,
    Segment,
    to_bytes,
)
from kappa_log.archive.presence import AbsentField, Presence
from kappa_log.archive.reader import Archive, open_if_there
from kappa_log.archive.snapshot import Snapshot, SnapshotWriter
from kappa_log.archive.store import Store
from kappa_log.archive.writing import Cut, SegmentWriter
from kappa_log.errors import ArchiveDiverged, UsageError, VerificationError
from kappa_log.events import Position
from kappa_log.storage import log, transfer
from kappa_log.storage.database import Database

JOURNAL = ".kappa_log-export.json"
"""What an export that did not end has made; for the next one alone."""

OnStep = Callable[[str, int, int], None]
"""Called with what is exported, how far, and of how much."""

# Only what an export made is ever deleted, whatever else lies in the folder.
_OURS = re.compile(
    r"\.kappa_log-.*\.tmp|\.kappa_log-export\.json"
    r"|events/date=\d{4}-\d\d-\d\d/\d{12,}-\d{12,}(-[0-9a-f]{8})?\.parquet"
    rf"|({'|'.join(layout.LEDGER)})/[0-9a-f]{{32}}\.parquet"
    r"|projections/\w+/build=\d+/\d{12,}(-[0-9a-f]{8})?\.parquet"
)


_TYPED = re.compile(r"events/date=[\d-]+/\d+-\d+-[0-9a-f]{8}\.parquet")
"""Segments of a variant; see `layout.variant_of`."""


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an export did, or with ``dry_run`` would do."""

    url: str
    position: Position
    """Last event in the archive now."""
    head: str
    """Head of the chain there, in hex."""
    events: int
    """Events that were read from the log."""
    segments_written: int
    segments_kept: int
    bytes_written: int
    deleted: int
    """Files that no manifest names any more."""
    projections: list[str]
    nulls: dict[str, int]
    """Payload column → values in new segments that were not of its type."""
    absent: list[AbsentField]
    """Payload columns whose field no event has, of those that were looked at: those
    written, and the last ones of the topic."""
    notes: list[str]
    dry_run: bool = False


class _Journal(msgspec.Struct, frozen=True):
    """Sealed segments of an export that did not end, and what they were made of."""

    position: Position
    head: str
    segment_events: int
    variant: str
    segments: list[Segment]


class Exporter:
    """One export of a log into a store.

    Args:
        database: The log.
        store: Where to.
        segment_events: Most events of a segment, for an archive that begins now.
        columns: Payload columns to make; those of the archive if None.
        step: Called as it goes on.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        segment_events: int,
        columns: Sequence[PayloadColumn] | None = None,
        step: OnStep = lambda *_: None,
    ) -> None:
        self._database = database
        self._store = store
        self._step = step
        self._wanted = (segment_events, columns)
        self._look()

    def _look(self) -> None:
        """See what is there."""
        self._old = open_if_there(self._store)
        old = None if self._old is None else self._old.manifest
        self._sizes = self._store.sizes()
        self._there: dict[str, File] = {
            file.path: file
            for file in (old.files if old else [])
            if self._sizes.get(file.path) == file.bytes
        }
        segment_events, columns = self._wanted
        self._segment_events = old.segment_events if old else segment_events
        self._notes = list(self._first_notes()) if old is None else []
        if self._segment_events != segment_events:
            self._notes.append(
                f"the archive was begun with segments of {self._segment_events:,} "
                f"events and goes on so; segment_events = {segment_events:,} holds "
                "for new archives"
            )
        if columns is None:
            columns = old.columns if old else []
        self._columns = sorted(columns, key=lambda column: column.name)

    def _first_notes(self) -> Iterator[str]:
        """Yield what to tell about a folder in which an archive begins.

        Raises:
            UsageError: It lies in another archive.
        """
        url = self._store.url
        around = self._store.around(NAME, FORMAT.encode())
        if around is not None:
            msg = (
                f"{url} lies in the archive {around}; an archive in an archive would "
                "be taken for a part of it. Name a place outside. Nothing was changed"
            )
            raise UsageError(msg)
        others = sorted(path for path in self._sizes if not _OURS.fullmatch(path))
        if others:
            yield (
                f"{url} is a folder with other files, {len(others):,} of them, for "
                f"instance {others[0]}; they are left as they are"
            )
        is_typed = any(_TYPED.fullmatch(path) for path in self._sizes)
        if is_typed and self._wanted[1] is None:
            yield (
                f"{url} has segments with typed columns, or from after an erasure, "
                "but no manifest, which alone knew the columns: none are made. If it "
                "had some, export again and name them: --columns TOPIC.FIELD:TYPE"
            )

    def plan(self) -> ExportReport:
        """Return what an export would do; nothing is written.

        Raises:
            ArchiveDiverged: The archive is of another log, or ahead of this one.
        """
        with self._database.read() as connection:
            self._require_same_log(connection)
            head = log.head(connection, self._database)
            epoch = transfer.erasure_epoch(connection, self._database)
            cuts = list(self._cuts(connection, head.position))
        variant = layout.variant_of(self._columns, epoch)
        new = [cut for cut in cuts if cut.path(variant) not in self._there]
        return ExportReport(
            url=self._store.url,
            position=head.position,
            head=head.digest.hex(),
            events=sum(cut.last - cut.first + 1 for cut in new),
            segments_written=len(new),
            segments_kept=len(cuts) - len(new),
            bytes_written=0,
            deleted=0,
            projections=[],
            nulls={},
            absent=self._absent(Presence(self._columns)),
            notes=self._notes,
            dry_run=True,
        )

    def run(self) -> ExportReport:
        """Export.

        Raises:
            AlreadyRunning: Another export of this log runs.
            ArchiveDiverged: The archive is of another log, or ahead of this one.
            ArchiveError: The store cannot be used; the archive is as it was.
            VerificationError: The log is damaged; the archive is as it was.
        """
        held = "another process exports this log now; wait for it. Nothing was changed"
        with self._database.lock("export", held):
            # Once more: another export may have ended since.
            self._look()
            return self._run()

    def _run(self) -> ExportReport:
        known = SnapshotWriter(self._database, self._store, self._there)
        with self._database.read() as connection:
            self._require_same_log(connection)
            head = log.head(connection, self._database)
            snapshot = known.write(connection, lambda what: self._step(what, 0, 1))
            cuts = list(self._cuts(connection, head.position))
        work = _Work(snapshot, layout.variant_of(self._columns, snapshot.erasure_epoch))
        writer = SegmentWriter(
            self._database, self._store, snapshot.names, self._columns
        )
        ready = self._ready(work.variant)
        for cut in cuts:
            found = ready.get(cut.path(work.variant))
            if found is None:
                found = self._write(writer, cut, work)
            work.segments.append(msgspec.structs.replace(found, sealed=cut.sealed))
        self._check_end(work)
        manifest = self._manifest(work)
        deleted = self._publish(manifest)
        return ExportReport(
            url=self._store.url,
            position=manifest.position,
            head=manifest.head,
            events=writer.events,
            segments_written=work.written,
            segments_kept=len(cuts) - work.written,
            bytes_written=work.bytes_written + snapshot.bytes_written,
            deleted=deleted,
            projections=[rows.projection for rows in manifest.projections],
            nulls=writer.extractor.nulls,
            absent=self._absent(writer.presence),
            notes=self._notes,
        )

    def _absent(self, presence: Presence) -> list[AbsentField]:
        presence.look_back(self._database)
        return presence.absent()

    def _write(self, writer: SegmentWriter, cut: Cut, work: _Work) -> Segment:
        upto = work.snapshot.head.position
        segment = writer.write(
            cut,
            cut.path(work.variant),
            work.head,
            lambda position: self._step("events", position, upto),
        )
        self._require_known_head(segment)
        work.written += 1
        work.bytes_written += segment.bytes
        if cut.sealed:
            self._note(work, segment)
        return segment

    def _require_known_head(self, segment: Segment) -> None:
        """Refuse events that are not those of the segment that is written again.

        Segments behind it may be kept, and their heads with them: then the end alone
        would not tell that the log was changed in the middle.
        """
        if self._old is None:
            return
        old = self._old.manifest
        if any(k.last == segment.last and k.head != segment.head for k in old.segments):
            self._store.delete(segment.path)
            msg = (
                f"the log's events at positions {segment.first:,} to {segment.last:,} "
                f"do not hash to the head that {NAME} of {self._store.url} has there; "
                "they were not kept. See: kappa-log verify. If it finds the log whole, "
                f"{NAME} is wrong. {old.remedy}"
            )
            raise VerificationError(msg)

    def _manifest(self, work: _Work) -> Manifest:
        snapshot = work.snapshot
        return Manifest(
            position=snapshot.head.position,
            head=snapshot.head.digest.hex(),
            recorded_at=snapshot.head.recorded_at,
            erasure_epoch=snapshot.erasure_epoch,
            segment_events=self._segment_events,
            columns=self._columns,
            sources=snapshot.sources,
            segments=work.segments,
            ledger=snapshot.ledger,
            projections=snapshot.projections,
        )

    def _check_end(self, work: _Work) -> None:
        if work.head != work.snapshot.head.digest:
            msg = (
                "the events do not hash to the log's head: the log is damaged, and the "
                "archive was left as it was. See: kappa-log verify"
            )
            raise VerificationError(msg)

    def _publish(self, manifest: Manifest) -> int:
        """Put the manifest in its place; delete what it does not name; say how many."""
        data = to_bytes(manifest)
        if self._old is None or data != to_bytes(self._old.manifest):
            self._put(NAME, data)
        named = {file.path for file in manifest.files}
        gone = [p for p in self._store.sizes() if _OURS.fullmatch(p) and p not in named]
        for path in gone:
            self._store.delete(path)
        return len([path for path in gone if path != JOURNAL])

    def _put(self, path: str, data: bytes) -> None:
        with self._store.writing() as sink:
            sink.write(data)
            sink.done(path, 0)

    # --- what is there already ------------------------------------------------

    def _require_same_log(self, connection: sa.Connection) -> None:
        if self._old is not None:
            require_same_log(connection, self._database, self._old)

    def _ready(self, variant: str) -> dict[str, Segment]:
        """Return path → the segments that need not be made."""
        ready = self._journaled(variant)
        if self._old is not None:
            ready |= {
                segment.path: segment
                for segment in self._old.manifest.segments
                if segment.path in self._there
            }
        return ready

    def _journaled(self, variant: str) -> dict[str, Segment]:
        """Return the segments that a killed export of this log made."""
        data = self._store.read(JOURNAL)
        if data is None:
            return {}
        try:
            found = msgspec.json.decode(data, type=_Journal)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return {}
        with self._database.read() as connection:
            known = transfer.head_at(connection, self._database, found.position)
        ours = (found.head, found.segment_events, found.variant)
        if known is None or ours != (known.hex(), self._segment_events, variant):
            return {}
        return {
            segment.path: segment
            for segment in found.segments
            if self._sizes.get(segment.path) == segment.bytes
        }

    def _note(self, work: _Work, segment: Segment) -> None:
        """Note a segment that is ready, for an export after this one is killed."""
        work.journal.append(segment)
        head = work.snapshot.head
        journal = _Journal(
            head.position,
            head.digest.hex(),
            self._segment_events,
            work.variant,
            work.journal,
        )
        self._put(JOURNAL, msgspec.json.encode(journal))

    # --- where segments begin and end -----------------------------------------

    def _cuts(self, connection: sa.Connection, head: Position) -> Iterator[Cut]:
        """Yield where segments begin and end, from the first position to the head."""
        first = 1
        for known in self._old.manifest.segments if self._old else []:
            if known.sealed:
                yield Cut(date.fromisoformat(known.date), first, known.last, True)
                first = known.last + 1
        day_end = 0
        while first <= head:
            recorded = log.recorded_after(connection, self._database, first - 1)
            if recorded is None:
                msg = f"position {first:,} is missing. See: kappa-log verify"
                raise VerificationError(msg)
            day = recorded.astimezone(UTC).date()
            if first > day_end:
                midnight = datetime.combine(day + timedelta(days=1), time.min, UTC)
                following = log.first_recorded(connection, self._database, midnight)
                day_end = head if following is None else following - 1
            full = first + self._segment_events - 1
            last = min(full, day_end)
            yield Cut(day, first, last, last == full or last < head)
            first = last + 1


class _Work(msgspec.Struct):
    """How far an export is."""

    snapshot: Snapshot
    variant: str
    segments: list[Segment] = []
    journal: list[Segment] = []
    written: int = 0
    bytes_written: int = 0

    @property
    def head(self) -> bytes:
        """Head of the chain at the end of the segments that are there."""
        if not self.segments:
            return chain.HEAD_OF_NOTHING
        return bytes.fromhex(self.segments[-1].head)


def require_same_log(
    connection: sa.Connection, database: Database, archive: Archive
) -> None:
    """Raise ArchiveDiverged unless the log holds what the archive holds.

    The head that the archive ends in is the head of a batch of the log: the chain
    over all events up to there is the same.
    """
    manifest, url = archive.manifest, archive.store.url
    position = log.head(connection, database).position
    if manifest.position > position:
        msg = (
            f"the archive at {url} holds positions up to {manifest.position:,}, the "
            f"log in {database.label} ends at {position:,}: was it restored from an "
            "older backup? Nothing was changed. Import the archive into an empty "
            "database (kappa-log import), or export to another place (--to)"
        )
        raise ArchiveDiverged(msg)
    known = transfer.head_at(connection, database, manifest.position)
    epoch = transfer.erasure_epoch(connection, database)
    if manifest.position and (
        known is None or known.hex() != manifest.head or epoch < manifest.erasure_epoch
    ):
        msg = (
            f"the archive at {url} is of another log: at position "
            f"{manifest.position:,} the two have different heads. Nothing was "
            "changed; export to another place (--to)"
        )
        raise ArchiveDiverged(msg)
