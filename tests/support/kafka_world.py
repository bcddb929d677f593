"""A topic, a log and consumers between them; and all that can be wrong at the end.

The test produces, and remembers what was acknowledged. Workers consume and meet with
accidents. `World.faults` then compares what was produced with the log, its ledger, its
projection and what readers were given on the way, and names everything that differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from itertools import count, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import sqlalchemy as sa
from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

import kappa_log
from kappa_log import KappaLog
from kappa_log.config import load_config
from kappa_log.storage import lists, log
from kappa_log.storage.database import sqlite_module
from support.history import Cursor, History, Outcome, Page, Place, Produced, Row, check
from support.kafka_broker import RealBroker
from support.kafka_process import ANSWER_SECONDS, admin_of, wait_for
from support.kafka_worker import GROUP, PROJECTIONS, Trail, follow

SECONDS = 60
"""How long anything may take at the most."""

SCALE = int(os.environ.get("KAPPA_LOG_TEST_TRIALS", "100")) / 100
"""Tests that try something again and again do so this many times as often."""

QUICK = {"fetch.wait.max.ms": 20, "topic.metadata.refresh.interval.ms": 500}
"""A partition's end, or another topic, is known sooner than users need to know it."""

STATIC = QUICK | {"group.instance.id": "w", "session.timeout.ms": 10_000}
"""A member that comes back under its name, at once, however its process ended."""

DYNAMIC = QUICK | {"session.timeout.ms": 1000, "heartbeat.interval.ms": 200}
"""A killed member is missed after a second."""

CONSUMER = QUICK | {"group.protocol": "consumer"}
"""The broker itself assigns (KIP-848); see `miss_soon` about killed members."""



def miss_soon(broker: RealBroker, group: str) -> None:
    """Have killed members of a group missed after a second, in KIP-848's protocol."""
    wanted = {"session.timeout": "1000", "heartbeat.interval": "200"}
    entries = [
        ConfigEntry(
            f"consumer.{name}.ms", value, incremental_operation=AlterConfigOpType.SET
        )
        for name, value in wanted.items()
    ]
    resource = ConfigResource(ResourceType.GROUP, group, incremental_configs=entries)
    admin = admin_of(broker.bootstrap)
    admin.incremental_alter_configs([resource])[resource].result(ANSWER_SECONDS)


# --- processes --------------------------------------------------------------------


class Nest:
    """Forks workers; all are gone at the end of the block."""

    def __init__(self) -> None:
        """Start it; it imports everything while the test prepares."""
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        paths = [str(Path(kappa_log.__file__).parents[1]), str(Path(__file__).parents[1])]
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from support.kafka_worker import nest; nest({number})",
                ],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
            )

    def start(self, **task: Any) -> Worker:
        """Start a worker at a task."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._ask(task, [theirs.fileno()])["pid"]
        return Worker(self, pid, ours)

    def code_of(self, pid: int) -> int:
        """Wait for a worker's end; return its exit code."""
        found: int = self._ask({"wait": pid}, [])["code"]
        return found

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        answer: dict[str, Any] = json.loads(self._control.recv(1 << 16))
        return answer

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all its workers."""
        self._control.close()
        self._process.wait()


class Worker:
    """A process that does one task."""

    def __init__(self, nest: Nest, pid: int, channel: socket.socket) -> None:
        """Use a process that was just forked."""
        self.pid = pid
        self.notices: list[str] = []
        self._heard = 0
        self._nest = nest
        self._channel = channel
        self._lines = channel.makefile("r")
        self._result: dict[str, Any] | None = None
        self._code: int | None = None
        channel.settimeout(SECONDS)

    def wait_until_paused(self) -> None:
        """Wait until it stands still at its trap."""
        while "said" not in (said := self._next()):
            assert said, f"it ended with code {self._code}"
            assert "result" not in said, said
        stat = Path(f"/proc/{self.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a stop")

    def hear(self, words: str) -> None:
        """Wait until it tells people something, after what was heard before."""
        while True:
            for notice in self.notices[self._heard :]:
                self._heard += 1
                if words in notice:
                    return
            assert self._next(), f"it ended with code {self._code}"

    def wake(self) -> None:
        """Let it go on after it paused."""
        self.signal(signal.SIGCONT)

    def result(self) -> dict[str, Any]:
        """Wait for its end, and return what came of it."""
        self._wait()
        assert self._result is not None, f"it died with code {self._code}"
        return self._result

    def was_killed(self) -> bool:
        """Wait for its end; tell whether that was SIGKILL."""
        self._wait()
        assert self._result or self._code == -signal.SIGKILL, f"code {self._code}"
        return self._result is None

    def has_ended(self) -> bool:
        """Tell whether it has ended, without waiting."""
        if self._code is None:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "Z"
        return True

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self.signal(signal.SIGKILL)
        self._wait()

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it is gone."""
        if self._code is None:
            os.kill(self.pid, number)

    def _wait(self) -> None:
        while self._next():
            pass
        if self._code is None:
            self._code = self._nest.code_of(self.pid)
            self._lines.close()
            self._channel.close()

    def _next(self) -> dict[str, Any]:
        """Return the next thing that it says; nothing when it says no more."""
        if self._code is not None:
            return {}
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = ""
        found: dict[str, Any] = json.loads(line) if line else {}
        if "notice" in found:
            self.notices.append(found["notice"])
        self._result = found.get("result", self._result)
        return found


