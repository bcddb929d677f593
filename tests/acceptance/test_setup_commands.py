"""Set-up as people type it: migrations of their own, seeds, dumps (SEED §7)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from kappa_log import KappaLog
from kappa_log.cli import run
from support.logs import tables

Type = Callable[..., tuple[int, str, str]]

NOTES = """
import sqlalchemy as sa
from alembic import context, op

revision = "{revision}"
down_revision = {down}

def upgrade():
    {upgrade}

def downgrade():
    op.drop_table("{table}")
"""

TABLE = (
    'op.create_table("{table}", sa.Column("id", sa.Integer, primary_key=True), '
    'sa.Column("position", sa.BigInteger, '
    "sa.ForeignKey(context.config.attributes['tables'].events.name + '.position')))"
)


@pytest.fixture
def typed(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Give what types commands in a project's folder, with a prefix of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAPPA_LOG__DATABASE__URL", database_url)
    monkeypatch.setenv("KAPPA_LOG__DATABASE__PREFIX", "shop_")
    monkeypatch.setenv("COLUMNS", "1000")

    def type_(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        found = capsys.readouterr()
        return code, found.out, found.err

    return type_


def migrate(folder: Path, revision: str, down: str, **how: str) -> None:
    """Write a migration of the project's own."""
    table = f"notes_{revision}"
    upgrade = how.get("upgrade") or TABLE.format(table=table)
    file = folder / "migrations" / f"{revision}_notes.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        NOTES.format(revision=revision, down=down, table=table, upgrade=upgrade)
    )


def test_migrations_of_a_project_go_up_and_down_beside_ours(
    typed: Type, tmp_path: Path
) -> None:
    """By one command, in one transaction, whatever the prefix (SEED K5, K7, K10)."""
    migrate(tmp_path, "01", "None")
    with KappaLog.open(tmp_path) as app:
        assert typed("db", "create")[0] == 0
        assert "notes_01" in tables(app)
        migrate(tmp_path, "02", '"01"')
        status = json.loads(typed("db", "status", "--json")[1])
        migrate(tmp_path, "03", '"02"', upgrade="raise ValueError('no')")
        code, _, err = typed("db", "upgrade")
        found = tables(app)

        assert (status["verdict"], status["project_verdict"]) == ("current", "behind")
        assert (status["project_found"], status["project_wanted"]) == ("01", "02")
        assert code == 69
        assert "ValueError: no; the database was not changed" in err
        assert "notes_02" not in found

        migrate(tmp_path, "03", '"02"')
        up = typed("db", "upgrade")[1]
        history = typed("db", "history", "--json")[1]
        down = typed("db", "downgrade", "-2", "--yes")[1]

        assert "moved  the project's own, 01 → 03" in up
        assert [
            (row["owner"], row["revision"], row["is_current"])
            for row in map(json.loads, history.splitlines())
        ] == [
            ("kappa_log", "0001", True),
            ("project", "01", False),
            ("project", "02", False),
            ("project", "03", True),
        ]
        assert "moved  the project's own, 03 → 01" in down
        assert app.database_state().verdict == "current"
        assert {"notes_01"} == {t for t in tables(app) if t.startswith("notes")}
        typed("db", "upgrade", "02")
        assert "notes_02" in tables(app)
        assert typed("db", "drop", "--yes")[0] == 0
        assert not app.database.exists() or tables(app) == []


def test_a_schema_is_dumped_and_loaded(typed: Type, tmp_path: Path) -> None:
    """It makes what the migrations made, and knows how far they were (SEED K10)."""
    migrate(tmp_path, "01", "None")
    with KappaLog.open(tmp_path) as app:
        typed("db", "create")
        made = tables(app)
        dumped = typed("db", "dump")
        refused = typed("db", "load")
        typed("db", "drop", "--yes")
        loaded = typed("db", "load")

        assert dumped[1] == "create  schema.sql\n"
        assert refused[0] == 2
        assert "a schema is loaded where there is none" in refused[2]
        assert loaded[0] == 0, loaded
        assert tables(app) == made
        state = app.own_state()
        assert state is not None
        assert state.verdict == "current"
        assert app.dump_schema() == (tmp_path / "schema.sql").read_text()
        assert app.verify().ok
        assert typed("db", "upgrade")[0] == 0
        other = (tmp_path / "schema.sql").read_text().replace("shop_", "other_")
        (tmp_path / "other.sql").write_text(other)
        code, _, err = typed("db", "load", "other.sql")
        assert (code, "was dumped for" in err) == (2, True)


