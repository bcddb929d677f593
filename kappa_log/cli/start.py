"""kappa-log demo, init, doctor, config and --version: the first minutes, and checks."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kappa_log.cli import output
from kappa_log.cli.params import Commands, Options, json_option, pass_app

if TYPE_CHECKING:
    from kappa_log.app import KappaLog

UNSOUND = 1
"""Exit code of a doctor that found something."""

TEMPLATE = """\
# Settings of kappa-log. What is commented out shows its default.
# KAPPA_LOG__SECTION__KEY variables and flags go before this file;
# `kappa-log config show` tells which value came from where.

[database]
url = "sqlite:///kappa_log.db"      # or postgresql+psycopg://USER@HOST/NAME
# prefix = "kappa_log_"             # first part of the name of each table
# pool_size = 20                    # most connections; else what listeners can use

[projections]
modules = ["projections"]           # packages, modules or folders
# on_error = "park"                 # or stop: what a fold that raises does, live

# [ingest]
# batch_size = 2000                 # records a transaction

# [archive]
# url = "archive"                   # a folder, or s3://BUCKET/FOLDER
# segment_events = 1_000_000        # most events of a Parquet file

# [api]
# host = "127.0.0.1"                # where `kappa-log serve` listens
# port = 8080
# hosts = []                        # names it may be called by, besides loopback's
# rate_per_second = 100             # requests of a token; 0 is no limit

# [log]
# format = "console"                # or json: of consume, run and serve, on stderr
# level = "info"                    # debug, warning, error

# Handed to librdkafka as it stands, for `kappa-log consume` and `run`.
# [kafka]
# "bootstrap.servers" = "localhost:9092"

# The same for producers alone, over [kafka].
# [producer]
# "linger.ms" = 5

# Handed to the schema registry's client: for avro, protobuf and jsonschema.
# [registry]
# url = "http://localhost:8081"

# A handler decides about each record of a topic. Without one, the options of
# `kappa-log ingest` say which fields an event is made of.
# [[listeners]]
# topic = "orders"                  # with ^ in front a regular expression of topics
# group_id = "billing"
# handler = "handlers:OrdersHandler"
# decoder = "json"                  # avro, protobuf, jsonschema, cloudevents, bytes
# dedupe = "payload"                # offset, key+payload, header:NAME
# start = "earliest"                # latest, or an offset: of the very first run
# max_retries = 5                   # after the first attempt; without it, for ever
# park = "key"                      # or event: who waits behind a failure
# max_concurrency = 1               # consumers that share the topic's partitions
# backoff = { min_ms = 500, max_ms = 10_000 }
# restart = { min_ms = 1_000, max_ms = 60_000, max = 10 }  # no max: for ever
# kafka = { "max.poll.interval.ms" = 300_000 }  # over [kafka], for it alone
"""


HANDLERS = '''\
"""Handlers: they decide about each record of a topic. Name one in kappa_log.toml."""

from kappa_log import Handler, ack


class OrdersHandler(Handler):
    """Keeps what happens to orders; a heartbeat is no event."""

    def consume(self, payload, metadata):
        """Say what an event is about and when it happened, or skip the record."""
        if payload.get("type") == "heartbeat":
            return None
        return ack(payload["order_id"], payload["time"], payload["type"])
'''


@click.command()
@click.option(
    "--events",
    type=click.IntRange(100, 10_000_000),
    default=2_000,
    show_default=True,
    help="Events to make up.",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to work in.  [default: kappa-log-demo]",
)
@click.option("--once", is_flag=True, help="End after the tour.")
def demo(*, events: int, folder: Path | None, once: bool) -> int:
    """Show all of it on made-up orders.

    With a broker and a folder of its own.

    Kafka is embedded: nothing is needed, and nothing outside of the folder changes.
    """
    from kappa_log import demo as shop

    return shop.run(events=events, folder=folder, once=once)


@click.command()
@click.argument(
    "folder",
    metavar="[DIR]",
    default=".",
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--from-phobos",
    "phobos_yml",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make kappa_log.toml of a phobos.yml.",
)
def init(*, folder: Path, phobos_yml: Path | None) -> None:
    """Write kappa_log.toml and examples into DIR.

    Examples are a handler and projections. What is there already is kept.
    """
    from kappa_log.config import FILE_NAME

    there = folder.resolve() == Path.cwd()
    steps = [] if there else [f"cd {shlex.quote(str(folder))}"]
    if phobos_yml is not None:
        steps += _translate(phobos_yml, folder / FILE_NAME)
    else:
        output.write_new(folder / FILE_NAME, TEMPLATE.encode())
        output.write_new(folder / "handlers.py", HANDLERS.encode())
    for target, content in _examples(folder / "projections"):
        output.write_new(target, content)
    output.next_steps(*steps, "kappa-log db create")


def _translate(phobos_yml: Path, target: Path) -> list[str]:
    """Write the settings of a phobos.yml, say what is not in them; return what to do.

    No example handler is written: it might have the name of one of these.

    Raises:
        UsageError: There are other settings already; nothing was written.
        ConfigError: The phobos.yml cannot be translated; nothing was written.
    """
    from kappa_log.errors import UsageError
    from kappa_log.phobos.settings import translated

    found = translated(phobos_yml)
    content = found.text.encode()
    if target.exists() and target.read_bytes() != content:
        msg = (
            f"{target} is there already, with other settings; nothing was written. "
            "Move it away, or name another folder: kappa-log init --from-phobos "
            f"{shlex.quote(str(phobos_yml))} DIR"
        )
        raise UsageError(msg)
    output.write_new(target, content)
    if found.notes:
        told = "\n".join(f"  {note}" for note in found.notes)
        output.say(f"Not translated; the file lists these too:\n{told}")
    return [
        *(f"write the handler {handler}" for handler in found.handlers),
        *(f"set {variable}" for variable in found.variables),
    ]


def _examples(target: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the example projections, and where copies of them belong."""
    from kappa_log.config import packaged

    for file in sorted(packaged("projections").glob("*.py")):
        yield target / file.name, file.read_bytes()


