"""Store: where the archive's files lie, on a disk or in an object store.

A file appears whole or not at all. On a disk it is written beside, synced to the
device and renamed; in an object store it is made on a local disk and put in one
piece. What is read is hashed first: nothing unproved is ever parsed.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from kappa_log.archive.manifest import File
from kappa_log.config import masked
from kappa_log.errors import ArchiveDamaged, ArchiveError, UsageError

if TYPE_CHECKING:
    from typing import BinaryIO

CHUNK = 2**20

Identity = tuple[int, ...]

_TEMPORARY = ".kappa_log-"

_MISSPELLED = re.compile(
    r"([a-z][a-z0-9+.-]+(?=:)|s3|gs|gcs|abfss?|hdfs|file)(?::/?|//)(.+)", re.IGNORECASE
)
"""Addresses whose :// lacks something: as folders they would be made, and filled."""


class Sink:
    """A file that is being written; it hashes and counts what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        """Begin an empty file."""
        self._file = file
        self._hash = sha256()
        self.bytes = 0
        self.path: str | None = None
        """Where it goes at the end of the block that writes it; None throws it away."""
        self.closed = False

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._file.write(view)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: the end of the block syncs."""

    def tell(self) -> int:
        """Return how much was written."""
        return self.bytes

    def close(self) -> None:
        """Do nothing: whoever opened it closes it."""

    @property
    def sha256(self) -> str:
        """Hash of what was written, in hex."""
        return self._hash.hexdigest()

    def done(self, path: str, rows: int) -> File:
        """Say where it goes, and return what the manifest says about it."""
        self.path = path
        return File(path=path, rows=rows, bytes=self.bytes, sha256=self.sha256)


