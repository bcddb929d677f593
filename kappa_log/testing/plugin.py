"""pytest's plugin: the fixture ``kappa_log``, without importing anything before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kappa_log.app import KappaLog


@pytest.fixture
def kappa_log(pytestconfig: pytest.Config, tmp_path: Path) -> Iterator[KappaLog]:
    """An empty log on SQLite, with the projections and listeners of kappa_log.toml."""
    from kappa_log.testing.logs import temporary_log

    file = tmp_path / "kappa_log.db"
    with temporary_log(folder=pytestconfig.rootpath, file=file) as log:
        yield log
