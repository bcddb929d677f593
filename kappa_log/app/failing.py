"""Failing: what could not become an event, or came twice, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kappa_log import duplicates
from kappa_log.app.actor import user
from kappa_log.app.archiving import Archiving
from kappa_log.errors import NotFound, UsageError
from kappa_log.events import Position
from kappa_log.failures import BulkRetry, Retried, Retrier
from kappa_log.handler import FieldOptions
from kappa_log.listeners import (
    Listener,
    field_listener,
    listener_for,
)
from kappa_log.records import Lane
from kappa_log.storage import failures as stored_failures
from kappa_log.storage import (
    ledger,
    lists,
    replays,
)
from kappa_log.storage.failures import FailureFilter, FailureGroup
from kappa_log.trial import Trial

NAMED_AT_MOST = 10
"""How many of what there is a message names."""

_COLUMNS = {
    "topic": "topic",
    "group": "group_id",
    "fingerprint": "fingerprint",
    "error_class": "error_class",
}
"""Filters that can be mistyped → their columns."""


class Failing(Archiving):
    """The part about failures and duplicates."""

    def listener(self, topic: str, group: str | None = None) -> Listener:
        """Return the configured listener of a topic, or one that keeps all of it."""
        return listener_for(self.config, topic, group)[0]

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
            who=user(),
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

    def failure_states(self) -> dict[str, int]:
        """Return how many failures raised themselves (failed), or wait (parked)."""
        self._require()
        with self.database.read() as connection:
            return stored_failures.count_states(connection, self.database)

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

        Raises:
            UsageError: There are failures, and a filter that none of them has, nor
                the log: it is mistyped.
        """
        self._require()
        retrier = self._retrier(who, reason)
        work = retrier.try_many if dry_run else retrier.many
        done = work(FailureFilter(**chosen), on_progress)
        if not done.matched:
            self._check_known(chosen)
        return done

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
            count = self.count_failures(**chosen)
        else:
            count = self._retrier(who, reason).discard_many(FailureFilter(**chosen))
        if not count:
            self._check_known(chosen)
        return count

    def _check_known(self, chosen: Mapping[str, Any]) -> None:
        """Refuse a filter that no failure has and the log knows nothing of.

        Nothing to do for it would look like success. A topic or group that is read
        and has no failure now is well known; without any failure there is nothing
        that could have been meant.

        Raises:
            UsageError: The filter names what is nowhere; the message says what is.
        """
        with self.database.read() as connection:
            for name, column in _COLUMNS.items():
                value = chosen.get(name)
                if value is None or self._is_read(connection, column, value):
                    continue
                asked = FailureFilter(**{name: value})
                if stored_failures.count(connection, self.database, asked):
                    continue
                there = stored_failures.values(
                    connection, self.database, column, limit=NAMED_AT_MOST + 1
                )
                if there:
                    more = ", …" if len(there) > NAMED_AT_MOST else ""
                    msg = (
                        f"no failure matches {name.replace('_', ' ')} {value!r}; there "
                        f"are failures of: {', '.join(there[:NAMED_AT_MOST])}{more}"
                    )
                    raise UsageError(msg)

    def _is_read(self, connection: Any, column: str, value: str) -> bool:
        """Tell whether a column is a topic or group that is read, or was."""
        if column not in ("topic", "group_id"):
            return False
        is_topic = column == "topic"
        return any(
            found.covers(value) if is_topic else found.group_id == value
            for found in self.config.listeners
        ) or ledger.has_lane(connection, self.database, **{column: value})

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

        act = replays.Audit(who=who or user(), action="", subject="", reason=reason)
        return Retrier(self.database, listener_of, self._clock, act)
