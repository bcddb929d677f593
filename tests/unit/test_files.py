"""Files: lines as records, and when a file is still the one that was read."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_log import files
from kappa_log.errors import SourceDiverged, SourceError, UsageError
from kappa_log.files import Chunk, LineFile


def read(
    file: Path | str, start: int = 0, digest: bytes | None = None, size: int = 100
) -> list[Chunk]:
    """Return the chunks of a file."""
    return list(LineFile(file, "s").chunks(start, digest, size))


def values(chunks: list[Chunk]) -> list[tuple[int, bytes | None]]:
    """Return offset and value of each record."""
    return [(r.offset, r.value) for chunk in chunks for r in chunk.records]


@pytest.mark.parametrize(
    ("content", "records", "lines", "held_back"),
    [
        (b"", [], 0, False),
        (b"1\n2\n", [(0, b"1"), (1, b"2")], 2, False),
        (b"1\r\n2\r\n", [(0, b"1"), (1, b"2")], 2, False),
        (b"1\n\n  \n\t\r\n2\n", [(0, b"1"), (4, b"2")], 5, False),
        (b"\n\n", [], 2, False),
        (b'{"a":1}\n{"a":2}', [(0, b'{"a":1}'), (1, b'{"a":2}')], 2, False),
        (b'{"a":1}\n{"a":', [(0, b'{"a":1}')], 1, True),
        (b'{"a":1}\n  ', [(0, b'{"a":1}')], 1, False),
        (b'{"a":1}\r', [], 0, True),
        (b"a\rb\n", [(0, b"a\rb")], 1, False),
        (b" 1 \n", [(0, b" 1 ")], 1, False),
        (
            b"\xff\x00\n\xef\xbb\xbf1\n",
            [(0, b"\xff\x00"), (1, b"\xef\xbb\xbf1")],
            2,
            False,
        ),
        (b"a\x0bb\x0c\x85\n", [(0, b"a\x0bb\x0c\x85")], 1, False),
    ],
)
def test_a_line_is_a_record_without_its_end(
    tmp_path: Path,
    content: bytes,
    records: list[tuple[int, bytes]],
    lines: int,
    held_back: bool,
) -> None:
    """Blank lines take an offset; a half-written last line waits, and it is said."""
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    file = LineFile(path)

    chunks = list(file.chunks(0, None, 100))

    assert values(chunks) == records
    assert (chunks[-1].next_offset if chunks else 0) == lines
    assert sum(chunk.blank for chunk in chunks) == lines - len(records)
    assert file.held_back is held_back
    assert file.bytes_total == len(content)


def test_a_gzipped_file_reads_like_the_plain_one(tmp_path: Path) -> None:
    """Its offsets and digests are those of the uncompressed lines."""
    plain, zipped = tmp_path / "f.jsonl", tmp_path / "f.jsonl.gz"
    plain.write_bytes(b"1\n\n2\n")
    zipped.write_bytes(gzip.compress(b"1\n\n2\n", mtime=0))
    one, other = LineFile(plain), LineFile(zipped)

    assert list(one.chunks(0, None, 2)) == list(other.chunks(0, None, 2))
    assert one.source == other.source == "file:f.jsonl"
    assert other.bytes_total == zipped.stat().st_size


lines_of = st.lists(
    st.sampled_from([b"1", b"", b" ", b'"a"', b"\xff", b"x\r"]), max_size=12
)


@given(lines_of, st.integers(0, 12), st.integers(1, 5))
def test_reading_in_two_runs_is_reading_in_one(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], stop: int, size: int
) -> None:
    """Wherever the first run ended and however large its chunks were."""
    path = tmp_path_factory.mktemp("f") / "f"
    stop = min(stop, len(lines))
    path.write_bytes(b"".join(line + b"\n" for line in lines[:stop]))
    first = read(path, size=size)
    path.write_bytes(b"".join(line + b"\n" for line in lines))

    start = first[-1].next_offset if first else 0
    digest = first[-1].content_digest if first else None
    second = read(path, start, digest, size)

    whole = read(path)
    assert values(first) + values(second) == values(whole)
    ends = [chunk.content_digest for chunk in (*first, *second)][-1:]
    assert ends == [chunk.content_digest for chunk in whole][-1:]
    assert all(c.next_offset - len(c.records) - c.blank >= 0 for c in first + second)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (b"1\n3\n", "its first 2 lines are not those that were ingested"),
        (b"1 \n2\n", "its first 2 lines are not those"),
        (b"12\n\n", "its first 2 lines are not those"),
        (b"1\n", "has 1 lines, but 2 were ingested"),
        (b"", "has 0 lines, but 2 were ingested"),
    ],
)
def test_a_file_that_changed_is_another_file(
    tmp_path: Path, changed: bytes, message: str
) -> None:
    """Nothing of it is read; the message says how to ingest it all the same."""
    path = tmp_path / "f"
    path.write_bytes(b"1\n2\n")
    (chunk,) = read(path)
    path.write_bytes(changed + b"")

    with pytest.raises(
        SourceDiverged, match=f"{message}.*Nothing was ingested.*--source"
    ):
        read(path, chunk.next_offset, chunk.content_digest)


def test_a_last_line_that_was_taken_may_get_its_end(tmp_path: Path) -> None:
    """A writer that ends lines late has changed nothing."""
    path = tmp_path / "f"
    path.write_bytes(b'1\n{"a":1}')
    (chunk,) = read(path)
    path.write_bytes(b'1\n{"a":1}\n2\n')

    assert values(read(path, chunk.next_offset, chunk.content_digest)) == [(2, b"2")]


def test_a_line_end_may_be_written_in_two_halves(tmp_path: Path) -> None:
    """The line waits between carriage return and line feed."""
    path = tmp_path / "f"
    path.write_bytes(b"1\r\n2\r")
    (chunk,) = read(path)
    path.write_bytes(b"1\r\n2\r\n")

    assert values(read(path, chunk.next_offset, chunk.content_digest)) == [(1, b"2")]


def test_a_chunk_ends_early_when_its_lines_are_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded in bytes, too."""
    monkeypatch.setattr(files, "MAX_CHUNK_BYTES", 10)
    path = tmp_path / "f"
    path.write_bytes(b'"123456"\n' * 5)

    assert [len(chunk.records) for chunk in read(path)] == [2, 2, 1]


