"""The log, its ledger, failures, builds and replays.

Revision: 0001, after nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")


def rising(*columns: str) -> list[sa.ColumnElement[object]]:
    """Return ascending order with NULL first, which is SQLite's own and only one."""
    is_sqlite = context.get_bind().dialect.name == "sqlite"
    order = "" if is_sqlite else " ASC NULLS FIRST"
    return [sa.literal_column(f"{column}{order}") for column in columns]


def upgrade() -> None:
    """Create all tables, empty."""
    p = context.config.attributes["tables"].prefix
    op.create_table(
        p + "audit",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_table(
        p + "head",
        sa.Column("id", BIG, autoincrement=False, nullable=False),
        sa.Column("position", BIG, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("recorded_at", INSTANT, nullable=True),
        sa.Column("erasure_epoch", BIG, nullable=False),
        sa.CheckConstraint("id = 1", name=p + "head_one_row"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_table(
        p + "projections",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("next_build", BIG, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sqlite_strict=True,
    )
    op.create_table(
        p + "replays",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("projection", sa.Text(), nullable=False),
        sa.Column("build", BIG, nullable=True),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("progress", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "replays_projection", p + "replays", ["projection"], unique=False
    )
    op.create_table(
        p + "sources",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", name=p + "sources_name"),
        sqlite_strict=True,
    )
    op.create_table(
        p + "builds",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("projection", sa.Text(), nullable=False),
        sa.Column("number", BIG, nullable=False),
        sa.Column("version", BIG, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("cursor", BIG, nullable=False),
        sa.Column("fingerprints", sa.Text(), nullable=False),
        sa.Column("layout", sa.Text(), nullable=False),
        sa.Column("mixed", sa.Text(), nullable=True),
        sa.Column("unkeyed", BIG, nullable=False),
        sa.Column("epoch", BIG, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.CheckConstraint(
            "role IN ('live', 'shadow', 'side', 'retired')", name=p + "builds_role"
        ),
        sa.ForeignKeyConstraint(
            ["projection"],
            [p + "projections.name"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("projection", "number", name=p + "builds_number"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "builds_live",
        p + "builds",
        ["projection"],
        unique=True,
        sqlite_where=sa.text("role = 'live'"),
        postgresql_where=sa.text("role = 'live'"),
    )
    op.create_index(
        p + "builds_retired",
        p + "builds",
        ["projection"],
        unique=True,
        sqlite_where=sa.text("role = 'retired'"),
        postgresql_where=sa.text("role = 'retired'"),
    )
    op.create_table(
        p + "checkpoints",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("source_id", BIG, nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("partition", BIG, nullable=False),
        sa.Column("from_offset", BIG, nullable=False),
        sa.Column("to_offset", BIG, nullable=False),
        sa.Column("acked", BIG, nullable=False),
        sa.Column("skipped", BIG, nullable=False),
        sa.Column("duplicate", BIG, nullable=False),
        sa.Column("failed", BIG, nullable=False),
        sa.Column("parked", BIG, nullable=False),
        sa.Column("first_position", BIG, nullable=True),
        sa.Column("last_position", BIG, nullable=True),
        sa.Column("head", sa.LargeBinary(), nullable=True),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.CheckConstraint(
            "kind IN ('batch', 'rewind', 'gap', 'retry', 'admit')",
            name=p + "checkpoints_kind",
        ),
        sa.CheckConstraint(
            # With IS NOT NULL: a check that comes to NULL is not violated.
            "(acked = 0 AND first_position IS NULL AND last_position IS NULL "
            "AND head IS NULL) OR (acked > 0 AND first_position IS NOT NULL "
            "AND last_position IS NOT NULL AND head IS NOT NULL "
            "AND last_position - first_position + 1 = acked)",
            name=p + "checkpoints_positions",
        ),
        sa.CheckConstraint("from_offset <= to_offset", name=p + "checkpoints_range"),
        sa.ForeignKeyConstraint(
            ["source_id"],
            [p + "sources.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "checkpoints_lane",
        p + "checkpoints",
        ["source_id", "group_id", "topic", "partition", "id"],
        unique=False,
    )
    op.create_index(
        p + "checkpoints_last_position",
        p + "checkpoints",
        ["last_position"],
        unique=False,
    )
    op.create_table(
        p + "events",
        sa.Column("position", BIG, autoincrement=False, nullable=False),
        sa.Column("source_id", BIG, nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("partition", BIG, nullable=False),
        sa.Column("offset", BIG, nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=True),
        sa.Column("headers", sa.LargeBinary(), nullable=True),
        sa.Column("timestamp", BIG, nullable=True),
        sa.Column("entity_id", sa.Text(), nullable=True),
        sa.Column("event_time", INSTANT, nullable=True),
        sa.Column("event_type", sa.Text(), nullable=True),
        sa.Column("event_version", sa.Text(), nullable=True),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.Column("checksum", sa.Text(), nullable=True),
        sa.Column("message_id", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=True),
        sa.Column("raw", sa.LargeBinary(), nullable=True),
        sa.Column("payload_digest", sa.LargeBinary(), nullable=True),
        sa.Column("personal_digest", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint("position >= 1", name=p + "events_from_1"),
        sa.ForeignKeyConstraint(
            ["source_id"],
            [p + "sources.id"],
        ),
        sa.PrimaryKeyConstraint("position"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "events_coordinates",
        p + "events",
        ["source_id", "group_id", "topic", "partition", "offset"],
        unique=True,
    )
    op.create_index(
        p + "events_entity", p + "events", ["entity_id", "position"], unique=False
    )
    listed = [*rising("event_time", "recorded_at"), sa.literal_column("position")]
    op.create_index(
        p + "events_event_type", p + "events", ["event_type", *listed], unique=False
    )
    op.create_index(p + "events_listed", p + "events", listed, unique=False)
    op.create_index(p + "events_message_id", p + "events", ["message_id"], unique=True)
    op.create_index(p + "events_topic", p + "events", ["topic", *listed], unique=False)
    op.create_table(
        p + "failures",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("source_id", BIG, nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("partition", BIG, nullable=False),
        sa.Column("offset", BIG, nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=True),
        sa.Column("headers", sa.LargeBinary(), nullable=True),
        sa.Column("timestamp", BIG, nullable=True),
        sa.Column("value", sa.LargeBinary(), nullable=True),
        sa.Column("checksum", sa.Text(), nullable=True),
        sa.Column("message_id", sa.LargeBinary(), nullable=True),
        sa.Column("entity_id", sa.Text(), nullable=True),
        sa.Column("event_time", INSTANT, nullable=True),
        sa.Column("event_type", sa.Text(), nullable=True),
        sa.Column("event_version", sa.Text(), nullable=True),
        sa.Column("park_id", sa.LargeBinary(), nullable=True),
        sa.Column("parked", BIG, nullable=False),
        sa.Column("error_class", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_backtrace", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column("attempts", BIG, nullable=False),
        sa.Column("first_at", INSTANT, nullable=False),
        sa.Column("last_at", INSTANT, nullable=False),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.CheckConstraint("parked IN (0, 1)", name=p + "failures_parked"),
        sa.ForeignKeyConstraint(
            ["source_id"],
            [p + "sources.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "failures_coordinates",
        p + "failures",
        ["source_id", "group_id", "topic", "partition", "offset"],
        unique=True,
    )
    op.create_index(
        p + "failures_fingerprint", p + "failures", ["fingerprint"], unique=False
    )
    op.create_index(
        p + "failures_listed",
        p + "failures",
        [*rising("event_time", "first_at"), sa.literal_column("id")],
        unique=False,
    )
    op.create_index(
        p + "failures_park", p + "failures", ["park_id", "offset"], unique=False
    )
    op.create_table(
        p + "offsets",
        sa.Column("source_id", BIG, nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("partition", BIG, nullable=False),
        sa.Column("next_offset", BIG, nullable=False),
        sa.Column("reached", BIG, nullable=False),
        sa.Column("epoch", BIG, nullable=False),
        sa.Column("content_digest", sa.LargeBinary(), nullable=True),
        sa.Column("dedupe", sa.Text(), nullable=False),
        sa.Column("fields", sa.Text(), nullable=True),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(
            ["source_id"],
            [p + "sources.id"],
        ),
        sa.PrimaryKeyConstraint(
            "source_id", "group_id", "topic", "partition", name=p + "offsets_pk"
        ),
        sqlite_strict=True,
    )
    op.create_table(
        p + "duplicates",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("source_id", BIG, nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("partition", BIG, nullable=False),
        sa.Column("offset", BIG, nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=True),
        sa.Column("headers", sa.LargeBinary(), nullable=True),
        sa.Column("timestamp", BIG, nullable=True),
        sa.Column("repeats", BIG, nullable=False),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(
            ["repeats"],
            [p + "events.position"],
        ),
        sa.ForeignKeyConstraint(
            ["source_id"],
            [p + "sources.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "duplicates_coordinates",
        p + "duplicates",
        ["source_id", "group_id", "topic", "partition", "offset"],
        unique=False,
    )
    op.create_table(
        p + "shards",
        sa.Column("build_id", BIG, nullable=False),
        sa.Column("shard", BIG, nullable=False),
        sa.Column("cursor", BIG, nullable=False),
        sa.ForeignKeyConstraint(["build_id"], [p + "builds.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("build_id", "shard", name=p + "shards_pk"),
        sqlite_strict=True,
    )
    op.create_table(
        p + "parked_keys",
        sa.Column("build_id", BIG, nullable=False),
        sa.Column("key_id", sa.LargeBinary(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("position", BIG, nullable=False),
        sa.Column("error_class", sa.Text(), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.Column("error_backtrace", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("attempts", BIG, nullable=False),
        sa.Column("first_at", INSTANT, nullable=False),
        sa.Column("last_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["build_id"], [p + "builds.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("build_id", "key_id", name=p + "parked_keys_pk"),
        sqlite_strict=True,
    )
    op.create_index(
        p + "parked_keys_position",
        p + "parked_keys",
        ["build_id", "position"],
        unique=False,
    )
    op.create_table(
        p + "tokens",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("revoked_at", INSTANT, nullable=True),
        sa.CheckConstraint("role IN ('read', 'operate')", name=p + "tokens_role"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", name=p + "tokens_name"),
        sa.UniqueConstraint("digest", name=p + "tokens_digest"),
        sqlite_strict=True,
    )
    op.create_table(
        p + "requests",
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("who", "key", name=p + "requests_pk"),
        sqlite_strict=True,
    )
    op.create_index(p + "requests_at", p + "requests", ["at"], unique=False)


def downgrade() -> None:
    """Drop all tables."""
    p = context.config.attributes["tables"].prefix
    op.drop_index(p + "requests_at", table_name=p + "requests")
    op.drop_table(p + "requests")
    op.drop_table(p + "tokens")
    op.drop_index(p + "parked_keys_position", table_name=p + "parked_keys")
    op.drop_table(p + "parked_keys")
    op.drop_table(p + "shards")
    op.drop_index(p + "duplicates_coordinates", table_name=p + "duplicates")
    op.drop_table(p + "duplicates")
    op.drop_table(p + "offsets")
    op.drop_index(p + "failures_park", table_name=p + "failures")
    op.drop_index(p + "failures_listed", table_name=p + "failures")
    op.drop_index(p + "failures_fingerprint", table_name=p + "failures")
    op.drop_index(p + "failures_coordinates", table_name=p + "failures")
    op.drop_table(p + "failures")
    op.drop_index(p + "events_topic", table_name=p + "events")
    op.drop_index(p + "events_message_id", table_name=p + "events")
    op.drop_index(p + "events_listed", table_name=p + "events")
    op.drop_index(p + "events_event_type", table_name=p + "events")
    op.drop_index(p + "events_entity", table_name=p + "events")
    op.drop_index(p + "events_coordinates", table_name=p + "events")
    op.drop_table(p + "events")
    op.drop_index(p + "checkpoints_last_position", table_name=p + "checkpoints")
    op.drop_index(p + "checkpoints_lane", table_name=p + "checkpoints")
    op.drop_table(p + "checkpoints")
    op.drop_index(
        p + "builds_retired",
        table_name=p + "builds",
        sqlite_where=sa.text("role = 'retired'"),
        postgresql_where=sa.text("role = 'retired'"),
    )
    op.drop_index(
        p + "builds_live",
        table_name=p + "builds",
        sqlite_where=sa.text("role = 'live'"),
        postgresql_where=sa.text("role = 'live'"),
    )
    op.drop_table(p + "builds")
    op.drop_table(p + "sources")
    op.drop_index(p + "replays_projection", table_name=p + "replays")
    op.drop_table(p + "replays")
    op.drop_table(p + "projections")
    op.drop_table(p + "head")
    op.drop_table(p + "audit")