@click.command()
@json_option
@pass_app
def doctor(app: KappaLog, /, *, as_json: bool) -> int:
    """Check installation, settings, database and projections."""
    checks = app.doctor()
    for check in checks:
        if as_json:
            output.print_json(output.to_json(check))
            continue
        mark = "ok  " if check.ok else "FAIL"
        colour = "green" if check.ok else "red"
        marked = output.style(mark, output.stdout(), fg=colour)
        output.line(f"{marked}  {check.name}: {output.safe(check.detail)}")
        if check.remedy:
            output.line(f"      → {output.safe(check.remedy)}")
    return 0 if all(check.ok for check in checks) else UNSOUND


@click.group(cls=Commands)
def config() -> None:
    """Look at the settings."""


@config.command("show")
@json_option
@click.pass_obj
def show_config(options: Options, *, as_json: bool) -> None:
    """Print each setting, and where it came from; secrets are masked."""
    from kappa_log.config import load_config

    found = load_config(overrides=options.overrides)
    origins = found.origins
    if as_json:
        settings = {
            key: {"value": value, "origin": origins[key]}
            for key, value in found.shown.items()
        }
        facts = {"file": found.file, "folder": found.folder, "settings": settings}
        output.print_json(output.to_json(facts))
        return
    rows = [
        (output.Uncut(key), _written(value), origins[key])
        for key, value in found.shown.items()
    ]
    output.print_table(("setting", "value", "origin"), rows)
    if found.file is None:
        output.say(f"There is no kappa_log.toml in {found.folder} or above it.")
        output.next_steps("kappa-log init")


def _written(value: object) -> str:
    return value if isinstance(value, str) else output.to_json(value)


def print_version(
    context: click.Context,
    _: click.Parameter,
    asked: bool,
) -> None:
    """Print the versions of what runs, and end."""
    if not asked or context.resilient_parsing:
        return
    from kappa_log import __version__
    from kappa_log.storage.database import sqlite_module

    output.line(f"kappa-log {__version__}")
    output.line(f"Python {platform.python_version()}")
    output.line(f"SQLite {sqlite_module().sqlite_version}")
    context.exit()
