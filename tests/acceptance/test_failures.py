"""failures and events retry as a person types them: what they print, how they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.poison import Poisoned
from support.typed import Type, Typed, typist


@pytest.fixture
def world(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Poisoned]:
    """Give three failures, two of one error, and one record that waits."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    with Poisoned(database_url, tmp_path) as found:
        found.read(
            ("ada", {"do": "raise", "n": 1}),
            ("ada", {"n": 2}),
            ("bob", b"{bad"),
            (None, {"do": "raise", "n": 4}),
            (None, {"n": 5}),
        )
        yield found


@pytest.fixture
def typed(world: Poisoned, capsys: pytest.CaptureFixture[str]) -> Type:
    """Type commands in the folder of the log."""
    plainly = typist(capsys)

    def type_(*arguments: str, code: int = 0) -> Typed:
        assert Path.cwd() == world.folder
        said = plainly(*arguments, code=code)
        assert not [line for line in said.err.splitlines() if len(line) > 80]
        return said

    return type_


def test_failures_are_listed_newest_first(typed: Type) -> None:
    """With what went wrong, and what to do next, in the width of a terminal."""
    said = typed("failures", "list")

    rows = said.out.splitlines()
    assert all(len(row) <= 80 for row in rows), said.out
    assert [row.split()[0] for row in rows if row.strip()[:1].isdigit()] == [
        "4", "3", "2", "1",
    ]  # fmt: skip
    assert "waits behind a failure" in said.out
    assert "kappa-log failures show 4" in said.err
    assert "kappa-log failures retry 4" in said.err
    found = typed("failures", "list", "--json", "--limit", "2").json
    assert [row["id"] for row in found] == [4, 3]
    assert found[0]["error_class"] == "ValueError"


def test_one_failure_is_shown_whole(typed: Type) -> None:
    """Its record and the steps of its error; one that is not there is said so.

    SEED F8.
    """
    said = typed("failures", "show", "1").out

    assert "ValueError: no such order" in said
    assert '{"do": "raise", "n": 1}' in said
    assert "Traceback (most recent call last)" in said
    (found,) = typed("failures", "show", "1", "--json").json
    assert (found["offset"], found["attempts"], found["parked"]) == (0, 1, False)
    assert "failure 99 not found" in typed("failures", "show", "99", code=2).err


def test_groups_are_shown_with_the_way_to_retry_them(typed: Type) -> None:
    """A fingerprint is to be copied, so it is never cut."""
    said = typed("failures", "groups")
    groups = typed("failures", "groups", "--json").json

    assert [(g["count"], g["parked"]) for g in groups] == [(2, 1), (1, 0)]
    assert all(g["fingerprint"] in said.out for g in groups)
    assert f"failures retry --fingerprint {groups[0]['fingerprint']}" in said.err


def test_without_failures_each_list_says_so(typed: Type, world: Poisoned) -> None:
    """An empty table would leave one wondering."""
    typed("failures", "discard", "--all", "--reason", "old", "--yes")

    assert "There is no failure" in typed("failures", "list").err
    assert "There is no failure" in typed("failures", "groups").err
    assert typed("failures", "list", "--json").out == ""
    assert typed("failures", "groups", "--json").out == ""
    for chosen in (("--all",), ("--topic", "ordres"), ("--fingerprint", "xyz")):
        assert typed("failures", "retry", *chosen).out == "nothing to retry\n"
        said = typed("failures", "discard", *chosen, "--reason", "old")
        assert said.out == "nothing to discard\n"
    world.check()


def test_a_retry_tells_what_came_of_it(typed: Type, world: Poisoned) -> None:
    """SEED F19: it ends with 3 while something fails, and with 0 when nothing does."""
    said = typed("failures", "retry", "--all", code=3)
    assert "kept 0   skipped 0   duplicate 0   failed again 3" in said.out
    assert "failure 1 failed again: ValueError: no such order" in said.out
    assert "2 keys still wait behind a failure" in said.out
    assert "kappa-log failures groups" in said.err
    world.fix()

    said = typed("failures", "retry", "1", "--reason", "fixed")

    assert "kept 2   skipped 0   duplicate 0   failed again 0" in said.out
    assert "kappa-log project" in said.err
    assert world.order() == [4, 0, 1]
    assert {row[0] for row in world.rows("audit", "reason")} == {"fixed"}
    one = typed("failures", "retry", "--all", code=3)
    assert "1 key still waits behind a failure" in one.out
    (done,) = typed("failures", "retry", "--topic", "orders", "--json", code=3).json
    assert (done["matched"], done["failed"], done["acked"]) == (1, 1, 0)
    world.check()


@pytest.mark.parametrize("act", ["retry", "discard"])
def test_a_dry_run_counts_and_does_nothing(
    typed: Type, world: Poisoned, act: str
) -> None:
    """By each filter; no reason and no consent are needed to count.

    That of a retry ends as the retry would.
    """
    before = world.app.failures()
    print_ = before[0].fingerprint or ""

    for chosen, count in (
        (("--all",), 4),
        (("1", "3"), 2),
        (("--fingerprint", print_), 2),
        (("--error-class", "DecodeError"), 1),
        (("--group", "billing", "--topic", "orders"), 4),
    ):
        code = 3 if act == "retry" else 0
        said = typed("failures", act, *chosen, "--dry-run", code=code)
        noun = "failure" if count == 1 else "failures"
        assert f"would {act} {count} {noun}" in said.out
    code = 3 if act == "retry" else 0
    found = typed("failures", act, "--all", "--dry-run", "--json", code=code).json[0]
    assert found["matched" if act == "retry" else "discarded"] == 4
    assert world.app.failures() == before


