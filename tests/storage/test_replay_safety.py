"""What must hold when replays, folds and ingests meet in unlucky ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typing_extensions import override

from kappa_log import (
    Event,
    FieldOptions,
    Handler,
    KappaLog,
    Projection,
    ack,
    projection,
)
from kappa_log.config import Config, ListenerConfig, load_config
from kappa_log.errors import RegistrationError, UsageError
from kappa_log.plan import Context
from kappa_log.swap import Swapper

FIELDS = FieldOptions(entity_id="who")


@dataclass(frozen=True)
class Count:
    """How many events."""

    events: int = 0


def counting(version: int, step: int = 1) -> Projection:
    """Return a projection that adds a step for each event."""

    @projection(topics=["t"], version=version, name="counts")
    def counts(state: Count | None, _: Event) -> Count:
        return Count((state or Count()).events + step)

    return counts


def _now() -> datetime:
    return datetime.now(UTC)


def write(folder: Path, name: str, numbers: Iterable[int]) -> Path:
    """Write a file of that many records."""
    file = folder / name
    lines = (json.dumps({"who": f"w{n % 3}", "n": n}) + "\n" for n in numbers)
    file.write_text("".join(lines))
    return file


def opened(url: str, *folds: Projection, config: Config | None = None) -> KappaLog:
    """Return the log with these projections, its tables made."""
    log = KappaLog(url, config=config or load_config(Path("/")), projections=folds)
    log.create_database()
    return log


def rows(log: KappaLog) -> dict[str, int]:
    """Return the live rows."""
    return {row["entity_id"]: row["events"] for row in log.rows("counts")}


class Waiting(Handler):
    """Decides when all who race have looked for duplicates."""

    barrier: threading.Barrier

    @override
    def consume(self, payload: object, metadata: object) -> object:
        """Wait once a batch, then keep the record."""
        if payload == {"who": "w0", "n": 0}:
            self.barrier.wait(timeout=20)
        return ack("x", None)


def test_the_same_messages_from_two_files_at_once_are_kept_once(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loser of the race decides again and finds duplicates, on both databases."""
    Waiting.barrier = threading.Barrier(2)
    monkeypatch.setattr("kappa_log.listeners.load_handler", lambda _: Waiting())
    listener = ListenerConfig(topic="t", group_id="g", handler="a:B")
    config = load_config(Path("/")).model_copy(update={"listeners": [listener]})
    opened(database_url).close()
    outcomes: list[tuple[int, int]] = []

    def take(file: Path) -> None:
        with opened(database_url, config=config) as log:
            counts = log.ingest(file, topic="t").counts
            outcomes.append((counts.acked, counts.duplicate))

    files = [write(tmp_path, name, range(20)) for name in ("a", "b")]
    race = [threading.Thread(target=take, args=(file,)) for file in files]
    # The second attempt of the loser meets no one: the barrier must not hold it.
    threading.Timer(2.0, Waiting.barrier.abort).start()
    for thread in race:
        thread.start()
    for thread in race:
        thread.join(timeout=60)

    assert sorted(outcomes) == [(0, 20), (20, 0)]
    with opened(database_url) as log:
        assert log.verify().ok


def test_a_second_group_stops_a_promotion_too(
    database_url: str, tmp_path: Path
) -> None:
    """A shadow must not double its rows because a group came after it was filled."""
    with opened(database_url, counting(1)) as log:
        log.ingest(write(tmp_path, "a", range(9)), topic="t", fields=FIELDS)
        log.project()
        log.replay("counts", promote=False)
        log.ingest(write(tmp_path, "b", range(9)), topic="t", group="g2", fields=FIELDS)

        with pytest.raises(RegistrationError, match="under the groups"):
            log.promote("counts")

        assert rows(log) == {"w0": 3, "w1": 3, "w2": 3}


def test_a_start_needs_states_that_can_be_read(
    database_url: str, tmp_path: Path
) -> None:
    """Rows of another state type are not taken over."""

    @dataclass(frozen=True)
    class Tags:
        tags: list[int]

    @dataclass(frozen=True)
    class TextTags:
        tags: list[str]

    @projection(topics=["t"], version=1, name="counts")
    def old(_: Tags | None, event: Event) -> Tags:
        return Tags([event.position])

    @projection(topics=["t"], version=2, name="counts")
    def new(_: TextTags | None, event: Event) -> TextTags:
        return TextTags([str(event.position)])

    with opened(database_url, old) as log:
        log.ingest(write(tmp_path, "a", range(9)), topic="t", fields=FIELDS)
        log.project()
    with opened(database_url, new) as log:
        with pytest.raises(UsageError, match="a full replay is needed"):
            log.replay("counts", from_position=9)

        assert log.replay("counts").promoted


