"""The checker of histories: it is silent when all is well, and finds each fault.

A checker that nobody checked passes everything. So random histories without a fault
must pass, and each fault, planted in any of them, must be found and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.history import (
    Cursor,
    Fault,
    Finding,
    History,
    Outcome,
    Page,
    Place,
    Produced,
    Row,
    by_place,
    check,
)

# --- random histories --------------------------------------------------------

Seen = list[tuple[int, list[tuple[int, str]]]]
"""What a reader was given: heads, with positions and payloads."""


@dataclass
class Story:
    """A history in the making, into which faults can be planted."""

    chance: Random
    produced: list[Produced]
    log: list[Produced]
    """What is in the log, in the order of positions."""
    elsewhere: set[Place]
    checkpoints: dict[tuple[str, int], int]
    reader: Seen | None = None
    """One reader that began at the start and read all; others read as they like."""

    def __post_init__(self) -> None:
        """No record has a part in two faults, which could undo each other."""
        self._spent: set[Place | None] = set()

    def spend(self, *records: Produced) -> None:
        """Keep records out of further faults."""
        self._spent.update(record.place for record in records)

    def unspent(self, outcome: Outcome = Outcome.COMMITTED) -> list[Produced]:
        """Return the records of one outcome that are in no fault yet."""
        return [
            record
            for record in self.produced
            if record.outcome is outcome
            and record.place not in self._spent | self.elsewhere
            and (record in self.log or outcome is Outcome.ABORTED)
        ]

    def next_place(self) -> Place:
        """Return the place of the next record of the first partition."""
        self.checkpoints["t", 0] += 1
        return Place("t", 0, self.checkpoints["t", 0] - 1)


FATES = [Outcome.COMMITTED, Outcome.ABORTED, "unsure", "unknown", "elsewhere", "hole"]
SURE = [Outcome.COMMITTED] * 4 + [Outcome.ABORTED] + [Outcome.COMMITTED] * 2
"""What the first partition begins with, so that any fault finds its victims."""


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Records of all fates in one to three partitions, in the log in any order."""
    story = Story(draw(st.randoms()), [], [], set(), {})
    fates = st.lists(st.sampled_from(FATES), max_size=8)
    queues = []
    for partition in range(draw(st.integers(1, 3))):
        drawn = draw(fates)
        queue = produce(story, partition, drawn if partition else SURE + drawn)
        queues.append(queue)
    while queues := [queue for queue in queues if queue]:
        story.log.append(story.chance.choice(queues).pop(0))
    return story


def produce(story: Story, partition: int, fates: list[str]) -> list[Produced]:
    """Produce a partition's records; return those that belong into the log."""
    logged = []
    for offset, fate in enumerate(fates):
        place = Place("t", partition, offset)
        record = Produced(place, f"{partition}.{offset}")
        if fate == "hole":
            continue
        if fate == "elsewhere":
            story.elsewhere.add(place)
        elif fate == "unsure":
            record = replace(record, outcome=Outcome.PENDING)
        elif fate == Outcome.ABORTED:
            record = replace(record, outcome=Outcome.ABORTED)
        arrives = fate in {Outcome.COMMITTED, "unknown"} or (
            fate == "unsure" and story.chance.random() < 0.5
        )
        logged += [record] * arrives
        unknown = replace(record, place=None, outcome=Outcome.PENDING)
        story.produced.append(unknown if fate == "unknown" else record)
    story.checkpoints["t", partition] = len(fates)
    # Acknowledged, and not read yet.
    late = Place("t", partition, len(fates) + 10)
    story.produced.append(Produced(late, f"{partition}.late"))
    return logged


def rows_of(story: Story) -> list[Row]:
    """Return the log, numbered."""
    return [
        Row(position, record.place, record.payload)
        for position, record in enumerate(story.log, start=1)
        if record.place is not None
    ]


def read(story: Story, after: int) -> Seen:
    """Read some rows behind a position, page by page."""
    pages: Seen = []
    rows = rows_of(story)[after:]
    while rows:
        size = story.chance.randint(1, 4)
        page = [(row.position, str(row.payload)) for row in rows[:size]]
        rows = rows[size:]
        head = story.chance.randint(page[-1][0], len(story.log))
        pages.append((head, page))
    return pages


def told(story: Story) -> History:
    """Return the history of a story."""
    story.reader = read(story, 0) if story.reader is None else story.reader
    after = story.chance.randint(0, len(story.log))
    pages = read(story, after)[: story.chance.randint(0, 3)]
    rows = rows_of(story)
    story.chance.shuffle(rows)
    return History(
        produced=story.produced,
        rows=rows,
        checkpoints=story.checkpoints,
        cursors=[reader("all", story.reader), reader("some", pages, after)],
        elsewhere=story.elsewhere,
    )


