"""CDNOW, real data with known sums, through the command line on both databases."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kappa_log.app import KappaLog
from kappa_log.cli import run
from kappa_log.config import load_config

pytestmark = pytest.mark.usefixtures("uncovered")

FIELDS = ("--entity-id=customer_id", "--event-time=time", "--event-type=type")
BOTH = ("customer_totals", "customer_totals_sql")
SINCE = ("--since", "1998-01-01", "--by", "event-time")

Type = Callable[..., list[Any]]


@pytest.fixture
def kappa_log(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Return a function that types a command in a fresh folder and reads its JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAPPA_LOG__DATABASE__URL", database_url)

    def type_(*arguments: str, code: int = 0) -> list[Any]:
        capsys.readouterr()
        ended = run(list(arguments))
        said = capsys.readouterr()
        assert ended == code, said.err
        if "--json" not in arguments:
            return [said.out, said.err]
        return [json.loads(line) for line in said.out.splitlines()]

    assert type_("init")
    assert type_("db", "create")
    return type_


def test_cdnow_ends_in_the_known_sums(kappa_log: Type, cdnow: Path) -> None:
    """The whole path on real data: file, log, replay, rows; and once is once."""
    topic = ("--topic", "cdnow", *FIELDS, "--json")
    (first,) = kappa_log("ingest", str(cdnow), *topic)
    (again,) = kappa_log("ingest", str(cdnow), *topic)

    (report,) = kappa_log("replay", "customer_totals", "--json")
    rows = kappa_log("projections", "rows", "customer_totals", "--json")

    assert first["counts"]["acked"] == 69_659
    assert (
        again["lines"] == again["counts"]["acked"] == again["counts"]["duplicate"] == 0
    )
    assert (report["events"], report["keys"], report["promoted"]) == (
        69_659,
        23_570,
        True,
    )
    assert report["build"] == 1
    assert report["to_position"] == 69_659
    by_customer = {row["entity_id"]: row for row in rows}
    assert len(rows) == 23_570
    assert sum(row["cds"] for row in rows) == 167_881
    assert round(sum(row["amount"] for row in rows), 2) == 2_500_315.63
    assert round(by_customer["07592"]["amount"], 2) == 13_990.93
    assert by_customer["14048"]["orders"] == 217


def test_the_same_columns_by_sql_are_the_same_rows(
    kappa_log: Type, cdnow: Path, tmp_path: Path
) -> None:
    """Live over several batches, and replayed from the database and the archive."""
    with gzip.open(cdnow, "rt") as lines:
        some = list(itertools.islice(lines, 5_000))
    for upto in (3_000, 5_000):
        (tmp_path / "some.jsonl").write_text("".join(some[:upto]))
        kappa_log("ingest", "some.jsonl", "--topic", "cdnow", *FIELDS)
        kappa_log("project", *BOTH)
    kappa_log("export")

    for how in ((), ("--from", "sql"), ("--from", "archive")):
        if how:
            (done,) = kappa_log("replay", BOTH[1], *how, "--json")
            assert (done["changed"], done["promoted"]) == (0, True), how
        wanted, found = (
            kappa_log("projections", "rows", name, "--json") for name in BOTH
        )
        assert len(wanted) == len(found) == 4_561
        for by_python, by_sql in zip(wanted, found, strict=True):
            amount = pytest.approx(by_python.pop("amount"), rel=1e-9)
            assert by_sql == by_python | {"amount": amount}, how

    kappa_log("verify", *BOTH)


def test_a_replay_since_1998_folds_the_touched_customers_alone(
    kappa_log: Type, cdnow: Path, tmp_path: Path
) -> None:
    """A changed fold reaches those who bought since, and nobody else."""
    kappa_log("ingest", str(cdnow), "--topic", "cdnow", *FIELDS)
    kappa_log("replay", "customer_totals")
    before = kappa_log("projections", "rows", "customer_totals", "--json")

    (same,) = kappa_log("replay", "customer_totals", *SINCE, "--json")
    file = tmp_path / "projections" / "customer_totals.py"
    text = file.read_text()
    file.write_text(
        text.replace("version=1", "version=2").replace("+ 1,", "+ 1_000_000,")
    )
    (changed,) = kappa_log("replay", "customer_totals", *SINCE, "--json")
    after = kappa_log("projections", "rows", "customer_totals", "--json")

    assert same["keys"] == changed["keys"] == 5_374
    assert (same["added"], same["removed"], same["changed"]) == (0, 0, 0)
    assert (changed["added"], changed["removed"], changed["changed"]) == (0, 0, 5_374)
    assert changed["from_position"] == 56_903
    old = {row["entity_id"]: row for row in before}
    touched = [row for row in after if row != old[row["entity_id"]]]
    assert len(touched) == 5_374
    assert all(row["orders"] % 1_000_000 == 0 for row in touched)


def test_what_was_bought_since_1998_is_what_the_data_says(
    kappa_log: Type, cdnow: Path
) -> None:
    """The events past the start are the 12,757 purchases of 1998."""
    kappa_log("ingest", str(cdnow), "--topic", "cdnow", *FIELDS)

    with KappaLog(config=load_config()) as log:
        events = log.events(after=56_902, limit=100_000, oldest_first=True)

    assert len(events) == 12_757
    assert round(sum(event.payload["amount"] for event in events), 2) == 476_154.37
    assert len({event.entity_id for event in events}) == 5_374


def test_verify_proves_the_log_and_the_view(kappa_log: Type, cdnow: Path) -> None:
    """A head kept elsewhere is found again, and the view equals a fresh fold."""
    kappa_log("ingest", str(cdnow), "--topic", "cdnow", *FIELDS)
    kappa_log("project", "customer_totals")

    (found,) = kappa_log("verify", "customer_totals", "--json")
    (kept,) = kappa_log("verify", "--head", found["head"], "--json")
    (other,) = kappa_log("verify", "--head", "00" * 31 + "01", "--json", code=4)

    assert found["ok"]
    assert kept["ok"]
    assert kept["limits"] == []
    assert not other["ok"]
