"""The archive from the command line: what is printed, how it ends; and on S3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem

from kappa_log import KappaLog
from kappa_log.archive.reader import Archive
from kappa_log.cli import run
from kappa_log.errors import ArchiveDamaged, UsageError
from support.archives import files
from support.typed import enter_project

BIKES = """
import msgspec
from kappa_log import Event, projection


class Ride(msgspec.Struct):
    bike: str
    km: float
    n: int


@projection(topics=["rides"], version=1, payload=Ride)
def bikes(state: float | None, event: Event) -> float:
    return (state or 0.0) + event.payload.km


@projection(topics=["rides"], version=1)
def plain(state: int | None, event: Event) -> int:
    return (state or 0) + 1
"""

Type = Callable[..., Any]


@pytest.fixture
def typed(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Return a function that types a command in a folder with a small log.

    It returns what was printed, as JSON if that was asked for, or the error.
    """
    enter_project(monkeypatch, tmp_path, database_url, {"bikes": BIKES})

    def type_(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        ended = run(list(arguments))
        said = capsys.readouterr()
        assert ended == code, said.out + said.err
        assert "Traceback" not in said.err
        if "--json" in arguments and not said.err.startswith("Error"):
            return json.loads(said.out)
        return said.out if code == 0 else said.out + said.err

    type_("db", "create")
    ride(tmp_path, 40)
    type_("ingest", "rides.jsonl", "--topic=rides", "--entity-id=bike")
    return type_


def ride(folder: Path, upto: int) -> None:
    """Write the first rides to a file of lines."""
    lines = [
        json.dumps({"bike": f"b{n % 5}", "km": n / 2, "n": n}) for n in range(upto)
    ]
    (folder / "rides.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def other_url(request: pytest.FixtureRequest, database_url: str) -> str:
    """URL of an empty database of the other kind."""
    is_sqlite = database_url.startswith("sqlite")
    name = "postgresql_url" if is_sqlite else "sqlite_url"
    return str(request.getfixturevalue(name))


def test_the_archive_goes_round(typed: Type, tmp_path: Path, other_url: str) -> None:
    """Export, verify, replay from it, import into another database, verify there."""
    typed("project")
    planned = typed("export", "--dry-run", "--json")
    assert (planned["events"], (tmp_path / "archive").exists()) == (40, False)
    done = typed("export", "--json")
    ride(tmp_path, 60)
    typed("ingest", "rides.jsonl", "--topic=rides", "--entity-id=bike")

    proved = typed("verify", "--archive", "--json")
    replayed = typed("replay", "bikes", "--from", "archive", "--json")
    brought = typed("--url", other_url, "import", "--json")
    alone = typed("--url", other_url, "verify", "--archive", "archive")
    said = typed("export")

    assert (done["events"], done["projections"]) == (40, ["bikes", "plain"])
    assert (proved["ok"], proved["compared"], proved["events"]) == (True, True, 40)
    assert (replayed["events"], replayed["to_position"]) == (60, 60)
    assert (brought["position"], brought["head"]) == (40, done["head"])
    assert "compared     with the log" in alone
    assert "written      60 events in 1 segment" in said
    assert "verified" in typed("--url", other_url, "verify")


def test_an_archive_is_verified_without_a_log(
    typed: Type, other_url: str, tmp_path: Path
) -> None:
    """It is what is left when the database is gone; what was changed is named."""
    typed("export", "--to", "elsewhere")

    alone = typed("--url", other_url, "verify", "--archive", "elsewhere", "--json")
    assert (alone["ok"], alone["compared"]) == (True, False)
    assert "no log to compare with" in alone["limits"][0]
    (segment,) = (tmp_path / "elsewhere").glob("events/*/*.parquet")
    segment.write_bytes(segment.read_bytes()[:-9])
    said = typed("verify", "--archive", "elsewhere", code=4)
    assert "NOT VERIFIED" in said
    assert f"{segment.relative_to(tmp_path / 'elsewhere')}" in said
    assert "is not what was written" in typed(
        "--url", other_url, "import", "elsewhere", code=4
    )


def test_columns_are_declared_one_by_one_or_by_a_projection(
    typed: Type, tmp_path: Path
) -> None:
    """By their types' names here, in Arrow or in SQL; what is none is refused."""
    typed("export", "--columns", "rides.km:double", "--columns", "rides.n:int64")
    first = files(tmp_path / "archive")
    typed("export", "--no-columns")
    assert files(tmp_path / "archive") != first
    typed("export", "--columns-of", "bikes", "--columns", "rides.n:bigint")
    manifest = json.loads(files(tmp_path / "archive")["manifest.json"])
    assert [(c["name"], c["type"]) for c in manifest["columns"]] == [
        *(("rides.bike", "str"), ("rides.km", "float"), ("rides.n", "int"))
    ]

    said = typed("export", "--columns", "rides.n", code=2)
    assert "TOPIC.FIELD:TYPE" in said
    assert "topics are: rides" in said
    assert "did you mean rides?" in typed("export", "--columns=rids.n:int", code=2)
    assert "none of int" in typed("export", "--columns", "rides.n:number", code=2)
    assert "declares no payload=" in typed("export", "--columns-of=plain", code=2)
    assert "not registered" in typed("export", "--columns-of=nobody", code=2)
    twice = ("--columns-of=bikes", "--columns=rides.n:str")
    assert "declared" in typed("export", *twice, code=2)
    assert "no other columns" in typed("export", "--no-columns", *twice, code=2)


def test_a_column_of_a_field_that_no_event_has_is_told(
    typed: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped one is NULL throughout; by a plan, an export, and exports after it."""
    wrong = ("export", "--columns=rides.kmm:double", "--columns=rides.km:double")
    for command in ((*wrong, "--dry-run"), wrong, ("export",)):
        (absent,) = typed(*command, "--json")["absent"]
        assert (absent["column"], absent["events"], absent["near"]) == (
            *("rides.kmm", 40, "km"),
        )
    said = typed("export")
    assert "not found    rides.kmm" in said
    assert typed("export", "--columns=rides.km:double", "--json")["absent"] == []
    capsys.readouterr()
    assert run(list(wrong)) == 0
    assert "has a field 'kmm', so it is NULL there; did you mean km?" in (
        capsys.readouterr().err
    )


def test_a_damaged_archive_is_mended_with_its_columns(
    typed: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As what is said of it tells: the file deleted, or the manifest and the names."""
    typed("export", "--columns=rides.km:double")
    before = files(tmp_path / "archive")
    (segment,) = (tmp_path / "archive").glob("events/*/*.parquet")
    segment.write_bytes(segment.read_bytes()[:-1] + b"?")

    capsys.readouterr()
    assert run(["export"]) == 0
    assert "they were not proved anew: kappa-log verify --archive does it" in (
        capsys.readouterr().err
    )
    said = typed("verify", "--archive", code=4)
    assert "events       0 proved, of 40" in said
    assert "with the log by what the manifest says, which ends there" in said
    assert "delete this file, and kappa-log export writes it anew" in said
    replay = ("replay", "bikes", "--from=archive")
    segment.write_bytes(segment.read_bytes()[:-1])
    assert f"{segment.name}: it is not what was written: it has" in (
        typed(*replay, "--dry-run", code=4)
    )
    segment.unlink()
    for command in ((*replay, "--dry-run"), replay, ("verify", "--archive")):
        assert "it is missing. Put it back from a copy, or" in typed(*command, code=4)
    typed("export")
    assert files(tmp_path / "archive") == before
    _mend_manifest(typed, tmp_path / "archive" / "manifest.json")
    assert files(tmp_path / "archive") == before


def _mend_manifest(typed: Type, manifest: Path) -> None:
    """Break a manifest, and do what is said about it."""
    manifest.write_text(manifest.read_text().replace('"rows": 40', '"rows": 41'))
    said = typed("verify", "--archive", code=4)
    assert "export anew, with its columns: --columns rides.km:float" in said
    assert "compared  with nothing: its manifest cannot be read" in said
    assert "position" not in said
    manifest.write_text("{")
    said = typed("verify", "--archive", code=4)
    assert "if it had typed columns, name them again" in said
    manifest.unlink()
    (note,) = typed("export", "--dry-run", "--json")["notes"]
    assert "name them: --columns" in note
    typed("export", "--columns=rides.km:float")


def test_an_archive_is_held_against_the_log_and_a_head_kept_elsewhere(
    typed: Type, tmp_path: Path, other_url: str
) -> None:
    """How far it is behind is said; a head that is not in it is a finding."""
    first = typed("verify", "--json")["head"]
    ride(tmp_path, 50)
    typed("ingest", "rides.jsonl", "--topic=rides", "--entity-id=bike")
    end = typed("export", "--json")["head"]
    ride(tmp_path, 54)
    typed("ingest", "rides.jsonl", "--topic=rides", "--entity-id=bike")
    now = typed("verify", "--json")["head"]
    alone = ("--url", other_url, "verify", "--archive", "archive")

    assert "with the log, which has 4 events more" in typed("verify", "--archive")
    for head, position, limits in ((first, 40, 1), (end, 50, 0)):
        found = typed(*alone, "--head", head, "--json")
        assert (found["ok"], found["kept_head"]) == (True, position)
        assert len(found["limits"]) == limits
        said = typed("verify", "--archive", "--head", head)
        assert f"kept head    it is the one at position {position}" in said
    said = typed("verify", "--archive", "--head", now, code=4)
    assert "is the log's at position 54, past the end of the archive, 50" in said
    (finding,) = typed(*alone, "--head", now, "--json", code=4)["findings"]
    assert "is no head of this archive" in finding["message"]
    shutil.rmtree(tmp_path / "archive" / "checkpoints")
    said = typed("verify", "--archive", "--head", first, code=4)
    assert "was not met in what is whole of this archive" in said


def test_what_cannot_be_an_archive_is_said(
    typed: Type, tmp_path: Path, other_url: str
) -> None:
    """Each with its exit code, and nothing is left of it."""
    (tmp_path / "file").write_text("mine")
    assert "is a file" in typed("export", "--to", "file", code=2)
    assert "cannot be used" in typed("export", "--to", "file/below", code=69)
    assert "cannot be used" in typed("export", "--to", "/proc/nothing", code=69)
    assert "s3://BUCKET" in typed("export", "--to", "gopher://x/y", code=2)
    assert "no archive at nowhere" in typed("verify", "--archive", "nowhere", code=69)
    assert "no archive" in typed("--url", other_url, "import", "nowhere", code=69)
    assert "kappa-log export" in typed("replay", "bikes", "--from=archive", code=69)
    assert "no PROJECTION" in typed("verify", "--archive=x", "bikes", code=2)

    typed("export")
    before = files(tmp_path / "archive")
    assert "is not empty" in typed("import", code=2)
    typed("--url", other_url, "db", "create")
    assert "ends at 0" in typed("--url", other_url, "export", code=65)
    shutil.copy("rides.jsonl", "more.jsonl")
    for name in ("rides.jsonl", "more.jsonl"):
        typed(
            *("--url", other_url, "ingest", name, "--topic=rides"),
            *("--dedupe=offset", "--entity-id=bike"),
        )
    said = typed("--url", other_url, "replay", "bikes", "--from=archive", code=65)
    assert "another log" in said
    manifest = tmp_path / "archive" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    assert "has layout 9" in typed("export", code=78)
    manifest.write_text("{")
    assert "manifest.json" in typed("export", code=4)
    manifest.write_bytes(before["manifest.json"])
    assert files(tmp_path / "archive") == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mistyped_address_is_told_from_an_archive_that_is_gone(
    typed: Type, tmp_path: Path, other_url: str
) -> None:
    """What is there, what state is left and what to type is said; nothing is made."""
    (tmp_path / "hollow").mkdir()
    (tmp_path / "file").write_text("mine")
    typed("export")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "an application"}')
    before = sorted(tmp_path.rglob("*"))

    for url, said, code in (
        ("hollow", "hollow is empty", 69),
        ("nowhere", "there is no folder /", 69),
        ("archive/events", "is a part of the archive /", 69),
        (".", "has no manifest.json, but /", 69),
        ("s3:/bucket", "Write s3://bucket, or ./s3:/bucket for a folder", 2),
        ("s3//b/x", "Write s3://b/x,", 2),
        ("", "address is empty", 2),
        ("file", "that its manifest.json is in", 2),
        ("~no-user/x", "whose home folder that is", 2),
        ("web", "Name another folder; it was left as it is", 4),
    ):
        told = [typed("verify", "--archive", url, code=code)]
        told.append(typed("--url", other_url, "import", url, code=code))
        if code != 69:
            told.append(typed("export", "--to", url, code=code))
        assert all(said in one for one in told), (told, said)
        assert all("Nothing was" in one for one in told[1:2]), told
    # In another one it would be taken for a part of that.
    (tmp_path / "link").symlink_to("archive/events")
    for inside, more in (("archive/events", "--dry-run"), ("link/c", "--json")):
        said = typed("export", "--to", inside, more, code=2)
        assert f"{inside} lies in the archive {tmp_path / 'archive'};" in said
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    (note,) = typed("export", "--to=projections", "--json")["notes"]
    assert note == (
        "projections is a folder with other files, 1 of them, for instance bikes.py; "
        "they are left as they are"
    )
    assert typed("export", "--to=projections", "--json")["notes"] == []


def test_an_archive_may_lie_at_home(
    typed: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands ~ in a configuration, nor behind a =."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    typed("export", "--to=~/kept")

    assert (tmp_path / "home" / "kept" / "manifest.json").exists()
    assert not (tmp_path / "~").exists()


def test_a_plan_says_from_where_events_are_read(
    typed: Type, tmp_path: Path, other_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at the archive, and refuses it as the replay itself would."""
    plan = ("replay", "bikes", "--from=archive", "--dry-run")
    assert "kappa-log export" in typed(*plan, code=69)
    typed("export")
    monkeypatch.setenv("COLUMNS", "80")

    assert "  all is read from the archive at archive\n" in typed(*plan)
    ride(tmp_path, 60)
    typed("ingest", "rides.jsonl", "--topic=rides", "--entity-id=bike")
    said = typed(*plan)
    assert "positions from 41 on are read from the database" in said
    assert max(map(len, said.splitlines())) <= 80
    found = typed(*plan, "--json")
    assert (found["archive"], found["archive_end"], found["head"]) == (
        *("archive", 40, 60),
    )
    plain = typed("replay", "bikes", "--dry-run", "--json")
    assert (plain["archive"], plain["archive_end"]) == (None, None)
    # Past the head nothing is read, so nothing is asked of the archive.
    (tmp_path / "archive").rename(tmp_path / "away")
    typed("project")
    past = ("--from-position=61", "--from=archive")
    assert "nothing to do" in typed("replay", "bikes", *past, "--dry-run")
    assert "nothing to do" in typed("replay", "bikes", *past)
    (tmp_path / "away").rename(tmp_path / "archive")

    typed("--url", other_url, "db", "create")
    assert "was it restored" in typed("--url", other_url, *plan, code=65)
    typed(
        *("--url", other_url, "ingest", "rides.jsonl", "--topic=rides"),
        *("--dedupe=offset", "--entity-id=n"),
    )
    assert "of another log" in typed("--url", other_url, *plan, code=65)


# --- S3 ----------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a folder in an S3 of this process."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        url = (
            f"s3://bucket/logs/mine?scheme=http&endpoint_override=127.0.0.1:{port}"
            "&region=us-east-1&allow_bucket_creation=true"
        )
        FileSystem.from_uri(url)[0].create_dir("bucket")
        yield url
    finally:
        server.stop()


def test_the_archive_may_be_in_an_object_store(
    bucket: str, sqlite_url: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same files as on a disk, read and written the same way."""
    from support.archives import (
        by_topic,
        contents,
        everything,
        fill,
        open_full,
        states,
    )

    with open_full(sqlite_url, tmp_path) as app:
        fill(app, rounds=1)
        app.project()
        with pytest.raises(Exception, match="no archive"):
            app.archive(bucket)
        app.export(bucket)
        fill(app, rounds=1, begin=1)
        app.project()
        app.export(bucket)
        app.export()
        archive = app.archive(bucket)
        system = archive.store.files
        there = {
            path: system.open_input_stream(path).read()
            for path in archive.store.sizes()
        }
        assert there == files(tmp_path / "archive")
        assert app.verify_archive(bucket).findings == []
        assert archive.events().count_rows() == app.head().position
        rows = states(app, [everything, by_topic])

        app.config.archive.__dict__["url"] = bucket
        app.replay("everything", source="archive")
        assert states(app, [everything, by_topic]) == rows
        with open_full(
            request.getfixturevalue("postgresql_url"), tmp_path / "archive"
        ) as other:
            other.import_archive(bucket)
            assert contents(other) == contents(app)
        _damage(app, bucket, archive)


def _damage(app: KappaLog, bucket: str, archive: Archive) -> None:
    """See that what is wrong with an archive in an object store is found there, too."""
    path, system = archive.manifest.segments[1].path, archive.store.files
    with pytest.raises(UsageError, match="lies in the archive bucket/logs/mine"):
        app.export(bucket.replace("mine", "mine/events"))
    assert app.verify_archive(bucket, head=archive.manifest.head).ok
    data = system.open_input_stream(path).read()
    with system.open_output_stream(path) as out:
        out.write(data[:-1] + b"!")
    (finding,) = app.verify_archive(bucket).findings
    assert finding.what == path
    system.delete_file(path)
    with pytest.raises(ArchiveDamaged, match=f"{path}: it is missing"):
        app.plan_replay("everything", source="archive")
