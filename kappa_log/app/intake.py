"""Intake: files and topics into the log, and records into topics."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kappa_log import ingest
from kappa_log.app.base import POLL_SECONDS
from kappa_log.app.replaying import Replaying
from kappa_log.config import ListenerConfig
from kappa_log.errors import KappaLogError
from kappa_log.files import LineFile
from kappa_log.handler import FieldOptions
from kappa_log.ingest import IngestProgress, IngestReport
from kappa_log.listeners import (
    listener_for,
    section_for,
    sections_named,
)

if TYPE_CHECKING:
    from kappa_log.kafka.consume import ConsumeProgress, ConsumeReport
    from kappa_log.kafka.lag import PartitionLag
    from kappa_log.kafka.produce import ProduceProgress, ProduceReport
    from kappa_log.kafka.producer import Producer
    from kappa_log.phobos.importer import PhobosProgress, PhobosReport

LAST_FOLD_SECONDS = 1.5
"""How long folding may take to notice that consuming has ended; it was told when that
was, and looks after each page. What takes longer dies with the process."""


class _Over(Exception):
    """Folding is to end: what was not written yet is folded again in the next run."""


class Intake(Replaying):
    """The part that takes records in."""

    def ingest(  # noqa: PLR0913 - each is an option of one run, by its name
        self,
        file: str | Path,
        *,
        topic: str,
        group: str | None = None,
        source: str | None = None,
        fields: FieldOptions | None = None,
        dedupe: str | None = None,
        on_progress: Callable[[IngestProgress], None] | None = None,
    ) -> IngestReport:
        """Take the lines of a file into the log, from where the last run ended.

        Args:
            file: JSON lines; ``.gz`` is decompressed, ``-`` is standard input.
            topic: Topic of the events.
            group: Group of the events; that of the topic's listener, else kappa-log.
            source: Name of the source; the file's base name if None.
            fields: Which fields say entity, time, type and version, for a topic
                without a listener.
            dedupe: payload, offset, key+payload or header:NAME, for a topic
                without a listener.
            on_progress: Called after each batch.

        Raises:
            UsageError: The options contradict a listener or an earlier run.
            SourceError: The file cannot be read; what was read is kept.
            SourceDiverged: The file is not what was ingested before.
            StorageError: The database refused; what was committed is kept.
        """
        listener, stored = listener_for(self.config, topic, group, fields, dedupe)
        lines = LineFile(file, source)
        self._require()
        return ingest.ingest_file(
            self.database,
            listener,
            lines,
            fields=stored,
            batch_size=self.config.ingest.batch_size,
            clock=self._clock,
            on_progress=on_progress,
        )

    def import_phobos(
        self,
        url: str,
        *,
        source: str | None = None,
        dry_run: bool = False,
        on_progress: Callable[[PhobosProgress], None] | None = None,
    ) -> PhobosReport:
        """Bring the events and failures of Phobos DB Checkpoint into the log.

        It goes on after what is in the log already, and compares all of it at the end.

        Args:
            url: The old database, of PostgreSQL or SQLite; it is only read.
            source: Name of the source, instead of the old database's name.
            dry_run: Say what there is, and import nothing.
            on_progress: Called after each batch.

        Raises:
            SourceError: The old database cannot be read; what was imported is kept.
            SourceDiverged: It is not the one that was imported under that name.
            AlreadyRunning: Another process imports.
            StorageError: The log's database refused; what was committed is kept.
        """
        from kappa_log.phobos.importer import Importer
        from kappa_log.storage.phobos import OldDatabase

        self._require()
        with contextlib.closing(OldDatabase(url)) as old:
            importer = Importer(
                self.database, old, self._clock, name=source, on_progress=on_progress
            )
            return importer.plan() if dry_run else importer.run()

    def consume(
        self,
        listeners: Sequence[str] = (),
        *,
        stop: threading.Event | None = None,
        until_end: bool = False,
        accept_gap: bool = False,
        on_notice: Callable[[str], None] = lambda _: None,
        on_progress: Callable[[ConsumeProgress], None] = lambda _: None,
    ) -> list[ConsumeReport]:
        """Take the records of Kafka topics into the log, each once, as they come.

        Without ``until_end``, a consumer that crashed is made anew after a while.

        Args:
            listeners: Ids of configured listeners; all if empty.
            stop: Ends it when set, from any thread or signal handler, within five
                seconds.
            until_end: End when all that is assigned is read to its end.
            accept_gap: Go on where the broker deleted records before they were read.
            on_notice: Called with what people should know: assignments, troubles.
            on_progress: Called after each batch. Both from threads of the listeners.

        Raises:
            ConfigError: No such cluster, listener or handler is configured.
            SourceGap: The broker deleted what would be read next.
            SourceDiverged: A topic has other records than those that were read.
            SourceError: The cluster cannot be used.
            StorageError: The database refuses; what was committed is kept.
        """
        from kappa_log.kafka import crew
        from kappa_log.kafka.consume import Options, Watch

        sections = self._sections(listeners)
        self._require()
        posts = crew.posts(
            self.database,
            self.config,
            sections,
            clock=self._clock,
            options=Options(until_end, accept_gap),
            watch=Watch(on_notice, on_progress),
        )
        return crew.work(list(posts), stop or threading.Event(), on_notice)

    def run(
        self,
        listeners: Sequence[str] = (),
        *,
        stop: threading.Event | None = None,
        accept_gap: bool = False,
        on_notice: Callable[[str], None] = lambda _: None,
        on_progress: Callable[[ConsumeProgress], None] = lambda _: None,
    ) -> list[ConsumeReport]:
        """Consume topics and keep live builds at the head, until told to stop.

        A projection that fails is left where it is, and told, as keys are that it
        parks; all else goes on.
        Options as `consume`.
        """
        ending = stop or threading.Event()
        news = threading.Event()

        def committed(progress: ConsumeProgress) -> None:
            news.set()
            on_progress(progress)

        done = threading.Event()

        def is_over() -> bool:
            return done.is_set() or ending.is_set()

        folding = threading.Thread(
            target=self._keep_folding,
            # Imported here: an error is the caller's, and no other thread imports now.
            args=(list(self.registry.names), is_over, news, on_notice),
            name="project",
            daemon=True,
        )
        self._require()
        folding.start()
        try:
            return self.consume(
                listeners,
                stop=ending,
                accept_gap=accept_gap,
                on_notice=on_notice,
                on_progress=committed,
            )
        finally:
            done.set()
            news.set()
            folding.join(LAST_FOLD_SECONDS)

    def _keep_folding(
        self,
        names: Sequence[str],
        is_over: Callable[[], bool],
        news: threading.Event,
        on_notice: Callable[[str], None],
    ) -> None:
        """Fold what is new as soon as it is there; leave out what cannot be folded."""
        told: set[str] = set()
        while not is_over():
            news.clear()
            for name in names:
                problem = self._fold(name, is_over)
                if problem is not None and problem not in told:
                    told.add(problem)
                    on_notice(problem)
            news.wait(POLL_SECONDS)

    def _fold(self, name: str, is_over: Callable[[], bool]) -> str | None:
        """Bring one live build to the head, or stop; return why it could not be."""

        def go_on(_: object) -> None:
            if is_over():
                raise _Over

        try:
            (report,) = self.project([name], on_progress=go_on)
        except _Over:
            return None
        except KappaLogError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the others' folding goes on
            return f"projection '{name}': unexpected {type(error).__name__}: {error}"
        return report.notice

    def rewind(
        self,
        topic: str,
        partition: int,
        offset: int,
        *,
        group: str | None = None,
        accept_gap: bool = False,
    ) -> tuple[int, int]:
        """Let a partition be read again from an offset on; the log keeps what it has.

        What is kept already is recognised by its coordinates and kept once; what was
        skipped is handed to the handler again.

        Args:
            topic: Name of the topic.
            partition: Number of the partition.
            offset: What is read next.
            group: Group of the listener, if the topic has several.
            accept_gap: Take the lowest offset there is if that one was deleted.

        Returns:
            The next offset before, and now.

        Raises:
            UsageError: Nobody reads the topic, or the offset was not reached yet.
        """
        from kappa_log.kafka.cluster import Cluster
        from kappa_log.kafka.lanes import LaneKeeper

        section = section_for(self.config, topic, group)
        self._require()
        keeper = LaneKeeper(
            self.database,
            Cluster(self.config.of_listener(section)),
            section,
            clock=self._clock,
            accept_gap=accept_gap,
        )
        return keeper.rewind((topic, partition), offset)

    def lag(self, listeners: Sequence[str] = ()) -> list[PartitionLag]:
        """Return how far each partition is behind, in records and in seconds."""
        from kappa_log.kafka.lag import lag

        sections = self._sections(listeners)
        self._require()
        return [
            found
            for section in sections
            for found in lag(
                self.database,
                self.config.of_listener(section),
                section,
                self._clock(),
            )
        ]

    def produce(
        self,
        file: str | Path,
        *,
        topic: str,
        key: str | None = None,
        partitions: int | None = None,
        on_progress: Callable[[ProduceProgress], None] | None = None,
    ) -> ProduceReport:
        """Produce a file's lines into a topic, in order.

        Args:
            file: JSON lines; ``.gz`` is decompressed, ``-`` is standard input.
            topic: Where to.
            key: Path of the field that becomes the key.
            partitions: Make the topic with so many if it is not there.
            on_progress: Called now and then.

        Raises:
            UsageError: No such topic, or a line without the key's field.
            SourceError: The cluster refuses records.
        """
        from kappa_log.kafka.produce import produce

        return produce(
            self.config,
            LineFile(file, "-" if str(file) == "-" else None),
            topic,
            key=key,
            partitions=partitions,
            on_progress=on_progress,
        )

    def producer(self, transactional_id: str | None = None) -> Producer:
        """Return a producer for this log's cluster; close it, or use it in ``with``.

        Args:
            transactional_id: For its transactions, if it is to have any.

        Raises:
            ConfigError: No cluster is configured, or a setting is refused.
        """
        from kappa_log.kafka.producer import Producer

        return Producer(self.config, transactional_id=transactional_id)

    def _sections(self, listeners: Sequence[str]) -> list[ListenerConfig]:
        return sections_named(self.config, listeners)
