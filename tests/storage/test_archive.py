"""The archive: what leaves the log comes back the same, on and from both databases."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kappa_log import KappaLog, chain, errors
from kappa_log.archive import layout, store, writing
from kappa_log.archive.manifest import Manifest, from_bytes, to_bytes
from support.archives import (
    SEGMENT,
    by_topic,
    contents,
    erase,
    everything,
    files,
    fill,
    open_full,
    other_kind,
    states,
)
from support.logs import execute

BOTH = [everything, by_topic]


@pytest.fixture
def app(database_url: str, tmp_path: Path) -> Iterator[KappaLog]:
    """A log with something of everything."""
    with open_full(database_url, tmp_path) as found:
        fill(found)
        yield found


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where its archive is."""
    return tmp_path / "archive"


# --- there and back ---------------------------------------------------------------


def test_an_archive_brings_the_same_log_into_the_other_kind_of_database(
    app: KappaLog, there: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Positions, chain, sources, offsets, ledger, failures, duplicates: all of it."""
    erase(app, 5)
    app.project()
    app.export()

    with other_kind(request, app.config.database.url, tmp_path / "other") as other:
        report = other.import_archive(str(there))

        assert report.head == app.head().digest == other.head().digest
        assert contents(other) == contents(app)
        assert other.verify().findings == []
        other.project()
        assert states(other, BOTH) == states(app, BOTH)
        # Ids and offsets go on where they were.
        shutil.copy(tmp_path / "rides.jsonl", tmp_path / "other")
        fill(other, rounds=1, begin=3)
        fill(app, rounds=1, begin=3)
        assert other.verify().findings == []
        assert [f.id for f in other.failures()] == [f.id for f in app.failures()]


def test_the_bytes_depend_on_the_log_alone(
    app: KappaLog, there: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same again, at once, in pieces, or from the other kind of database."""
    columns = ["orders.n:int", "rides.id:string"]
    fill(app, rounds=1, begin=3)
    app.project()
    app.export(columns=columns)
    first = files(there)

    again = app.export()
    assert (again.segments_written, again.bytes_written, files(there)) == (0, 0, first)
    app.export(str(tmp_path / "fresh"), columns=columns)
    assert files(tmp_path / "fresh") == first
    with other_kind(request, app.config.database.url, tmp_path / "other") as other:
        other.import_archive(str(there))
        other.project()
        other.export(columns=columns)
        assert files(tmp_path / "other" / "archive") == first


def test_an_export_writes_what_is_new(app: KappaLog, there: Path) -> None:
    """Sealed segments stay; the open one moves into a longer one; nothing is left."""
    first = app.export()
    before = files(there)
    # On the day of the open segment: its events move into a longer one.
    app._clock.move(-60 * 17)  # type: ignore[attr-defined]  # noqa: SLF001
    fill(app, rounds=1, begin=3)

    planned = app.export(dry_run=True)
    assert files(there) == before
    second = app.export()

    manifest = app.archive().manifest
    assert (planned.events, planned.segments_written, planned.segments_kept) == (
        second.events,
        second.segments_written,
        second.segments_kept,
    )
    assert second.segments_kept >= first.segments_written - 1
    assert second.position == app.head().position == manifest.position
    assert set(files(there)) == {file.path for file in manifest.files} | {
        "manifest.json"
    }
    spans = [(s.first, s.last) for s in manifest.segments]
    assert [first for first, _ in spans] == [1, *(last + 1 for _, last in spans[:-1])]
    assert max(last - first + 1 for first, last in spans) == SEGMENT
    for segment in manifest.segments:
        dates = {
            event.recorded_at.date().isoformat()
            for event in app.events(
                after=segment.first - 1, before=segment.last + 1, limit=100
            )
        }
        assert dates == {segment.date}
    assert all(segment.sealed for segment in manifest.segments[:-1])
    assert app.verify_archive().findings == []
    app.export(str(there.with_name("fresh")))
    assert files(there.with_name("fresh")) == files(there)


def test_segments_have_the_columns_of_the_log(app: KappaLog) -> None:
    """Names and values are those of events, payloads as they were received."""
    app.export()

    archive = app.archive()
    table = archive.events().to_table()
    kept = app.events(limit=1000, oldest_first=True)
    assert table.schema.equals(layout.EVENTS)
    for name, column in (
        *(("position", "position"), ("payload", "payload_text"), ("raw", "raw")),
        *(("key", "key"), ("timestamp", "timestamp"), ("entity_id", "entity_id")),
        *(("event_time", "event_time"), ("recorded_at", "recorded_at")),
        *(("event_type", "event_type"), ("checksum", "checksum")),
    ):
        values = table.column(name).to_pylist()
        assert values == [getattr(event, column) for event in kept], name
    found = pq.ParquetFile(archive.paths("events")[0]).metadata.row_group(0)
    described = {
        found.column(n).path_in_schema: found.column(n)
        for n in range(found.num_columns)
    }
    for name in ("position", "topic", "entity_id", "event_time", "recorded_at"):
        assert described[name].is_stats_set, name
    assert described["payload"].compression == "ZSTD"
    assert archive.table("failures").num_rows == app.count_failures()
    assert archive.table("duplicates").num_rows == len(app.duplicates())
    assert archive.table("checkpoints").num_rows == len(app.checkpoints())
    assert archive.rows("everything") is None


def test_row_groups_end_where_their_events_say(
    app: KappaLog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By number or by contents, however many rows are read at a time."""
    monkeypatch.setattr(layout, "ROW_GROUP", 4)
    monkeypatch.setattr(writing, "PAGE", 2)
    app.export()

    path = app.archive().paths("events")[0]
    found = pq.ParquetFile(path)
    rows = [found.metadata.row_group(n).num_rows for n in range(found.num_row_groups)]
    assert rows == [4, SEGMENT - 4]
    assert app.verify_archive().findings == []
    monkeypatch.setattr(layout, "ROW_GROUP_BYTES", 1)
    app.export(str(tmp_path / "small"))
    small = app.archive(str(tmp_path / "small")).paths("events")[0]
    assert pq.ParquetFile(small).num_row_groups == 4


def test_rows_of_live_builds_lie_beside_the_events(app: KappaLog) -> None:
    """With the types of their columns, at the position they are at."""
    app.project()
    app.export()

    table = app.archive().rows("everything")
    assert table is not None
    plain = [{**row, "money": str(row["money"])} for row in app.rows("everything")]
    found = table.drop_columns(["_position"]).to_pylist()
    for row in found:
        row["seen_by"] = json.loads(row["seen_by"])
    assert found == plain
    (rows, _) = sorted(app.archive().manifest.projections, key=lambda r: -len(r.path))
    assert (
        rows.path
        == f"projections/everything/build=1/{app.head().position:012d}.parquet"
    )


def test_an_erasure_makes_the_segments_anew(app: KappaLog, there: Path) -> None:
    """What was erased is in no file any more, and the chain still holds."""
    app.export()
    text = app.event(1).payload_text
    erase(app, 1)

    app.export()

    assert app.verify_archive().findings == []
    payloads = app.archive().events().to_table().column("payload").to_pylist()
    assert payloads[0] is None
    assert text not in payloads
    assert len(list(there.glob("events/*/*.parquet"))) == len(
        app.archive().manifest.segments
    )


# --- typed columns ------------------------------------------------------------------


def test_payload_fields_become_typed_columns(app: KappaLog) -> None:
    """What is not of the type is NULL and counted; the columns stay once named."""
    report = app.export(
        columns=["orders.n:int", "orders.x:decimal", "orders.nested.y:int"]
    )

    table = app.archive().events().to_table()
    events = app.events(limit=1000, oldest_first=True)
    numbers = [
        (event.payload or {}).get("n") if event.topic == "orders" else None
        for event in events
    ]
    wanted = [None if n is None or n > 2**63 else n for n in numbers]
    assert table.column("orders.n").to_pylist() == wanted
    assert "1.50" in table.column("orders.x").to_pylist()
    assert report.nulls == {"orders.n": 6, "orders.nested.y": 6}
    assert app.export().segments_written == 0
    assert app.archive().schema.field("orders.x").metadata == {
        b"kappa_log.kind": b"decimal"
    }
    fewer = app.export(no_columns=True)
    assert (fewer.segments_kept, app.archive().schema) == (0, layout.EVENTS)


# --- damage ---------------------------------------------------------------------------


def test_a_flipped_byte_in_any_file_is_named(app: KappaLog, there: Path) -> None:
    """By its path, whatever else is whole; a file that is gone, too."""
    app.project()
    app.export()
    whole = files(there)
    assert app.verify_archive().ok

    for path, data in whole.items():
        for place in {0, len(data) // 2, len(data) - 1}:
            broken = bytearray(data)
            broken[place] ^= 1
            (there / path).write_bytes(broken)
            found = app.verify_archive().findings
            assert {finding.what for finding in found} == {path}, (path, place)
        if path != "manifest.json":
            (there / path).unlink()
            assert {f.what for f in app.verify_archive().findings} == {path}
        (there / path).write_bytes(data)
    assert app.verify_archive().ok


def test_a_damaged_archive_is_not_imported(
    app: KappaLog, there: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The file is named, and the empty log is as empty as before."""
    app.export()
    whole = files(there)
    with other_kind(request, app.config.database.url, tmp_path / "other") as other:
        before = contents(other)
        for path, data in whole.items():
            if path == "manifest.json":
                continue
            broken = bytearray(data)
            broken[len(data) // 2] ^= 1
            (there / path).write_bytes(broken)
            with pytest.raises(errors.ArchiveDamaged, match=path):
                other.import_archive(str(there))
            (there / path).write_bytes(data)
        assert contents(other) == before
        other.import_archive(str(there))
        assert contents(other) == contents(app)
        with pytest.raises(errors.UsageError, match="is not empty"):
            other.import_archive(str(there))


def test_events_that_do_not_hash_to_the_heads_are_found(
    app: KappaLog, there: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also by a file whose own hash somebody has put into the manifest."""
    app.export()
    segment = app.archive().manifest.segments[1]
    _forge(there, segment.path, "payload", 2, "{}")

    (finding,) = app.verify_archive().findings
    assert (finding.what, finding.position) == (segment.path, segment.first)
    with (
        other_kind(request, app.config.database.url, tmp_path / "other") as other,
        pytest.raises(errors.ArchiveDamaged, match="do not hash"),
    ):
        other.import_archive(str(there))


def test_a_file_is_hashed_as_sha256sum_does_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that people can prove a file without us."""
    monkeypatch.setattr(store, "CHUNK", 4)
    data = bytes(range(42))
    found = store.Store("archive", tmp_path)
    for size in (1, 3, 4, 9, 42):
        with found.writing() as sink:
            for start in range(0, len(data), size):
                sink.write(data[start : start + size])
            file = sink.done("file", rows=0)
        found.check(file)
        assert file.sha256 == sha256(data).hexdigest()
        for place in (0, 17, 41):
            broken = bytearray(data)
            broken[place] ^= 1
            (tmp_path / "archive" / "file").write_bytes(broken)
            with pytest.raises(errors.ArchiveDamaged, match="hash differs"):
                found.check(file)


def test_an_export_of_a_damaged_log_leaves_the_archive_as_it_was(
    app: KappaLog, there: Path
) -> None:
    """The chain is recomputed on the way out."""
    app.export()
    before = files(there)
    fill(app, rounds=1, begin=3)
    last = app.head().position
    execute(
        app,
        "UPDATE kappa_log_events SET payload = '{}' WHERE position = :p",
        p=last,
    )

    with pytest.raises(errors.VerificationError, match="kappa-log verify"):
        app.export()

    kept = files(there)
    assert {path: kept[path] for path in before} == before
    assert app.verify_archive().findings == []


def _erased_and_forged(there: Path, manifest: Manifest) -> None:
    """Put another payload beside the true one's hash, which the chain goes by."""
    path = manifest.segments[0].path
    payload = pq.read_table(there / path, partitioning=None)["payload"][0].as_py()
    _forge(there, path, "payload_digest", 0, chain.payload_digest(payload.encode()))
    _forge(there, path, "payload", 0, "{}")


_WHOLE = "kappa-log export writes this file anew"

# What is done to the archive → the file that is named, and what is said of it. Of
# tables a column, a row and a value are given; None takes the row away.
PLANTED: list[tuple[str, Any, str, str]] = [
    ("checkpoints", ("head", 0, bytes(32)), "checkpoints", "head as 0000"),
    ("checkpoints", ("head", -1, b"\1" * 32), "checkpoints", "the events come to"),
    ("checkpoints", ("to_offset", 0, 99), "checkpoints", "not at 99, where the one"),
    ("checkpoints", ("failed", 0, 0), "failures", "account for"),
    ("checkpoints", ("skipped", 0, 99), "checkpoints", "accounts for"),
    ("checkpoints", ("first_position", 1, 1), "checkpoints", "but has positions 1"),
    ("checkpoints", ("topic", 2, "rods"), "checkpoints", "its last event is offset"),
    ("checkpoints", ("source_id", 2, 77), "manifest.json", "no source 77"),
    ("checkpoints", None, "checkpoints", "by no checkpoint, or by two"),
    ("offsets", ("next_offset", 0, 5), "offsets", "its checkpoints end at"),
    ("offsets", None, "offsets", "is gone, its checkpoints end at"),
    ("duplicates", ("repeats", 0, 10**6), "duplicates", "repeat .* is not there"),
    ("duplicates", None, "duplicates", "account for"),
    ("failures", ("offset", 0, 10**6), "failures", "up to offset 1000000, but was"),
    ("failures", ("partition", 0, 9), "failures", "partition 9 .* has 1 failures"),
    ("failures", None, "failures", "account for"),
    ("rows", ("_position", 0, 10**6), "projections", "made by the event at"),
    ("manifest", {"recorded_at": 2**50}, "manifest.json", "last event was recorded"),
    ("segment", {"lanes": [["rides", "kappa-log"]]}, "manifest.json", "pass over"),
    ("segment", {"date": "2024-02-30"}, "manifest.json", "pass over"),
    ("segment", {"rows": 6}, "manifest.json", "pass over"),
    ("projection", {"position": 10**6}, "manifest.json", "past the end"),
    ("projection", {"rows": 10**6}, "projections", "the manifest says 1,000,000"),
    ("code", _erased_and_forged, "events", "marked as erased but has contents"),
]


def test_what_disagrees_with_the_events_is_named(app: KappaLog, there: Path) -> None:
    """Also where the file's own hash was put into the manifest; and what to do."""
    app.project()
    app.export()
    whole, manifest = files(there), app.archive().manifest
    ledger = {name: file.path for name, file in manifest.ledger.items()}
    ledger["rows"] = manifest.projections[0].path
    report = app.verify_archive()
    assert (report.findings, report.checkpoints) == ([], len(app.checkpoints()))
    assert "not made anew from the events" in report.limits[0]

    for where, change, what, said in PLANTED:
        match where:
            case "manifest":
                _rewrite(there, lambda m, facts=change: m.update(facts))
            case "segment":
                _rewrite(there, lambda m, facts=change: m["segments"][0].update(facts))
            case "projection":
                _rewrite(
                    there, lambda m, facts=change: m["projections"][0].update(facts)
                )
            case "code":
                change(there, manifest)
            case _:
                _forge(there, ledger[where], *(change or ()))
        found = app.verify_archive().findings
        named = [f for f in found if f.what.startswith(what)]
        assert any(re.search(said, f.message) for f in named), (where, change, found)
        advice = ("export anew", "export writes it anew", _WHOLE)
        assert all(any(a in f.message for a in advice) for f in found), found
        for path, data in whole.items():
            (there / path).write_bytes(data)
    assert app.verify_archive().ok


def test_a_ledger_that_is_not_what_was_written_is_the_only_finding(
    app: KappaLog, there: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Columns that are not there are damage, not an error; nor are they imported."""
    app.export()
    path = app.archive().manifest.ledger["checkpoints"].path
    table = pq.read_table(there / path)
    place = table.column_names.index("failed")
    texts = pa.array(["0"] * table.num_rows)
    for column, changed in (
        ("failed", table.set_column(place, "failed", texts)),
        ("head", table.drop_columns(["head"])),
    ):
        _put(there, path, changed)

        (finding,) = app.verify_archive().findings

        said = f"no column '{column}'" in finding.message
        assert (finding.what, said) == (path, True)
    with (
        other_kind(request, app.config.database.url, tmp_path / "other") as other,
        pytest.raises(errors.ArchiveDamaged, match="no column 'head'"),
    ):
        other.import_archive(str(there))
    app.export()
    assert app.verify_archive().ok
    _rewrite(there, lambda m: m["ledger"].pop("failures"))
    (finding,) = app.verify_archive().findings
    assert finding.what == "manifest.json"


def _forge(
    there: Path, path: str, column: str = "", row: int = 0, value: Any = None
) -> None:
    """Change a value in a file, or take a row away, and put its hash where it goes."""
    table = pq.read_table(there / path, partitioning=None)
    rows = table.to_pylist()
    if column:
        rows[row][column] = value
    else:
        del rows[row]
    _put(there, path, pa.Table.from_pylist(rows, table.schema))


def _put(there: Path, path: str, table: pa.Table) -> None:
    """Write a file and say in the manifest that this is what was written."""
    pq.write_table(table, there / path)
    data = (there / path).read_bytes()
    digest = sha256(data).hexdigest()
    facts = {"rows": table.num_rows, "bytes": len(data), "sha256": digest}

    def change(manifest: dict[str, Any]) -> None:
        ledger = manifest["ledger"].values()
        for file in (*manifest["segments"], *ledger, *manifest["projections"]):
            if file["path"] == path:
                file.update(facts)

    _rewrite(there, change)


def _rewrite(there: Path, change: Any) -> None:
    """Change a manifest and give it the hash that goes with it."""
    path = there / "manifest.json"
    found = json.loads(path.read_bytes())
    change(found)
    found["sha256"] = ""
    plain = json.dumps(found).encode()
    decoded = msgspec.json.decode(plain, type=Manifest)
    path.write_bytes(to_bytes(decoded))


# --- whose archive it is --------------------------------------------------------------


def test_the_archive_of_another_log_is_left_alone(
    app: KappaLog, there: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By the chain's head at its end; a log that lost events is another, too."""
    app.export()
    before = files(there)
    with other_kind(request, app.config.database.url, tmp_path / "other") as other:
        fill(other, rounds=1)
        with pytest.raises(errors.ArchiveDiverged, match="restored from an older"):
            other.export(str(there))
        fill(other, rounds=1, begin=7)
        fill(other, rounds=2, begin=8)
        with pytest.raises(errors.ArchiveDiverged, match="of another log"):
            other.export(str(there))
        (finding,) = other.verify_archive(str(there)).findings
        assert finding.what == "log"
        with pytest.raises(errors.ArchiveDiverged):
            other.export(str(there), dry_run=True)
    assert files(there) == before


def test_an_empty_log_has_an_archive_too(
    database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Nothing is something to begin with."""
    with open_full(database_url, tmp_path) as app:
        app.export()
        assert app.archive().events().count_rows() == 0
        assert app.verify_archive().findings == []
        with other_kind(request, database_url, tmp_path / "other") as other:
            other.import_archive(str(tmp_path / "archive"))
            assert contents(other) == contents(app)
        fill(app, rounds=1)
        app.export()
        assert app.archive().events().count_rows() == app.head().position


def test_other_peoples_files_stay(app: KappaLog, there: Path) -> None:
    """An export deletes what an export made and nothing else."""
    mine = ["notes.txt", "events/readme.md", "failures/mine.parquet", ".kappa_log-x"]
    ours = [
        ".kappa_log-1.tmp",
        f"events/date=2024-01-01/{1:012d}-{3:012d}.parquet",
        f"failures/{'a' * 32}.parquet",
        f"projections/everything/build=7/{9:012d}.parquet",
    ]
    for path in [*mine, *ours]:
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        (there / path).write_bytes(b"x")

    assert app.export().deleted == len(ours)

    assert set(mine) <= set(files(there))
    assert not set(ours) & set(files(there))


def test_a_sealed_segment_that_is_gone_is_made_again(
    app: KappaLog, there: Path
) -> None:
    """An export mends what it can see is missing, if the log is what it was."""
    app.export()
    before = files(there)
    shutil.rmtree(there / "events")

    app.export()

    assert files(there) == before
    # The segments behind it are kept: the end of the chain would not tell.
    execute(app, "UPDATE kappa_log_events SET payload = '{}' WHERE position = 1")
    first = app.archive().manifest.segments[0].path
    (there / first).unlink()
    with pytest.raises(errors.VerificationError, match="1 to 7 do not hash to"):
        app.export()
    assert files(there) == {p: d for p, d in before.items() if p != first}


def test_a_newer_layout_is_left_alone(app: KappaLog, there: Path) -> None:
    """A later version knows things that this one would lose."""
    app.export()
    path = there / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))

    for act in (app.export, app.verify_archive, app.import_archive):
        with pytest.raises(errors.ArchiveNewer, match="has layout 2"):
            act()


def test_a_manifest_is_read_as_it_was_written(app: KappaLog, there: Path) -> None:
    """Whatever was changed in it by hand is noticed."""
    app.export()
    data = (there / "manifest.json").read_bytes()
    assert to_bytes(from_bytes(data, "x")) == data

    for broken in (
        b"",
        b"{}",
        b"[1]",
        b"\xff",
        data[:-5],
        data.replace(b": 1,", b":1,"),
    ):
        (there / "manifest.json").write_bytes(broken)
        with pytest.raises(errors.ArchiveDamaged, match=r"manifest\.json"):
            app.export()
        (finding,) = app.verify_archive().findings
        assert finding.what == "manifest.json"
