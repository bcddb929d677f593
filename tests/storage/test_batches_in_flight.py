"""One batch is decided while the one before commits: as if one came after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from kappa_log import Handler, KappaLog, ack
from kappa_log.codec import decode_json
from kappa_log.decide import Portion
from kappa_log.errors import Fenced, SourceError
from kappa_log.handler import Metadata
from kappa_log.ingest import ingest_batch, ingest_batches
from kappa_log.listeners import Listener
from kappa_log.records import Lane, Record
from kappa_log.storage import ledger
from support.logs import START, open_log

SECONDS = 30
"""How long to wait for what must come; only a failing test waits that long."""


class Noting(Handler):
    """Keeps what is not to fail, and notes what it was asked."""

    def __init__(self) -> None:
        """Start with nothing noted and nothing to do."""
        self.asked: list[str] = []
        self.at: dict[str, Callable[[], object]] = {}
        """What to do, once, when asked about a payload."""

    @override
    def consume(self, payload: str, metadata: Metadata) -> object:
        """Keep the record."""
        self.asked.append(payload)
        self.at.pop(payload, lambda: None)()
        if payload.startswith("bad"):
            raise ValueError(payload)
        return ack(payload, None)


class World:
    """An empty log and two files that are read into it."""

    def __init__(self, log: KappaLog) -> None:
        """Take both files."""
        self.log = log
        self.database = log.database
        self.handler = Noting()
        self.listener = Listener(
            "l", "t", "g", self.handler, decode_json, dedupe="payload"
        )
        self.held = {name: self.take(name) for name in ("ours", "theirs")}

    def take(self, name: str) -> ledger.Assignment:
        """Take a file; whoever had it is fenced."""
        with self.database.write() as connection:
            return ledger.assign(
                connection,
                self.database,
                Lane(name, "t", "g"),
                ledger.Reader("payload", None),
                START,
            )

    def batches(
        self, *batches: str, source: str = "ours"
    ) -> Iterator[Sequence[Portion]]:
        """Yield batches of records, whose payloads are words."""
        held = self.held[source]
        for words in batches:
            records = [
                Record(offset, f'"{word}"'.encode())
                for offset, word in enumerate(words.split(), held.next_offset)
            ]
            end = held.next_offset + len(records)
            yield [Portion(Lane(source, "t", "g"), held, self.listener, records, end)]
            held = held.moved(end)
        self.held[source] = held

    def ingest(self, batches: Iterator[Sequence[Portion]]) -> Iterator[str]:
        """Ingest, yielding what became of each batch."""
        for _, done in ingest_batches(self.database, batches, lambda: START):
            counts = done.counts
            yield f"{counts.acked} {counts.duplicate} {counts.failed}"

    def kept(self) -> list[str | None]:
        """Return the entities of the log in order; the log must be sound."""
        assert self.log.verify().ok
        events = self.log.events(limit=100, oldest_first=True)
        return [event.entity_id for event in events]


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    """Give an empty log and two files."""
    with open_log(database_url, tmp_path) as log:
        yield World(log)


def test_the_next_batch_is_decided_while_one_commits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or nothing would be gained."""
    reached = threading.Event()
    world.handler.at["c"] = reached.set
    write = world.database.write

    @contextmanager
    def slow(**how: Any) -> Iterator[Any]:
        with write(**how) as connection:
            yield connection
            assert reached.wait(SECONDS)

    batches = world.batches("a b", "c")
    monkeypatch.setattr(world.database, "write", slow)

    assert list(world.ingest(batches)) == ["2 0 0", "1 0 0"]
    assert world.kept() == ["a", "b", "c"]


def test_what_the_batch_before_has_is_repeated_by_its_position(world: World) -> None:
    """A batch that repeats a message waits until that has a position."""
    found = list(world.ingest(world.batches("a b", "b c", "d", "a c")))

    assert found == ["2 0 0", "1 1 0", "1 0 0", "0 2 0"]
    assert world.kept() == world.handler.asked == ["a", "b", "c", "d"]
    repeats = {d.offset: d.repeats for d in world.log.duplicates()}
    assert repeats == {2: 2, 5: 1, 6: 3}


def test_what_comes_after_a_failure_is_decided_when_it_is_kept(world: World) -> None:
    """A later record may have to wait behind it."""
    asked = world.handler.asked
    found = world.ingest(world.batches("a bad", "b", "c"))

    told = [(outcome, *asked) for outcome in found]

    assert told[0] == ("1 0 1", "a", "bad")
    assert told[1] == ("1 0 0", "a", "bad", "b", "c")
    assert world.kept() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("when", "kept"), [("a", []), ("b", []), ("c", ["a", "b"]), ("e", list("abcd"))]
)
def test_nothing_is_kept_after_a_batch_that_failed(
    world: World, when: str, kept: list[str]
) -> None:
    """Whenever the file is taken away, whole batches are kept, and none past it."""
    world.handler.at[when] = lambda: world.take("ours")
    found = world.ingest(world.batches("a b", "c d", "e f", "g h"))
    told: list[str] = []

    with pytest.raises(Fenced):
        told.extend(found)

    assert world.kept() == kept
    assert told == ["2 0 0"] * (len(kept) // 2)


def test_a_batch_that_another_got_ahead_of_is_decided_anew_with_the_next(
    world: World,
) -> None:
    """What the next one was decided on may be different now."""

    def get_ahead() -> None:
        (portions,) = world.batches("b", source="theirs")
        ingest_batch(world.database, portions, lambda: START)

    world.handler.at["a"] = get_ahead

    found = list(world.ingest(world.batches("a b", "c d", "e")))

    assert found == ["1 1 0", "2 0 0", "1 0 0"]
    assert world.kept() == ["b", "a", "c", "d", "e"]
    theirs = "b"
    assert world.handler.asked == ["a", theirs, "b", *"cd", "a", *"cd", "e"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_batch_that_was_read_before_an_error_comes_first(
    world: World, taken: bool
) -> None:
    """It is in the log and told of; or if it is not, that is the error."""

    def broken() -> Iterator[Sequence[Portion]]:
        yield from world.batches("a b")
        raise SourceError("no more")

    told: list[str] = []
    if taken:
        world.handler.at["b"] = lambda: world.take("ours")

    with pytest.raises(Fenced if taken else SourceError):
        told.extend(world.ingest(broken()))

    assert world.kept() == ([] if taken else ["a", "b"])
    assert told == ([] if taken else ["2 0 0"])
