"""Failures in SQL: what waits, what is retried or given up, and what stays of it."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kappa_log import decide
from kappa_log import failures as retries
from kappa_log.errors import (
    DatabaseBusy,
    HandlerError,
    KappaLogError,
    LostRace,
    NotFound,
    RetryFailed,
)
from kappa_log.storage import ledger
from support.poison import Poisoned, bad

BAD = {"do": "raise"}


@pytest.fixture
def world(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Poisoned]:
    """Give an empty log whose handler fails on demand."""
    monkeypatch.syspath_prepend(tmp_path)
    with Poisoned(database_url, tmp_path) as found:
        yield found


# --- retry -------------------------------------------------------------------


def test_a_retried_failure_becomes_an_event(world: Poisoned) -> None:
    """SEED R1, R4, R11: event, end of the failure, ledger and audit trail are one."""
    world.read(("a", bad(1)), ("b", {"n": 2}))
    world.fix()

    done = world.app.retry_failure(1, who="eve", reason="fixed")

    assert (done.outcome, done.position) == ("acked", 2)
    event = world.app.event(2)
    assert (event.offset, event.key, event.entity_id) == (0, b"a", "1")
    assert world.failed() == []
    columns = ("kind", "from_offset", "to_offset", "acked", "failed", "first_position")
    assert world.rows("checkpoints", *columns) == [
        ("batch", 0, 2, 1, 1, 1),
        ("retry", 0, 1, 1, 0, 2),
    ]
    assert world.rows("audit", "who", "action", "subject", "reason") == [
        ("eve", "retry", "failure 1", "fixed")
    ]
    world.check()
    with pytest.raises(NotFound, match="failure 1 not found"):
        world.app.retry_failure(1)


def test_a_retry_that_skips_removes_the_failure(world: Poisoned) -> None:
    """SEED R5: the handler decided; nothing waits any more."""
    world.read(("a", bad(1)))
    handlers = world.folder / f"{world.module}.py"
    handlers.write_text(
        "from kappa_log import Handler\nclass Orders(Handler):\n"
        "    def consume(self, payload, metadata):\n        pass\n"
    )
    world.module = f"{world.module}_later"
    handlers.rename(world.folder / f"{world.module}.py")
    world.configure()

    assert world.app.retry_failure(1).outcome == "skipped"

    assert (world.failed(), world.app.head().position) == ([], 0)
    assert world.rows("checkpoints", "kind", "skipped")[-1] == ("retry", 1)
    world.check()


def test_a_message_that_became_an_event_meanwhile_is_a_duplicate(
    world: Poisoned,
) -> None:
    """SEED R7: it is noted as one, and its handler is not called for it."""
    world.read((None, bad(1)))
    world.fix()
    world.read((None, bad(1)))
    calls = len(world.calls)

    done = world.app.retry_failure(1)

    assert (done.outcome, done.position) == ("duplicate", 1)
    assert len(world.calls) == calls
    assert world.rows("duplicates", "offset", "repeats") == [(0, 1)]
    assert world.failed() == []
    world.check()


def test_a_retry_that_fails_keeps_the_new_error(world: Poisoned) -> None:
    """Error, attempts and time are of the last attempt; the record stays whole.

    SEED R6.
    """
    world.read(("a", bad(1)))
    before = world.app.failure(1)
    handlers = world.folder / f"{world.module}.py"
    text = handlers.read_text().replace("ValueError(", "KeyError(")
    world.module = f"{world.module}_later"
    (world.folder / f"{world.module}.py").write_text(text)
    world.configure()

    with pytest.raises(RetryFailed, match="failure 1 failed again: KeyError"):
        world.app.retry_failure(1)

    after = world.app.failure(1)
    assert (before.error_class, after.error_class) == ("ValueError", "KeyError")
    assert (before.attempts, after.attempts) == (1, 2)
    assert after.last_at > before.last_at == before.first_at == after.first_at
    assert after.fingerprint != before.fingerprint
    assert after.value == before.value
    assert any("KeyError" in line for line in after.error_backtrace)
    assert world.app.head().position == 0
    world.check()


def test_a_retry_that_fails_at_the_last_attempt_keeps_its_failure(
    world: Poisoned,
) -> None:
    """SEED R8: with max_retries 0 it was deleted, and so lost."""
    world.configure(more="max_retries = 0")
    world.read(("a", bad(1)))

    with pytest.raises(RetryFailed, match="failure 1 failed again: ValueError"):
        world.app.retry_failure(1)

    assert world.failed() == [(0, False)]
    assert world.app.failure(1).attempts == 2
    world.check()


def test_a_retried_record_goes_the_way_of_any_other(world: Poisoned) -> None:
    """SEED R3, R9, R10: by the handler's own hooks; then it is known by its bytes."""
    world.configure("Around")
    world.read((None, bad(1)))
    failure = world.app.failure(1)
    world.fix()

    world.app.retry_failure(1)
    world.read((None, bad(1)))

    assert world.calls == [("around", 0), (1, 0), ("around", 0), (1, 0)]
    event = world.app.event(1)
    for name in ("topic", "group_id", "checksum"):
        assert getattr(event, name) == getattr(failure, name)
    assert world.rows("duplicates", "offset", "repeats") == [(1, 1)]
    world.check()


