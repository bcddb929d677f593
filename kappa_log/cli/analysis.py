"""kappa-log sql: DuckDB over the log and its read models."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kappa_log.cli import output
from kappa_log.cli.params import json_option, limit_option, pass_app

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

    from kappa_log.analysis import Analysis
    from kappa_log.app import KappaLog

BATCH_ROWS = 10_000
"""Rows that are fetched at once; however many there are, no more are in memory."""

FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""What a text begins with that a spreadsheet would run."""


@click.command()
@click.argument("query", required=False)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, safe in spreadsheets.")
@click.option(
    "--parquet",
    "file",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the rows to FILE.",
)
@limit_option(100)
@pass_app
def sql(
    app: KappaLog,
    /,
    *,
    query: str | None,
    as_json: bool,
    as_csv: bool,
    file: Path | None,
    limit: int,
) -> None:
    """Ask the log and its read models by SQL.

    QUERY is DuckDB's SQL, or - to read it from stdin; without one the views and
    their columns are listed. --limit counts for tables alone.
    """
    if as_json + as_csv + (file is not None) > 1:
        msg = "give one of --json, --csv and --parquet."
        raise click.UsageError(msg)
    analysis = app.analysis()
    if query is None:
        _print_views(analysis, as_json=as_json)
        return
    found = analysis.sql(sys.stdin.read() if query == "-" else query)
    if found is None:
        return
    rows = Rows(analysis, found)
    if file is not None:
        _write_parquet(rows, file)
    elif as_json:
        for row in rows:
            output.print_json(output.to_json(dict(zip(rows.names, row, strict=True))))
    elif as_csv:
        _print_csv(rows)
    else:
        _print_table(rows, limit)


class Rows:
    """The rows of a result, fetched as they are asked for."""

    def __init__(self, analysis: Analysis, found: DuckDBPyRelation) -> None:
        """Look at its columns; no row is computed."""
        self._analysis = analysis
        self._found = found
        self.names: Sequence[str] = list(found.columns)
        self._are_json = [str(kind) == "JSON" for kind in found.types]

    def batches(self) -> Iterator[Any]:
        """Yield the rows as batches of Arrow; the first is empty and tells the schema.

        Raises:
            KappaLogError: The query fails, or what it reads.
        """
        import duckdb

        try:
            reader = self._found.to_arrow_reader(BATCH_ROWS)
            yield reader.schema.empty_table().combine_chunks()
            yield from reader
        except duckdb.Error as error:
            raise self._analysis.error(error) from error
        except OSError as error:
            # Arrow passes on what DuckDB says, as one of its own.
            raise self._analysis.error(duckdb.Error(str(error))) from error

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the rows as plain values; JSON is passed through as it is."""
        for batch in self.batches():
            columns = [
                [_plain(value, is_json=is_json) for value in column.to_pylist()]
                for column, is_json in zip(batch.columns, self._are_json, strict=True)
            ]
            yield from map(list, zip(*columns, strict=True))


def _plain(value: Any, *, is_json: bool) -> Any:
    """Return a value as `output` knows it; a sum of integers is an integer."""
    import msgspec

    if isinstance(value, str) and is_json:
        # Line ends in JSON stand between tokens only; as spaces they mean the same.
        return msgspec.Raw(re.sub("[\r\n]", " ", value).encode())
    if isinstance(value, Decimal) and value.as_tuple().exponent == 0:
        return int(value)
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    if isinstance(value, list):
        return [_plain(one, is_json=False) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one, is_json=False) for name, one in value.items()}
    return value if value is None or isinstance(value, _KNOWN) else str(value)


_KNOWN = (bool, int, float, str, bytes, Decimal, date, time, timedelta)


def _print_views(analysis: Analysis, *, as_json: bool) -> None:
    for view in analysis.views():
        if as_json:
            output.print_json(output.to_json(view))
            continue
        output.line(output.style(view.name, sys.stdout, bold=True))
        output.print_fields(view.columns.items(), indent="  ")
        output.line()
    if not as_json:
        output.next_steps(
            'kappa-log sql "SELECT topic, count(*) FROM events GROUP BY 1"'
        )


def _print_table(rows: Rows, limit: int) -> None:
    shown = [list(map(_shown, row)) for row in islice(iter(rows), limit + 1)]
    output.print_table(list(map(output.safe, rows.names)), shown[:limit])
    if len(shown) > limit:
        output.say(
            f"There are more rows than --limit {limit}; all of them: --json, --csv or "
            "--parquet FILE."
        )


def _shown(value: Any) -> Any:
    import msgspec

    return bytes(value).decode() if isinstance(value, msgspec.Raw) else value


def _print_csv(rows: Rows) -> None:
    writer = csv.writer(output.stdout(), lineterminator="\n")
    writer.writerow(map(_csv_cell, rows.names))
    for row in rows:
        writer.writerow(map(_csv_cell, row))


def _csv_cell(value: Any) -> Any:
    """Return a cell; text that a spreadsheet would take for a formula gets a ``'``."""
    import msgspec

    match value:
        case str():
            return f"'{value}" if value.startswith(FORMULAS) else value
        case None | int() | float() if not isinstance(value, bool):
            return value
        case msgspec.Raw():
            return bytes(value).decode()
        case Decimal():
            return format(value, "f")
        case _:
            return output.to_json(value).strip('"')


def _write_parquet(rows: Rows, file: Path) -> None:
    """Write all rows to a file, which is there whole or not at all."""
    import pyarrow.parquet as pq

    if not file.absolute().parent.is_dir():
        msg = f"--parquet {file}: its folder is not there."
        raise click.UsageError(msg)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    count = 0
    batches = rows.batches()
    try:
        with pq.ParquetWriter(part, next(batches).schema, compression="zstd") as writer:
            for batch in batches:
                count += batch.num_rows
                writer.write_batch(batch)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    output.say(f"{file}: {output.plural(count, 'row')}")
