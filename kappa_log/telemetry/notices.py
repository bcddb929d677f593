"""Notices: what happens to records, batches and folds, told to who subscribed.

The first six have the names, the order and the payload's keys of the system that
kappa_log succeeds. What is announced of an outcome (acknowledged, skipped, already
consumed, failed) is told once its batch is committed, so nothing is told that rolls
back; a call of a handler is told when it was made, and again when it is repeated.

Without subscribers a batch costs one look into a set. A subscriber that raises breaks
nothing: its first error is logged, and it goes on being told.
"""

from __future__ import annotations

import fnmatch
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec

from kappa_log.errors import UsageError, message_of

NAMES: Mapping[str, str] = {
    "event_already_exists_check": "It was looked up whether the log has a record.",
    "event_action": "Decoder and handler had it; an exception if it is tried again.",
    "event_acknowledged": "A record became an event, and is committed.",
    "event_skipped": "A record became no event: skipped, or kept as a failure.",
    "event_already_consumed": "A record repeats an event, and is kept as a duplicate.",
    "around_consume": "All that became of an attempt at a record was told.",
    "record_failed": "A record is kept as a failure, with its error.",
    "record_parked": "A record waits behind a failure of its key.",
    "record_retried": "A record's handler raised; it is tried again in its place.",
    "batch_committed": "A batch is in the log.",
    "failure_settled": "A kept failure became an event, a skip or a duplicate.",
    "partition_read": "How far a partition of a topic is read.",
    "handler_started": "The handler of a consumer is ready.",
    "listener_started": "A consumer begins to read.",
    "listener_stopping": "A consumer was asked to stop; its batch at hand ends.",
    "retry_aborted": "A record waits to be tried again, and its consumer stops.",
    "handler_stopped": "The handler of a consumer was told to stop.",
    "listener_stopped": "A consumer has left its group.",
    "listener_crashed": "A consumer crashed; another takes its place after a wait.",
    "run_stopping": "All consumers of a run are told to stop.",
    "projection_folded": "Rows and cursor of a build were written.",
    "projection_seen_to": "A live build is at the head, or waits at its cursor.",
}
"""Name → what it tells."""

OF_RECORDS = frozenset(list(NAMES)[:9])
"""Those of single records."""

_LOGGER = logging.getLogger("kappa_log.telemetry")


class Notice(msgspec.Struct, frozen=True):
    """Something that happened.

    ``exception`` ([class, message]) and ``exception_object`` are in the payload of
    what ended by one.
    """

    name: str
    payload: dict[str, Any]
    """Of this notice alone: changing it changes no other."""
    duration: float
    """Milliseconds that it took; 0 for what takes no time."""


Subscriber = Callable[[Notice], object]


