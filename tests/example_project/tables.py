"""The shop's own tables: upgrade and downgrade of its migration."""

import sqlalchemy as sa
from alembic import op


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "products",
        sa.Column("product", sa.Text, primary_key=True),
        sa.Column("cents", sa.BigInteger, nullable=False),
    )
    # No unique key: were an invoice written twice, it would be there twice.
    op.create_table(
        "invoices",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("order_id", sa.Text, nullable=False),
        sa.Column("cents", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("invoices")
    op.drop_table("products")