# --- databases --------------------------------------------------------------------


class Databases:
    """Copies of databases: a new log costs a copy, and a backup is one."""

    def __init__(self, url: str) -> None:
        """Make the tables in an empty database, which is copied from then on."""
        self._url = sa.make_url(url)
        self._numbers = count(1)
        with KappaLog(config=load_config(Path("/"), {"database.url": url})) as app:
            app.create_database()

    @contextmanager
    def fresh(self, *, is_empty: bool = False) -> Iterator[str]:
        """Give the URL of a new log, or of a database to be; it is gone afterwards."""
        url = self._shown(
            self._url.set(database=f"{self._url.database}_{next(self._numbers)}")
        )
        if not is_empty:
            self.copy(self._shown(self._url), url)
        try:
            yield url
        finally:
            self.drop(url)

    def copy(self, old: str, new: str) -> None:
        """Copy a database over another one that may be there, and that nobody uses.

        SQLite's can be in use. PostgreSQL ends whoever uses the old one.
        """
        self.drop(new)
        source, target = sa.make_url(old).database, sa.make_url(new).database
        if self._is_sqlite:
            connect = sqlite_module().connect
            with closing(connect(source)) as one, closing(connect(target)) as other:
                one.backup(other)
        else:
            self._admin(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                f"WHERE datname = '{source}'"
            )
            self._admin(f'CREATE DATABASE "{target}" TEMPLATE "{source}"')

    def drop(self, url: str) -> None:
        """Drop a database, if it is there."""
        name = sa.make_url(url).database
        if self._is_sqlite:
            for ending in ("", "-wal", "-shm"):
                Path(f"{name}{ending}").unlink(missing_ok=True)
        else:
            self._admin(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def _admin(self, statement: str) -> None:
        engine = sa.create_engine(
            self._url.set(database="postgres"),
            isolation_level="AUTOCOMMIT",
            poolclass=sa.NullPool,
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    @staticmethod
    def _shown(url: sa.URL) -> str:
        return url.render_as_string(hide_password=False)


# --- records ----------------------------------------------------------------------

Made = tuple[bytes | None, bytes, int]
"""Value, key and partition."""


def outcome_of(value: str | None) -> str:
    """Return what becomes of a record whose message the log does not have."""
    if value is None:
        return "kept"
    try:
        return str({"keep": "kept"}.get(wanted := json.loads(value)["do"], wanted))
    except ValueError:
        return "fail"


def made_records(
    chance: random.Random, partitions: int, number: int, start: int = 0
) -> list[Made]:
    """Return records of which some skip, some fail, and some come a second time."""
    found: list[Made] = []
    for index in range(start, start + number):
        who, luck = chance.randrange(20), chance.random()
        at = b"k%d" % who, who % partitions
        if luck < 0.05 and found:
            found.append((chance.choice(found)[0], b"again", at[1]))
        elif luck < 0.08:
            found.append((b'{"number": %d, broken' % index, *at))
        elif luck < 0.1:
            found.append((None, *at))
        else:
            do = "fail" if luck < 0.14 else "skip" if luck < 0.18 else "keep"
            value = json.dumps({"who": f"w{who}", "number": index, "do": do})
            found.append((value.encode(), *at))
    return found


# --- the world --------------------------------------------------------------------


class World:
    """One topic, one log, and what the test knows of both.

    Args:
        broker: Where the topic is.
        nest: Where workers come from.
        url: The log's database; its tables are there.
        folder: An empty folder.
        topic: Name of the topic.
        kafka: Settings of the consumers.
        batch_size: Records a transaction.
        handler: Class of `kafka_worker`, which decides.
        projection: What is folded, by its name there.
    """

    def __init__(
        self,
        broker: RealBroker,
        nest: Nest,
        url: str,
        folder: Path,
        topic: str,
        *,
        kafka: dict[str, Any] = STATIC,
        batch_size: int = 25,
        handler: str = "Picky",
        projection: str = "trails",
    ) -> None:
        self.broker = broker
        self.topic = topic
        self.group = f"{GROUP}-{uuid4().hex[:8]}"
        self.topic_id = broker.topic_id(topic)
        self.sent: list[Produced] = []
        self.deleted: set[Place] = set()
        """Records that the broker deleted before they were read."""
        self._errors: list[str] = []
        self._nest = nest
        self._folder = folder
        self._projection = projection
        self._config = {
            "database.url": url,
            "kafka": kafka | {"bootstrap.servers": broker.bootstrap},
            "listeners": [
                {
                    "topic": topic,
                    "group_id": self.group,
                    "handler": f"support.kafka_worker:{handler}",
                    "max_retries": 0,
                    "park": "event",
                }
            ],
            "ingest.batch_size": batch_size,
            "projections.modules": [],
        }
        self.app = KappaLog(
            config=load_config(folder, self._config),
            projections=[PROJECTIONS[projection](topic)],
        )
        if kafka.get("group.protocol") == "consumer":
            miss_soon(broker, self.group)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the log."""
        self.app.close()

    # --- what goes on -------------------------------------------------------------

    def produce(self, records: Iterable[Made]) -> None:
        """Produce records, and remember where each one is."""
        records = list(records)
        places = self.broker.produce(self.topic, records)
        self.remember(records, places)

    def recreate(self, partitions: int) -> None:
        """Delete the topic, and create another one of its name."""
        self.broker.delete_topic(self.topic)
        self.broker.create_topic(self.topic, partitions)
        self.topic_id = self.broker.topic_id(self.topic)

    def remember(
        self,
        records: Iterable[Made],
        places: Iterable[tuple[int, int]],
        outcome: Outcome = Outcome.COMMITTED,
    ) -> None:
        """Remember records that somebody produced."""
        for (value, *_), (partition, offset) in zip(records, places, strict=True):
            place = Place(self.topic_id, partition, offset)
            self.sent.append(Produced(place, _text(value), outcome))

    def start(self, work: str = "consume", **task: Any) -> Worker:
        """Start a worker at this log."""
        kafka = self._config["kafka"] | task.pop("kafka", {})
        return self._nest.start(
            work=work,
            folder=str(self._folder),
            topic=self.topic,
            projection=self._projection,
            config=self._config | {"kafka": kafka},
            **task,
        )

    def finish(self) -> None:
        """Read all that is left, in workers that nobody disturbs; fold it.

        A killed member has its partitions until it is missed: then one worker alone
        may end without them.
        """
        ends = self.ends()
        give_up = time.monotonic() + ANSWER_SECONDS
        while not self._errors and time.monotonic() < give_up:
            done = self.start(until_end=True).result()
            if "error" in done:
                self._errors.append(f"{done['error']}: {done['message']}")
            if self.offsets().items() >= ends.items():
                break
        self.app.project()

    def written(self) -> Path:
        """Write its configuration to a file, for the command line; return the folder."""
        (listener,) = self._config["listeners"]
        lines = [
            f"database.url = {json.dumps(self._config['database.url'])}",
            f"ingest.batch_size = {self._config['ingest.batch_size']}",
            "projections.modules = []",
            "[kafka]",
            *(f'"{k}" = {json.dumps(v)}' for k, v in self._config["kafka"].items()),
            "[[listeners]]",
            *(f"{k} = {json.dumps(v)}" for k, v in listener.items()),
        ]
        (self._folder / "kappa_log.toml").write_text("\n".join(lines))
        return self._folder

    # --- what came of it ----------------------------------------------------------

    def faults(self, *cursors: Cursor) -> list[str]:
        """Return all that is wrong, in words; nothing if the promises were kept."""
        kept = self._kept()
        cursors = (
            *cursors,
            self.read("small pages", limit=7),
            self.read("one person", limit=50, entity_id="w1"),
        )
        found = [f"{f.fault}: {f.where}" for f in self._history(kept, cursors)]
        found += self._errors
        found += self._misplaced(kept)
        found += self._mistimed()
        found += self._miscounted()
        found += self._misfolded(kept)
        report = self.app.verify(names=["trails"])
        found += [finding.message for finding in report.findings]
        return found

    def read(self, name: str, *, limit: int, **chosen: str) -> Cursor:
        """Return what a reader is given that reads to the end, page by page."""
        pages: list[Page] = []
        while (page := self.page(_last(pages), limit, **chosen)).seen:
            pages.append(page)
        return Cursor(name, tuple(pages), wants=_wanting(**chosen))

    def page(self, after: int, limit: int, **chosen: str) -> Page:
        """Return a page of events as users get it, and the head with it."""
        database = self.app.database
        with database.read() as connection:
            head = log.head(connection, database).position
            found = lists.events(
                connection,
                database,
                lists.EventFilter(after=after, **chosen),
                limit=limit,
                oldest_first=True,
            )
        return Page(head, tuple((e.position, e.payload_text) for e in found))

    @contextmanager
    def following(self) -> Iterator[Following]:
        """Read the log in a thread while the block goes on."""
        with Following(self) as reader:
            yield reader

    def ends(self) -> dict[tuple[str, int], int]:
        """Return where the partitions end, as `offsets` names them."""
        found: dict[int, tuple[int, int]] = {}

        def is_known() -> bool:
            # A topic that was just made anew is unknown for some moments.
            with suppress(KafkaException):
                found.update(self.broker.watermarks(self.topic))
            return bool(found)

        wait_for(is_known, f"the ends of {self.topic}")
        return {(self.topic_id, number): high for number, (_, high) in found.items()}

    def wait_until_read(self, ends: dict[tuple[str, int], int] | None = None) -> None:
        """Wait until all is read that there is now, or up to some other ends."""
        wanted = self.ends() if ends is None else ends
        wait_for(lambda: self.offsets().items() >= wanted.items(), f"{wanted} be read")

    def is_folded(self) -> bool:
        """Tell whether the projection is at the log's end."""
        live = self.app.projection(self._projection).live
        return live is not None and live.cursor == self.app.head().position

    def offsets(self) -> dict[tuple[str, int], int]:
        """Return what is read next, by topic id and partition."""
        table, sources = self.app.database.tables.offsets, self.app.database.tables.sources
        query = sa.select(sources.c.name, table.c.partition, table.c.next_offset)
        return {
            (_topic_id(name), partition): offset
            for name, partition, offset in self.select(query.join_from(table, sources))
        }

    def select(self, query: sa.Select[Any]) -> list[Any]:
        """Return a query's rows."""
        with self.app.database.read() as connection:
            return list(connection.execute(query))

    # --- judgement ----------------------------------------------------------------

    def _kept(self) -> list[tuple[Row, str | None]]:
        """Return the log's rows with their entities, by position."""
        table, sources = self.app.database.tables.events, self.app.database.tables.sources
        query = sa.select(
            table.c.position,
            sources.c.name,
            table.c.partition,
            table.c.offset,
            table.c.payload,
            table.c.entity_id,
        )
        query = query.join_from(table, sources).order_by(table.c.position)
        return [
            (Row(position, Place(_topic_id(name), partition, offset), payload), who)
            for position, name, partition, offset, payload, who in self.select(query)
        ]

    def _beside(self, table: sa.Table) -> Counter[Place]:
        """Return the places of duplicates or failures."""
        sources = self.app.database.tables.sources
        query = sa.select(sources.c.name, table.c.partition, table.c.offset)
        rows = self.select(query.join_from(table, sources))
        return Counter(Place(_topic_id(name), *more) for name, *more in rows)

    def _history(
        self, kept: list[tuple[Row, str | None]], cursors: Iterable[Cursor]
    ) -> list[Any]:
        tables = self.app.database.tables
        skipped = {p.place for p in self.sent if p.place and _outcome(p) == "skip"}
        elsewhere = {*self._beside(tables.duplicates), *self._beside(tables.failures)}
        return check(
            History(
                produced=self.sent,
                rows=[row for row, _ in kept],
                checkpoints=self.offsets(),
                cursors=list(cursors),
                elsewhere=elsewhere | skipped | self.deleted,
            )
        )

    def _misplaced(self, kept: list[tuple[Row, str | None]]) -> Iterator[str]:
        """Find records that became something else than they should."""
        tables = self.app.database.tables
        committed = [p for p in self.sent if p.outcome is Outcome.COMMITTED]
        wanted: dict[str, set[Any]] = {"kept": set(), "skip": set(), "fail": set()}
        for produced in committed:
            if produced.place not in self.deleted:
                wanted[_outcome(produced)].add(produced.place)
        failures, duplicates = (
            self._beside(table) for table in (tables.failures, tables.duplicates)
        )
        for place, times in (failures + duplicates).items():
            if times > 1:
                yield f"{place} is kept {times} times beside the log"
        rows = {row.place for row, _ in kept} | set(duplicates)
        for name, found in (("fail", set(failures)), ("kept", rows)):
            yield from (f"{place} is not in '{name}'" for place in wanted[name] - found)
            yield from (f"{place} is in '{name}'" for place in found - wanted[name])
        payloads = {produced.place: produced.payload for produced in committed}
        at = {row.position: row for row, _ in kept}
        table, sources = tables.duplicates, tables.sources
        query = sa.select(
            sources.c.name, table.c.partition, table.c.offset, table.c.repeats
        )
        for name, partition, offset, repeats in self.select(
            query.join_from(table, sources)
        ):
            place = Place(_topic_id(name), partition, offset)
            if payloads.get(place) != at[repeats].payload or at[repeats].place == place:
                yield f"{place} does not repeat position {repeats}"

    def _miscounted(self) -> Iterator[str]:
        """Find partitions whose end was not reached, or whose ledger says else."""
        offsets = self.offsets()
        table, sources = self.app.database.tables.checkpoints, self.app.database.tables.sources
        rows = self.select(
            sa.select(sources.c.name, table)
            .join_from(table, sources)
            .order_by(table.c.id)
        )
        for lane, end in self.ends().items():
            partition = lane[1]
            if offsets.get(lane) != end:
                yield f"partition {partition} is read to {offsets.get(lane)} of {end}"
            mine = [r for r in rows if (_topic_id(r.name), r.partition) == lane]
            told = Counter[str]()
            for row in mine:
                told["seen"] += row.acked + row.skipped + row.duplicate + row.failed
                told["skip"] += row.skipped
                told["fail"] += row.failed
            there = Counter(
                _outcome(p)
                for p in self.sent
                if p.place
                and p.place[:2] == lane
                and p.outcome is Outcome.COMMITTED
                and p.place not in self.deleted
            )
            known = Counter(skip=there["skip"], fail=there["fail"], seen=there.total())
            if told != known:
                yield f"partition {partition}: the ledger has {told}, not {known}"
            for before, after in pairwise(mine):
                if before.to_offset != after.from_offset:
                    yield f"partition {partition}: hole at {before.to_offset}"

    def _mistimed(self) -> Iterator[str]:
        """Find positions at which the time goes back."""
        table = self.app.database.tables.events
        times = self.select(
            sa.select(table.c.position, table.c.recorded_at).order_by(table.c.position)
        )
        for before, after in pairwise(times):
            if after.recorded_at < before.recorded_at:
                yield f"position {after.position} was recorded before the one before"

    def _misfolded(self, kept: list[tuple[Row, str | None]]) -> Iterator[str]:
        """Find rows of the projection that are not the fold of the log."""
        states: dict[str, Trail] = {}
        for row, who in kept:
            if who is not None and row.payload is not None:
                states[who] = follow(states.get(who), json.loads(row.payload)["number"])
        wanted = [{"entity_id": who} | asdict(states[who]) for who in sorted(states)]
        if list(self.app.rows("trails")) != wanted:
            yield "the projection is not the fold of the log"


class Following:
    """A reader that reads on while the log grows."""

    def __init__(self, world: World) -> None:
        """Begin in `with`."""
        self._world = world
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._pages: list[Page] = []
        self._error: BaseException | None = None

    @property
    def cursor(self) -> Cursor:
        """What it was given."""
        return Cursor("while it went on", tuple(self._pages))

    def __enter__(self) -> Self:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and raise what went wrong in the thread."""
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.02):
                page = self._world.page(_last(self._pages), 40)
                if page.seen:
                    self._pages.append(page)
        except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
            self._error = error


def _last(pages: list[Page]) -> int:
    return pages[-1].seen[-1][0] if pages else 0


def _wanting(entity_id: str | None = None) -> Callable[[Row], bool]:
    def wants(row: Row) -> bool:
        if entity_id is None:
            return True
        return row.payload is not None and json.loads(row.payload)["who"] == entity_id

    return wants


def _outcome(produced: Produced) -> str:
    assert not isinstance(produced.payload, bytes)
    return outcome_of(produced.payload)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _topic_id(source: str) -> str:
    return source.partition("/")[2]
