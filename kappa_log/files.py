"""Files of JSON lines as a source of records.

A line is a record: its number from 0 is the offset, its bytes without the line end
are the value. A file is resumed only if the lines read before are still the same;
it may have grown.
"""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec
from typing_extensions import override

from kappa_log.codec import check_id, decode_json
from kappa_log.errors import DecodeError, SourceDiverged, SourceError, UsageError
from kappa_log.records import Record, field

MAX_CHUNK_BYTES = 16 * 1024 * 1024
"""A chunk ends here even if it has few lines, so that memory is bounded."""


class Chunk(msgspec.Struct, frozen=True):
    """Some lines of a file, in order."""

    records: list[Record]
    next_offset: int
    content_digest: bytes
    """Over all lines from the first to next_offset."""
    blank: int
    """Lines without a record; they take an offset all the same."""


class LineFile:
    """One file, or standard input, read line by line.

    Args:
        file: Path; ``.gz`` is decompressed; ``-`` is standard input.
        source: Name of the source; the base name without ``.gz`` if None.

    Raises:
        UsageError: Standard input without a source.
    """

    def __init__(self, file: str | Path, source: str | None = None) -> None:
        self.file = str(file)
        if source is None:
            if self.file == "-":
                msg = (
                    "standard input has no name: give --source NAME, so that it can "
                    "be resumed"
                )
                raise UsageError(msg)
            source = Path(self.file).name.removesuffix(".gz")
        try:
            check_id("source name", source)
        except DecodeError as error:
            msg = f"{error}; give another by --source NAME"
            raise UsageError(msg) from None
        if not source:
            msg = "the source has no name; give one by --source NAME"
            raise UsageError(msg)
        self.source = f"file:{source}"
        self.held_back = False
        """Whether a last line without line end was left for the next run."""
        self._taken = 0
        self.bytes_total: int | None = None
        self._under: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the disk so far, compressed ones of a compressed file."""
        try:
            return 0 if self._under is None else self._under.tell()
        except (OSError, ValueError):
            return 0

    def chunks(self, start: int, digest: bytes | None, size: int) -> Iterator[Chunk]:
        """Yield the lines from ``start`` on, in chunks of at most ``size`` lines.

        Args:
            start: Number of lines read before.
            digest: Digest over them; None if there are none.
            size: Most lines a chunk.

        A chunk counts as kept when the next one is asked for. What can be read of a
        file that was cut is a chunk, too; the error comes after it.

        Raises:
            SourceError: The file cannot be read, or not further.
            SourceDiverged: The lines before ``start`` are not what was read.
        """
        self._taken = start
        try:
            yield from self._chunks(start, digest, size)
        except (OSError, EOFError, zlib.error) as error:
            reason = (
                getattr(error, "strerror", None) or str(error) or type(error).__name__
            )
            kept = (
                f"its first {self._taken:,} lines are kept, and the next run goes on "
                "after them"
                if self._taken
                else "nothing of it is kept"
            )
            msg = f"{self.file} cannot be read: {reason}; {kept}"
            raise SourceError(msg) from error

    def _chunks(self, start: int, digest: bytes | None, size: int) -> Iterator[Chunk]:
        with self._open() as lines:
            hasher = self._skip(lines, start, digest)
            offset = start
            cut: Exception | None = None
            while cut is None:
                values, cut = self._values(lines, size)
                if values:
                    hasher.update(b"".join(map(field, values)))
                    records = [
                        Record(number, value)
                        for number, value in enumerate(values, offset)
                        if value and not value.isspace()
                    ]
                    offset += len(values)
                    blank = len(values) - len(records)
                    yield Chunk(records, offset, hasher.digest(), blank)
                    self._taken = offset
                elif cut is None:
                    return
            raise cut

    def _values(
        self, lines: BinaryIO, size: int
    ) -> tuple[list[bytes], Exception | None]:
        """Return the next lines without their ends, and why there are no more.

        Of a damaged gzip file, unlike a cut one, whatever came out may be wrong.
        """
        values: list[bytes] = []
        held = 0
        try:
            while len(values) < size and held < MAX_CHUNK_BYTES:
                line = lines.readline()
                if not line or self._is_partial(line):
                    break
                value = _value(line)
                held += len(value)
                values.append(value)
        except gzip.BadGzipFile:
            raise
        except (EOFError, OSError) as error:
            return values, error
        return values, None

    def _skip(self, lines: BinaryIO, start: int, digest: bytes | None) -> blake2b:
        """Pass over the lines read before, and return the hasher that took them in."""
        hasher = blake2b(digest_size=32)
        for number in range(start):
            line = lines.readline()
            if not line:
                self._diverged(f"has {number} lines, but {start} were ingested")
            hasher.update(field(_value(line)))
        if digest is not None and hasher.digest() != digest:
            self._diverged(f"its first {start} lines are not those that were ingested")
        return hasher

    def _open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        if self.file == "-":
            # It is not ours to close: the caller may go on reading it.
            return contextlib.nullcontext(sys.stdin.buffer)
        path = Path(self.file)
        self.bytes_total = path.stat().st_size
        under = path.open("rb")
        self._under = under
        if path.suffix == ".gz":
            return _Unzipped(under)  # type: ignore[return-value]
        return under

    def _is_partial(self, line: bytes) -> bool:
        """Tell whether a last line is still being written.

        Without its line end it may be half a record; only whole JSON is taken.
        """
        if line.endswith(b"\n"):
            return False
        try:
            decode_json(line)
        except DecodeError:
            self.held_back = bool(line.strip())
            return True
        # After a carriage return the other half of the line end may follow.
        self.held_back = line.endswith(b"\r")
        return self.held_back

    def _diverged(self, what: str) -> None:
        msg = (
            f"{self.file}: {what}. Nothing was ingested. A file may grow but not "
            "change; ingest another file under another name (--source NAME)"
        )
        raise SourceDiverged(msg)


class _Unzipped(gzip.GzipFile):
    """A gzip file that closes what it reads from."""

    def __init__(self, under: BinaryIO) -> None:
        super().__init__(fileobj=under, mode="rb")
        self._to_close = under

    @override
    def close(self) -> None:
        super().close()
        self._to_close.close()


def _value(line: bytes) -> bytes:
    if line.endswith(b"\n"):
        return line[:-2] if line.endswith(b"\r\n") else line[:-1]
    return line