def reader(name: str, seen: Seen, after: int = 0) -> Cursor:
    """Return a cursor that was given so much."""
    pages = tuple(Page(head, tuple(page)) for head, page in seen)
    return Cursor(name, pages, after)


# --- faults ------------------------------------------------------------------


def lose(story: Story) -> None:
    """Leave a record out of the log."""
    victim = story.chance.choice(story.unspent())
    story.log.remove(victim)
    story.spend(victim)


def keep_again(story: Story) -> None:
    """Put a record into the log a second time."""
    victim = story.chance.choice(story.unspent())
    first = story.log.index(victim)
    story.log.insert(story.chance.randint(first + 1, len(story.log)), victim)
    story.spend(victim)


def send_again(story: Story) -> None:
    """Let a producer send a message twice, and keep it twice."""
    victim = story.chance.choice(story.unspent())
    again = replace(victim, place=story.next_place())
    story.produced.append(again)
    story.log.append(again)
    story.spend(victim, again)


def keep_dropped(story: Story) -> None:
    """Keep a record that was dropped as a duplicate, too."""
    victim = Produced(story.next_place(), "dropped and kept")
    assert victim.place is not None
    story.produced.append(victim)
    story.elsewhere.add(victim.place)
    story.log.append(victim)


def reorder(story: Story) -> None:
    """Let two records of a partition change places in the log."""
    first = [each for each in story.unspent() if each.place and not each.place[1]]
    one, other = story.chance.sample(first, 2)
    at, to = story.log.index(one), story.log.index(other)
    story.log[at], story.log[to] = other, one
    story.spend(one, other)


def keep_aborted(story: Story) -> None:
    """Put an aborted record into the log, where it would belong."""
    victim = story.chance.choice(story.unspent(Outcome.ABORTED))
    assert victim.place is not None
    behind = [
        at
        for at, record in enumerate(story.log)
        if record.place and record.place[:2] == victim.place[:2]
        if record.place > victim.place
    ]
    story.log.insert(min(behind, default=len(story.log)), victim)
    story.spend(victim)


def invent(story: Story) -> None:
    """Put a record into the log that nobody produced."""
    story.log.append(Produced(story.next_place(), "invented"))


def damage(story: Story) -> None:
    """Keep something else than what was produced."""
    victim = story.chance.choice(story.unspent())
    story.log[story.log.index(victim)] = replace(victim, payload="damaged")
    story.spend(victim)


def reading(story: Story) -> Seen:
    """Return what the reader of everything was given, to be changed."""
    story.reader = read(story, 0) if story.reader is None else story.reader
    return story.reader


def skip(story: Story) -> None:
    """Keep a row, though not the last one, from the reader."""
    pages = [page for _, page in reading(story)]
    rows = [(page, row) for page in pages for row in page][:-1]
    page, row = story.chance.choice(rows)
    page.remove(row)


def repeat(story: Story) -> None:
    """Give the reader a row again."""
    pages = [page for _, page in reading(story) if page]
    at = story.chance.randrange(len(pages))
    known = [row for page in pages[: at + 1] for row in page]
    pages[at].append(story.chance.choice(known))


def swap(story: Story) -> None:
    """Give the reader two rows the wrong way round, all in one page."""
    pages = reading(story)
    rows = [row for _, page in pages for row in page]
    at = story.chance.randrange(len(rows) - 1)
    rows[at], rows[at + 1] = rows[at + 1], rows[at]
    pages[:] = [(len(story.log), rows)]


def run_ahead(story: Story) -> None:
    """Give the reader a row that was not committed yet."""
    pages = reading(story)
    at = story.chance.choice([at for at, (_, page) in enumerate(pages) if page])
    ahead = max(position for position, _ in pages[at][1])
    pages[at] = (ahead - 1, pages[at][1])


def peek(story: Story) -> None:
    """Give the reader a row that another one took the place of."""
    page = story.chance.choice([page for _, page in reading(story) if page])
    page[0] = (page[0][0], "rolled back")


def dream(story: Story) -> None:
    """Give the reader a row that never came to be, at a head that never was."""
    pages = reading(story)
    position = len(story.log) + 1
    pages.append((position, [(position, "rolled back")]))


