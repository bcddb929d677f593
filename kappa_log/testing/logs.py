"""Logs for tests: empty, on SQLite, gone afterwards.

The tables are made once a process; each log begins as a copy of that file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kappa_log.app import KappaLog
from kappa_log.config import load_config
from kappa_log.fold import Projection


@contextmanager
def temporary_log(
    *projections: Projection, folder: Path | None = None, file: Path | None = None
) -> Iterator[KappaLog]:
    """Give an empty log of its own; it is closed, and gone, at the end of the block.

    Args:
        projections: To be used instead of those of the configuration.
        folder: Where the search for kappa_log.toml starts; the current one if None.
            Its listeners and projections are there, its database is left alone.
        file: Where the SQLite file is kept; nowhere for long if None.
    """
    with tempfile.TemporaryDirectory(prefix="kappa-log-") as made:
        path = file or Path(made) / "log.db"
        path.write_bytes(_empty_log())
        chosen: Iterable[Projection] | None = projections or None
        config = load_config(folder, {"database.url": f"sqlite:///{path.absolute()}"})
        with KappaLog(config=config, projections=chosen) as log:
            if config.database.prefix != _PREFIX:
                log.create_database()
            yield log


_PREFIX = "kappa_log_"


@cache
def _empty_log() -> bytes:
    with tempfile.TemporaryDirectory(prefix="kappa-log-") as made:
        file = Path(made) / "log.db"
        overrides = {"database.url": f"sqlite:///{file}", "database.prefix": _PREFIX}
        with KappaLog(config=load_config(Path(made), overrides), projections=()) as log:
            log.create_database()
        # Closing it moved all of its write-ahead log into the file.
        return file.read_bytes()
