"""Check: an archive proved by itself, and against the log that it is of.

By itself: each file hashes to what the manifest says, positions have no holes, and the
chain over all events comes to the heads in the manifest. Against the log: the last of
these heads is the log's own at that position. So an archive may be trusted as far as
the head that it ends in; keep that elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pyarrow as pa

from kappa_log import chain
from kappa_log.archive import proof
from kappa_log.archive.export import require_same_log
from kappa_log.archive.manifest import NAME, Manifest, Segment
from kappa_log.archive.reader import Archive, open_archive_in
from kappa_log.archive.scan import scan
from kappa_log.archive.store import Store
from kappa_log.errors import ArchiveDamaged, ArchiveDiverged, VerificationError
from kappa_log.events import Position
from kappa_log.storage.database import Database
from kappa_log.verify import Finding, OnStep

SLICE = 8_192
"""Rows that are in Python's memory at a time."""


class ArchiveReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified of an archive, and what was found."""

    ok: bool
    url: str
    position: Position
    head: str
    """Head of the chain in hex; keep it elsewhere."""
    events: int
    """Events that hashed to the heads in the manifest."""
    files: int
    bytes: int
    compared: bool
    """Whether the log was there to compare with."""
    findings: list[Finding]
    """``what`` is the file, or ``log``."""
    limits: list[str]


def check_archive(
    store: Store, database: Database | None, step: OnStep = lambda *_: None
) -> ArchiveReport:
    """Verify an archive.

    Args:
        store: Where it is.
        database: The log to compare with; None verifies the archive alone.
        step: Called as it goes on.

    Raises:
        ArchiveMissing: There is none.
        ArchiveNewer: A later version of kappa_log wrote it.
        ArchiveError: It cannot be read now, which is no damage.
    """
    findings: list[Finding] = []
    try:
        archive = open_archive_in(store)
    except ArchiveDamaged as error:
        return _report(store, None, 0, [Finding(NAME, None, error.reason)], None)
    manifest = archive.manifest
    _check_files(archive, findings)
    events = 0
    before = chain.HEAD_OF_NOTHING
    for segment in manifest.segments:
        events += _SegmentCheck(archive, segment, before).run(step, findings)
        # The manifest's: one damaged segment says nothing about those after it.
        before = bytes.fromhex(segment.head)
    _check_ends(manifest, findings)
    if database is not None:
        try:
            with database.read() as connection:
                require_same_log(connection, database, archive)
        except ArchiveDiverged as error:
            findings.append(Finding("log", None, str(error)))
    return _report(store, manifest, events, findings, database)


def _check_files(archive: Archive, findings: list[Finding]) -> None:
    """Prove the files beside the segments."""
    for file in [*archive.manifest.ledger.values(), *archive.manifest.projections]:
        try:
            archive.store.check(file)
        except ArchiveDamaged as error:
            findings.append(Finding(error.path, None, error.reason))


class _SegmentCheck:
    """Proves one segment, from the head before it to its own."""

    def __init__(self, archive: Archive, segment: Segment, before: bytes) -> None:
        self._store = archive.store
        self._segment = segment
        self._upto = archive.manifest.position
        names = {source.id: source.name for source in archive.manifest.sources}
        self._chain = proof.Chain(names, segment.first - 1, before)

    def run(self, step: OnStep, findings: list[Finding]) -> int:
        """Return how many events are proved; what is wrong goes to the findings."""
        path, first = self._segment.path, self._segment.first
        try:
            self._read(step)
        except ArchiveDamaged as error:
            findings.append(Finding(path, first, error.reason))
        except VerificationError as error:
            findings.append(Finding(path, self._chain.position + 1, str(error)))
        else:
            if self._chain.head.hex() == self._segment.head:
                return self._segment.rows
            findings.append(
                Finding(path, first, "its events do not hash to the manifest's head")
            )
        return 0

    def _read(self, step: OnStep) -> None:
        for part in scan(self._store, [self._segment], proof.ARCHIVED):
            prove(self._chain, part.table, lambda at: step("events", at, self._upto))


def prove(
    along: proof.Chain, table: pa.Table, step: Callable[[Position], None]
) -> None:
    """Move the chain on over a table's events, a slice at a time."""
    for start in range(0, table.num_rows, SLICE):
        along.extend(proof.lists(table.slice(start, SLICE)))
        step(along.position)


def _check_ends(manifest: Manifest, findings: list[Finding]) -> None:
    """Prove that the segments follow each other up to the manifest's end."""
    expected, head = 1, chain.HEAD_OF_NOTHING.hex()
    for segment in manifest.segments:
        if segment.first != expected:
            message = f"{segment.path} does not begin at position {expected:,}"
            findings.append(Finding(NAME, expected, message))
        expected, head = segment.last + 1, segment.head
    if (expected - 1, head) != (manifest.position, manifest.head):
        message = "its segments do not end at its position and head"
        findings.append(Finding(NAME, manifest.position, message))


def _report(
    store: Store,
    manifest: Manifest | None,
    events: int,
    findings: list[Finding],
    database: Database | None,
) -> ArchiveReport:
    files = [] if manifest is None else manifest.files
    limits = []
    if database is None:
        limits.append(
            "There is no log to compare with: who can rewrite the whole archive would "
            "not be caught. Compare its head with one that you kept."
        )
    return ArchiveReport(
        ok=not findings,
        url=store.url,
        position=manifest.position if manifest else 0,
        head=manifest.head if manifest else "",
        events=events,
        files=len(files) + 1,
        bytes=sum(file.bytes for file in files),
        compared=database is not None and manifest is not None,
        findings=findings,
        limits=limits,
    )
