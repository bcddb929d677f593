"""What each customer of CDNOW bought, as SQL: the columns of `customer_totals`.

DuckDB adds up whole ranges of events at once, so from an archive it is replayed several
times as fast. Counts and whole numbers are the same to the digit; sums of floats depend
on the order of adding up, in their last digits.
"""

from kappa_log import sql_projection

customer_totals_sql = sql_projection(
    name="customer_totals_sql",
    version=1,
    topics=["cdnow"],
    columns={
        "orders": "count(*)",
        "cds": "sum((payload->>'quantity')::BIGINT)",
        "amount": "sum((payload->>'amount')::DOUBLE)",
    },
)
