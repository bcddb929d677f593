"""Base: the settings, the database, the clock and the registry of one log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from os import PathLike
from typing import Any, Self

from kappa_log import discovery
from kappa_log.app.actor import user
from kappa_log.config import Config, load_config
from kappa_log.fold import Projection, Registry
from kappa_log.storage import migrations, replays
from kappa_log.storage.database import Database

POLL_SECONDS = 0.2
"""How often a follower looks for new events."""


class Base:
    """What all parts of the front door share."""

    def __init__(
        self,
        url: str | None = None,
        *,
        config: Config | None = None,
        projections: Iterable[Projection] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.config = config or load_config()
        self.database = Database(
            url or self.config.database.url,
            self.config.database.prefix,
            self.config.pool_size,
        )
        self.interrupted_replay: int | None = None
        """Id of the replay that an interrupt left to be resumed."""
        self._given = None if projections is None else Registry(projections)
        self._clock = clock

    @classmethod
    def open(
        cls,
        folder: str | PathLike[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the log that a configuration names; arguments as `load_config`."""
        return cls(config=load_config(folder, overrides))

    def close(self) -> None:
        """Close all connections."""
        self.database.dispose()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    def now(self) -> datetime:
        """Return the time by this log's clock."""
        return self._clock()

    @cached_property
    def registry(self) -> Registry:
        """The registered projections; importing them happens once, when first asked.

        Raises:
            RegistrationError: A module cannot be imported or declares what cannot work.
        """
        if self._given is not None:
            return self._given
        return discovery.discover(self.config.projections.modules, self.config.folder)

    def _require(self) -> None:
        migrations.require_current(self.database)

    def _audit(
        self, connection: Any, action: str, subject: str, reason: str | None
    ) -> None:
        act = replays.Audit(who=user(), action=action, subject=subject, reason=reason)
        replays.write_audit(connection, self.database, act, self._clock())
