"""Tables of the engine, on SQLite and PostgreSQL alike.

What can be an invariant of the schema is one: positions are unique and start at 1,
coordinates and identities repeat nowhere, a projection has at most one live and one
retired build, and a checkpoint's numbers add up. Builds are tables of their own,
made by `builds`, and hidden from migrations.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from typing_extensions import override

from kappa_log.events import kept_instant, to_micros

REVISION = "0001"
"""The migration that makes these tables; the newest one."""

ROLES = ("live", "shadow", "side", "retired")
TOKEN_ROLES = ("read", "operate")
CHECKPOINT_KINDS = ("batch", "rewind", "gap", "retry", "admit")

Big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Bytes = sa.LargeBinary()


class Instant(sa.types.TypeDecorator[datetime]):
    """A UTC time: TIMESTAMPTZ on PostgreSQL, INTEGER microseconds on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    @override
    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(sa.Integer())
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    @override
    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return to_micros(value)

    @override
    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return kept_instant(value if dialect.name == "sqlite" else to_micros(value))


class Tables:
    """The engine's tables under one prefix, for one of the two databases."""

    def __init__(self, prefix: str, *, is_sqlite: bool) -> None:
        """Define the tables; nothing is read or written."""
        self.prefix = prefix
        self._is_sqlite = is_sqlite
        self.metadata = sa.MetaData()
        self.sources = self._sources()
        self.offsets = self._offsets()
        self.head = self._head()
        self.events = self._events()
        self.checkpoints = self._checkpoints()
        self.duplicates = self._duplicates()
        self.failures = self._failures()
        self.projections = self._projections()
        self.builds = self._builds()
        self.shards = self._shards()
        self.parked_keys = self._parked_keys()
        self.replays = self._replays()
        self.audit = self._audit()
        self.tokens = self._tokens()
        self.requests = self._requests()

    @property
    def version_table(self) -> str:
        """Name of the table in which Alembic keeps the revision."""
        return f"{self.prefix}alembic_version"

    @property
    def project_version_table(self) -> str:
        """Name of that of a project's own migrations; made with the first of them."""
        return f"{self.prefix}project_version"

    def _table(self, name: str, *parts: Any) -> sa.Table:
        return sa.Table(self.prefix + name, self.metadata, *parts, sqlite_strict=True)

    def _id(self) -> sa.Column[int]:
        return sa.Column("id", Big, primary_key=True, autoincrement=True)

    def _source(self) -> sa.Column[int]:
        return sa.Column(
            "source_id", Big, sa.ForeignKey(f"{self.prefix}sources.id"), nullable=False
        )

    def _name(self, name: str, *columns: str) -> str:
        return f"{self.prefix}{name}_{'_'.join(columns)}"

    def _rising(self, *columns: sa.Column[Any]) -> list[sa.ColumnElement[Any]]:
        """Return the order, from its end, of lists: descending with NULL last.

        What is new then comes at the end of an index, which fills its pages; read
        backwards it gives the list. SQLite has NULL first without a word.
        """
        if self._is_sqlite:
            return list(columns)
        return [column.asc().nulls_first() for column in columns]

    def _sources(self) -> sa.Table:
        return self._table(
            "sources",
            self._id(),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("created_at", Instant, nullable=False),
            sa.UniqueConstraint("name", name=self._name("sources", "name")),
        )

    def _offsets(self) -> sa.Table:
        return self._table(
            "offsets",
            self._source(),
            sa.Column("group_id", sa.Text, nullable=False),
            sa.Column("topic", sa.Text, nullable=False),
            sa.Column("partition", Big, nullable=False),
            sa.Column("next_offset", Big, nullable=False),
            sa.Column("reached", Big, nullable=False),
            sa.Column("epoch", Big, nullable=False),
            sa.Column("content_digest", Bytes),
            sa.Column("dedupe", sa.Text, nullable=False),
            sa.Column("fields", sa.Text),
            sa.Column("updated_at", Instant, nullable=False),
            sa.PrimaryKeyConstraint(
                "source_id",
                "group_id",
                "topic",
                "partition",
                name=self._name("offsets", "pk"),
            ),
        )

    def _head(self) -> sa.Table:
        return self._table(
            "head",
            sa.Column("id", Big, primary_key=True, autoincrement=False),
            sa.Column("position", Big, nullable=False),
            sa.Column("digest", Bytes, nullable=False),
            sa.Column("recorded_at", Instant),
            sa.Column("erasure_epoch", Big, nullable=False),
            sa.CheckConstraint("id = 1", name=self._name("head", "one_row")),
        )

    def _events(self) -> sa.Table:
        table = self._table(
            "events",
            sa.Column("position", Big, primary_key=True, autoincrement=False),
            self._source(),
            sa.Column("topic", sa.Text, nullable=False),
            sa.Column("group_id", sa.Text, nullable=False),
            sa.Column("partition", Big, nullable=False),
            sa.Column("offset", Big, nullable=False),
            sa.Column("key", Bytes),
            sa.Column("headers", Bytes),
            sa.Column("timestamp", Big),
            sa.Column("entity_id", sa.Text),
            sa.Column("event_time", Instant),
            sa.Column("event_type", sa.Text),
            sa.Column("event_version", sa.Text),
            sa.Column("recorded_at", Instant, nullable=False),
            sa.Column("checksum", sa.Text),
            sa.Column("message_id", Bytes, nullable=False),
            sa.Column("payload", sa.Text),
            sa.Column("raw", Bytes),
            sa.Column("payload_digest", Bytes),
            sa.Column("personal_digest", Bytes),
            sa.CheckConstraint("position >= 1", name=self._name("events", "from_1")),
        )
        columns = table.c
        sa.Index(self._name("events", "message_id"), columns.message_id, unique=True)
        sa.Index(
            self._name("events", "coordinates"),
            columns.source_id,
            columns.group_id,
            columns.topic,
            columns.partition,
            columns.offset,
            unique=True,
        )
        sa.Index(self._name("events", "entity"), columns.entity_id, columns.position)
        listed = self._rising(columns.event_time, columns.recorded_at)
        listed.append(columns.position)
        sa.Index(self._name("events", "listed"), *listed)
        # However rare a topic or a type is, its page is not searched for in the log.
        sa.Index(self._name("events", "topic"), columns.topic, *listed)
        sa.Index(self._name("events", "event_type"), columns.event_type, *listed)
        return table

    def _checkpoints(self) -> sa.Table:
        counts = ("acked", "skipped", "duplicate", "failed", "parked")
        return self._table(
            "checkpoints",
            self._id(),
            sa.Column("kind", sa.Text, nullable=False),
            self._source(),
            sa.Column("group_id", sa.Text, nullable=False),
            sa.Column("topic", sa.Text, nullable=False),
            sa.Column("partition", Big, nullable=False),
            sa.Column("from_offset", Big, nullable=False),
            sa.Column("to_offset", Big, nullable=False),
            *(sa.Column(name, Big, nullable=False) for name in counts),
            sa.Column("first_position", Big),
            sa.Column("last_position", Big),
            sa.Column("head", Bytes),
            sa.Column("recorded_at", Instant, nullable=False),
            sa.CheckConstraint(
                "kind IN ({})".format(", ".join(f"'{k}'" for k in CHECKPOINT_KINDS)),
                name=self._name("checkpoints", "kind"),
            ),
            sa.CheckConstraint(
                "from_offset <= to_offset", name=self._name("checkpoints", "range")
            ),
            sa.CheckConstraint(
                # With IS NOT NULL: a check that comes to NULL is not violated.
                "(acked = 0 AND first_position IS NULL AND last_position IS NULL "
                "AND head IS NULL) OR (acked > 0 AND first_position IS NOT NULL "
                "AND last_position IS NOT NULL AND head IS NOT NULL "
                "AND last_position - first_position + 1 = acked)",
                name=self._name("checkpoints", "positions"),
            ),
            sa.Index(self._name("checkpoints", "last_position"), "last_position"),
            sa.Index(
                self._name("checkpoints", "lane"),
                "source_id",
                "group_id",
                "topic",
                "partition",
                "id",
            ),
        )

    def _received(self) -> list[Any]:
        """Columns of a record that is kept outside the log."""
        return [
            self._source(),
            sa.Column("group_id", sa.Text, nullable=False),
            sa.Column("topic", sa.Text, nullable=False),
            sa.Column("partition", Big, nullable=False),
            sa.Column("offset", Big, nullable=False),
            sa.Column("key", Bytes),
            sa.Column("headers", Bytes),
            sa.Column("timestamp", Big),
        ]

    def _duplicates(self) -> sa.Table:
        return self._table(
            "duplicates",
            self._id(),
            *self._received(),
            sa.Column(
                "repeats",
                Big,
                sa.ForeignKey(f"{self.prefix}events.position"),
                nullable=False,
            ),
            sa.Column("recorded_at", Instant, nullable=False),
            sa.Index(
                self._name("duplicates", "coordinates"),
                "source_id",
                "group_id",
                "topic",
                "partition",
                "offset",
            ),
        )

    def _failures(self) -> sa.Table:
        table = self._table(
            "failures",
            self._id(),
            *self._received(),
            sa.Column("value", Bytes),
            sa.Column("checksum", sa.Text),
            sa.Column("message_id", Bytes),
            sa.Column("entity_id", sa.Text),
            sa.Column("event_time", Instant),
            sa.Column("event_type", sa.Text),
            sa.Column("event_version", sa.Text),
            sa.Column("park_id", Bytes),
            sa.Column("parked", Big, nullable=False),
            sa.Column("error_class", sa.Text),
            sa.Column("error_message", sa.Text),
            sa.Column("error_backtrace", sa.Text),
            sa.Column("fingerprint", sa.Text),
            sa.Column("attempts", Big, nullable=False),
            sa.Column("first_at", Instant, nullable=False),
            sa.Column("last_at", Instant, nullable=False),
            sa.Column("metadata", sa.Text),
            sa.CheckConstraint(
                "parked IN (0, 1)", name=self._name("failures", "parked")
            ),
        )
        columns = table.c
        sa.Index(
            self._name("failures", "coordinates"),
            columns.source_id,
            columns.group_id,
            columns.topic,
            columns.partition,
            columns.offset,
            unique=True,
        )
        sa.Index(self._name("failures", "park"), columns.park_id, columns.offset)
        sa.Index(self._name("failures", "fingerprint"), columns.fingerprint)
        sa.Index(
            self._name("failures", "listed"),
            *self._rising(columns.event_time, columns.first_at),
            columns.id,
        )
        return table

    def _projections(self) -> sa.Table:
        return self._table(
            "projections",
            sa.Column("name", sa.Text, primary_key=True),
            sa.Column("next_build", Big, nullable=False),
            sa.Column("created_at", Instant, nullable=False),
        )

    def _builds(self) -> sa.Table:
        table = self._table(
            "builds",
            self._id(),
            sa.Column(
                "projection",
                sa.Text,
                sa.ForeignKey(f"{self.prefix}projections.name"),
                nullable=False,
            ),
            sa.Column("number", Big, nullable=False),
            sa.Column("version", Big, nullable=False),
            sa.Column("role", sa.Text, nullable=False),
            sa.Column("cursor", Big, nullable=False),
            sa.Column("fingerprints", sa.Text, nullable=False),
            sa.Column("layout", sa.Text, nullable=False),
            sa.Column("mixed", sa.Text),
            sa.Column("unkeyed", Big, nullable=False),
            sa.Column("epoch", Big, nullable=False),
            sa.Column("created_at", Instant, nullable=False),
            sa.Column("updated_at", Instant, nullable=False),
            sa.UniqueConstraint(
                "projection", "number", name=self._name("builds", "number")
            ),
            sa.CheckConstraint(
                "role IN ({})".format(", ".join(f"'{role}'" for role in ROLES)),
                name=self._name("builds", "role"),
            ),
        )
        # Naming the other one, too, would import all of its drivers' code.
        dialect = "sqlite" if self._is_sqlite else "postgresql"
        for role in ("live", "retired"):
            condition: dict[str, Any] = {
                f"{dialect}_where": sa.text(f"role = '{role}'")
            }
            name = self._name("builds", role)
            sa.Index(name, table.c.projection, unique=True, **condition)
        return table

    def _shards(self) -> sa.Table:
        return self._table(
            "shards",
            sa.Column(
                "build_id",
                Big,
                sa.ForeignKey(f"{self.prefix}builds.id", ondelete="CASCADE"),
                nullable=False,
            ),
            sa.Column("shard", Big, nullable=False),
            sa.Column("cursor", Big, nullable=False),
            sa.PrimaryKeyConstraint(
                "build_id", "shard", name=self._name("shards", "pk")
            ),
        )

    def _parked_keys(self) -> sa.Table:
        return self._table(
            "parked_keys",
            sa.Column(
                "build_id",
                Big,
                sa.ForeignKey(f"{self.prefix}builds.id", ondelete="CASCADE"),
                nullable=False,
            ),
            # A digest: the key's text may be longer than an index takes.
            sa.Column("key_id", Bytes, nullable=False),
            sa.Column("key", sa.Text, nullable=False),
            sa.Column("position", Big, nullable=False),
            sa.Column("error_class", sa.Text, nullable=False),
            sa.Column("error_message", sa.Text, nullable=False),
            sa.Column("error_backtrace", sa.Text, nullable=False),
            sa.Column("fingerprint", sa.Text, nullable=False),
            sa.Column("attempts", Big, nullable=False),
            sa.Column("first_at", Instant, nullable=False),
            sa.Column("last_at", Instant, nullable=False),
            sa.PrimaryKeyConstraint(
                "build_id", "key_id", name=self._name("parked_keys", "pk")
            ),
            sa.Index(self._name("parked_keys", "position"), "build_id", "position"),
        )

    def _replays(self) -> sa.Table:
        return self._table(
            "replays",
            self._id(),
            sa.Column("projection", sa.Text, nullable=False),
            sa.Column("build", Big),
            sa.Column("phase", sa.Text, nullable=False),
            sa.Column("outcome", sa.Text),
            sa.Column("request", sa.Text, nullable=False),
            sa.Column("plan", sa.Text, nullable=False),
            sa.Column("progress", sa.Text, nullable=False),
            sa.Column("reason", sa.Text),
            sa.Column("created_at", Instant, nullable=False),
            sa.Column("updated_at", Instant, nullable=False),
            sa.Index(self._name("replays", "projection"), "projection"),
        )

    def _audit(self) -> sa.Table:
        return self._table(
            "audit",
            self._id(),
            sa.Column("at", Instant, nullable=False),
            sa.Column("who", sa.Text, nullable=False),
            sa.Column("action", sa.Text, nullable=False),
            sa.Column("subject", sa.Text, nullable=False),
            sa.Column("detail", sa.Text, nullable=False),
            sa.Column("reason", sa.Text),
        )

    def _tokens(self) -> sa.Table:
        return self._table(
            "tokens",
            self._id(),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("role", sa.Text, nullable=False),
            sa.Column("digest", Bytes, nullable=False),
            sa.Column("created_at", Instant, nullable=False),
            sa.Column("revoked_at", Instant),
            sa.UniqueConstraint("name", name=self._name("tokens", "name")),
            sa.UniqueConstraint("digest", name=self._name("tokens", "digest")),
            sa.CheckConstraint(
                "role IN ({})".format(", ".join(f"'{role}'" for role in TOKEN_ROLES)),
                name=self._name("tokens", "role"),
            ),
        )

    def _requests(self) -> sa.Table:
        """Return the table of requests that must not be done twice."""
        return self._table(
            "requests",
            sa.Column("who", sa.Text, nullable=False),
            sa.Column("key", sa.Text, nullable=False),
            sa.Column("digest", Bytes, nullable=False),
            sa.Column("answer", sa.Text),
            sa.Column("at", Instant, nullable=False),
            sa.PrimaryKeyConstraint("who", "key", name=self._name("requests", "pk")),
            sa.Index(self._name("requests", "at"), "at"),
        )
