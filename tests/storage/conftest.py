"""A fixture of tests that need one kind of database, and now and then both."""

from __future__ import annotations

import pytest


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """Give the URL of an empty database: SQLite's, unless a test is for both kinds."""
    kind = getattr(request, "param", "sqlite")
    found: str = request.getfixturevalue(f"{kind}_url")
    return found
