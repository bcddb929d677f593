"""The command line's manners: help, typos, bad times, exit codes, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from kappa_log import cli, errors
from kappa_log.cli import output, params

COMMANDS = [
    "demo",
    "init",
    "copy-migrations",
    "migration",
    "doctor",
    "config",
    "db",
    "ingest",
    "import-phobos",
    "consume",
    "run",
    "lag",
    "produce",
    "events",
    "duplicates",
    "failures",
    "project",
    "replay",
    "projections",
    "export",
    "import",
    "verify",
    "sql",
    "serve",
    "token",
    "init-events-api",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds a configuration, or leaves a database."""
    monkeypatch.chdir(tmp_path)


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command."""
    code = cli.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- help --------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """SEED K1: who knows nothing finds everything."""
    code, out, _ = typed(capsys, "--help")

    listing = out.partition("Commands:")[2]
    assert code == 0
    assert [line.split()[0] for line in listing.splitlines() if line] == COMMANDS
    assert "..." not in listing


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("words", commands(cli.cli), ids=" ".join)
def test_every_command_explains_itself(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """Help is there, and fits 80 columns."""
    code, out, _ = typed(capsys, *words, "--help")

    assert code == 0
    assert f"kappa-log {' '.join(words)}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_imports_no_database() -> None:
    """Help answers at once: nothing heavy is loaded for it."""
    heavy = ("sqlalchemy", "alembic", "psycopg", "pydantic", "msgspec", "rich.table")
    code = (
        "import sys; from kappa_log.cli import run; run(['--help']); "
        f"sys.exit(repr([m for m in {heavy!r} if m in sys.modules]))"
    )
    done = process("-c", code)

    assert done.stderr.strip() == "[]"


def test_version_names_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """SEED K1: a bug report begins with these three."""
    code, out, _ = typed(capsys, "--version")

    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "kappa-log",
        "Python",
        "SQLite",
    ]


# --- typos -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replly"], "Did you mean 'replay'?"),
        (["projections", "lst"], "Did you mean 'list'?"),
        (["replay", "--sicne", "1998-01-01"], "--since"),
        (["ingest"], "Missing argument 'FILE...'"),
        (["ingest", "a.jsonl"], "Missing option '--topic'"),
        (["events", "show", "first"], "'first' is no whole number from 1 on"),
        (["events", "show", "0"], "'0' is no whole number from 1 on"),
        (["events", "show", "9" * 30], "is no whole number"),
        (["ingest", "a", "--topic", "t", "--dedupe", "x"], "header:NAME"),
        (["ingest", "a", "b", "--topic", "t", "--source", "s"], "--source names one"),
        (["verify", "--head", "beef"], "64 digits of 0-9 and a-f"),
        (["replay", "--max-changed", "some"], "for instance 5%"),
        (["replay", "--max-changed", "5.%5"], "for instance 5%"),
        (["replay", "--from-offset", "orders:1"], "for instance orders:0:1500"),
        (["replay", "--from-offset", "orders:x:1"], "for instance orders:0:1500"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """SEED K2: usage errors exit with 2, on stderr, and teach."""
    code, out, err = typed(capsys, *arguments)

    assert code == 2
    assert out == ""
    assert said in err


# --- times -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("1998-01-01", "1998-01-01T00:00:00+00:00"),
        ("1998-01-01T09:30Z", "1998-01-01T09:30:00+00:00"),
        ("1998-01-01T09:30+01:00", "1998-01-01T08:30:00+00:00"),
        ("1998-01-01 09:30:00.000001-02:00", "1998-01-01T11:30:00.000001+00:00"),
    ],
)
def test_a_date_is_midnight_utc_and_a_time_its_instant(text: str, instant: str) -> None:
    """The same command means the same everywhere on earth."""
    assert params.MOMENT.convert(text, None, None).isoformat() == instant


@pytest.mark.parametrize("option", ["--since", "--until"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1998-01-01T09:30", "'1998-01-01T09:30Z' if it is UTC"),
        ("1998-01-01 09:30:00", "'1998-01-01 09:30:00+01:00'"),
        ("2026-02-30", "'2026-02-30' is no time (day is out of range for month)"),
        ("2026-13-01", "'2026-13-01' is no time (month must be in 1..12)"),
        ("1998-01-01T25:00Z", "'1998-01-01T25:00Z' is no time"),
        ("yesterday", "Type a date, for instance 1998-01-01"),
        ("", "'' is no time"),
        ("0001-01-01T00:00+10:00", "is no time"),
    ],
)
def test_a_naive_or_impossible_time_is_refused(
    capsys: pytest.CaptureFixture[str], option: str, text: str, said: str
) -> None:
    """Nobody's guess decides what is replayed."""
    code, _, err = typed(capsys, "replay", option, text)

    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "1998-01-01", "--from-position", "3"], "two starts"),
        (["--since", "1998-01-01", "--from-offset", "a:0:0"], "two starts"),
        (["--until", "1998-01-01", "--from-position", "3"], "--until"),
        (["--until", "1998-01-01", "--since", "1997-01-01"], "--until"),
        (["--by", "event-time"], "--by"),
        (["--resume", "1", "--cancel", "1"], "exclude each other"),
        (["--list", "--cancel", "1"], "exclude each other"),
        (["totals", "--resume", "1"], "goes alone"),
        (["--since", "1998-01-01", "--resume", "1"], "goes alone"),
        (["--dry-run", "--cancel", "1"], "goes alone"),
    ],
)
def test_a_replay_that_contradicts_itself_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Which of two orders was meant is not guessed."""
    code, _, err = typed(capsys, "replay", *arguments)

    assert code == 2
    assert said in err


# --- errors end in one place -------------------------------------------------


def families(error: type[errors.KappaLogError]) -> list[type[errors.KappaLogError]]:
    """Return an error and all errors under it."""
    return [error, *(leaf for sub in error.__subclasses__() for leaf in families(sub))]


def test_every_error_has_an_exit_code() -> None:
    """A new error cannot be forgotten in the table."""
    declared = [
        e for e in families(errors.KappaLogError) if e.__module__ == errors.__name__
    ]
    own_code = set(cli.EXIT_CODES)

    for error in declared[1:]:
        assert own_code & set(error.__mro__), f"{error.__name__} has no exit code"
    assert set(cli.EXIT_CODES.values()) <= {1, 2, 3, 4, 65, 69, 75, 78}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.KappaLogError("x"), 1),
        (errors.ConfigError("x"), 78),
        (errors.NotFound("event", 9), 2),
        (errors.ProjectionNotFound("x", []), 2),
        (errors.ProjectionError("p", 1, "x"), 1),
        (errors.StaleCode("p", 1, ["code"], "x"), 2),
        (errors.SourceError("x"), 69),
        (errors.SourceDiverged("x"), 65),
        (errors.StorageError("x"), 69),
        (errors.DatabaseBusy("x"), 75),
        (errors.AlreadyRunning("x"), 75),
        (errors.SchemaOutOfDate(None, "1", "x"), 78),
        (errors.VerificationError("x"), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_becomes_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: errors.KappaLogError,
    code: int,
) -> None:
    """What went wrong is told without a traceback, and programs know which kind."""
    raises(monkeypatch, error)

    assert typed(capsys, "init") == (code, "", f"Error: {error}\n")


def raises(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, command: str = "init"
) -> None:
    """Let a command end in an error."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli.commands[command], "callback", fail)