def test_a_dry_run_of_a_retry_tells_what_would_come_of_each(
    typed: Type, world: Poisoned
) -> None:
    """With the error, if it fails again, and what would wait behind it."""
    said = typed("failures", "retry", "1", "--dry-run", code=3)
    assert "would retry 1 failure" in said.out
    assert "fails again: ValueError: no such order" in said.out
    assert "waits behind failure 1" in said.out
    assert "keep 0   skip 0   duplicate 0   fail again 1   wait 1" in said.out
    world.fix()

    said = typed("failures", "retry", "1", "--dry-run")
    (found,) = typed("failures", "retry", "1", "--dry-run", "--json").json

    assert said.out.count("becomes an event") == 2
    assert [(t["id"], t["outcome"]) for t in found["trials"]] == [
        (world.id_of(offset), "acked") for offset in (0, 1)
    ]
    assert world.order() == [4]
    assert "what they do elsewhere" in " ".join(
        typed("failures", "retry", "--help").out.split()
    )


@pytest.mark.parametrize("act", ["retry", "discard"])
def test_what_is_meant_must_be_said(typed: Type, world: Poisoned, act: str) -> None:
    """Neither nothing, nor all and some of it; and what is named must be there."""
    for arguments in ((), ("--all", "1"), ("--all", "--topic", "orders")):
        said = typed("failures", act, *arguments, "--reason", "x", code=2)
        assert "say which failures" in said.err
    said = typed("failures", act, "1", "99", "--reason", "x", code=2)
    assert "failure 99 not found" in said.err
    typed("failures", act, "0", code=2)
    typed("failures", act, "one", code=2)
    for option in ("--topic", "--group", "--fingerprint", "--error-class"):
        said = typed("failures", act, option, "\udcff", "--dry-run", code=2)
        assert option in said.err
    typed("failures", act, "1", "--reason", "a\udcff", code=2)
    assert len(world.failed()) == 4


MISTYPED = [
    (("--topic", "ordres"), "topic 'ordres'; there are failures of: orders"),
    (("--group", "biling"), "group 'biling'; there are failures of: billing"),
    (("--fingerprint", "xyz"), "fingerprint 'xyz'; there are failures of: "),
    (
        ("--error-class", "ValueErr", "--topic", "orders"),
        "error class 'ValueErr'; there are failures of: DecodeError, ValueError",
    ),
]


@pytest.mark.parametrize("act", ["retry", "discard"])
def test_a_mistyped_filter_is_no_success(
    world: Poisoned, capsys: pytest.CaptureFixture[str], act: str
) -> None:
    """What is nowhere was mistyped; what is read and has no failure is done already."""
    typed = typist(capsys)
    for chosen, words in MISTYPED:
        for more in ((), ("--dry-run",)):
            said = typed("failures", act, *chosen, *more, "--reason", "x", code=2)
            assert f"no failure matches {words}" in said.err
    with (world.folder / "kappa_log.toml").open("a") as file:
        file.write('[[listeners]]\ntopic = "refunds"\ngroup_id = "books"\n')
        file.write(f'handler = "{world.module}:Orders"\n')

    for chosen in (("--topic", "refunds"), ("--group", "books", "--topic", "orders")):
        said = typed("failures", act, *chosen, "--reason", "x")
        assert said.out == f"nothing to {act}\n"
    assert len(world.failed()) == 4


def test_a_discard_wants_a_reason_and_consent(typed: Type, world: Poisoned) -> None:
    """It is for good: who, when and why stay in the audit trail."""
    assert "--reason" in typed("failures", "discard", "1", "--yes", code=2).err
    blank = typed("failures", "discard", "1", "--yes", "--reason", "  ", code=2)
    assert "say why these records are given up" in blank.err
    assert "--yes" in typed("failures", "discard", "1", "--reason", "old", code=2).err
    assert len(world.failed()) == 4

    said = typed("failures", "discard", "1", "3", "--reason", "old", "--yes")

    assert "discarded 2 failures" in said.out
    assert world.rows("audit", "action", "subject", "reason") == [
        ("discard", "failure 1", "old"),
        ("discard", "failure 3", "old"),
    ]
    (found,) = typed(
        "failures", "discard", "4", "--reason", "old", "--yes", "--json"
    ).json
    assert found == {"discarded": 1, "dry_run": False}
    assert world.failed() == [(1, True)]
    world.check()


def test_an_event_is_handled_again(typed: Type, world: Poisoned) -> None:
    """What its handler says now is told; nothing is stored."""
    assert "Z recorded" in typed("events", "list").out  # it says no time of its own
    assert "its handler acknowledges it" in typed("events", "retry", "1").out
    assert typed("events", "retry", "1", "--json").json == [{"acknowledged": True}]
    handlers = world.folder / f"{world.module}.py"
    for name, code, ended in (("skips", "return None", 0), ("raises", "1/0", 3)):
        module = f"{world.module}_{name}"
        (world.folder / f"{module}.py").write_text(
            handlers.read_text().replace(
                "match payload", f"{code}\n        match payload"
            )
        )
        world.module = module
        world.configure()
        said = typed("events", "retry", "1", code=ended)
        assert ("would skip it now" in said.out) == (ended == 0)
        assert ("event 1 failed again: ZeroDivisionError" in said.err) == (ended == 3)
        world.module = world.module.removesuffix(f"_{name}")
    assert "event 2 not found" in typed("events", "retry", "2", code=2).err
    assert world.app.head().position == 1
    world.check()
