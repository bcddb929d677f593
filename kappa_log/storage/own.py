"""A project's own migrations: Python files beside its kappa_log.toml, run by Alembic.

They are in ``migrations/`` of the project, one after the other. Their version table is
their own, so no revision of ours ever meets one of theirs, and an upgrade of kappa_log
adds none to the project. A folder with an ``env.py`` is an Alembic environment of its
own and is left alone.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from kappa_log.backtrace import described
from kappa_log.errors import RegistrationError, UsageError
from kappa_log.storage.database import Database
from kappa_log.storage.migrations import (
    Revision,
    RevisionFailed,
    revisions_of,
    script_location,
)

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

FOLDER = "migrations"

_FILE = re.compile(r"\d+_\w+\.py")
_NOT_IN_NAMES = re.compile(r"\W+", re.ASCII)

TEMPLATE = '''\
"""{title}"""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = {down_revision}


def upgrade() -> None:
    """Change the database: op.create_table, op.add_column, op.execute …

    It runs in one transaction with all others, after kappa_log's own. Names of its
    tables are best left to it: context.config.attributes["tables"].events.name
    (from alembic import context).
    """


def downgrade() -> None:
    """Undo what upgrade did."""
'''


class OwnState(msgspec.Struct, frozen=True):
    """Which of a project's migrations a database has, and which there are."""

    found: str | None
    wanted: str | None
    pending: int
    """How many are to be run."""

    @property
    def verdict(self) -> str:
        """One of: current, behind, unknown."""
        if self.pending < 0:
            return "unknown"
        return "behind" if self.pending else "current"


class OwnMigrations:
    """The migrations of one project.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, project: Path) -> OwnMigrations | None:
        """Return the migrations of a project's folder; None if it has none."""
        found = cls(project / FOLDER)
        return found if found.files and not found.is_foreign else None

    @property
    def is_foreign(self) -> bool:
        """Tell whether somebody else's Alembic works in the folder."""
        return (self.folder / "env.py").exists()

    @property
    def files(self) -> list[Path]:
        """The files of the migrations, oldest first."""
        if not self.folder.is_dir():
            return []
        found = self.folder.glob("*.py")
        return sorted(file for file in found if _FILE.fullmatch(file.name))

    def write(self, name: str, now: datetime) -> tuple[Path, bool]:
        """Write the next migration, empty; tell whether it is new.

        Raises:
            UsageError: The name has no letter, or the folder is somebody else's.
        """
        clean = _NOT_IN_NAMES.sub("_", name).strip("_").lower()
        if not clean:
            msg = f"migration name {name!r} has no letter or digit; nothing was written"
            raise UsageError(msg)
        if self.is_foreign:
            msg = (
                f"{self.folder} has an env.py, so another Alembic works there; nothing "
                "was written"
            )
            raise UsageError(msg)
        for file in self.files:
            if file.stem.partition("_")[2] == clean:
                return file, False
        last = self._script().get_current_head() if self.files else None
        moment = now.strftime("%Y%m%d%H%M%S%f")
        revision = moment if last is None or moment > last else str(int(last) + 1)
        target = self.folder / f"{revision}_{clean}.py"
        self.folder.mkdir(parents=True, exist_ok=True)
        title = clean.replace("_", " ").capitalize() + "."
        text = TEMPLATE.format(
            title=title,
            revision=revision,
            down_revision=f'"{last}"' if last else "None",
        )
        target.write_text(text, encoding="utf-8")
        return target, True

    def has(self, revision: str) -> bool:
        """Tell whether a revision is one of these."""
        return any(
            step.revision == revision for step in self._script().walk_revisions()
        )

    def state(self, database: Database) -> OwnState:
        """Return which of them the database has."""
        found = self._found_in(database)
        script = self._script()
        steps = [step.revision for step in script.walk_revisions()]
        wanted = steps[0] if steps else None
        if found is None:
            return OwnState(None, wanted, len(steps))
        pending = steps.index(found) if found in steps else -1
        return OwnState(found, wanted, pending)

    def history(self, database: Database) -> Iterator[Revision]:
        """Yield them, oldest first."""
        yield from revisions_of(self._script(), self._found_in(database), "project")

    def upgrade(
        self, connection: sa.Connection, database: Database, revision: str
    ) -> None:
        """Run those up to a revision, in the caller's transaction."""
        from alembic import command

        with self._naming_failures():
            command.upgrade(self._config(database, connection), revision)

    def downgrade(
        self, connection: sa.Connection, database: Database, revision: str
    ) -> None:
        """Undo those after a revision, in the caller's transaction."""
        from alembic import command

        with self._naming_failures():
            command.downgrade(self._config(database, connection), revision)

    def step_down(
        self, connection: sa.Connection, database: Database, revision: str
    ) -> str:
        """Undo what ``base`` or ``-N`` undoes; return what is left for ours."""
        found = _current(connection, database)
        steps = [step.revision for step in self._script().walk_revisions()]
        if found not in steps:
            return revision
        applied = len(steps) - steps.index(found)
        if revision == "base":
            self.downgrade(connection, database, "base")
            return revision
        if not (revision.startswith("-") and revision[1:].isdecimal()):
            return revision
        wanted = int(revision[1:])
        undone = min(wanted, applied)
        self.downgrade(
            connection, database, "base" if undone == applied else f"-{undone}"
        )
        # -0 moves nothing.
        return f"-{wanted - undone}"

    def _found_in(self, database: Database) -> str | None:
        if not database.exists():
            return None
        with database.read() as connection:
            return _current(connection, database)

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        from alembic.util import CommandError

        try:
            yield
        except (CommandError, sa.exc.SQLAlchemyError):
            raise
        except Exception as error:
            msg = (
                f"a migration of {self.folder} failed: {type(error).__name__}: "
                f"{error}; the database was not changed"
            )
            raise RevisionFailed(msg) from error

    def _config(
        self, database: Database | None = None, connection: Any = None
    ) -> Config:
        from alembic.config import Config

        config = Config(stdout=io.StringIO())
        for name, value in (
            ("script_location", str(script_location())),
            ("version_locations", str(self.folder)),
            ("path_separator", "newline"),
        ):
            config.set_main_option(name, value.replace("%", "%%"))
        if database is not None:
            config.attributes["tables"] = database.tables
            config.attributes["version_table"] = database.tables.project_version_table
            config.attributes["connection"] = connection
        return config

    def _script(self) -> ScriptDirectory:
        """Return the scripts, imported and in order.

        Raises:
            RegistrationError: One cannot be imported, or two follow the same one.
        """
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        try:
            script = ScriptDirectory.from_config(self._config())
            heads = script.get_heads()
        except CommandError as error:
            msg = f"the migrations of {self.folder} cannot be put in order: {error}"
            raise RegistrationError(msg) from error
        except Exception as error:
            msg = f"a migration of {self.folder} cannot be imported: {described(error)}"
            raise RegistrationError(msg) from error
        if len(heads) > 1:
            msg = (
                f"the migrations of {self.folder} have two ends, "
                f"{' and '.join(heads)}: let the down_revision of one name the other"
            )
            raise RegistrationError(msg)
        return script


def _current(connection: sa.Connection, database: Database) -> str | None:
    table = database.tables.project_version_table
    if not sa.inspect(connection).has_table(table):
        return None
    found: str | None = connection.scalar(sa.text(f"SELECT version_num FROM {table}"))
    return found
