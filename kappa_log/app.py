"""KappaLog: the front door. It wires storage, projections and the clock together.

All that the command line does is a method here.
"""

from __future__ import annotations

import contextlib
import getpass
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from kappa_log import discovery, duplicates, ingest, project, verify
from kappa_log.columns import Unsettled
from kappa_log.config import Config, ListenerConfig, OnError, load_config
from kappa_log.cursor import spans
from kappa_log.doctor import Check, examine
from kappa_log.errors import (
    ArchiveDiverged,
    ArchiveMissing,
    KappaLogError,
    NotFound,
    UsageError,
)
from kappa_log.events import Event, Position, from_micros
from kappa_log.failures import BulkRetry, Retried, Retrier
from kappa_log.files import LineFile
from kappa_log.fold import Projection, Registry
from kappa_log.handler import FieldOptions
from kappa_log.ingest import IngestProgress, IngestReport
from kappa_log.keys import key_shape_of
from kappa_log.listeners import (
    Listener,
    field_listener,
    listener_for,
    section_for,
    sections_named,
)
from kappa_log.parked import ParkedRetrier, ParkedRetry, with_waiting
from kappa_log.plan import Context, ReplayPlan, ReplayRequest
from kappa_log.project import EventSource, OnProgress, ProjectReport
from kappa_log.records import Lane
from kappa_log.replay import Replayer
from kappa_log.seeds import seed_of
from kappa_log.status import (
    CursorStatus,
    HeadStatus,
    ProjectionStatus,
    cursor_statuses,
    projection_status,
)
from kappa_log.steps import ReplayReport
from kappa_log.storage import (
    builds,
    diff,
    dump,
    ledger,
    lists,
    log,
    migrations,
    pages,
    replays,
    tokens,
)
from kappa_log.storage import failures as stored_failures
from kappa_log.storage import parked as stored_parked
from kappa_log.storage.builds import Build
from kappa_log.storage.database import Database
from kappa_log.storage.diff import Diff
from kappa_log.storage.failures import FailureFilter, FailureGroup
from kappa_log.storage.own import FOLDER, OwnMigrations, OwnState
from kappa_log.storage.pages import Chosen, Page
from kappa_log.storage.parked import ParkedKey
from kappa_log.storage.replays import ReplayRow
from kappa_log.storage.rows import plain_rows
from kappa_log.storage.tokens import Token
from kappa_log.swap import Swap
from kappa_log.trial import Trial
from kappa_log.verify import VerifyReport

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from kappa_log.analysis import Analysis
    from kappa_log.archive.bring import ImportReport
    from kappa_log.archive.check import ArchiveReport
    from kappa_log.archive.export import ExportReport
    from kappa_log.archive.reader import Archive
    from kappa_log.kafka.consume import ConsumeProgress, ConsumeReport
    from kappa_log.kafka.lag import PartitionLag
    from kappa_log.kafka.produce import ProduceProgress, ProduceReport
    from kappa_log.kafka.producer import Producer
    from kappa_log.phobos.importer import PhobosProgress, PhobosReport

LAST_FOLD_SECONDS = 1.5
"""How long folding may take to notice that consuming has ended; it was told when that
was, and looks after each page. What takes longer dies with the process."""

POLL_SECONDS = 0.2
"""How often a follower looks for new events."""

_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Over(Exception):
    """Folding is to end: what was not written yet is folded again in the next run."""


class Explained(msgspec.Struct, frozen=True):
    """One event of a row, and the state after it; None deletes the row."""

    event: Event
    state: dict[str, Any] | None
    error: str | None = None
    """Why the key is parked at this event: the state is that before it."""