def test_a_key_is_drained_in_the_order_of_its_records(world: Poisoned) -> None:
    """Whichever of them was asked for, its head comes first."""
    world.read(*(("a", bad(n)) for n in range(4)), ("b", bad(9)))
    assert world.failed() == [(0, False), (1, True), (2, True), (3, True), (4, False)]
    world.fix()

    done = world.app.retry_failure(world.id_of(2))

    assert done.outcome == "acked"
    assert world.order("a") == [0, 1, 2, 3]
    assert world.failed() == [(4, False)]
    assert [call[0] for call in world.calls] == [0, 9, 0, 1, 2, 3]
    world.check()


def test_a_drain_stops_at_the_first_error(world: Poisoned) -> None:
    """What comes behind still waits; what came before is done."""
    world.read(("a", bad(0)), ("a", {"n": 1}), ("a", b"{bad"), ("a", {"n": 3}))
    world.fix()

    done = world.app.retry_failures()

    assert (done.acked, done.failed, done.stopped_keys) == (2, 1, 1)
    assert world.order() == [0, 1]
    assert world.failed() == [(2, False), (3, True)]
    third = world.app.failure(world.id_of(2))
    assert third.error_class == "DecodeError"
    with pytest.raises(RetryFailed, match=f"failure {third.id} failed again"):
        world.app.retry_failure(world.id_of(3))
    world.read(("a", {"n": 4}))
    assert world.failed() == [(2, False), (3, True), (4, True)]
    world.check()


def test_what_waited_tells_of_itself_when_it_is_tried(
    world: Poisoned,
) -> None:
    """It was not tried before, so nobody could say whom it is about."""
    world.configure("Told")
    world.read(("a", bad(1)), ("a", bad(2)))
    world.app.discard_failure(1)
    waiting = world.app.failure(2)
    assert (waiting.entity_id, waiting.error_class, waiting.attempts) == (None, None, 0)

    with pytest.raises(RetryFailed):
        world.app.retry_failure(2)

    tried = world.app.failure(2)
    assert (tried.entity_id, tried.attempts, tried.parked) == ("entity-2", 1, False)
    assert tried.event_time is not None
    assert tried.event_time.isoformat() == "2024-05-05T00:00:00+00:00"


def test_many_are_chosen_by_what_they_have_in_common(world: Poisoned) -> None:
    """The others stay, and a dry run does nothing."""
    world.read((None, bad(1)), (None, b"{bad"), (None, bad(2)))
    world.fix()
    prints = {f.offset: f.fingerprint for f in world.app.failures()}

    for chosen, count in (
        ({}, 3),
        ({"error_class": "ValueError"}, 2),
        ({"fingerprint": prints[1]}, 1),
        ({"group": "billing", "partition": 0}, 3),
        ({"ids": (1, 2, 10**30, -1)}, 2),
    ):
        assert world.app.retry_failures(dry_run=True, **chosen).matched == count, chosen
        assert world.app.discard_failures(dry_run=True, **chosen) == count
    assert world.app.head().position == 0

    done = world.app.retry_failures(error_class="ValueError", reason="fixed")

    assert (done.matched, done.acked, done.failed) == (2, 2, 0)
    assert world.failed() == [(1, False)]
    assert world.rows("audit", "subject") == [("failure 1",), ("failure 3",)]
    world.check()