class Store:
    """The files of one archive.

    Args:
        url: A folder, which may begin with ~, or an address that
            ``pyarrow.fs.FileSystem.from_uri`` knows.
        base: Folder that a relative path is meant from.

    Raises:
        UsageError: The address is none, or a file is there.
        ArchiveError: The object store does not answer.
    """

    def __init__(self, url: str, base: Path) -> None:
        self.url: str = masked("archive.url", url)
        """The address without secrets, for messages."""
        self.folder: Path | None = None
        """Where it lies; None in an object store."""
        if "://" in url:
            system, path = self._opened(url)
        else:
            self._check_folder(url)
            system = fs.LocalFileSystem()
            path = str((base / self._at_home(url)).absolute())
        if isinstance(system, fs.LocalFileSystem):
            self.folder = Path(path)
            if self.folder.exists() and not self.folder.is_dir():
                msg = (
                    f"{self.folder} is a file; an archive is a folder. Give the folder "
                    "that its manifest.json is in. Nothing was changed"
                )
                raise UsageError(msg)
        self.files = fs.SubTreeFileSystem(path, system)
        """The archive's folder as a file system of its own; to read."""

    def _opened(self, url: str) -> tuple[fs.FileSystem, str]:
        """Return the file system of an address, and the path in it."""
        try:
            system, path = fs.FileSystem.from_uri(url)
        except ValueError as error:
            msg = (
                f"archive address {self.url!r} cannot be used: {_why(error)}. Give "
                "a folder, or for instance s3://BUCKET/FOLDER. Nothing was changed"
            )
            raise UsageError(msg) from None
        except (pa.ArrowException, OSError) as error:
            msg = (
                f"the archive at {self.url} cannot be used: {_why(error)}. Check its "
                "address, the network and the credentials. Nothing was changed"
            )
            raise ArchiveError(msg) from error
        return system, path

    def _at_home(self, url: str) -> Path:
        """Return the path of a folder, which may begin with ~ as in a shell."""
        try:
            return Path(url).expanduser()
        except RuntimeError:
            msg = (
                f"archive address {self.url!r}: whose home folder that is, is not "
                f"known; write its path, or ./{self.url} for a folder of that name. "
                "Nothing was changed"
            )
            raise UsageError(msg) from None

    def _check_folder(self, url: str) -> None:
        """Raise UsageError if an address was meant, or nothing."""
        if not url.strip():
            msg = (
                "an archive's address is empty. Give a folder, or for instance "
                "s3://BUCKET/FOLDER. Nothing was changed"
            )
            raise UsageError(msg)
        found = _MISSPELLED.fullmatch(url)
        if found is not None:
            meant = masked("archive.url", f"{found[1].lower()}://{found[2]}")
            msg = (
                f"archive address {self.url!r} is neither a folder nor an address. "
                f"Write {meant}, or ./{self.url} for a folder of that name. Nothing "
                "was changed"
            )
            raise UsageError(msg)

    def nothing_there(self, name: str) -> str:
        """Say why there is no file of a name that each archive has, and where one is.

        Args:
            name: The file, which is in the archive's own folder.
        """
        folder = self.folder
        if folder is None:
            return f"there is no {name} at {self.url}"
        if not folder.exists():
            return f"there is no folder {folder}"
        if (folder.parent / name).is_file():
            return f"{folder} is a part of the archive {folder.parent}"
        for found in sorted(folder.glob(f"*/{name}"))[:1]:
            return f"{folder} has no {name}, but {found.parent} has"
        if not any(folder.iterdir()):
            return f"the folder {folder} is empty"
        return f"the folder {folder} has no {name}"

    def around(self, name: str, mark: bytes) -> str | None:
        """Return the folder above this one that is an archive; None if none is.

        Args:
            name: The file that each archive has.
            mark: What is written in it.
        """
        system, path = self.files.base_fs, self.files.base_path
        if self.folder is not None:
            path = self.folder.resolve().as_posix()
        for parent in PurePosixPath(path).parents:
            # What cannot be read is no archive of whoever asks.
            with (
                contextlib.suppress(OSError, pa.ArrowException),
                system.open_input_stream(str(parent / name)) as stream,
            ):
                if mark in stream.read(CHUNK):
                    return str(parent)
        return None

    # --- reading ------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a small file; None if there is none."""
        with self._translating(path):
            if self.files.get_file_info(path).type == fs.FileType.NotFound:
                return None
            with self.files.open_input_stream(path) as stream:
                return bytes(stream.read())

    @contextlib.contextmanager
    def checked(self, file: File) -> Iterator[Path]:
        """Give a local file with the proved contents of one of the archive.

        Raises:
            ArchiveDamaged: It is missing, or not what was written.
        """
        if self.folder is not None:
            self._check(file, None)
            yield self.folder / file.path
            return
        with tempfile.TemporaryDirectory(prefix="kappa_log-") as folder:
            copy = Path(folder, "copy.parquet")
            with copy.open("wb") as out:
                self._check(file, out)
            yield copy

    def check(self, file: File) -> None:
        """Prove that a file is there and is what was written.

        Raises:
            ArchiveDamaged: It is not.
        """
        self._check(file, None)

    def check_untouched(self, file: File) -> None:
        """Prove a file, unless this process did and nobody touched it since.

        In an object store nobody can tell, so nothing is proved: its bytes would be
        fetched once more.

        Raises:
            ArchiveDamaged: It is not what was written.
        """
        if self.folder is None:
            return
        path = self.folder / file.path
        there = identity(path)
        if there is None or _PROVED.get((path, file.sha256)) != there:
            self._check(file, None)
            _PROVED[path, file.sha256] = there

    def _check(self, file: File, copy: BinaryIO | None) -> None:
        digest, size = sha256(), 0
        with self._translating(file.path):
            try:
                stream = self.files.open_input_stream(file.path, buffer_size=0)
            except FileNotFoundError:
                raise self.missing(file.path) from None
            with stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    if copy is not None:
                        copy.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise self._unlike(file, size)

    def _unlike(self, file: File, size: int | None) -> ArchiveDamaged:
        """Return the error about a file of another size, or hash if it is the same."""
        if size is None:
            return self.missing(file.path)
        why = f"it has {size:,} bytes" if size != file.bytes else "its hash differs"
        return self.damaged(file.path, f"it is not what was written: {why}")

    def damaged(self, path: str, why: str) -> ArchiveDamaged:
        """Return the error about a file that is not as it should be."""
        # The manifest stays: with it went the typed columns.
        remedy = (
            "Put it back from a copy, or, if kappa-log verify finds the log whole, "
            "delete this file, and kappa-log export writes it anew"
        )
        return ArchiveDamaged(self.url, path, f"{why}. {remedy}")

    def missing(self, path: str) -> ArchiveDamaged:
        """Return the error about a file that is not there."""
        remedy = (
            "Put it back from a copy, or, if kappa-log verify finds the log whole, "
            "kappa-log export writes it anew"
        )
        return ArchiveDamaged(self.url, path, f"it is missing. {remedy}")

    def look(self, files: Iterable[File]) -> None:
        """See by one listing that files are there, as large as they were.

        Raises:
            ArchiveDamaged: One is not; the first of them is named.
        """
        sizes = self.sizes()
        wrong = [file for file in files if sizes.get(file.path) != file.bytes]
        if not wrong:
            return
        error = self._unlike(wrong[0], sizes.get(wrong[0].path))
        if len(wrong) > 1:
            more = f"{len(wrong) - 1:,} more: kappa-log verify --archive names them"
            error = ArchiveDamaged(self.url, error.path, f"{error.reason}. And {more}")
        raise error

    def sizes(self) -> dict[str, int]:
        """Return path → bytes of all files that are there."""
        chosen = fs.FileSelector("", allow_not_found=True, recursive=True)
        with self._translating("while listing"):
            found = self.files.get_file_info(chosen)
        return {one.path: one.size for one in found if one.type == fs.FileType.File}

    # --- writing ------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Sink]:
        """Give a file to write; it appears at the end of the block, at ``sink.path``.

        Raises:
            ArchiveError: It cannot be written; nothing of it is there.
        """
        with self._translating("while writing"), self._temporary() as (file, name):
            sink = Sink(file)
            yield sink
            file.flush()
            if sink.path is None:
                return
            if self.folder is None:
                file.seek(0)
                with self.files.open_output_stream(sink.path) as out:
                    while chunk := file.read(CHUNK):
                        out.write(chunk)
                return
            os.fsync(file.fileno())
            self._put(name, self.folder / sink.path)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[BinaryIO, Path]]:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", _TEMPORARY, self.folder)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file, Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _put(self, temporary: Path, path: Path) -> None:
        """Rename a file to its name, so that it stays there through a power loss."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # What mkstemp makes is for its owner alone; an archive is as other files are.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
        assert self.folder is not None
        for folder in (path.parent, *path.parent.parents):
            _sync(folder)
            if folder == self.folder:
                break

    def delete(self, path: str) -> None:
        """Delete a file; that it is gone already is no error."""
        with self._translating(path), contextlib.suppress(FileNotFoundError):
            self.files.delete_file(path)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / path).parent.rmdir()

    @contextlib.contextmanager
    def _translating(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            msg = (
                f"the archive at {self.url} cannot be used: {_why(error)} ({what}). "
                "What it held before is still whole"
            )
            raise ArchiveError(msg) from error


_PROVED: dict[tuple[Path, str], Identity | None] = {}
"""File and its hash → what it was when it was proved."""


def identity(path: Path) -> Identity | None:
    """Return what changes when somebody writes a file; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())