def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a bug does not throw a traceback at the user."""
    raises(monkeypatch, ZeroDivisionError("of\nmany lines"))

    code, out, err = typed(capsys, "init")

    assert (code, out) == (1, "")
    assert err == (
        "Unexpected error: ZeroDivisionError: of; run with KAPPA_LOG_DEBUG=1 for the "
        "traceback\n"
    )


def test_debug_raises_the_unexpected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever mends it needs the traceback."""
    raises(monkeypatch, ZeroDivisionError())
    monkeypatch.setenv("KAPPA_LOG_DEBUG", "1")

    with pytest.raises(ZeroDivisionError):
        cli.run(["init"])


def test_an_interrupt_exits_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script can tell Ctrl-C from failure."""
    raises(monkeypatch, KeyboardInterrupt())

    assert typed(capsys, "init")[0] == 130


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("ingest x --topic t", "the batches that were committed are kept"),
        ("project", "rows and cursors that were written are kept"),
        ("export", "the archive is whole"),
        ("import", "an import is one transaction: nothing was imported, unless"),
        ("verify", "nothing was changed"),
        ("produce x --topic t", "what the cluster took is in the topic"),
    ],
)
def test_ctrl_c_says_what_is_kept_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kept: str,
) -> None:
    """Nobody has to guess whether to begin again."""
    words = command.split()
    raises(monkeypatch, KeyboardInterrupt(), words[0])

    code, out, err = typed(capsys, *words)

    assert (code, out) == (130, "")
    assert f"Interrupted; {kept}" in " ".join(err.split())
    assert "the same command" in err.lower()


def test_a_wrong_setting_exits_78(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Configuration is checked before anything is opened."""
    (tmp_path / "kappa_log.toml").write_text("[databse]\n")

    code, out, err = typed(capsys, "config", "show")

    assert (code, out) == (78, "")
    assert "did you mean database?" in err


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/name", "sqlite://"])
def test_a_url_of_no_log_exits_78(capsys: pytest.CaptureFixture[str], url: str) -> None:
    """A database that cannot hold a log is refused by name."""
    code, _, err = typed(capsys, "--url", url, "db", "status")

    assert code == 78
    assert "database url" in err


