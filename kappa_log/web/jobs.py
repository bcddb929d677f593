"""Jobs: replays that go on after their request was answered.

A job is a thread of this server. What it does is a row of the log, so a server that is
killed loses nothing but the thread: the replay is resumed by its id, here or anywhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kappa_log.app import acting_as
from kappa_log.errors import AlreadyRunning, KappaLogError
from kappa_log.project import FoldProgress
from kappa_log.steps import ReplayReport

MAX_JOBS = 4
"""Replays that one server runs at a time; each projection has one at most."""

STOP_SECONDS = 10
"""How long a job may take to notice that it is to stop."""

_logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The job was told to stop; its replay can be resumed."""


class Job:
    """One replay at work in this server."""

    def __init__(self, work: Callable[[Job], ReplayReport], who: str) -> None:
        self.id: int | None = None
        """Of its replay, once it has one."""
        self.progress: FoldProgress | None = None
        self.report: ReplayReport | None = None
        self.error: Exception | None = None
        self._work = work
        self._who = who
        self._settled = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether it is at work."""
        return self._thread.is_alive()

    def begin(self) -> None:
        """Start it, and wait until it is a row, or has ended without one.

        Raises:
            KappaLogError: It could not begin.
        """
        self._thread.start()
        self._settled.wait()
        if self.id is None and self.error is not None:
            raise self.error

    def started(self, identifier: int) -> None:
        """Remember the id of its replay."""
        self.id = identifier
        self._settled.set()

    def on_progress(self, progress: FoldProgress) -> None:
        """Note how far it is, and stop where it was asked to."""
        self.progress = progress
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Ask it to stop after what it is writing."""
        self._stop.set()

    def wait(self, seconds: float) -> bool:
        """Wait for its end; tell whether it ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with acting_as(self._who):
                self.report = self._work(self)
        except Stopped:
            pass
        except KappaLogError as error:
            self.error = error
        except Exception as error:
            _logger.exception("a replay failed")
            self.error = error
        finally:
            self._settled.set()


class Jobs:
    """The jobs of one server."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._lock = threading.Lock()

    def start(self, work: Callable[[Job], ReplayReport], who: str) -> Job:
        """Start a job and return it once it is a row.

        Raises:
            AlreadyRunning: This server runs as many as it may.
            KappaLogError: It could not begin.
        """
        job = Job(work, who)
        with self._lock:
            running = [known for known in self._jobs if known.is_running]
            if len(running) >= MAX_JOBS:
                msg = f"{MAX_JOBS} replays run in this server; wait for one of them"
                raise AlreadyRunning(msg)
            # The ended ones are kept for their errors, but not for ever.
            self._jobs = [*self._jobs[-100:], job]
        job.begin()
        return job

    def of(self, identifier: int) -> Job | None:
        """Return the newest job of a replay, if this server has or had one."""
        mine = [job for job in self._jobs if job.id == identifier]
        return mine[-1] if mine else None

    def running(self) -> set[int]:
        """Return the replays at work now, by id."""
        return {job.id for job in self._jobs if job.id is not None and job.is_running}

    def tell_to_stop(self) -> None:
        """Tell all jobs to stop; their replays can be resumed."""
        for job in self._jobs:
            job.stop()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Stop all jobs, and wait so long in all for their ends."""
        self.tell_to_stop()
        last = time.monotonic() + seconds
        for job in self._jobs:
            job.wait(max(0.0, last - time.monotonic()))