class Subscription:
    """A subscriber and what it is told, until it is cancelled.

    Use as a context, or call `cancel`.
    """

    def __init__(self, pattern: str, subscriber: Subscriber) -> None:
        self.pattern = pattern
        self._subscriber = subscriber
        self._has_raised = False

    def cancel(self) -> None:
        """Tell it nothing more; harmless if it is cancelled already."""
        with _lock:
            for name, known in _subscriptions.items():
                _subscriptions[name] = tuple(s for s in known if s is not self)
            _look_again()

    def tell(self, notice: Notice) -> None:
        """Call the subscriber; its first error is logged, and none is raised."""
        try:
            self._subscriber(notice)
        except Exception as error:  # noqa: BLE001 - it must not break what it hears of
            if not self._has_raised:
                self._has_raised = True
                _LOGGER.error(  # noqa: TRY400 - one line, as all that people are told
                    "a subscriber of %r raised %r at %r; nothing else was affected, "
                    "and this is not told again",
                    self.pattern,
                    error,
                    notice.name,
                )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel it."""
        self.cancel()


_lock = threading.Lock()
_subscriptions: dict[str, tuple[Subscription, ...]] = dict.fromkeys(NAMES, ())
_heard: frozenset[str] = frozenset()
"""Names that somebody subscribed to."""


def _look_again() -> None:
    global _heard  # noqa: PLW0603 - one look into a set is all that silence may cost
    _heard = frozenset(name for name, known in _subscriptions.items() if known)


def subscribe(pattern: str, subscriber: Subscriber) -> Subscription:
    """Let a function be told of what happens in this process.

    Args:
        pattern: A name of `NAMES`, or several by ``*``, as in ``event_*``. The names
            of old may have ``db_checkpoint.`` in front.
        subscriber: Called with a `Notice`, in the thread in which it happened.

    Raises:
        UsageError: Nothing has such a name.
    """
    wanted = pattern.removeprefix("phobos.").removeprefix("db_checkpoint.")
    names = fnmatch.filter(NAMES, wanted)
    if not names:
        msg = f"nothing is told under {pattern!r}; there are: {', '.join(NAMES)}"
        raise UsageError(msg)
    made = Subscription(pattern, subscriber)
    with _lock:
        for name in names:
            _subscriptions[name] += (made,)
        _look_again()
    return made


def is_heard(name: str) -> bool:
    """Tell whether anybody wants to know."""
    return name in _heard


def records_are_heard() -> bool:
    """Tell whether anybody wants to know of single records."""
    return not OF_RECORDS.isdisjoint(_heard)


def tell(
    name: str,
    payload: Mapping[str, Any],
    *,
    seconds: float = 0.0,
    error: BaseException | None = None,
) -> None:
    """Tell subscribers that something happened.

    Args:
        name: One of `NAMES`.
        payload: Facts about it; each subscriber is given a copy.
        seconds: How long it took.
        error: What ended it.
    """
    for subscription in _subscriptions[name]:
        facts = dict(payload)
        if error is not None:
            facts["exception"] = [type(error).__name__, message_of(error)]
            facts["exception_object"] = error
        subscription.tell(Notice(name, facts, seconds * 1000))


class Attempt(msgspec.Struct):
    """One attempt at one record, told step by step in the order of old."""

    payload: dict[str, Any]
    begun: float
    outcome: str = ""
    """acked, skipped, duplicate, failed, refused, parked, stopped, or, for a failure
    that is read once more, kept."""
    error: BaseException | None = None
    decided: float = 0.0
    waiting_time: float = 0.0
    """Seconds until it is tried again; of what is stopped."""

    @classmethod
    def begin(cls, payload: dict[str, Any], looked_up: float) -> Attempt:
        """Tell that a record's message was looked up, in so many seconds."""
        tell("event_already_exists_check", payload, seconds=looked_up)
        return cls(payload, time.perf_counter())

    def decide(self, outcome: str, error: BaseException | None) -> None:
        """Note what became of it, and tell of the handler's call, if there was one."""
        self.outcome, self.error = outcome, error
        self.decided = time.perf_counter()
        if outcome in ("acked", "skipped", "failed", "stopped"):
            tell(
                "event_action",
                self.payload,
                seconds=self.decided - self.begun,
                error=error if outcome == "stopped" else None,
            )

    def end(self, position: int | None = None) -> None:
        """Tell what became of it, now that it is committed.

        Args:
            position: Of the event that it became.
        """
        now = time.perf_counter()
        facts = self.payload
        match self.outcome:
            case "acked":
                tell(
                    "event_acknowledged",
                    facts | {"position": position},
                    seconds=now - self.decided,
                )
            case "duplicate":
                tell("event_already_consumed", facts)
            case "skipped" | "kept":
                tell("event_skipped", facts)
            case "failed" | "refused":
                tell("event_skipped", facts)
                tell("record_failed", facts, error=self.error)
            case "parked":
                tell("record_parked", facts)
            case _:
                waiting = {"waiting_time": round(self.waiting_time, 3)}
                tell("record_retried", facts | waiting, error=self.error)
        is_raised = self.outcome == "stopped"
        tell(
            "around_consume",
            facts,
            seconds=now - self.begun,
            error=self.error if is_raised else None,
        )