def test_setup_and_reset_seed(typed: Type, tmp_path: Path) -> None:
    """`setup` is create, upgrade and seed, and does no harm twice (SEED K9, K10)."""
    nothing = typed("db", "setup")
    (tmp_path / "first.jsonl").write_text("1\n2\n")
    (tmp_path / "seeds.py").write_text(
        "def seed(log):\n    log.ingest('first.jsonl', topic='firsts')\n"
    )
    typed("db", "setup")
    again = typed("db", "setup")
    with KappaLog.open(tmp_path) as app:
        assert app.head().position == 2
        reset = typed("db", "reset", "--yes")
        assert app.head().position == 2

    assert "define seed(log) in it" in nothing[2]
    assert "seeded  " in again[1]
    assert (nothing[0], again[0], reset[0]) == (0, 0, 0)
    for text, place in (
        ("\n1/0", "seeds.py, line 2"),
        ("def seed(log):\n    log.head()\n    1/0", "seed, line 3"),
    ):
        (tmp_path / "seeds.py").write_text(text)
        code, _, err = typed("db", "seed")
        told = f"ZeroDivisionError: division by zero at {place}"
        assert (code, told in err, "seeds.py" in err) == (2, True, True), err
    (tmp_path / "seeds.py").write_text("")
    assert typed("db", "seed")[0] == 2


# --- files: the database is not asked ------------------------------------------


@pytest.fixture
def at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Type:
    """Give what types commands in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def type_(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        found = capsys.readouterr()
        return code, found.out, found.err

    return type_


@pytest.mark.parametrize(
    "command",
    [
        ("init",),
        ("copy-migrations",),
        ("migration", "add-new-column"),
        ("init-events-api",),
    ],
)
def test_a_command_that_writes_files_writes_them_once(
    at: Type, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """SEED K3 to K8: create, then exists, and each time the next step."""
    first, files = at(*command), _files(tmp_path)
    again = at(*command)

    assert {line.split()[0] for line in first[1].splitlines()} == {"create"}
    assert again[1] == first[1].replace("create", "exists")
    assert (first[0], again[0]) == (0, 0)
    assert "Next:" in first[2]
    assert _files(tmp_path) == files


def _files(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_migrations_are_numbered_by_time_and_follow_each_other(
    at: Type, tmp_path: Path
) -> None:
    """SEED K6, K7: 20 digits that rise; a dash in a name divides words, too."""
    at("migration", "add-new-column")
    at("migration", "Drop it!")

    first, second = sorted((tmp_path / "migrations").glob("*.py"))
    assert re.fullmatch(r"\d{20}_add_new_column\.py", first.name)
    assert re.fullmatch(r"\d{20}_drop_it\.py", second.name)
    assert f'down_revision = "{first.name[:20]}"' in second.read_text()
    assert at("migration", "?")[0] == 2
    (tmp_path / "migrations" / "env.py").touch()
    code, _, err = at("migration", "other")
    assert (code, "another Alembic works there" in err) == (2, True)


def test_migrations_with_two_ends_or_a_typo_are_told(at: Type, tmp_path: Path) -> None:
    """Before anything is moved."""
    migrate(tmp_path, "01", "None")
    migrate(tmp_path, "02", "None")
    code, _, err = at("db", "create")
    assert (code, "have two ends, " in err) == (2, True)

    migrate(tmp_path, "02", '"01"', upgrade="(")
    code, _, err = at("db", "create")
    assert (code, "cannot be imported: SyntaxError" in err) == (2, True)
    assert not (tmp_path / "kappa_log.db").exists() or not _has_tables(tmp_path)


def _has_tables(folder: Path) -> bool:
    engine = sa.create_engine(f"sqlite:///{folder / 'kappa_log.db'}")
    found = sa.inspect(engine).get_table_names()
    engine.dispose()
    return bool(found)


def test_init_translates_a_phobos_yml(at: Type, tmp_path: Path) -> None:
    """One command, and the settings are there; what is left to do is told."""
    (tmp_path / "phobos.yml").write_text(
        "kafka:\n  seed_brokers: [one:9092]\n  sasl_plain_username: me\n"
        "  sasl_plain_password: hush\n  colour: blue\n"
        "listeners: [{topic: a, group_id: b, handler: OrdersHandler}]\n"
    )

    code, out, err = at("init", "--from-phobos", "phobos.yml")
    again = at("init", "--from-phobos", "phobos.yml")

    assert code == 0
    assert out.startswith("create  kappa_log.toml\n")
    assert '  line 5: kafka.colour = "blue": no key of Phobos' in err
    *_, write, to_set, create = err.splitlines()
    assert write == "  write the handler handlers:OrdersHandler"
    assert to_set.startswith("  set KAPPA_LOG__KAFKA__SASL_PASSWORD ")
    assert create == "  kappa-log db create"
    assert not (tmp_path / "handlers.py").exists()
    assert again == (0, out.replace("create", "exists"), err)
    assert (
        '"bootstrap.servers" = "one:9092"' in (tmp_path / "kappa_log.toml").read_text()
    )


def test_init_translates_nothing_over_other_settings(at: Type, tmp_path: Path) -> None:
    """Exit 0 would say that they are there; and half of it would be written."""
    (tmp_path / "phobos.yml").write_text("kafka:\n  seed_brokers: [one:9092]\n")
    (tmp_path / "kappa_log.toml").write_text("")

    code, out, err = at("init", "--from-phobos", "phobos.yml")

    assert (code, out) == (2, "")
    assert "kappa_log.toml is there already, with other settings; nothing was" in err
    assert set(_files(tmp_path)) == {"phobos.yml", "kappa_log.toml"}
