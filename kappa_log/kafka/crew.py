"""Crew: the listeners of one process, each in threads of its own; one end for all.

A listener has as many consumers as its ``max_concurrency``, of one group, each with a
handler of its own. No handler is started before all have found their topics: a topic
that is missing is told while nobody is at work. A consumer that crashes is made anew
and goes on where SQL says, after a wait that grows. What a new one would meet again
ends all: wrong settings, a source that is not what it was, records deleted unread, a
database that refuses. So does whatever comes before a consumer first read, since that
is told best where it was started.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kappa_log.config import Config, ListenerConfig, RestartConfig
from kappa_log.errors import (
    ConfigError,
    HandlerError,
    KappaLogError,
    SourceError,
    UsageError,
    message_of,
)
from kappa_log.ingest import Clock
from kappa_log.kafka.consume import (
    CLOSE_SECONDS,
    STOP_SECONDS,
    ConsumeReport,
    Consumption,
    Options,
    Tally,
    Watch,
)
from kappa_log.listeners import configured_listener
from kappa_log.storage.database import Database
from kappa_log.telemetry import notices

_TICK_SECONDS = 0.1


class Post(msgspec.Struct, frozen=True):
    """What one consumer does, and how it is made, again if need be."""

    restart: RestartConfig | None
    """None lets the first crash end all."""
    make: Callable[[Tally], Consumption]


def posts(
    database: Database,
    config: Config,
    sections: Sequence[ListenerConfig],
    *,
    clock: Clock,
    options: Options,
    watch: Watch,
) -> Iterator[Post]:
    """Yield a post for each consumer of each listener; arguments as `Consumption`.

    A run until the end is not supervised: who waits for it wants to know.
    """

    def maker(section: ListenerConfig, number: int) -> Callable[[Tally], Consumption]:
        def make(tally: Tally) -> Consumption:
            return Consumption(
                database,
                config.of_listener(section),
                configured_listener(section, config),
                section,
                clock=clock,
                options=options,
                watch=watch,
                number=number,
                tally=tally,
            )

        return make

    for section in sections:
        restart = None if options.until_end else section.restart
        for number in range(1, section.max_concurrency + 1):
            yield Post(restart, maker(section, number))


class _Member:
    """One consumer at work, and those that take its place."""

    def __init__(
        self,
        post: Post,
        gate: threading.Barrier,
        stop: threading.Event,
        news: threading.Event,
        on_notice: Callable[[str], None],
    ) -> None:
        """Make the first one, which may be refused; it does not work yet."""
        self._post = post
        self._gate = gate
        self._stop = stop
        self._news = news
        self._on_notice = on_notice
        self._tally = Tally()
        self._has_begun = False
        self._consumption = post.make(self._tally)
        self.id = self._consumption.id
        self.is_in = False
        self.is_at_work = True
        self.report: ConsumeReport | None = None
        self.error: BaseException | None = None
        # A daemon: what hangs in a client's or a driver's call cannot keep us.
        self.thread = threading.Thread(target=self._work, name=self.id, daemon=True)

    def dismiss(self) -> None:
        """Let its consumer go, which never worked."""
        self._consumption.close()

    def _work(self) -> None:
        try:
            if self._is_let_in():
                self.report = self._supervised()
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            self.error = error
        finally:
            self.is_at_work = False
            self._news.set()

    def _is_let_in(self) -> bool:
        """Wait until all are prepared; tell whether all are, and nobody is to stop."""
        try:
            self._consumption.prepare()
        except BaseException:
            self._gate.abort()
            self.dismiss()
            raise
        try:
            self._gate.wait()
        except threading.BrokenBarrierError:
            self.dismiss()
            self.report = self._consumption.report()
            return False
        self.is_in = True
        return True

    def _supervised(self) -> ConsumeReport:
        """Consume, and begin again after each crash that may pass."""
        crashes = 0
        while True:
            before = self._tally.batches
            try:
                return self._consumption.run(self._stop)
            except Exception as error:
                self._has_begun |= self._consumption.has_begun
                # What committed anything works: its next crash is the first again.
                crashes = 1 if self._tally.batches > before else crashes + 1
                if not self._may_restart(error, crashes):
                    raise
                if self._stop.wait(self._pause(error, crashes)):
                    return self._consumption.report()
            self._consumption = self._post.make(self._tally)

    def _may_restart(self, error: Exception, crashes: int) -> bool:
        restart = self._post.restart
        if restart is None or not self._has_begun or self._stop.is_set():
            return False
        is_final = isinstance(error, KappaLogError) and not (
            # Its handler could start before.
            error.retryable or isinstance(error, HandlerError)
        )
        return not is_final and (restart.max is None or crashes <= restart.max)

    def _pause(self, error: Exception, crashes: int) -> float:
        """Return how many seconds to wait, and tell."""
        restart = self._post.restart
        assert restart is not None, "it may restart"
        longest = min(restart.min_ms * 2 ** min(crashes - 1, 32), restart.max_ms)
        # Jitter: consumers that crashed together do not come back together.
        seconds = random.uniform(longest / 2, longest) / 1000  # noqa: S311
        facts = {
            "listener_id": self.id,
            "retry_count": crashes,
            "waiting_time": round(seconds, 3),
        }
        notices.tell("listener_crashed", facts, error=error)
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
        self._on_notice(
            f"{self.id}: crashed: {type(error).__name__}: {message_of(error)}{place}; "
            f"begins again in {seconds:.1f} s, where the log says"
        )
        return seconds


def work(
    crew_posts: Sequence[Post],
    stop: threading.Event,
    on_notice: Callable[[str], None],
) -> list[ConsumeReport]:
    """Run consumers until each is at its end, one fails, or all are told to stop.

    Whoever is told to stop ends its batch or lets it roll back, within five seconds.
    Nothing waits on `stop`, so a signal handler may set it: one that interrupts a wait
    on the same event in its own thread would wait for ever.

    Returns:
        The reports, in the order of the posts; one that did not end in time has none.

    Raises:
        ConfigError: Some cannot be made; all that is wrong with any is told, by lines.
        SourceError: Some have no topic, told in the same way; no handler was started.
        KappaLogError: What the first consumer that failed for good raised; the others
            were stopped.
    """
    together = threading.Event()
    gate = threading.Barrier(max(1, len(crew_posts)))
    news = threading.Event()
    crew = _made(crew_posts, gate, together, news, on_notice)
    for member in crew:
        member.thread.start()
    try:
        while _at_work(crew) and not _failed(crew) and not stop.is_set():
            news.wait(_TICK_SECONDS)
            news.clear()
    finally:
        ids = [member.id for member in crew]
        notices.tell("run_stopping", {"listener_ids": ids})
        together.set()
        gate.abort()
        end = time.monotonic() + STOP_SECONDS + CLOSE_SECONDS + 0.5
        for member in crew:
            member.thread.join(max(0.0, end - time.monotonic()))
    _raise_first(_failed(crew))
    for member in _at_work(crew):
        on_notice(f"{member.id} did not end in time: its last batch rolls back")
    return [member.report for member in crew if member.report is not None]


def _raise_first(failed: Sequence[_Member]) -> None:
    """Raise what ended a crew: of those that could not begin, all that was wrong."""
    errors = [member.error for member in failed if member.error is not None]
    if not errors:
        return
    first = errors[0]
    said = dict.fromkeys(
        str(member.error)
        for member in failed
        if not member.is_in and isinstance(member.error, KappaLogError)
    )
    if len(said) > 1 and type(first) in (SourceError, UsageError):
        raise type(first)("\n".join(said)) from first
    raise first


def _made(
    crew_posts: Sequence[Post],
    gate: threading.Barrier,
    stop: threading.Event,
    news: threading.Event,
    on_notice: Callable[[str], None],
) -> list[_Member]:
    made: list[_Member] = []
    wrong: list[str] = []
    for post in crew_posts:
        try:
            made.append(_Member(post, gate, stop, news, on_notice))
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        for member in made:
            member.dismiss()
        # Consumers of one listener are refused in the same words.
        raise ConfigError("\n".join(dict.fromkeys(wrong)))
    return made


def _at_work(crew: Sequence[_Member]) -> list[_Member]:
    return [member for member in crew if member.is_at_work]


def _failed(crew: Sequence[_Member]) -> list[_Member]:
    return [member for member in crew if member.error is not None]
