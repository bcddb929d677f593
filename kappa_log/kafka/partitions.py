"""Partitions: those that are assigned to us, whose lanes we hold, what is gathered.

A record is believed only while its partition is *settled*: assigned, its lane taken in
SQL, and the consumer set to the offset that SQL says. All other records are dropped;
they will come again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from confluent_kafka import (
    OFFSET_END,
    Consumer,
    KafkaException,
    Message,
    TopicPartition,
)

from kappa_log.decide import Portion, Stopped
from kappa_log.kafka.lanes import At, Held, LaneKeeper
from kappa_log.listeners import Listener
from kappa_log.records import Record


class Intake(msgspec.Struct):
    """What is gathered of one partition for the next batch."""

    position: int
    """Offset after the last record: where the consumer itself stands."""
    records: list[Record] = []
    is_at_end: bool = False


class _Later(msgspec.Struct, frozen=True):
    """A record that is tried again, in its place, when its time comes."""

    offset: int
    attempt: int
    until: float
    """Of the monotonic clock."""


class Partitions:
    """The partitions of one consumer.

    Args:
        consumer: Whose they are.
        keeper: Takes their lanes.
        is_cooperative: They come and go one by one, not all at once.
    """

    def __init__(
        self, consumer: Consumer, keeper: LaneKeeper, *, is_cooperative: bool
    ) -> None:
        self._consumer = consumer
        self._keeper = keeper
        self._is_cooperative = is_cooperative
        self._is_paused = False
        self._held: dict[At, Held] = {}
        self._intakes: dict[At, Intake] = {}
        self._later: dict[At, _Later] = {}
        self.assigned: set[At] = set()

    @property
    def unsettled(self) -> set[At]:
        """Those that records are not believed of yet, but for those that wait."""
        now = time.monotonic()
        waiting = {at for at, later in self._later.items() if now < later.until}
        return self.assigned - self._intakes.keys() - waiting

    @property
    def gathered(self) -> int:
        """How many records are gathered."""
        return sum(len(intake.records) for intake in self._intakes.values())

    @property
    def held(self) -> list[Held]:
        """The lanes that are ours, in order."""
        return [self._held[at] for at in sorted(self._held)]

    @property
    def behind(self) -> int:
        """Offsets that the brokers have beyond what is written, as last heard of."""
        return sum(self.behind_of(at) or 0 for at in self._held)

    def behind_of(self, at: At) -> int | None:
        """Return the offsets that a broker has beyond what is written of a partition.

        None if it is not ours, or nothing was heard of its end.
        """
        held = self._held.get(at)
        ends = self._consumer.get_watermark_offsets(TopicPartition(*at), cached=True)
        if held is None or ends is None:
            return None
        return max(0, ends[1] - held.assignment.next_offset)

    @property
    def is_read(self) -> bool:
        """Tell whether each one is read to its end, and all of it written."""
        return all(
            (intake := self._intakes.get(at)) is not None
            and intake.is_at_end
            and self._held[at].assignment.next_offset == intake.position
            for at in self.assigned
        )

    # --- who has what ---------------------------------------------------------

    def take(self, wanted: Iterable[At]) -> list[str]:
        """Take lanes anew; return which gaps were passed over, in words."""
        wanted = set(wanted)
        for at in wanted:
            self._held.pop(at, None)
        if not wanted:
            return []
        taken = self._keeper.take(wanted)
        self._held |= taken.held
        return taken.gaps

    def begin(self, new: set[At]) -> None:
        """Tell the consumer where new partitions begin.

        One whose lane could not be taken yet waits at no place, and paused.
        """
        self.assigned |= new
        parts = [
            TopicPartition(
                *at,
                held.assignment.next_offset
                if (held := self._held.get(at)) is not None
                else OFFSET_END,
            )
            for at in sorted(new)
        ]
        if self._is_cooperative:
            self._consumer.incremental_assign(parts)
        else:
            self._consumer.assign(parts)
        taken = new & self._held.keys()
        for at in taken:
            self._intakes[at] = Intake(self._held[at].assignment.next_offset)
        # The client keeps in mind, beyond an assignment, that a partition was paused.
        self._consumer.resume([TopicPartition(*at) for at in taken])
        self._consumer.pause([TopicPartition(*at) for at in new - taken])

    def let_go(self, gone: Iterable[At]) -> None:
        """Drop what is not ours any more, and what was gathered of it."""
        for at in gone:
            self.assigned.discard(at)
            self.forget(at)

    def forget(self, at: At) -> None:
        """Let a lane be taken anew."""
        self._held.pop(at, None)
        self._intakes.pop(at, None)
        self._later.pop(at, None)

    def unsettle(self, moved: Iterable[Held]) -> None:
        """Believe nothing of lanes that were moved behind our back, until SQL is asked.

        One that we moved ourselves since is another one by now.
        """
        for old in moved:
            if self._held.get(old.at) == old:
                self._intakes.pop(old.at, None)

    def reset(self) -> None:
        """Drop what is gathered; nothing is believed until SQL was asked again."""
        self._intakes.clear()
        self.pause()

    def settle(self) -> list[str]:
        """Find out by SQL where unsettled lanes stand, and seek there.

        Returns:
            The gaps that were passed over, in words.

        Raises:
            KappaLogError: As `LaneKeeper.take`; what is not settled stays so.
        """
        wanted = self.unsettled
        found = self._keeper.reread(self._held[at] for at in wanted & self._held.keys())
        self._held |= found
        gaps = self.take(wanted - found.keys())
        for at in sorted(wanted & self._held.keys()):
            self._seek(at)
        return gaps

    def _seek(self, at: At) -> None:
        offset = self._held[at].assignment.next_offset
        try:
            self._consumer.seek(TopicPartition(*at, offset))
        except KafkaException:
            self._begin_again(at)
            return
        self._consumer.resume([TopicPartition(*at)])
        self._intakes[at] = Intake(offset)

    def _begin_again(self, at: At) -> None:
        """Begin a partition whose fetching has not begun yet, or ended by an error."""
        try:
            if self._is_cooperative:
                self._consumer.incremental_unassign([TopicPartition(*at)])
            self.begin({at} if self._is_cooperative else set(self.assigned))
        except KafkaException:
            # It is about to be taken away: a later turn knows.
            return

    # --- records --------------------------------------------------------------

    def standing(self) -> dict[At, Intake]:
        """Return what is gathered into, to be shown to `believes` after a poll."""
        return dict(self._intakes)

    def believes(self, message: Message, standing: Mapping[At, Intake]) -> bool:
        """Tell whether a message is of its partition as that stood before the poll.

        While the client is polled a partition may go, and come back at another
        offset. What the same poll returns was fetched before that or after, and
        nobody can tell which: the partition seeks once more.
        """
        at = at_of(message)
        if self._intakes.get(at) is standing.get(at):
            return True
        self._intakes.pop(at, None)
        return False

    def take_in(self, message: Message) -> None:
        """Gather a record, if it is believed."""
        intake = self._intakes.get(at_of(message))
        offset: Any = message.offset()
        if intake is None or offset < intake.position:
            return
        headers: Any = message.headers()
        kind, timestamp = message.timestamp()
        intake.records.append(
            Record(
                offset,
                message.value(),
                message.key(),
                tuple(headers) if headers else (),
                timestamp if kind else None,
            )
        )
        intake.position = offset + 1
        intake.is_at_end = False

    def note_end(self, message: Message) -> None:
        """Note a partition's end; holes before it have no records, and are passed."""
        at, end = at_of(message), message.offset()
        intake = self._intakes.get(at)
        if intake is None or end is None:
            return
        # What the client reports of before the last seek, it drops itself.
        intake.position = max(end, intake.position)
        intake.is_at_end = end == intake.position

    def portions(self, listener: Listener) -> list[Portion]:
        """Return what is gathered as portions of a batch, and gather anew."""
        return list(self._portions(listener))

    def _portions(self, listener: Listener) -> Iterator[Portion]:
        for at, intake in self._intakes.items():
            held = self._held[at]
            if held.assignment.next_offset < intake.position:
                yield Portion(
                    held.lane,
                    held.assignment,
                    listener,
                    intake.records,
                    intake.position,
                    attempt=self._attempts(at, held),
                )
                intake.records = []

    def _attempts(self, at: At, held: Held) -> int:
        """Return how often the next record of a lane was tried."""
        later = self._later.get(at)
        is_next = later is not None and later.offset == held.assignment.next_offset
        return later.attempt if later is not None and is_next else 0

    def written(self, portion: Portion, to_offset: int) -> bool:
        """Move a lane that was written; tell whether it still is ours.

        It may have been lost, and even taken anew, while it was written.
        """
        at = portion.lane.topic, portion.lane.partition
        held = self._held.get(at)
        if held is None or held.assignment != portion.held:
            return False
        self._held[at] = held.moved(to_offset)
        later = self._later.get(at)
        if later is not None and later.offset < to_offset:
            del self._later[at]
        return True

    def hold_back(self, at: At, stopped: Stopped) -> None:
        """Let a partition wait until its next record is tried again."""
        until = time.monotonic() + stopped.wait
        self._later[at] = _Later(stopped.offset, stopped.attempt, until)
        self._intakes.pop(at, None)
        self._consumer.pause([TopicPartition(*at)])

    def held_back(self) -> list[dict[str, Any]]:
        """Return topic, partition, offset and attempts of what is to be tried again."""
        return [
            {
                "topic": topic,
                "partition": partition,
                "offset": later.offset,
                "retry_count": later.attempt,
            }
            for (topic, partition), later in self._later.items()
        ]

    # --- flow -----------------------------------------------------------------

    def pause(self) -> None:
        """Let nothing come; polling goes on."""
        if not self._is_paused and self.assigned:
            self._consumer.pause([TopicPartition(*at) for at in self.assigned])
            self._is_paused = True

    def resume(self) -> None:
        """Let settled partitions flow again; the others wait for their seek."""
        settled = self.assigned & self._intakes.keys()
        if self._is_paused and settled:
            self._consumer.resume([TopicPartition(*at) for at in settled])
        self._is_paused = False


def at_of(found: Message | TopicPartition) -> At:
    """Return the topic and partition of what the client hands out."""
    if isinstance(found, TopicPartition):
        return found.topic, found.partition
    return found.topic() or "", found.partition() or 0