def test_a_live_build_is_not_swapped_with_itself(
    database_url: str, tmp_path: Path
) -> None:
    """A swap that ran already must not retire, then drop, what undo needs."""
    with opened(database_url, counting(1)) as log:
        log.ingest(write(tmp_path, "a", range(9)), topic="t", fields=FIELDS)
        log.project()
        log.replay("counts")
        context = Context(
            database=log.database, registry=log.registry, clock=_now, who="me"
        )

        with pytest.raises(UsageError, match="live already"):
            Swapper(
                context=context,
                projection="counts",
                number=2,
                fold=None,
                action="promote",
                reason=None,
            ).run()

        assert [b.role for b in log.projection("counts").builds] == ["retired", "live"]


def test_a_shadow_is_promoted_however_many_replays_came_after(
    sqlite_url: str, tmp_path: Path
) -> None:
    """The replay of a shadow is found by its build, not among the latest."""
    with opened(sqlite_url, counting(1)) as log:
        log.ingest(write(tmp_path, "a", range(9)), topic="t", fields=FIELDS)
        log.project()
        log.replay("counts", promote=False)
        for _ in range(51):
            report = log.replay("counts", until=log.event(9).recorded_at)
            assert report.build is not None
            log.drop_build("counts", report.build)

        assert log.promote("counts").promoted


def test_tables_made_by_several_at_once_are_made_once(database_url: str) -> None:
    """Whoever comes second finds them, and meets no error."""
    errors: list[BaseException] = []

    def create() -> None:
        try:
            with KappaLog(
                database_url, config=load_config(Path("/")), projections=[]
            ) as log:
                log.create_database()
        except BaseException as error:  # noqa: BLE001 - any is a failure of the test
            errors.append(error)

    _at_once([create] * 4)

    assert errors == []


def test_first_folds_by_several_at_once_are_one(
    database_url: str, tmp_path: Path
) -> None:
    """The losers of the first batch read again; nobody sees a constraint."""
    with opened(database_url, counting(1)) as log:
        log.ingest(write(tmp_path, "a", range(900)), topic="t", fields=FIELDS)
    errors: list[BaseException] = []

    def fold() -> None:
        try:
            with opened(database_url, counting(1)) as log:
                log.project()
        except BaseException as error:  # noqa: BLE001 - any is a failure of the test
            errors.append(error)

    _at_once([fold] * 4)

    assert errors == []
    with opened(database_url, counting(1)) as log:
        assert rows(log) == {"w0": 300, "w1": 300, "w2": 300}


def test_a_kept_diff_is_shown_when_the_builds_have_moved_apart(
    database_url: str, tmp_path: Path
) -> None:
    """The refusal says: look at the diff; there must be one to look at."""
    with opened(database_url, counting(1)) as log:
        log.ingest(write(tmp_path, "a", range(9)), topic="t", fields=FIELDS)
        log.project()
    with opened(database_url, counting(1), counting(2, step=5)) as log:
        refused = log.replay("counts", max_changed="1")
        log.ingest(write(tmp_path, "b", range(9, 12)), topic="t", fields=FIELDS)
        log.project()

        found = log.diff("counts")

    assert refused.outcome == "refused"
    assert (found.position, found.changed) == (9, 3)


def test_rows_are_found_by_the_keys_that_the_build_has(
    database_url: str, tmp_path: Path
) -> None:
    """Code whose key has changed since does not keep anybody from looking."""

    @projection(
        topics=["t"], version=2, name="counts", key=lambda e: e.position, key_type=int
    )
    def by_position(_: Count | None, __: Event) -> Count:
        return Count(1)

    with opened(database_url, counting(1)) as log:
        log.ingest(write(tmp_path, "a", range(9)), topic="t", fields=FIELDS)
        log.project()
    with opened(database_url, by_position) as log:
        assert list(log.rows("counts", key="w1")) == [{"entity_id": "w1", "events": 3}]


def _at_once(work: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=target) for target in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
