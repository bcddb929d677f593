"""Manifest: which files are the archive, and what each of them holds.

It is written last and replaced in one step. It is text that depends on the log alone:
no clock, no host. Its own hash is in it, so that a damaged one is noticed, too.
"""

from __future__ import annotations

import shlex
from hashlib import sha256
from typing import Any

import msgspec

from kappa_log.archive.layout import VERSION
from kappa_log.errors import ArchiveDamaged, ArchiveNewer
from kappa_log.events import Position

NAME = "manifest.json"

FORMAT = "kappa_log archive"

_REMEDY = "Put it back from a copy, or delete it and export anew"

_UNREADABLE = (
    f"{_REMEDY}; if it had typed columns, name them again (--columns): nothing else "
    "knows them"
)

_NO_DIGEST = ""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the archive."""

    path: str
    """In the archive, with forward slashes."""
    rows: int
    bytes: int
    sha256: str
    """SHA-256 of the file, in hex: ``sha256sum`` tells the same, and processors have
    instructions for it."""


class Segment(File, frozen=True, kw_only=True):
    """Some successive events."""

    date: str
    first: Position
    last: Position
    head: str
    """Head of the chain at ``last``, in hex."""
    sealed: bool
    """Nothing will be added; the others' events move into a longer file."""
    lanes: list[tuple[str, str]]
    """(topic, group) of the events in it, sorted: what others may pass over."""


class Rows(File, frozen=True, kw_only=True):
    """The rows of a live build at a position."""

    projection: str
    version: int
    build: int
    position: Position
    mixed: bool
    """It was made by a replay with a start and no full one since."""


class PayloadColumn(msgspec.Struct, frozen=True, kw_only=True):
    """A typed column that was made of a field of some payloads."""

    name: str
    """Name of the column: ``topic.field``."""
    topic: str
    field: str
    """Dotted path in the payload."""
    type: str
    """Kind of the value, as `archive.fields.KINDS` names it."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A source of records that the log knows."""

    id: int
    name: str
    created_at: int
    """Microseconds since 1970 UTC."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that an archive is."""

    format: str = FORMAT
    version: int = VERSION
    position: Position
    """Last event in it; positions 1 to this one are there."""
    head: str
    """Head of the chain at that position, in hex."""
    recorded_at: int | None
    """Of the last event, in microseconds since 1970 UTC."""
    erasure_epoch: int
    segment_events: int
    columns: list[PayloadColumn]
    sources: list[Source]
    segments: list[Segment]
    """By position; together they hold each position once."""
    ledger: dict[str, File]
    """offsets, checkpoints, duplicates and failures, as of the same head."""
    projections: list[Rows]
    sha256: str = _NO_DIGEST
    """SHA-256 of this text while this is empty, in hex."""

    @property
    def remedy(self) -> str:
        """What to do about a manifest that is not as it should be.

        Nothing else knows which typed columns there are, so they are named.
        """
        if not self.columns:
            return _REMEDY
        named = (shlex.quote(f"{c.name}:{c.type}") for c in self.columns)
        return f"{_REMEDY}, with its columns: --columns {' --columns '.join(named)}"

    @property
    def files(self) -> list[File]:
        """All files but the manifest."""
        return [*self.segments, *self.ledger.values(), *self.projections]


class _Version(msgspec.Struct):
    format: str
    version: int


def to_bytes(manifest: Manifest) -> bytes:
    """Return a manifest as its file, hash included."""
    unsigned = msgspec.structs.replace(manifest, sha256=_NO_DIGEST)
    digest = sha256(_encoded(unsigned)).hexdigest()
    return _encoded(msgspec.structs.replace(manifest, sha256=digest))


def from_bytes(data: bytes, url: str) -> Manifest:
    """Return the manifest that a file holds.

    Raises:
        ArchiveNewer: A later version of kappa_log wrote it.
        ArchiveDamaged: It is none, or not what was written.
    """
    try:
        version = msgspec.json.decode(data, type=_Version)
    except msgspec.ValidationError:
        raise _not_ours(url) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(url, f"it is no manifest ({error})") from None
    if version.format != FORMAT:
        raise _not_ours(url)
    if version.version > VERSION:
        msg = (
            f"the archive at {url} has layout {version.version}; this version of "
            f"kappa_log knows layouts up to {VERSION}. Install a newer one; nothing "
            "was changed"
        )
        raise ArchiveNewer(msg)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(url, f"it cannot be read ({error})") from None
    if to_bytes(manifest) != data:
        raise _damaged(
            url, "it is not what was written: its hash differs", manifest.remedy
        )
    return manifest


def _encoded(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _not_ours(url: str) -> ArchiveDamaged:
    # Nobody is told to delete it: it may be another program's.
    why = f"it is no manifest of a {FORMAT}. Name another folder; it was left as it is"
    return ArchiveDamaged(url, NAME, why)


def _damaged(url: str, why: str, remedy: str = _UNREADABLE) -> ArchiveDamaged:
    return ArchiveDamaged(url, NAME, f"{why}. {remedy}")
