"""Traps for a worker, and faults: functions of the engine, wrapped in its process.

The engine knows nothing of them. A name that is not there to be wrapped is an error.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import confluent_kafka
import sqlalchemy as sa
from typing_extensions import override

from kappa_log import KappaLog, ingest
from kappa_log.errors import Fenced
from kappa_log.kafka import client, cluster, consume
from kappa_log.storage import builds, bulk, ledger, log, rows

# --- traps ------------------------------------------------------------------------


class Trap:
    """Kills or stops this process at the n-th pass of a point.

    Args:
        app: The log that it works on.
        on_pause: Called before it stops.
        point: K0 to K9.
        at: Which pass.
        seed: Chooses among the places that a point has, unless one is given.
        place: Number of the place.
        act: ``kill``, or ``pause``.
    """

    def __init__(
        self,
        app: KappaLog,
        on_pause: Callable[[], None],
        *,
        point: str,
        at: int,
        seed: float = 0,
        place: int | None = None,
        act: str = "kill",
    ) -> None:
        self._left = at
        self._on_pause = on_pause
        self._act = act
        self._chance = random.Random(f"{point} {seed}")
        self._dialect = app.database.engine.dialect
        self._engine = app.database.engine
        self._writers: set[int] = set()
        """Threads whose transaction has come to what marks it."""
        places: list[Callable[[], None]] = getattr(self, point.lower())()
        (self._chance.choice(places) if place is None else places[place])()

    def k0(self) -> list[Callable[[], None]]:
        """After poll, before BEGIN."""
        return [
            lambda: self._before(consume, "ingest_batch"),
            lambda: self._after(ingest, "decide"),
        ]

    def k1(self) -> list[Callable[[], None]]:
        """After BEGIN, before or after the first statement."""
        return [
            lambda: self._before(ledger, "advance"),
            lambda: self._after(ledger, "advance"),
        ]

    def k2(self) -> list[Callable[[], None]]:
        """After the first row of a batch."""
        insert = bulk.insert_rows

        def first_row(connection: Any, table: Any, names: Any, rows: Any) -> None:
            given = list(rows)
            if self._left == 1 and given:
                insert(connection, table, names, given[:1])
            self._pass()
            insert(connection, table, names, given)

        return [lambda: _replace(log, "insert_rows", first_row)]

    def k3(self) -> list[Callable[[], None]]:
        """After the last row, before a checkpoint."""
        return [lambda: self._before(ledger, "write_checkpoint")]

    def k4(self) -> list[Callable[[], None]]:
        """After the checkpoints, before COMMIT."""
        return [
            lambda: self._before(log, "move_head"),
            lambda: self._around_commit(ledger, "advance", before=self._pass),
        ]

    def k5(self) -> list[Callable[[], None]]:
        """During COMMIT, by the kernel's own timer: no lock of Python's delays it."""
        took = [0.0003]

        def commit(inner: Callable[[Any], None], connection: Any) -> None:
            self._left -= 1
            if self._left == 0:
                moment = self._chance.uniform(1e-6, 1.2 * min(took))
                signal.setitimer(signal.ITIMER_REAL, moment)
            begun = time.perf_counter()
            inner(connection)
            took.append(time.perf_counter() - begun)
            if self._left == 0:
                time.sleep(60)

        return [lambda: self._around_commit(ledger, "advance", instead=commit)]

    def k6(self) -> list[Callable[[], None]]:
        """After COMMIT, before Kafka's own commit, and right after that."""
        trap = self

        class Consumer(confluent_kafka.Consumer):
            @override
            def commit(self, *given: Any, **named: Any) -> Any:
                # It is called about once a second: there may be no third time.
                trap._left = min(trap._left, 2)
                trap._pass()
                return super().commit(*given, **named)

        return [
            lambda: self._around_commit(ledger, "advance", after=self._pass),
            lambda: self._after(consume, "ingest_batch"),
            lambda: _replace(client, "Consumer", Consumer),
        ]

    def k7(self) -> list[Callable[[], None]]:
        """While rows and cursor of a projection are written."""
        return [
            lambda: self._before(rows.RowStore, "save"),
            lambda: self._after(rows.RowStore, "save"),
            lambda: self._before(builds, "move_cursor"),
            lambda: self._around_commit(rows.RowStore, "save", before=self._pass),
        ]

    def k9(self) -> list[Callable[[], None]]:
        """During a migration, between two statements."""

        def place() -> None:
            sa.event.listen(
                self._engine, "after_cursor_execute", lambda *_: self._pass()
            )

        return [place]

    def _before(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def trapped(*given: Any, **named: Any) -> Any:
            self._pass()
            return inner(*given, **named)

        _replace(owner, name, trapped)

    def _after(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def trapped(*given: Any, **named: Any) -> Any:
            result = inner(*given, **named)
            self._pass()
            return result

        _replace(owner, name, trapped)

    def _around_commit(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        instead: Callable[..., None] = lambda inner, connection: inner(connection),
    ) -> None:
        """Act at the commits of transactions that called a function."""
        marked = getattr(owner, name)
        inner = self._dialect.do_commit

        @functools.wraps(marked)
        def marking(*given: Any, **named: Any) -> Any:
            self._writers.add(threading.get_ident())
            return marked(*given, **named)

        def do_commit(connection: Any) -> None:
            if threading.get_ident() not in self._writers:
                inner(connection)
                return
            self._writers.discard(threading.get_ident())
            before()
            instead(inner, connection)
            after()

        _replace(owner, name, marking)
        _replace(self._dialect, "do_commit", do_commit)

    def _pass(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._spring()

    def _spring(self) -> None:
        is_kill = self._act == "kill"
        if not is_kill:
            self._on_pause()
        os.kill(os.getpid(), signal.SIGKILL if is_kill else signal.SIGSTOP)
        # Another thread may be the one that the signal reaches first.
        time.sleep(60 if is_kill else 0.1)


# --- planted faults ---------------------------------------------------------------


def _offsets_first(_: KappaLog) -> None:
    """Commit the offsets before the events: a kill in between loses these."""
    advance = ledger.advance

    def planted(connection: Any, database: Any, *more: Any) -> None:
        advance(connection, database, *more)
        driver = connection.connection.driver_connection
        driver.commit()
        if database.is_sqlite:
            driver.execute("BEGIN IMMEDIATE")

    _replace(ledger, "advance", planted)


def _no_offsets(_: KappaLog) -> None:
    """Append without moving the offsets: all comes again after a kill."""
    _replace(ledger, "advance", lambda *_: None)


def _cursor_first(_: KappaLog) -> None:
    """Commit a projection's cursor before its rows: a kill in between loses these."""
    save = rows.RowStore.save

    def planted(store: Any, connection: Any, changed: Any, **named: Any) -> None:
        driver = connection.connection.driver_connection
        driver.commit()
        if connection.dialect.name == "sqlite":
            driver.execute("BEGIN IMMEDIATE")
        save(store, connection, changed, **named)

    _replace(rows.RowStore, "save", planted)


def _no_fence(_: KappaLog) -> None:
    """Move the offsets, whoever they belong to by now."""

    def planted(
        connection: Any, database: Any, lane: Any, held: Any, reached: Any, now: Any
    ) -> None:
        table = database.tables.offsets
        connection.execute(
            table.update()
            .where(
                table.c.source_id == held.source_id,
                table.c.partition == lane.partition,
            )
            .values(next_offset=reached.next_offset, updated_at=now)
        )

    _replace(ledger, "advance", planted)


def _kafka_offsets(app: KappaLog) -> None:
    """Go on where Kafka believes that the group is, whatever the log says."""
    assign = ledger.assign

    def planted(connection: Any, database: Any, lane: Any, *more: Any) -> Any:
        held = assign(connection, database, lane, *more)
        settings = {"bootstrap.servers": app.config.kafka["bootstrap.servers"]}
        consumer = confluent_kafka.Consumer(settings | {"group.id": lane.group_id})
        wanted = [confluent_kafka.TopicPartition(lane.topic, lane.partition)]
        (found,) = consumer.committed(wanted, client.SECONDS)
        consumer.close()
        if found.offset <= held.next_offset:
            return held
        moved = held.moved(found.offset)
        ledger.advance(connection, database, lane, held, moved, datetime.now(UTC))
        return moved

    _replace(ledger, "assign", planted)


def _no_topic_ids(_: KappaLog) -> None:
    """Take a topic that was made anew for the old one."""
    _replace(
        cluster.Cluster, "_source", lambda self, name, _: f"kafka:{self.id}/{name}"
    )


FAULTS: dict[str, Callable[[KappaLog], None]] = {
    "offsets first": _offsets_first,
    "no offsets": _no_offsets,
    "no fence": _no_fence,
    "cursor first": _cursor_first,
    "kafka offsets": _kafka_offsets,
    "no topic ids": _no_topic_ids,
}


def _replace(owner: Any, name: str, by: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} to wrap"
    setattr(owner, name, by)


def counting_fences() -> list[Fenced]:
    """Return a list that each refusal to a fenced writer is put on."""
    found: list[Fenced] = []
    advance = ledger.advance

    def counted(*given: Any) -> None:
        try:
            advance(*given)
        except Fenced as error:
            found.append(error)
            raise

    _replace(ledger, "advance", counted)
    return found
