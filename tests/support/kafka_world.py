"""A topic, a log and consumers between them; and all that can be wrong at the end.

The test produces, and remembers what was acknowledged. Workers consume and meet with
accidents. `World.faults` then compares what was produced with the log, its ledger, its
projection and what readers were given on the way, and names everything that differs.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
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

from kappa_log import KappaLog
from kappa_log.config import load_config
from kappa_log.storage.database import sqlite_module
from support import kafka_judge
from support.history import Cursor, Outcome, Place, Produced
from support.kafka_broker import RealBroker
from support.kafka_judge import Following, topic_id_of
from support.kafka_nest import Nest, Worker
from support.kafka_process import ANSWER_SECONDS, admin_of, wait_for
from support.kafka_worker import PROJECTIONS

SCALE = int(os.environ.get("KAPPA_LOG_TEST_TRIALS", "100")) / 100
"""Tests that try something again and again do so this many times as often."""

Settings = dict[str, Any]
"""Settings of a client, by librdkafka's names."""

QUICK: Settings = {"fetch.wait.max.ms": 20, "topic.metadata.refresh.interval.ms": 500}
"""A partition's end, or another topic, is known sooner than users need to know it."""

STATIC: Settings = QUICK | {"group.instance.id": "w", "session.timeout.ms": 10_000}
"""A member that comes back under its name, at once, however its process ended."""

DYNAMIC: Settings = QUICK | {"session.timeout.ms": 1000, "heartbeat.interval.ms": 200}
"""A killed member is missed after a second."""

CONSUMER: Settings = QUICK | {"group.protocol": "consumer"}
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
        kafka: Settings = STATIC,
        batch_size: int = 25,
        handler: str = "Picky",
        projection: str = "trails",
    ) -> None:
        self.broker = broker
        self.topic = topic
        self.group = f"g-{uuid4().hex[:8]}"
        self.topic_id = broker.topic_id(topic)
        self.sent: list[Produced] = []
        self.deleted: set[Place] = set()
        """Records that the broker deleted before they were read."""
        self.errors: list[str] = []
        """What should not have happened on the way."""
        self._nest = nest
        self._workers: list[Worker] = []
        self._folder = folder
        self._projection = projection
        self._kafka = kafka | {"bootstrap.servers": broker.bootstrap}
        self._listener = {
            "topic": topic,
            "group_id": self.group,
            "handler": f"support.kafka_worker:{handler}",
            "max_retries": 0,
            "park": "event",
        }
        self._config = {
            "database.url": url,
            "kafka": self._kafka,
            "listeners": [self._listener],
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
        """Leave no process behind, and close the log."""
        for worker in self._workers:
            worker.kill()
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
        kafka = self._kafka | task.pop("kafka", {})
        worker = self._nest.start(
            work=work,
            folder=str(self._folder),
            topic=self.topic,
            projection=self._projection,
            config=self._config | {"kafka": kafka},
            **task,
        )
        self._workers.append(worker)
        return worker

    def finish(self, **task: Any) -> None:
        """Read all that is left, in workers that nobody disturbs; fold it.

        A killed member has its partitions until it is missed: then one worker alone
        may end without them.
        """
        ends = self.ends()
        give_up = time.monotonic() + ANSWER_SECONDS
        while not self.errors:
            worker = self.start(until_end=True, **task)
            done = worker.result()
            if "error" in done:
                self.errors.append(f"{done['error']}: {done['message']}")
            if self.offsets().items() >= ends.items():
                break
            if time.monotonic() > give_up:
                self.errors.append(f"not read to {ends}, but {worker.notices}")
        self.app.project()

    def written(self) -> Path:
        """Write its configuration, for the command line; return the file's folder."""
        lines = [
            f"database.url = {json.dumps(self._config['database.url'])}",
            f"ingest.batch_size = {self._config['ingest.batch_size']}",
            "projections.modules = []",
            "[kafka]",
            *(f'"{k}" = {json.dumps(v)}' for k, v in self._kafka.items()),
            "[[listeners]]",
            *(f"{k} = {json.dumps(v)}" for k, v in self._listener.items()),
        ]
        (self._folder / "kappa_log.toml").write_text("\n".join(lines))
        return self._folder

    # --- what came of it ----------------------------------------------------------

    def faults(self, *cursors: Cursor) -> list[str]:
        """Return all that is wrong, in words; nothing if the promises were kept."""
        return kafka_judge.faults(self, *cursors)

    @contextmanager
    def following(self) -> Iterator[Following]:
        """Read the log in a thread while the block goes on."""
        with Following(self.app) as reader:
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
        try:
            wait_for(lambda: self.offsets().items() >= wanted.items(), "all to be read")
        except TimeoutError as error:
            error.add_note(f"wanted: {wanted}, reached: {self.offsets()}")
            raise

    def is_folded(self) -> bool:
        """Tell whether the projection is at the log's end."""
        live = self.app.projection(self._projection).live
        return live is not None and live.cursor == self.app.head().position

    def offsets(self) -> dict[tuple[str, int], int]:
        """Return what is read next, by topic id and partition."""
        table, sources = (
            self.app.database.tables.offsets,
            self.app.database.tables.sources,
        )
        query = sa.select(sources.c.name, table.c.partition, table.c.next_offset)
        return {
            (topic_id_of(name), partition): offset
            for name, partition, offset in self.select(query.join_from(table, sources))
        }

    def select(self, query: sa.Select[Any]) -> list[Any]:
        """Return a query's rows."""
        with self.app.database.read() as connection:
            return list(connection.execute(query))


class Worlds:
    """Makes worlds: each has a log of its own, and mostly a topic of its own."""

    def __init__(
        self, broker: RealBroker, nest: Nest, databases: Databases, folder: Path
    ) -> None:
        """Make them of these."""
        self.broker = broker
        self.databases = databases
        self._nest = nest
        self._folder = folder

    @contextmanager
    def new(
        self,
        partitions: int = 0,
        *,
        topic: str = "",
        is_empty: bool = False,
        **settings: Any,
    ) -> Iterator[World]:
        """Give a world, with a new topic or one that is there, and maybe no tables."""
        topic = topic or self.broker.new_topic(partitions)
        with (
            self.databases.fresh(is_empty=is_empty) as url,
            World(
                self.broker, self._nest, url, self._folder, topic, **settings
            ) as world,
        ):
            yield world


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
