"""Tables: the log's schema, and a project's own beside it, made, moved and dropped."""

from __future__ import annotations

from pathlib import Path

from kappa_log.app.base import Base
from kappa_log.seeds import seed_of
from kappa_log.storage import dump, migrations
from kappa_log.storage.own import FOLDER, OwnMigrations, OwnState


class Tables(Base):
    """The part about tables."""

    @property
    def own_migrations(self) -> OwnMigrations | None:
        """The project's own migrations, beside its kappa_log.toml; None without any."""
        return OwnMigrations.of(self.config.folder)

    def create_database(self) -> bool:
        """Create the database and its tables; tell whether they are new."""
        return migrations.create(self.database, self.own_migrations)

    def drop_database(self) -> bool:
        """Remove all that kappa_log made; tell whether there was anything."""
        return migrations.drop(self.database, self.own_migrations)

    def reset_database(self) -> None:
        """Remove all that kappa_log made, and create it anew, empty."""
        self.drop_database()
        self.create_database()

    def setup_database(self) -> bool:
        """Create the database, bring it up to date and seed it; tell whether seeded."""
        if not self.create_database():
            self.upgrade_database()
        return self.seed_database()

    def seed_database(self) -> bool:
        """Call ``seed(log)`` of the project's seeds.py; False without that file.

        It is called each time: what it does twice is its own affair. Ingesting a file
        again, for one, adds nothing.

        Raises:
            RegistrationError: The file cannot be imported.
            UsageError: It has no such function.
        """
        seed = seed_of(self.config.folder)
        if seed is None:
            return False
        self._require()
        seed(self)
        return True

    def dump_schema(self) -> str:
        """Return the tables, without rows and builds, as SQL text."""
        return dump.dump(self.database)

    def load_schema(self, text: str) -> None:
        """Make the tables of a dump in a database that has none of ours."""
        dump.load(self.database, text)

    def write_migration(self, name: str) -> tuple[Path, bool]:
        """Write the project's next migration, empty; tell whether it is new."""
        own = OwnMigrations(self.config.folder / FOLDER)
        return own.write(name, self._clock())

    def upgrade_database(self, revision: str = "head") -> None:
        """Move the tables up to a revision; ``head``: the project's own, too."""
        if self.database_state().verdict == "empty":
            self._require()
        migrations.upgrade(self.database, revision, self.own_migrations)

    def downgrade_database(self, revision: str = "-1") -> None:
        """Move the tables down, the project's first; ``base`` removes them."""
        if self.database_state().verdict == "empty":
            self._require()
        migrations.downgrade(self.database, revision, self.own_migrations)

    def database_state(self) -> migrations.SchemaState:
        """Return which revision the database has, and which is wanted."""
        return migrations.state(self.database)

    def own_state(self) -> OwnState | None:
        """Return the same of the project's own migrations; None without any."""
        own = self.own_migrations
        return None if own is None else own.state(self.database)

    def database_history(self) -> list[migrations.Revision]:
        """Return all migrations, oldest first, the project's own after ours."""
        return migrations.history(self.database, self.own_migrations)
