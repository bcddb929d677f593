"""Alembic's entry: runs migrations over a connection that kappa_log hands in.

The URL never comes from an ini file: `kappa-log db upgrade` and the tests pass an
open connection and the tables' prefix as attributes. A project's own migrations run
through here too, with a version table of their own.
"""

from alembic import context

from kappa_log.storage.migrations import is_engine_table
from kappa_log.storage.schema import Tables

tables: Tables = context.config.attributes["tables"]
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    version_table=context.config.attributes["version_table"],
    include_name=lambda name, kind, _: kind != "table" or is_engine_table(tables, name),
    compare_type=True,
    render_as_batch=False,
)
with context.begin_transaction():
    context.run_migrations()
