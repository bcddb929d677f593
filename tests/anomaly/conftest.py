"""Fixtures of tests whose consumers meet with accidents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.kafka_broker import RealBroker
    from support.kafka_nest import Nest
    from support.kafka_world import Worlds


@pytest.fixture(scope="session")
def nest() -> Iterator[Nest]:
    """Give a nest of workers, which have imported all that they need."""
    from support.kafka_nest import Nest

    with Nest() as found:
        yield found


@pytest.fixture
def worlds(
    kafka_broker: RealBroker, nest: Nest, database_url: str, tmp_path: Path
) -> Worlds:
    """Give worlds on one kind of database, as many as a test wants."""
    from support.kafka_world import Databases, Worlds

    return Worlds(kafka_broker, nest, Databases(database_url), tmp_path)