@pytest.mark.parametrize("cut", [5, 30, 900, -1, -9])
def test_a_cut_gzip_file_gives_its_whole_lines_and_can_be_resumed(
    tmp_path: Path, cut: int
) -> None:
    """The error says how many lines were kept; the whole file goes on after them."""
    path = tmp_path / "f.gz"
    content = [b'{"n":%d}' % n for n in range(1000)]
    zipped = gzip.compress(b"".join(line + b"\n" for line in content), mtime=0)
    path.write_bytes(zipped[:cut])
    taken: list[Chunk] = []

    with pytest.raises(SourceError, match=r"f.gz cannot be read: ") as caught:
        taken.extend(LineFile(path, "s").chunks(0, None, 10_000))

    first = taken[-1] if taken else Chunk([], 0, b"", 0)
    assert len(taken) <= 1
    assert [r.value for r in first.records] == content[: first.next_offset]
    assert first.next_offset > 100 or cut in (5, 30)
    kept = f"its first {first.next_offset:,} lines are kept, and the next run goes on"
    assert (kept if taken else "nothing of it is kept") in str(caught.value)
    digest = first.content_digest or None
    with pytest.raises(SourceError, match=kept if taken else "nothing"):
        read(path, first.next_offset, digest)
    path.write_bytes(zipped)
    again = values(read(path, first.next_offset, digest, 10_000))
    assert again == list(enumerate(content))[first.next_offset :]


def test_a_cut_gzip_file_is_an_error_after_what_earlier_chunks_gave(
    tmp_path: Path,
) -> None:
    """Lines count as kept once the next ones are asked for."""
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(b"1\n2\n3\n", mtime=0)[:-8])
    chunks = LineFile(path, "s").chunks(0, None, 2)

    assert (next(chunks).next_offset, next(chunks).next_offset) == (2, 3)
    with pytest.raises(SourceError, match="its first 3 lines are kept"):
        next(chunks)


@pytest.mark.parametrize(
    "content", [b"no gzip at all", gzip.compress(b"1\n", mtime=0) + b"junk"]
)
def test_what_is_no_gzip_is_an_error(tmp_path: Path, content: bytes) -> None:
    """Whatever its name says."""
    path = tmp_path / "f.gz"
    path.write_bytes(content)

    with pytest.raises(SourceError, match=r"f.gz cannot be read"):
        read(path)


def test_a_gzip_file_may_have_several_members(tmp_path: Path) -> None:
    """Appending to a gzipped log makes such files."""
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(b"1\n", mtime=0) + gzip.compress(b"2\n"))

    assert values(read(path)) == [(0, b"1"), (1, b"2")]


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """As is a folder."""
    with pytest.raises(SourceError, match="nothing cannot be read: No such file"):
        read(tmp_path / "nothing")
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_standard_input_needs_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it could not be resumed."""
    with pytest.raises(UsageError, match="standard input has no name: give --source"):
        LineFile("-")

    class Stdin:
        buffer = io.BytesIO(b"1\n2")

    monkeypatch.setattr(sys, "stdin", Stdin)
    file = LineFile("-", "pipe")

    assert file.source == "file:pipe"
    assert values(list(file.chunks(0, None, 10))) == [(0, b"1"), (1, b"2")]
    assert (file.bytes_total, file.bytes_read) == (None, 0)
    assert not Stdin.buffer.closed  # It is the caller's.


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("f", "", "has no name"),
        ("f", "a\0b", "NUL"),
        ("f", "a" * 2000, "2000 bytes"),
        ("\udcff.jsonl", None, "lone surrogate.*--source"),
        ("/", None, "has no name"),
    ],
)
def test_a_source_needs_a_name_that_databases_take(
    file: str, source: Any, message: str
) -> None:
    """A file's name may be bytes that are no text; then another name must be given."""
    with pytest.raises(UsageError, match=message):
        LineFile(file, source)


def test_progress_is_counted_in_bytes_of_the_disk(tmp_path: Path) -> None:
    """A bar needs them; before and after reading they are told without error."""
    path = tmp_path / "f"
    path.write_bytes(b"1\n" * 10)
    file = LineFile(path)

    assert file.bytes_read == 0
    chunks = file.chunks(0, None, 5)
    next(chunks)
    assert 0 < file.bytes_read <= 20
    list(chunks)
    assert file.bytes_read == 0
