"""import-phobos as people type it: what they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kappa_log.cli import output, run
from support.phobos import Old


@pytest.fixture
def old(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Old:
    """Give an old file with an odd row, in the folder of a log."""
    monkeypatch.chdir(tmp_path)
    made = Old(sqlite_url, tmp_path)
    made.event('{"id":1}')
    made.put("events", made.row(None) | {"payload": b"\xff"})
    made.event('{"id":3}', event_time="soon")
    made.close()
    assert run(["db", "create"]) == 0
    return made


def test_odd_rows_are_told_before_and_after(
    old: Old, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rehearsal says what the import will do with them."""
    capsys.readouterr()
    codes = (
        run(["import-phobos", old.url, "--dry-run"]),
        run(["import-phobos", old.url]),
    )

    assert codes == (0, 3)
    out = capsys.readouterr().out
    assert (
        out.count("  1 payload is no UTF-8, kept byte for byte as raw: rows 2\n") == 2
    )
    assert (
        "  1 row cannot be an event here, and would become a failure: rows 3\n" in out
    )
    assert "  1 row cannot be an event here, and became a failure: rows 3\n" in out


def test_who_interrupts_is_told_what_is_kept(
    old: Old, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with no traceback."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output.Meter, "update", interrupted)

    assert run(["import-phobos", old.url]) == 130

    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1] == (
        "Interrupted; 3 of its rows are in the log, and the same command goes on after "
        "them."
    )