PLANTS: list[tuple[Fault, Callable[[Story], None]]] = [
    (Fault.LOST, lose),
    (Fault.DUPLICATE, keep_again),
    (Fault.DUPLICATE, send_again),
    (Fault.DUPLICATE, keep_dropped),
    (Fault.REORDERED, reorder),
    (Fault.ABORTED_READ, keep_aborted),
    (Fault.FUTURE_READ, invent),
    (Fault.FUTURE_READ, damage),
    # The log is complete from here on: these are about its reader.
    (Fault.SKIPPED, skip),
    (Fault.INVERTED, repeat),
    (Fault.INVERTED, swap),
    (Fault.FUTURE_READ, run_ahead),
    (Fault.FUTURE_READ, peek),
    (Fault.FUTURE_READ, dream),
]


# --- tests -------------------------------------------------------------------


@given(stories())
def test_nothing_is_found_where_nothing_is_wrong(story: Story) -> None:
    """Holes, aborted, pending and unread records are no faults."""
    assert check(told(story)) == []


def test_every_fault_is_planted() -> None:
    """A class without a planted fault would be one that nobody tried."""
    assert {fault for fault, _ in PLANTS} == set(Fault)
    assert len(Fault) == 7


@pytest.mark.parametrize(("fault", "plant"), PLANTS)
@given(story=stories())
def test_a_planted_fault_is_found_as_what_it_is(
    fault: Fault, plant: Callable[[Story], None], story: Story
) -> None:
    """It is named once at least, and nothing else is."""
    plant(story)

    assert {finding.fault for finding in check(told(story))} == {fault}


PAIRS = [(one, two) for one, two in combinations(PLANTS, 2) if one[0] != two[0]]


@given(stories(), st.sampled_from(PAIRS))
def test_two_planted_faults_are_both_found(
    story: Story,
    pair: tuple[tuple[Fault, Callable[[Story], None]], ...],
) -> None:
    """One fault does not hide another."""
    for _, plant in pair:
        plant(story)

    found = {finding.fault for finding in check(told(story))}

    assert found == {fault for fault, _ in pair}


def history(
    *records: tuple[int, str | None], cursors: Sequence[Cursor] = ()
) -> History:
    """Return the history of a log of one partition: offsets and payloads, in order."""
    rows = [
        Row(position, Place("t", 0, offset), payload)
        for position, (offset, payload) in enumerate(records, start=1)
    ]
    return History(
        produced=[Produced(row.place, row.payload) for row in rows],
        rows=rows,
        checkpoints={("t", 0): max(offset for offset, _ in records) + 1},
        cursors=cursors,
    )


def test_a_record_is_not_lost_before_its_turn() -> None:
    """A checkpoint is the offset to read next: that record need not be there yet."""
    early = Produced(Place("t", 0, 2), "c")
    good = history((0, "a"), (1, "b"))
    good = replace(good, produced=[*good.produced, early])

    assert check(good) == []
    late = replace(good, checkpoints={("t", 0): 3})
    assert check(late) == [Finding(Fault.LOST, "t[0]@2", early)]


def test_every_record_behind_a_later_one_is_found() -> None:
    """Each is named by its position, for whoever has to look for the reason."""
    found = check(history((0, "a"), (3, "d"), (1, "b"), (2, "c")))

    assert [(each.fault, each.where) for each in found] == [
        (Fault.REORDERED, "position 3"),
        (Fault.REORDERED, "position 4"),
    ]


def test_equal_payloads_are_allowed_where_places_tell_messages_apart() -> None:
    """Without deduplication, the same words twice are two messages."""
    twice = history((0, "a"), (1, "a"))

    assert [found.fault for found in check(twice)] == [Fault.DUPLICATE]
    assert check(replace(twice, message=by_place)) == []


def test_no_two_tombstones_are_one_message() -> None:
    """SEED H12: they have no payload by which they could be told apart."""
    assert check(history((0, None), (1, None))) == []


def test_a_reader_may_pass_rows_that_do_not_concern_it() -> None:
    """Those that do concern it, it may not pass, even without a row behind them."""
    page = Page(head=3, seen=((1, "a"),), reached=3)
    cursor = Cursor("odd", (page,), wants=lambda row: row.position == 1)
    records = (0, "a"), (1, "b"), (2, "c")

    assert check(history(*records, cursors=[cursor])) == []
    cursor = replace(cursor, wants=lambda row: row.position != 2)
    (found,) = check(history(*records, cursors=[cursor]))
    assert (found.fault, found.where) == (Fault.SKIPPED, "odd, position 3")


def test_one_position_for_two_rows_is_a_duplicate() -> None:
    """The database forbids it; the checker does not take its word for it."""
    good = history((0, "a"), (1, "b"))
    bad = replace(good, rows=[replace(row, position=1) for row in good.rows])

    assert [found.fault for found in check(bad)] == [Fault.DUPLICATE]