class KappaLog:
    """One log with its projections.

    Args:
        url: Database; the configuration's if None.
        config: Configuration; found from the current folder upwards if None.
        projections: Projections to use instead of those that the configuration's
            modules declare.
        clock: The time; for tests.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        config: Config | None = None,
        projections: Iterable[Projection] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.config = config or load_config()
        self.database = Database(
            url or self.config.database.url, self.config.database.prefix
        )
        self.interrupted_replay: int | None = None
        """Id of the replay that an interrupt left to be resumed."""
        self._given = None if projections is None else Registry(projections)
        self._clock = clock

    @classmethod
    def open(
        cls, folder: Path | None = None, overrides: dict[str, Any] | None = None
    ) -> Self:
        """Return the log that a folder's configuration names."""
        return cls(config=load_config(folder, overrides))

    def close(self) -> None:
        """Close all connections."""
        self.database.dispose()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    def now(self) -> datetime:
        """Return the time by this log's clock."""
        return self._clock()

    @cached_property
    def registry(self) -> Registry:
        """The registered projections; importing them happens once, when first asked.

        Raises:
            RegistrationError: A module cannot be imported or declares what cannot work.
        """
        if self._given is not None:
            return self._given
        return discovery.discover(self.config.projections.modules, self.config.folder)

    # --- the database -------------------------------------------------------

    @property
    def own_migrations(self) -> OwnMigrations | None:
        """The project's own migrations, beside its kappa_log.toml; None without any."""
        return OwnMigrations.of(self.config.folder)

    def create_database(self) -> bool:
        """Create the database and its tables; tell whether they are new."""
        return migrations.create(self.database, self.own_migrations)

    def drop_database(self) -> bool:
        """Remove all that kappa_log made; tell whether there was anything."""
        return migrations.drop(self.database, self.own_migrations)

    def reset_database(self) -> None:
        """Remove all that kappa_log made, and create it anew, empty."""
        self.drop_database()
        self.create_database()

    def setup_database(self) -> bool:
        """Create the database, bring it up to date and seed it; tell whether seeded."""
        if not self.create_database():
            self.upgrade_database()
        return self.seed_database()

    def seed_database(self) -> bool:
        """Call ``seed(log)`` of the project's seeds.py; False without that file.

        It is called each time: what it does twice is its own affair. Ingesting a file
        again, for one, adds nothing.

        Raises:
            RegistrationError: The file cannot be imported.
            UsageError: It has no such function.
        """
        seed = seed_of(self.config.folder)
        if seed is None:
            return False
        self._require()
        seed(self)
        return True

    def dump_schema(self) -> str:
        """Return the tables, without rows and builds, as SQL text."""
        return dump.dump(self.database)

    def load_schema(self, text: str) -> None:
        """Make the tables of a dump in a database that has none of ours."""
        dump.load(self.database, text)

    def write_migration(self, name: str) -> tuple[Path, bool]:
        """Write the project's next migration, empty; tell whether it is new."""
        own = OwnMigrations(self.config.folder / FOLDER)
        return own.write(name, self._clock())

    def upgrade_database(self, revision: str = "head") -> None:
        """Move the tables up to a revision; ``head``: the project's own, too."""
        if self.database_state().verdict == "empty":
            self._require()
        migrations.upgrade(self.database, revision, self.own_migrations)

    def downgrade_database(self, revision: str = "-1") -> None:
        """Move the tables down, the project's first; ``base`` removes them."""
        if self.database_state().verdict == "empty":
            self._require()
        migrations.downgrade(self.database, revision, self.own_migrations)

    def database_state(self) -> migrations.SchemaState:
        """Return which revision the database has, and which is wanted."""
        return migrations.state(self.database)

    def own_state(self) -> OwnState | None:
        """Return the same of the project's own migrations; None without any."""
        own = self.own_migrations
        return None if own is None else own.state(self.database)

    def database_history(self) -> list[migrations.Revision]:
        """Return all migrations, oldest first, the project's own after ours."""
        return migrations.history(self.database, self.own_migrations)

    def _require(self) -> None:
        migrations.require_current(self.database)

    # --- ingest -------------------------------------------------------------

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

    # --- Kafka --------------------------------------------------------------

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
            stop: Ends it when set, within five seconds.
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

    def listener(self, topic: str, group: str | None = None) -> Listener:
        """Return the configured listener of a topic, or one that keeps all of it."""
        return listener_for(self.config, topic, group)[0]

    # --- reading the log ----------------------------------------------------

    def head(self) -> HeadStatus:
        """Return the end of the log."""
        self._require()
        with self.database.read() as connection:
            found = log.head(connection, self.database)
        at = None if found.recorded_at is None else from_micros(found.recorded_at)
        return HeadStatus(found.position, found.digest.hex(), at)

    def events(
        self, *, limit: int = 20, oldest_first: bool = False, **chosen: Any
    ) -> list[Event]:
        """Return events by position, newest first.

        Args:
            limit: Most events to return.
            oldest_first: Begin at the lowest position.
            chosen: topic, group, entity_id, event_type, after, before, since.
        """
        self._require()
        with self.database.read() as connection:
            return lists.events(
                connection,
                self.database,
                lists.EventFilter(**chosen),
                limit=limit,
                oldest_first=oldest_first,
            )

    def event_page(self, chosen: Chosen, page: Page) -> list[Event]:
        """Return a page of events, the latest event time first."""
        self._require()
        with self.database.read() as connection:
            return pages.events(connection, self.database, chosen, page)

    def failure_page(self, chosen: Chosen, page: Page) -> list[lists.Failure]:
        """Return a page of failures, the latest event time first."""
        self._require()
        with self.database.read() as connection:
            return pages.failures(connection, self.database, chosen, page)

    def event(self, position: Position) -> Event:
        """Return the event at a position, or raise NotFound."""
        self._require()
        with self.database.read() as connection:
            return lists.event(connection, self.database, position)

    def sources(self) -> dict[int, str]:
        """Return source_id → name of the sources that the log knows."""
        self._require()
        with self.database.read() as connection:
            return lists.sources(connection, self.database)

    def tail(
        self,
        *,
        stop: threading.Event,
        after: Position | None = None,
        topic: str | None = None,
    ) -> Iterator[Event]:
        """Yield events as they come, until told to stop.

        Args:
            stop: Ends the iteration when set.
            after: Position to begin after; None begins at the head.
            topic: Topic to follow; None follows all.
        """
        cursor = self.head().position if after is None else after
        while not stop.is_set():
            found = self.events(after=cursor, topic=topic, limit=500, oldest_first=True)
            yield from found
            if found:
                cursor = found[-1].position
            else:
                stop.wait(POLL_SECONDS)

    def checkpoints(
        self, *, limit: int = 50, after: int | None = None
    ) -> list[lists.Checkpointed]:
        """Return the ledger's rows by id."""
        self._require()
        with self.database.read() as connection:
            return lists.checkpoints(
                connection, self.database, limit=limit, after=after
            )

    def seen(self) -> ledger.Counts:
        """Return what became of all records that were ever read."""
        self._require()
        with self.database.read() as connection:
            return ledger.totals(connection, self.database)

    def duplicates(
        self, *, limit: int = 50, after: int | None = None
    ) -> list[lists.Duplicate]:
        """Return dropped duplicates by id."""
        self._require()
        with self.database.read() as connection:
            return lists.duplicates(connection, self.database, limit=limit, after=after)

    def admit(self, identifier: int, reason: str | None = None) -> Position:
        """Turn a dropped duplicate into an event; return its position.

        Raises:
            NotFound: No such duplicate, or another process admitted it.
            UsageError: Its handler raises on it or skips it.
        """
        self._require()
        with self.database.read() as connection:
            found = lists.duplicates(
                connection, self.database, limit=1, only=identifier
            )
            if not found:
                raise NotFound(
                    "duplicate", identifier, "See: kappa-log duplicates list"
                )
            listener = self._listener_of(connection, found[0])
        return duplicates.admit(
            self.database,
            listener,
            found[0],
            clock=self._clock,
            who=_user(),
            reason=reason,
        )

    def _listener_of(self, connection: Any, kept: lists.Received) -> Listener:
        """Return who decided about a record that was kept, by its stored options."""
        lane = Lane(kept.source, kept.topic, kept.group_id, kept.partition)
        row = ledger.peek(connection, self.database, lane)
        if row is None or row.fields is None:
            return self.listener(kept.topic, kept.group_id)
        fields = msgspec.json.decode(row.fields, type=FieldOptions)
        return field_listener(kept.topic, kept.group_id, fields, row.dedupe)

    def failures(self, *, limit: int = 50) -> list[lists.Failure]:
        """Return failures, newest first."""
        self._require()
        with self.database.read() as connection:
            return lists.failures(connection, self.database, limit=limit)

    def failure(self, identifier: int) -> lists.Failure:
        """Return one failure, or raise NotFound."""
        self._require()
        with self.database.read() as connection:
            found = lists.failures(connection, self.database, limit=1, only=identifier)
        if not found:
            raise NotFound("failure", identifier, "See: kappa-log failures list")
        return found[0]

    def count_failures(self, **chosen: Any) -> int:
        """Return how many failures there are, those that wait included.

        Args:
            chosen: ids, fingerprint, topic, group, error_class, partition.
        """
        self._require()
        with self.database.read() as connection:
            return stored_failures.count(
                connection, self.database, FailureFilter(**chosen)
            )

    def failure_groups(self, *, limit: int = 50) -> list[FailureGroup]:
        """Return failures by error and place, the largest groups first."""
        self._require()
        with self.database.read() as connection:
            return stored_failures.groups(connection, self.database, limit)

    def retry_failure(
        self, identifier: int, *, who: str | None = None, reason: str | None = None
    ) -> Retried:
        """Hand a failure to its handler again, after those that it waits behind.

        What waits behind it is handled next, until one fails.

        Raises:
            NotFound: No such failure.
            RetryFailed: It failed again; the error is kept with it.
            LostRace: Somebody else retried or discarded it first.
        """
        self._require()
        return self._retrier(who, reason).one(identifier)

    def try_failure(self, identifier: int) -> Trial:
        """Tell what a retry of one failure would come to; keep nothing of it.

        Handlers are called, as by a dry run of `retry_failures`.

        Raises:
            NotFound: No such failure.
        """
        self._require()
        return self._retrier(None, None).try_one(identifier)

    def retry_failures(
        self,
        *,
        dry_run: bool = False,
        who: str | None = None,
        reason: str | None = None,
        on_progress: Callable[[BulkRetry], None] = lambda _: None,
        **chosen: Any,
    ) -> BulkRetry:
        """Hand all matching failures to their handlers again, key by key in order.

        Args:
            dry_run: Tell what would become of them (`trials`, of the first 500), and
                keep nothing of it. Handlers are called: what they write by
                ``metadata.connection`` is rolled back, what they do elsewhere is done.
            who: Whom the audit trail names; the user of the machine if None.
            reason: Why, for the audit trail.
            on_progress: Called after each failure.
            chosen: ids, fingerprint, topic, group, error_class, partition; all
                failures without any.
        """
        self._require()
        retrier = self._retrier(who, reason)
        work = retrier.try_many if dry_run else retrier.many
        return work(FailureFilter(**chosen), on_progress)

    def discard_failure(
        self, identifier: int, *, who: str | None = None, reason: str | None = None
    ) -> None:
        """Give a failure up; the next of its key may then be retried.

        Raises:
            NotFound: No such failure.
        """
        self._require()
        self._retrier(who, reason).discard(identifier)

    def discard_failures(
        self,
        *,
        dry_run: bool = False,
        who: str | None = None,
        reason: str | None = None,
        **chosen: Any,
    ) -> int:
        """Give matching failures up; return how many.

        With ``dry_run`` they are only counted. Other options as `retry_failures`.
        """
        self._require()
        if dry_run:
            return self.count_failures(**chosen)
        return self._retrier(who, reason).discard_many(FailureFilter(**chosen))

    def retry_event(self, position: Position, *, who: str | None = None) -> bool:
        """Hand a kept event to its handler again; tell whether it acknowledges it.

        Nothing is stored, and SQL by ``metadata.connection`` is rolled back.

        Raises:
            NotFound: No such event.
            RetryFailed: The handler raised.
        """
        event = self.event(position)
        kept = lists.Received(
            id=event.position,
            source=self.sources()[event.source_id],
            topic=event.topic,
            group_id=event.group_id,
            partition=event.partition,
            offset=event.offset,
            key=event.key,
            headers=list(event.headers),
            timestamp=event.timestamp,
        )
        return self._retrier(who, None).event(event, kept)

    def _retrier(self, who: str | None, reason: str | None) -> Retrier:
        def listener_of(kept: lists.Received) -> Listener:
            with self.database.read() as connection:
                found = self._listener_of(connection, kept)
            told = kept.metadata if isinstance(kept, lists.Failure) else {}
            return msgspec.structs.replace(found, told=told)

        act = replays.Audit(who=who or _user(), action="", subject="", reason=reason)
        return Retrier(self.database, listener_of, self._clock, act)

    # --- projections --------------------------------------------------------

    def projections(self) -> list[ProjectionStatus]:
        """Return all projections that are registered or built, by name."""
        self._require()
        with self.database.read() as connection:
            built = {build.projection for build in builds.of(connection, self.database)}
            names = sorted({*self.registry.names, *built})
            return [self._status(connection, name) for name in names]

    def cursors(self) -> list[CursorStatus]:
        """Return how far each live build is behind the head; no rows are counted."""
        self._require()
        with self.database.read() as connection:
            return cursor_statuses(connection, self.database, self._clock)

    def projection(self, name: str) -> ProjectionStatus:
        """Return one projection, or raise ProjectionNotFound."""
        self._require()
        with self.database.read() as connection:
            if not builds.of(connection, self.database, name):
                self.registry.latest(name)
            return self._status(connection, name)

    def _status(self, connection: Any, name: str) -> ProjectionStatus:
        return projection_status(
            connection, self.database, self.registry, name, self._clock
        )

    def project(
        self,
        names: Sequence[str] = (),
        *,
        on_progress: OnProgress | None = None,
        on_error: OnError | None = None,
    ) -> list[ProjectReport]:
        """Bring live builds up to the head; make those that are missing.

        Args:
            names: Which projections; all registered ones if empty.
            on_progress: Called as folding goes on.
            on_error: ``park``: the key of a fold that raises waits, all others go on;
                ``stop``: the projection stops before that event. The configuration's
                if None.

        Raises:
            ProjectionNotFound: No such projection; nothing was folded.
            ProjectionError: A fold failed, and stops; all before that event is written.
        """
        self._require()
        for name in names:
            self.projection(name)
        return [
            project.project(
                self.database,
                self.registry,
                name,
                self._clock,
                on_progress,
                on_error or self.config.projections.on_error,
            )
            for name in names or self.registry.names
        ]

    def follow(
        self,
        names: Sequence[str] = (),
        *,
        stop: threading.Event,
        on_report: Callable[[ProjectReport], None] | None = None,
        on_error: OnError | None = None,
    ) -> None:
        """Keep live builds at the head until told to stop."""
        while not stop.is_set():
            for report in self.project(names, on_error=on_error):
                if on_report is not None:
                    on_report(report)
            stop.wait(POLL_SECONDS)

    def plan_replay(self, name: str, **request: Any) -> ReplayPlan:
        """Return what a replay would do; nothing is written. Options as `replay`."""
        self._require()
        return self._replayer().plan(name, ReplayRequest(**request))

    def replay(
        self,
        name: str,
        *,
        on_plan: Callable[[ReplayPlan], None] | None = None,
        on_start: Callable[[int], None] | None = None,
        on_progress: OnProgress | None = None,
        **request: Any,
    ) -> ReplayReport:
        """Fold a range of the log into a new build, compare it, and promote it.

        Args:
            name: The projection; its highest registered version is built.
            on_plan: Called with what the request comes to, before anything is written.
            on_start: Called with the replay's id, once it can be resumed.
            on_progress: Called as folding goes on.
            request: since, from_position or from_offset (a start: only keys touched
                from there on are folded again); by (recorded or event-time); until;
                promote (default True); max_changed; on_error (stop, the default, or
                park); reason; source (sql, or archive: the configured one, as far as
                it reaches). See `ReplayRequest`.

        Raises:
            UsageError: The request contradicts itself, or needs a full replay.
            AlreadyRunning: Another replay of it runs, or was interrupted.
            ProjectionError: The fold failed; the live build was not changed.
        """
        self._require()
        return self._interruptible(
            lambda: self._replayer(on_plan, on_progress, on_start).replay(
                name, ReplayRequest(**request)
            )
        )

    def resume(
        self,
        identifier: int,
        *,
        on_start: Callable[[int], None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> ReplayReport:
        """Go on with a replay that was killed or interrupted."""
        self._require()
        return self._interruptible(
            lambda: self._replayer(None, on_progress, on_start).resume(identifier)
        )

    def cancel(self, identifier: int) -> ReplayRow:
        """End a replay that does not run, and drop what it built."""
        self._require()
        return self._replayer().cancel(identifier)

    def replays(
        self,
        projection: str | None = None,
        *,
        unfinished: bool = False,
        limit: int = 50,
    ) -> list[ReplayRow]:
        """Return replays, newest first."""
        self._require()
        with self.database.read() as connection:
            return replays.listed(
                connection,
                self.database,
                projection=projection,
                unfinished=unfinished,
                limit=limit,
            )

    def replay_row(self, identifier: int) -> ReplayRow:
        """Return one replay as it is stored, or raise NotFound."""
        self._require()
        with self.database.read() as connection:
            return replays.get(connection, self.database, identifier)

    def _replayer(
        self,
        on_plan: Callable[[ReplayPlan], None] | None = None,
        on_progress: OnProgress | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> Replayer:
        def started(identifier: int) -> None:
            self.interrupted_replay = identifier
            if on_start is not None:
                on_start(identifier)

        return Replayer(
            Context(
                database=self.database,
                registry=self.registry,
                clock=self._clock,
                who=_user(),
                on_plan=on_plan,
                on_progress=on_progress,
                on_start=started,
                open_archive=self._open_source,
            )
        )

    def _open_source(self) -> EventSource:
        """Open the configured archive as what replays of this log read."""
        from kappa_log.archive.source import open_source

        archive = self.archive()
        with self.database.read() as connection:
            return open_source(connection, self.database, archive)

    def _interruptible(self, run: Callable[[], ReplayReport]) -> ReplayReport:
        self.interrupted_replay = None
        report = run()
        self.interrupted_replay = None
        return report

    def rows(
        self,
        name: str,
        *,
        key: str | None = None,
        build: int | None = None,
        limit: int | None = None,
        after: str | None = None,
        offset: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a projection by key: key columns, then the state's fields.

        Args:
            name: The projection.
            key: One key as text; parts of a tuple joined by ``/``.
            build: Number of a build; the live one if None.
            limit: Most rows to yield.
            after: A key as text; only rows past it.
            offset: Rows to pass over.
        """
        self._require()
        with self.database.read() as connection:
            found = self._build(connection, name, build)
            where = None if key is None else _key_columns(found, key)
            past = None if after is None else _key_columns(found, after)
            yield from plain_rows(
                connection,
                self.database,
                found,
                where=where,
                limit=limit,
                past=past,
                offset=offset,
            )

    def explain(self, name: str, key: str) -> Iterator[Explained]:
        """Yield each event of a row with the state after it, up to the live cursor.

        A parked key ends with the event that it is parked at, and the error.

        Raises:
            ProjectionNotFound: The projection's code is not registered.
            ProjectionError: The fold fails on one of the events.
        """
        self._require()
        fold = self.registry.latest(name)
        stop: ParkedKey | None = None
        with self.database.read() as connection:
            build = builds.in_role(connection, self.database, name, "live")
            end = log.head(connection, self.database).position
            if build is not None:
                fold = self.registry.made_by(name, build.fingerprints) or fold
                end = build.cursor
            wanted = _parsed(fold, key)
            if build is not None:
                found = stored_parked.listed(
                    connection, self.database, build, key=wanted
                )
                stop = found[0][1] if found else None
        state: Any = None
        folding = fold.folding()
        for event in self._events_of(fold, wanted, stop.position if stop else end):
            if stop is not None and event.position == stop.position:
                error = f"{stop.error_class}: {stop.error_message}"
                yield Explained(event, fold.state_shape.fields(state), error)
                return
            state = folding.after(wanted, state, event)
            yield Explained(event, fold.state_shape.fields(state))

    def _events_of(self, fold: Projection, key: Any, end: Position) -> Iterator[Event]:
        reader = project.reader_of(self.database, fold, {key})
        for after, until in spans(0, end, project.page_events(fold)):
            for _, event in fold.keyed(reader.page(after, until), {key})[0]:
                yield event

    def parked(
        self,
        name: str,
        *,
        build: int | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[ParkedKey]:
        """Return the keys of a projection that are parked, in log order.

        Args:
            name: The projection.
            build: Number of a build; the live one if None.
            limit: Most to return.
            offset: How many to pass over.

        Raises:
            NotFound: No such build.
        """
        self._require()
        with self.database.read() as connection:
            found = self._build(connection, name, build)
            keys = stored_parked.listed(
                connection, self.database, found, limit=limit, offset=offset
            )
        fold = None
        if name in self.registry.names:
            made_by = self.registry.made_by(name, found.fingerprints)
            fold = made_by or self.registry.latest(name)
        return with_waiting(self.database, fold, found, keys)

    def retry_parked(
        self,
        name: str,
        keys: Sequence[str] | None = None,
        *,
        dry_run: bool = False,
        who: str | None = None,
        reason: str | None = None,
    ) -> ParkedRetry:
        """Fold parked keys of the live build on, from where they are parked.

        A key whose fold raises again stays parked, at that event. The registered code
        must be that of the build, or have been declared `compatible`.

        Args:
            name: The projection.
            keys: Keys as text, parts of a tuple joined by ``/``; all if None.
            dry_run: Tell what would come of it, and write nothing.
            who: Whom the audit trail names; the user of the machine if None.
            reason: Why, for the audit trail.

        Raises:
            NotFound: There is no live build, or a key is not parked.
            StaleCode: The registered code is not that of the build.
            ProjectionError: A payload or key cannot be made; nothing was changed.
            LostRace: Somebody else retried them first.
        """
        self._require()
        act = replays.Audit(who=who or _user(), action="", subject="", reason=reason)
        retrier = ParkedRetrier(self.database, self.registry, self._clock, act)
        return retrier.retry(name, keys, dry_run=dry_run)

    def diff(self, name: str, old: int | None = None, new: int | None = None) -> Diff:
        """Compare two builds of a projection at one position.

        If they have moved apart, the comparison that the replay took is returned.

        Args:
            name: The projection.
            old: Number of a build; the live one if None.
            new: Number of a build; the newest other one if None.

        Raises:
            NotFound: No such builds.
            UsageError: They are at different positions.
        """
        self._require()
        with self.database.read() as connection:
            left = self._build(connection, name, old)
            others = [
                build
                for build in builds.of(connection, self.database, name)
                if build.number != left.number
            ]
            if new is None and not others:
                raise NotFound(
                    "a second build of",
                    name,
                    f"Make one: kappa-log replay {name} --no-promote",
                )
            right = others[-1] if new is None else self._build(connection, name, new)
            if left.cursor != right.cursor:
                taken = replays.diff_of(connection, self.database, left, right)
                if taken is not None:
                    return taken
                msg = (
                    f"{left.label} is at position {left.cursor}, {right.label} at "
                    f"{right.cursor}; rows are compared at one position only. "
                    f"Bring the live build up: kappa-log project {name}"
                )
                raise UsageError(msg)
            return diff.compare(connection, self.database, left, right)

    def promote(
        self, name: str, *, max_changed: str | None = None, reason: str | None = None
    ) -> ReplayReport:
        """Promote the newest shadow that a replay kept."""
        self._require()
        return self._interruptible(
            lambda: self._replayer().promote(
                name, max_changed=max_changed, reason=reason
            )
        )

    def undo(
        self, name: str, *, behind: bool = False, reason: str | None = None
    ) -> Swap:
        """Make the retired build the live one again.

        Args:
            name: The projection.
            behind: Swap even if the retired build cannot catch up.
            reason: Why, for the audit trail.
        """
        self._require()
        return self._replayer().undo(name, behind=behind, reason=reason)

    def drop_build(self, name: str, number: int, *, reason: str | None = None) -> None:
        """Drop a build that is not live; a live one is what users read.

        Raises:
            NotFound: No such build.
            UsageError: It is live, or a replay that fills it has not ended.
        """
        self._require()
        with self.database.write() as connection:
            build = self._build(connection, name, number)
            if build.role == "live":
                msg = f"{build.label} is live: users read it. Promote another first"
                raise UsageError(msg)
            for row in replays.listed(
                connection, self.database, projection=name, unfinished=True
            ):
                if row.build == number:
                    msg = (
                        f"replay {row.id} fills {build.label}; run: "
                        f"kappa-log replay --cancel {row.id}"
                    )
                    raise UsageError(msg)
            builds.drop(connection, self.database, build)
            self._audit(connection, "drop", f"{name} build {number}", reason)

    def compatible(self, name: str, *, reason: str | None = None) -> list[str]:
        """Declare that the registered code makes the same rows as the live build's.

        Returns:
            The fingerprints that were declared equal; empty if they are anyway.

        Raises:
            UsageError: The routing or the columns changed: never the same rows.
        """
        self._require()
        fold = self.registry.latest(name)
        with self.database.write() as connection:
            build = self._build(connection, name, None)
            parts = build.fingerprints.differing(fold.fingerprints)
            fixed = [part for part in parts if part in ("routing", "state")]
            if fixed:
                msg = (
                    f"'{name}' cannot be declared compatible: {', '.join(fixed)} "
                    "changed, which rows or columns there are. "
                    f"Run: kappa-log replay {name}"
                )
                raise UsageError(msg)
            if parts:
                builds.set_fingerprints(
                    connection, self.database, build, fold.fingerprints, self._clock()
                )
                self._audit(connection, "compatible", build.label, reason)
        return parts

    def _audit(
        self, connection: Any, action: str, subject: str, reason: str | None
    ) -> None:
        act = replays.Audit(who=_user(), action=action, subject=subject, reason=reason)
        replays.write_audit(connection, self.database, act, self._clock())

    def _build(self, connection: Any, name: str, number: int | None) -> Build:
        if number is not None:
            return builds.get(connection, self.database, name, number)
        found = builds.in_role(connection, self.database, name, "live")
        if found is None:
            self.registry.latest(name)
            raise NotFound("live build of", name, f"Make it: kappa-log project {name}")
        return found

    # --- the archive --------------------------------------------------------

    def export(
        self,
        to: str | None = None,
        *,
        columns: Sequence[str] = (),
        columns_of: Sequence[str] = (),
        no_columns: bool = False,
        dry_run: bool = False,
        on_step: verify.OnStep = lambda *_: None,
    ) -> ExportReport:
        """Bring the archive up to the log: Parquet files, their manifest last.

        Args:
            to: A folder, or an address of an object store; the configuration's if None.
            columns: TOPIC.FIELD:TYPE, each a typed column made of a payload field.
                Those of the archive stay if no columns are named.
            columns_of: Projections whose payload Struct's fields become columns.
            no_columns: Make no columns of payload fields any more.
            dry_run: Say what would be done, and do nothing.
            on_step: Called as it goes on.

        Raises:
            UsageError: The address or a column is none.
            ArchiveDiverged: The archive is of another log, or ahead of this one.
            ArchiveError: It cannot be written; it is as it was.
            VerificationError: The log is damaged; the archive is as it was.
        """
        from kappa_log.archive import fields
        from kappa_log.archive.export import Exporter
        from kappa_log.archive.store import Store

        self._require()
        chosen = None
        if columns or columns_of or no_columns:
            with self.database.read() as connection:
                lanes = ledger.lanes(connection, self.database)
            topics = sorted({lane.topic for lane in lanes})
            folds = [self.registry.latest(name) for name in columns_of]
            chosen = fields.chosen(columns, folds, topics)
        exporter = Exporter(
            self.database,
            Store(*self._address(to)),
            segment_events=self.config.archive.segment_events,
            columns=chosen,
            step=on_step,
        )
        return exporter.plan() if dry_run else exporter.run()

    def import_archive(
        self,
        url: str | None = None,
        *,
        on_step: verify.OnStep = lambda *_: None,
    ) -> ImportReport:
        """Bring an archive into an empty log: the same positions, chain and ledger.

        The database is made if it is not there. All or nothing comes in.

        Args:
            url: The archive; the configuration's if None.
            on_step: Called as it goes on.

        Raises:
            UsageError: The log is not empty; nothing was changed.
            ArchiveMissing: There is no archive.
            ArchiveDamaged: It is not what was written; nothing was kept.
        """
        from kappa_log.archive.bring import Importer

        found = self.archive(url)
        if self.database_state().verdict == "empty":
            self.create_database()
        self._require()
        with self.database.write() as connection:
            report = Importer(self.database, found, on_step).run(connection)
            self._audit(connection, "import", report.url, None)
        return report

    def verify_archive(
        self,
        url: str | None = None,
        *,
        on_step: verify.OnStep = lambda *_: None,
    ) -> ArchiveReport:
        """Prove each file of an archive and its chain, and compare with the log.

        Without a log, or beside an empty one, the archive is verified by itself.

        Args:
            url: The archive; the configuration's if None.
            on_step: Called as it goes on.

        Raises:
            ArchiveMissing: There is none.
            ArchiveError: It cannot be read now.
        """
        from kappa_log.archive.check import check_archive
        from kappa_log.archive.store import Store

        there = self.database_state().verdict != "empty" and self.head().position > 0
        return check_archive(
            Store(*self._address(url)), self.database if there else None, on_step
        )

    def archive(self, url: str | None = None) -> Archive:
        """Open an archive to read; the configuration's if None.

        Raises:
            ArchiveMissing: There is none.
            ArchiveDamaged: Its manifest is not what was written.
        """
        from kappa_log.archive.reader import open_archive

        return open_archive(*self._address(url))

    def _address(self, url: str | None) -> tuple[str, Path]:
        """Return an archive's address, and from where it counts if it is relative."""
        if url is None:
            return self.config.archive.url, self.config.folder
        return url, Path.cwd()

    # --- tokens of the API --------------------------------------------------

    def create_token(self, name: str, role: str) -> str:
        """Make a token for the API and return it; it is not kept, only its digest.

        Args:
            name: Whom the audit trail names.
            role: ``read``, or ``operate``, which may also change things.

        Raises:
            UsageError: The name is none, or is taken.
        """
        if not _TOKEN_NAME.fullmatch(name):
            msg = "a token's name is 1 to 64 letters, digits, dots, dashes, underscores"
            raise UsageError(msg)
        self._require()
        secret = f"kl_{secrets.token_urlsafe(32)}"
        tokens.keep(self.database, name, role, secret, self._clock())
        return secret

    def tokens(self) -> list[Token]:
        """Return all tokens, those that were revoked too."""
        self._require()
        with self.database.read() as connection:
            return tokens.listed(connection, self.database)

    def has_tokens(self) -> bool:
        """Tell whether there is a token that opens something."""
        self._require()
        with self.database.read() as connection:
            return tokens.active(connection, self.database) > 0

    def token(self, secret: str) -> Token | None:
        """Return whose token this is; None if it opens nothing."""
        self._require()
        with self.database.read() as connection:
            return tokens.found_by(connection, self.database, secret)

    def revoke_token(self, name: str) -> None:
        """Let a token open nothing any more."""
        self._require()
        with self.database.write() as connection:
            tokens.revoke(connection, self.database, name, self._clock())
            self._audit(connection, "revoke token", name, None)

    # --- analysis -----------------------------------------------------------

    def duckdb(self) -> DuckDBPyConnection:
        """Return a DuckDB connection with views over the log and its read models.

        ``events``, ``failures``, ``checkpoints``, ``duplicates`` and each projection by
        its name are read when a query scans them, as they are then. The connection
        reads no files and its settings are locked; what is made in it is gone with it.
        """
        return self.analysis().connection

    def sql(self, query: str) -> DuckDBPyRelation | None:
        """Return what an SQL query comes to; None for statements that have no rows.

        DuckDB gives it as ``.to_arrow_table()``, ``.df()`` (pandas), ``.pl()`` (polars)
        or ``.fetchall()``. See `duckdb` for the views.

        Raises:
            UsageError: DuckDB refuses the query.
        """
        return self.analysis().sql(query)

    def analysis(self) -> Analysis:
        """Return a new DuckDB connection together with what its views are."""
        from kappa_log.analysis import Analysis

        self._require()
        return Analysis(self.database, self._own_archive())

    def _own_archive(self) -> Archive | None:
        """Return the configured archive if it is there, and as the log is now."""
        from kappa_log.archive.export import require_same_log
        from kappa_log.storage.transfer import erasure_epoch

        try:
            found = self.archive()
            with self.database.read() as connection:
                require_same_log(connection, self.database, found)
                # What was erased since is in its files still.
                epoch = erasure_epoch(connection, self.database)
        except (ArchiveMissing, ArchiveDiverged):
            return None
        return found if found.manifest.erasure_epoch == epoch else None

    # --- care ---------------------------------------------------------------

    def verify(
        self,
        *,
        head: str | None = None,
        names: Sequence[str] = (),
        on_step: verify.OnStep | None = None,
    ) -> VerifyReport:
        """Recompute the chain, prove the ledger, fold the named views afresh.

        Args:
            head: A head kept elsewhere, in hex.
            names: Projections whose live rows are compared with a fresh fold.
            on_step: Called as it goes on.
        """
        self._require()
        return verify.verify(
            self.database, self.registry, head=head, names=names, on_step=on_step
        )

    def doctor(self) -> list[Check]:
        """Look at what commonly goes wrong; nothing is changed."""
        return list(examine(self))


def _key_columns(build: Build, key: str) -> dict[str, Any]:
    """Return the key columns of a build for a key that a person typed."""
    columns = build.layout.keys
    shape = key_shape_of([column.kind for column in columns])
    try:
        values = shape.values(shape.parse(key))
    except Unsettled as error:
        msg = f"{build.label}: {error}"
        raise UsageError(msg) from None
    return {c.name: value for c, value in zip(columns, values, strict=True)}


def _parsed(fold: Projection, key: str) -> Any:
    try:
        return fold.key_shape.parse(key)
    except Unsettled as error:
        msg = f"projection '{fold.name}': {error}"
        raise UsageError(msg) from None


@contextlib.contextmanager
def acting_as(who: str) -> Iterator[None]:
    """Let the audit trail name somebody, in this thread, not the machine's user."""
    before = _actor.set(who)
    try:
        yield
    finally:
        _actor.reset(before)


_actor: ContextVar[str | None] = ContextVar("actor", default=None)


def _user() -> str:
    actor = _actor.get()
    if actor is not None:
        return actor
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