def test_the_process_ends_with_the_exit_code() -> None:
    """What `run` returns is what a shell sees."""
    done = process("-m", "kappa_log", "replly")

    assert done.returncode == 2
    assert "Did you mean 'replay'?" in done.stderr


# --- streams -----------------------------------------------------------------


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`| head` ends the command quietly."""
    code = (
        "import sys\nfrom kappa_log import cli\n"
        "from kappa_log.cli import output, run\n"
        "def many(**_):\n"
        "    for n in range(100_000): output.line('x' * 80)\n"
        "cli.cli.commands['init'].callback = many\n"
        "sys.exit(run(['init']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        said = running.stderr.read()

    assert (running.returncode, said) == (0, b"")


def test_consent_cannot_be_given_where_nobody_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script that drops a log says so itself."""
    code, out, err = typed(capsys, "db", "drop")

    assert (code, out) == (2, "")
    assert "--yes" in err


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31mred", "\\x9b31mred"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        ("[red]:smile: é 漢", "[red]:smile: é 漢"),
    ],
)
def test_control_characters_are_shown_and_never_obeyed(
    hostile: str, shown: str
) -> None:
    """A payload cannot write to the terminal behind the user's back."""
    assert output.safe(hostile) == shown


def test_a_table_fits_the_columns_and_cuts_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is cut off is another number."""
    monkeypatch.setenv("COLUMNS", "40")

    output.print_table(
        ("position", "payload"), [(123_456_789, "x" * 100), (1, "漢" * 50)]
    )

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "   position  payload"
    assert lines[1] == "123,456,789  " + "x" * 26 + "…"
    assert lines[2] == "          1  " + "漢" * 13 + "…"


def test_a_table_without_room_becomes_records(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many columns are read below each other."""
    monkeypatch.setenv("COLUMNS", "20")

    output.print_table(("a", "long_name"), [(10**12, 10**12)])

    assert capsys.readouterr().out == (
        "a          1,000,000,000,000\nlong_name  1,000,000,000,000\n\n"
    )


def test_a_table_in_a_pipe_cuts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grep finds all of it."""
    monkeypatch.delenv("COLUMNS", raising=False)

    output.print_table(("payload",), [("x" * 500,)])

    assert "x" * 500 in capsys.readouterr().out


# --- init --------------------------------------------------------------------


def test_init_writes_what_is_missing_and_keeps_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Run twice it changes nothing; it prints what it did and the next step.

    SEED K3, K4, X1.
    """
    code, out, err = typed(capsys, "init", "shop")
    (tmp_path / "shop" / "kappa_log.toml").write_text("# mine\n")
    again = typed(capsys, "init", "shop")

    assert code == again[0] == 0
    assert "create  shop/kappa_log.toml" in out
    assert "create  shop/projections/__init__.py" in out
    assert "cd shop\n  kappa-log db create" in err
    assert {line.split()[0] for line in again[1].splitlines()} == {"exists"}
    assert (tmp_path / "shop" / "kappa_log.toml").read_text() == "# mine\n"


def test_what_init_writes_is_a_configuration(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file works as it is."""
    monkeypatch.setenv("COLUMNS", "1000")
    typed(capsys, "init")
    code, out, _ = typed(capsys, "config", "show")

    assert code == 0
    monkeypatch.setenv("COLUMNS", "80")
    long = "socket.connection.setup.timeout.ms"
    with (tmp_path / "kappa_log.toml").open("a") as file:
        file.write(f'[kafka]\n"{long}" = 5000\n')
    narrow = typed(capsys, "config", "show")[1].splitlines()
    assert [line for line in narrow if line.startswith(f"kafka.{long}  5000 ")]
    assert max(map(len, narrow)) <= 80
    assert f"sqlite:///{tmp_path}/kappa_log.db" in out
    assert '["projections"]' in out