def test_a_bulk_retry_ends_while_others_fail(
    world: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It means what failed before it began: new failures must not keep it going."""
    monkeypatch.setattr(retries, "PAGE", 1)
    world.read((None, b"{0"), (None, b"{1"))
    left = list(range(2, 30))

    def another(_: object) -> None:
        if left:
            world.read((None, b"{%d" % left.pop(0)))

    done = world.app.retry_failures(on_progress=another)

    assert (done.matched, done.failed) == (2, 2)
    assert len(world.failed()) == 4


def test_handlers_are_started_once_a_run(world: Poisoned) -> None:
    """What they prepare in start, they have in a retry too."""
    world.read(*((None, bad(n)) for n in range(3)))
    world.fix()

    world.app.retry_failures(ids=(1, 2))
    assert world.hooks == ["start", "stop"]
    world.app.retry_failure(3)
    assert world.hooks == ["start", "stop"] * 2
    world.app.retry_event(1)
    assert world.hooks == ["start", "stop"] * 3


def test_a_handler_that_cannot_start_retries_nothing(world: Poisoned) -> None:
    """The failure is as it was: no attempt was made."""
    world.read((None, bad(1)))
    handlers = world.folder / f"{world.module}.py"
    text = handlers.read_text().replace('HOOKS.append("start")', "raise OSError(5)")
    world.module = f"{world.module}_later"
    (world.folder / f"{world.module}.py").write_text(text)
    world.configure()

    with pytest.raises(HandlerError, match="start"):
        world.app.retry_failure(1)

    assert world.app.failure(1).attempts == 1


# --- giving up ---------------------------------------------------------------


def test_a_discarded_failure_lets_the_next_one_be_retried(world: Poisoned) -> None:
    """It is counted as skipped, by name, and the key goes on in order."""
    world.read(("a", b"{bad"), ("a", {"n": 1}), ("a", {"n": 2}))

    world.app.discard_failure(1, who="eve", reason="broken by hand")
    world.app.retry_failure(world.id_of(1))

    assert world.order() == [1, 2]
    assert world.rows("audit", "who", "action", "subject", "reason")[0] == (
        "eve",
        "discard",
        "failure 1",
        "broken by hand",
    )
    assert world.rows("checkpoints", "kind", "skipped")[1] == ("retry", 1)
    world.check()
    with pytest.raises(NotFound):
        world.app.discard_failure(1)


def test_a_failure_can_be_given_up_without_its_listener(world: Poisoned) -> None:
    """Who takes a topic out of the configuration has its failures still."""
    world.read(("a", bad(1)), ("a", bad(2)))
    world.configure("")

    world.app.discard_failure(1)
    assert world.app.discard_failures(topic="orders") == 1

    assert world.failed() == []
    world.check()


def test_what_is_gone_is_passed_over_when_many_are_given_up(world: Poisoned) -> None:
    """Two who clean up at once share the work, and neither is stopped by the other."""
    world.read(*((None, b"{%d" % n) for n in range(60)))
    counts: list[int] = []
    errors: list[Exception] = []

    def discard() -> None:
        try:
            counts.append(world.app.discard_failures())
        except KappaLogError as error:
            errors.append(error)

    threads = [threading.Thread(target=discard) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert sum(counts) == 60
    assert len(world.rows("audit", "id")) == 60
    world.check()


# --- waiting behind a failure ------------------------------------------------


def test_only_its_own_key_waits_behind_a_failure(world: Poisoned) -> None:
    """Other keys and other partitions flow; what waits is counted as parked."""
    done = world.read(("a", bad(0)), ("b", {"n": 1}), ("a", {"n": 2}), (None, {"n": 3}))
    assert (done.counts.acked, done.counts.failed, done.counts.parked) == (2, 1, 1)

    later = world.read(("a", {"n": 4}), ("b", {"n": 5}))
    other = world.read(("a", {"n": 6}), partition=1)

    assert (later.counts.acked, later.counts.parked) == (1, 1)
    assert (other.counts.acked, other.counts.parked) == (1, 0)
    assert world.failed() == [(0, False), (2, True), (4, True)]
    assert [call[0] for call in world.calls] == [0, 1, 3, 5, 6]
    world.check()


@pytest.mark.parametrize(("key", "more"), [(None, ""), ("a", 'park = "event"')])
def test_a_record_alone_holds_nothing_up(
    world: Poisoned, key: str | None, more: str
) -> None:
    """Without a key, or where the listener says so."""
    world.configure(more=more)

    world.read((key, bad(0)), (key, {"n": 1}))
    done = world.read((key, {"n": 2}))

    assert (done.counts.acked, world.failed()) == (1, [(0, False)])
    world.check()


def test_a_duplicate_waits_for_nothing(world: Poisoned) -> None:
    """The log has its message already, whatever its key waits for."""
    world.read(("a", {"n": 1}), ("a", bad(2)))

    done = world.read(("a", {"n": 1}), ("a", bad(2)))

    assert (done.counts.duplicate, done.counts.parked) == (1, 1)
    world.fix()
    world.app.retry_failures()
    assert world.order() == [0, 1]
    assert world.rows("duplicates", "offset", "repeats") == [(2, 1), (3, 2)]
    world.check()


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_full_queue_stops_its_partition(
    world: Poisoned, monkeypatch: pytest.MonkeyPatch, *, in_batch: bool
) -> None:
    """The next record stays in its topic, and all behind it; others flow."""
    monkeypatch.setattr(decide, "MAX_PARKED", 3)
    world.configure(more="max_retries = 0")
    records: list[Any] = [("a", bad(0)), *(("a", {"n": n}) for n in range(1, 6))]
    if not in_batch:
        world.read(records.pop(0))
    records.append(("b", {"n": 7}))

    portions = world.portion(records), world.portion([("a", {"n": 8})], partition=1)
    done = world.take(*portions)

    stopped = done.stopped[world.lane()]
    assert (stopped.offset, stopped.attempt) == (4, 0)
    assert "3 records wait behind a failure of its key" in stopped.why
    assert world.failed() == [(0, False), (1, True), (2, True), (3, True)]
    assert world.held().next_offset == 4
    assert world.order() == [0]
    world.fix()
    world.app.retry_failures()
    assert world.take(world.portion(records[-3:])).stopped == {}
    assert world.order("a")[1:] == [0, 1, 2, 3, 4, 5]
    world.check()


def test_a_file_is_read_to_its_end_however_many_wait(
    world: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be told to wait, as a topic can."""
    monkeypatch.setattr(decide, "MAX_PARKED", 3)

    done = world.read(*(("a", bad(n)) for n in range(9)))

    assert (done.counts.failed, done.counts.parked, done.stopped) == (1, 8, {})


def test_groups_count_what_waits_behind_them(world: Poisoned) -> None:
    """Each record once, also where two errors stand in one queue."""
    world.configure(more='dedupe = "header:id"')
    portion = world.portion([("a", {"n": 1}), ("a", {"n": 2}), ("a", {"n": 3})])
    portion.records[2] = msgspec.structs.replace(
        portion.records[2], headers=(("id", b"1"),)
    )
    world.take(portion)

    (found,) = world.app.failure_groups()

    assert (found.error_class, found.count, found.parked) == ("DecodeError", 2, 1)
    assert found.example_id == 2
    assert world.app.failure_groups(limit=0) == []


# --- a retry beside a batch ---------------------------------------------------


def test_nothing_overtakes_a_key_that_was_drained_meanwhile(world: Poisoned) -> None:
    """A batch that was decided to wait is decided anew when nothing waits any more."""
    world.read(("a", bad(0)))
    world.fix()
    world.during_call(world.app.retry_failures)

    done = world.read(("b", {"n": 1}), ("a", {"n": 2}))

    assert (done.counts.acked, done.counts.parked) == (2, 0)
    assert (world.order(), world.failed()) == ([0, 1, 2], [])
    world.check()


def test_a_batch_that_is_overtaken_again_and_again_gives_up(world: Poisoned) -> None:
    """Nothing of it is kept, and whoever reads tries again: the error says so."""
    world.configure(more="max_retries = 0")
    world.read(*((f"k{n}", bad(n)) for n in range(5)))
    world.fix()

    def one_more() -> None:
        if world.failed():
            world.app.retry_failure(world.app.failures()[0].id)
            world.during_call(one_more, 9)

    world.during_call(one_more, 9)
    portion = world.portion(
        [("x", {"n": 9}), *((f"k{n}", {"n": n + 10}) for n in range(5))]
    )
    with pytest.raises(DatabaseBusy, match="retried faster"):
        world.take(portion)

    assert world.app.head().position == 5
    assert world.held().next_offset == 5
    sys.modules[world.module].DURING.clear()
    assert world.take(portion).counts.acked == 6
    world.check()


def test_two_who_retry_one_failure_do_it_once(world: Poisoned) -> None:
    """The one who comes late changes nothing, and is told."""
    world.read(("a", bad(0)), ("a", {"n": 1}))
    world.fix()
    world.during_call(lambda: world.app.retry_failure(1))

    with pytest.raises(
        LostRace, match="failure 1 was retried or discarded by somebody"
    ):
        world.app.retry_failure(1)

    assert (world.order(), world.failed()) == ([0, 1], [])
    assert len(world.rows("audit", "id")) == 2
    world.check()


def test_a_failure_that_is_given_up_during_its_retry_is_gone(world: Poisoned) -> None:
    """The retry has nothing left to keep its error with."""
    world.read((None, bad(0)))
    world.during_call(lambda: world.app.discard_failure(1))

    with pytest.raises(LostRace):
        world.app.retry_failure(1)

    assert world.failed() == []
    assert world.rows("audit", "action") == [("discard",)]
    world.check()


def test_an_attempt_that_ended_meanwhile_counts(world: Poisoned) -> None:
    """Who decided upon the failure as it was before changes nothing of it."""
    world.read((None, bad(0)))

    def fail_once_more() -> None:
        with pytest.raises(RetryFailed):
            world.app.retry_failure(1)
        world.fix()

    world.during_call(fail_once_more)
    with pytest.raises(LostRace):
        world.app.retry_failure(1)

    assert world.app.failure(1).attempts == 2
    assert world.app.head().position == 0
    assert world.app.retry_failure(1).outcome == "acked"
    world.check()


def test_what_is_not_its_turn_any_more_is_not_retried(world: Poisoned) -> None:
    """A rewind may put an earlier record of the key before it."""
    world.read(("a", {"do": "skip", "n": 0}), ("a", bad(1)))
    world.fix()

    def rewind() -> None:
        with world.app.database.write() as connection:
            ledger.move(
                connection,
                world.app.database,
                world.lane(),
                world.held(),
                0,
                world.app.now(),
            )
        world.move_to(0)
        world.read(("a", {"do": "skip", "n": 0}))

    world.during_call(rewind)
    with pytest.raises(LostRace):
        world.app.retry_failure(1)

    assert world.failed() == [(0, True), (1, False)]
    assert world.app.retry_failure(1).outcome == "acked"
    assert (world.order(), world.failed()) == ([1], [])
    world.check()


# --- tried again in place ------------------------------------------------------


def test_by_default_a_record_is_tried_in_its_place_for_ever(world: Poisoned) -> None:
    """Its handler is told how often; nothing of it is written meanwhile.

    SEED F2, F6, P3.
    """
    found = [("a", bad(1)), ("a", {"n": 2})]
    for attempt in range(12):
        done = world.take(world.portion(found, attempt=attempt))

        stopped = done.stopped[world.lane()]
        assert (stopped.offset, stopped.attempt) == (0, attempt + 1)
        assert stopped.why == "ValueError: no such order"
        assert done.counts.seen == 0
    assert world.calls == [(1, attempt) for attempt in range(12)]
    assert (world.failed(), world.rows("checkpoints", "id")) == ([], [])
    world.fix()

    world.take(world.portion(found, attempt=12))

    assert world.order() == [0, 1]
    assert world.calls[-2:] == [(1, 12), (2, 0)]
    world.check()


def test_retries_are_as_many_as_were_wanted(world: Poisoned) -> None:
    """Two retries are three attempts; then it is a failure, and the others go on.

    SEED F2, F3.
    """
    world.configure(more="max_retries = 2")
    found = [(None, bad(1)), (None, {"n": 2})]
    for attempt in range(2):
        assert world.take(world.portion(found, attempt=attempt)).stopped

    done = world.take(world.portion(found, attempt=2))

    assert (done.counts.failed, done.counts.acked, done.stopped) == (1, 1, {})
    assert world.calls == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert world.app.failure(1).attempts == 3
    world.check()


def test_the_handler_may_say_itself_what_is_tried_again(world: Poisoned) -> None:
    """Its hook decides instead of max_retries, by record, attempt and error.

    SEED F1, F4.
    """
    world.configure("Willing", more="max_retries = 0")
    found = [(None, bad(1, tries=1)), (None, bad(2, tries=0))]

    first = world.take(world.portion(found))
    assert first.stopped[world.lane()].attempt == 1
    done = world.take(world.portion(found, attempt=1))

    assert (done.counts.failed, done.stopped) == (2, {})
    asked = [call for call in world.calls if len(call) == 3]
    assert asked == [
        (1, 0, "no such order"),
        (1, 1, "no such order"),
        (2, 0, "no such order"),
    ]


@pytest.mark.parametrize(
    ("handler", "payload"),
    [
        ("Orders", b"{bad"),
        ("Orders", {"do": "naive", "n": 1}),
        ("Asking", bad(1)),
        ("Willing", bad(1)),
    ],
    ids=[
        "broken JSON",
        "an ack that cannot be kept",
        "a hook that asks",
        "a broken hook",
    ],
)
def test_what_stays_wrong_is_a_failure_at_once(
    world: Poisoned, handler: str, payload: Any
) -> None:
    """No later attempt could end otherwise; a broken hook holds nothing up either.

    SEED F12.
    """
    world.configure(handler)

    done = world.take(world.portion([(None, payload), (None, {"n": 2, "tries": 0})]))

    assert (done.counts.failed, done.counts.acked, done.stopped) == (1, 1, {})
    assert world.app.failure(1).attempts == 1


def test_a_record_without_identity_is_a_failure_at_once(world: Poisoned) -> None:
    """The header that should identify it will not come."""
    world.configure(more='dedupe = "header:id"')
    portion = world.portion([(None, {"n": 1})])

    done = world.take(portion)

    assert (done.counts.failed, done.stopped) == (1, {})


def test_lines_of_files_are_not_tried_again_in_place(world: Poisoned) -> None:
    """Nobody waits for them: they are retried when somebody says so."""
    file = world.folder / "orders.jsonl"
    file.write_text('{"n":1,"do":"raise"}\n{"n":2}\n')

    report = world.app.ingest(file, topic="orders")

    assert (report.counts.failed, report.counts.acked) == (1, 1)
    world.check()


def test_the_first_record_to_retry_ends_its_partitions_part(world: Poisoned) -> None:
    """What precedes it is committed, what follows is not handled; others are whole."""
    portions = [
        world.portion(
            [("a", {"n": 10}), ("b", {"n": 11}), ("a", bad(12)), ("b", {"n": 13})],
            partition=1,
        ),
        world.portion([("a", {"n": 20}), ("b", {"n": 21})], partition=2),
        world.portion([("a", bad(30)), ("b", {"n": 31})], partition=3),
    ]

    done = world.take(*portions)

    assert {lane.partition: s.offset for lane, s in done.stopped.items()} == {
        1: 2,
        3: 0,
    }
    assert world.entities() == [10, 11, 20, 21]
    assert [call[0] for call in world.calls] == [10, 11, 12, 20, 21, 30]
    assert [world.held(n).next_offset for n in (1, 2, 3)] == [2, 2, 0]
    columns = ("partition", "from_offset", "to_offset", "acked")
    assert world.rows("checkpoints", *columns) == [(1, 0, 2, 2), (2, 0, 2, 2)]
    assert world.failed() == []
    world.check()


# --- a storm -----------------------------------------------------------------


def test_a_storm_of_one_failure_is_borne(world: Poisoned) -> None:
    """A broken release fails on everything: it is kept, counted, listed and grouped."""
    storm, batch = 20_000, 2000
    megabytes = []
    for start in range(0, storm, batch):
        # Beside a few full queues, most records fail by themselves.
        keys = (None if n % 4 else f"k{n % 10}" for n in range(start, start + batch))
        world.read(*((key, bad(n)) for n, key in enumerate(keys, start)))
        megabytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

    (group,) = world.app.failure_groups()
    assert (group.count, group.parked) == (15_005, 4995)
    assert world.app.count_failures() == storm
    assert world.app.count_failures(fingerprint=group.fingerprint) == 15_005
    assert len(world.app.failures(limit=50)) == 50
    # SQLite's page cache may fill up to its 64 MB meanwhile.
    cache = 64 if world.app.database.is_sqlite else 0
    assert megabytes[-1] < megabytes[1] + 50 + cache, megabytes
    world.fix()
    assert world.app.retry_failures(ids=(2, 3, 4)).acked == 3
    world.check()
