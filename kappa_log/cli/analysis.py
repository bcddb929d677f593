"""kappa-log sql: DuckDB over the log and its read models."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    text = sys.stdin.read() if query == "-" else query
    _check_that_it_asks(analysis, text)
    found = analysis.sql(text)
    assert found is not None, "it has rows"
    if file is not None:
        _write_parquet(Rows(analysis, found), file)
        return
    rows = Rows(analysis, _readable(found))
    if as_json:
        names = _distinct(rows.names)
        for row in rows:
            output.print_json(output.to_json(dict(zip(names, row, strict=True))))
    elif as_csv:
        _print_csv(rows)
    else:
        _print_table(rows, limit)


def _check_that_it_asks(analysis: Analysis, text: str) -> None:
    """Refuse what has no rows at its end: what it made would be gone with the command.

    Raises:
        UsageError: DuckDB cannot read the text.
    """
    statements = analysis.statements(text)
    if not statements:
        msg = "the query is empty; without one, the views and their columns are listed."
        raise click.UsageError(msg)
    if statements[-1] in _ROWLESS:
        msg = (
            f"{statements[-1]} asks for no rows. What a query makes is gone with it, "
            "and the log cannot be written by SQL. Nothing was done."
        )
        raise click.UsageError(msg)


_ROWLESS = frozenset(
    {
        *("ALTER", "ANALYZE", "ATTACH", "COPY", "COPY_DATABASE", "CREATE", "DELETE"),
        *("DETACH", "DROP", "EXPORT", "INSERT", "LOAD", "MERGE_INTO", "PREPARE", "SET"),
        *("TRANSACTION", "UPDATE", "VACUUM", "VARIABLE_SET"),
    }
)
"""Kinds of statements, as DuckDB names them."""


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

        # DuckDB works in a thread of its own: here it would not see a Ctrl-C.
        with ThreadPoolExecutor(1, "sql") as thread:
            try:
                work = thread.submit(self._found.to_arrow_reader, BATCH_ROWS)
                reader = work.result()
                yield reader.schema.empty_table().combine_chunks()
                while (batch := thread.submit(next, reader, None).result()) is not None:
                    yield batch
            except duckdb.Error as error:
                raise self._analysis.error(error) from error
            except OSError as error:
                # Arrow passes on what DuckDB says, as one of its own.
                raise self._analysis.error(duckdb.Error(str(error))) from error
            finally:
                # Who wants no more need not wait until DuckDB has found it.
                self._analysis.connection.interrupt()

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the rows as plain values; JSON is passed through as it is."""
        for batch in self.batches():
            columns = [
                [_plain(value, is_json=is_json) for value in _values(column)]
                for column, is_json in zip(batch.columns, self._are_json, strict=True)
            ]
            yield from map(list, zip(*columns, strict=True))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names that are not there twice, as members of an object must be."""
    found: list[str] = []
    for name in names:
        number, new = 1, name
        while new in found:
            new, number = f"{name}_{number}", number + 1
        found.append(new)
    return found


def _readable(found: DuckDBPyRelation) -> DuckDBPyRelation:
    """Let DuckDB itself write what Python has no type for, as text or as JSON."""
    columns = []
    for number, (name, kind) in enumerate(zip(found.columns, found.types, strict=True)):
        parts = set(_parts(kind))
        column = f"#{number + 1}"
        if parts <= _TEXTS:
            column = f"CAST({column} AS VARCHAR)"
        elif parts & (_TEXTS | _AS_JSON):
            column = f"to_json({column})"
        quoted = name.replace('"', '""')
        columns.append(f'{column} AS "{quoted}"')
    if all(column.startswith("#") for column in columns):
        return found
    return found.project(", ".join(columns))


def _parts(kind: Any) -> Iterator[str]:
    """Yield what a type of DuckDB is, and each type in it."""
    yield kind.id
    if kind.id in ("list", "array", "struct"):
        for name, part in kind.children:
            if name != "size":  # That of an array is a number.
                yield from _parts(part)


_TEXTS = frozenset(
    {
        "bignum",
        "bit",
        "geometry",
        "interval",
        "time with time zone",
        "time_ns",
        "timestamp_ns",
    }
)
"""Python has a smaller type for them, or none."""

_AS_JSON = frozenset({"map", "union", "variant"})


def _values(column: Any) -> Sequence[Any]:
    """Return a column's values; instants that Python has not, as DuckDB writes them."""
    import duckdb
    import pyarrow as pa

    try:
        found: list[Any] = column.to_pylist()
    except OverflowError:  # Infinity, or no year of 1 to 9999.
        table = pa.table({"v": column})
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'")
            query = connection.from_arrow(table).project("CAST(v AS VARCHAR)")
            texts = [text for (text,) in query.fetchall()]
        found = [_value(*pair) for pair in zip(column, texts, strict=True)]
    return found


def _value(scalar: Any, text: str | None) -> Any:
    try:
        return scalar.as_py()
    except OverflowError:
        return text


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


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as found:
        return found.read(4) in (b"PAR1", b"")


def _write_parquet(rows: Rows, file: Path) -> None:
    """Write all rows to a file, which is there whole or not at all.

    Of files that are there, only Parquet is replaced: a name that was mistyped may be
    that of the log's own database.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.absolute().parent.is_dir():
        msg = f"--parquet {file}: its folder is not there."
        raise click.UsageError(msg)
    if file.exists() and not _is_parquet(file):
        msg = (
            f"--parquet {file}: a file that is no Parquet is there. Give another name, "
            "or remove it. Nothing was written."
        )
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
    except pa.ArrowNotImplementedError as error:
        msg = (
            f"--parquet {file}: a column's type has no place in Parquet ({error}); "
            "cast it, for instance to VARCHAR. Nothing was written."
        )
        raise click.UsageError(msg) from None
    finally:
        part.unlink(missing_ok=True)
    output.say(f"{file}: {output.plural(count, 'row')}")
