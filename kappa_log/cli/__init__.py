"""The command line: parse, call `KappaLog`, print.

Data goes to stdout, everything else to stderr, and nothing from the log reaches a
terminal with its control characters alive. All errors end in `run`, which knows one
line and one exit code for each. Heavy modules are imported inside the commands.

    0    ok
    1    unexpected
    2    usage
    3    finished with new failures
    4    verification or diff failed
    65   data divergence
    69   source or database unavailable
    75   locked, try later
    78   configuration
    130  interrupted, resumable
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click
from typing_extensions import override

from kappa_log import errors
from kappa_log.cli import (
    analysis,
    archive,
    db,
    failures,
    kafka,
    log,
    output,
    phobos,
    projections,
    reading,
    replay,
    serve,
    setup,
    start,
)
from kappa_log.cli.params import Commands, Options

EXIT_CODES: Mapping[type[errors.KappaLogError], int] = {
    errors.ConfigError: 78,
    errors.UsageError: 2,
    errors.RegistrationError: 2,
    errors.StaleCode: 2,
    errors.ProjectionError: 1,
    errors.HandlerError: 1,
    errors.DecodeError: 65,
    errors.RetryFailed: 3,
    errors.SourceError: 69,
    errors.SourceDiverged: 65,
    errors.SourceGap: 69,
    errors.VerificationError: 4,
    errors.ArchiveError: 69,
    errors.ArchiveNewer: 78,
    errors.ArchiveDiverged: 65,
    errors.ArchiveDamaged: 4,
    errors.StorageError: 69,
    errors.DatabaseBusy: 75,
    errors.DatabaseUnavailable: 69,
    errors.AlreadyRunning: 75,
    errors.Fenced: 75,
    errors.LostRace: 75,
    errors.CursorConflict: 75,
    errors.SchemaOutOfDate: 78,
}
"""Exit code of each error; one that is not here has that of its nearest parent."""

_GOES_ON = "the same command goes on from there."

INTERRUPTED: Mapping[str, str] = {
    "ingest": f"the batches that were committed are kept, and {_GOES_ON}",
    "import-phobos": "nothing was imported.",
    "project": f"rows and cursors that were written are kept, and {_GOES_ON}",
    "export": f"the archive is whole, as it was or as it is to be, and {_GOES_ON}",
    "import": (
        "an import is one transaction: nothing was imported, unless all was already. "
        "The same command begins anew, or says that the log is not empty."
    ),
    "verify": "nothing was changed, and the same command begins anew.",
    "produce": (
        "what the cluster took is in the topic, and the same command would produce it "
        "once more."
    ),
}
"""What Ctrl-C leaves behind, by command, where the interrupt has no note that knows
more. `replay` says it itself."""

DEBUG = "KAPPA_LOG_DEBUG"


class Root(Commands):
    """The command itself; a reader of stdout that has seen enough is no error."""

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            output.close_stdout()
            ctx.exit()
        except KeyboardInterrupt as stop:
            kept = " ".join(f"{note}." for note in getattr(stop, "__notes__", ()))
            kept = kept or INTERRUPTED.get(ctx.invoked_subcommand or "", "")
            if kept:
                output.say(f"\nInterrupted; {kept}")
            raise
        return code


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", metavar="URL", help="Database, instead of the configured one.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=start.print_version,
    help="Print the versions of kappa-log, Python and SQLite.",
)
@click.pass_context
def cli(context: click.Context, url: str | None) -> None:
    """Events into an append-only log, once; every view of them replayable."""
    context.obj = Options(url=url)


for _command in (
    start.demo,
    start.init,
    setup.copy_migrations,
    setup.migration,
    start.doctor,
    start.config,
    db.db,
    log.ingest,
    phobos.import_phobos,
    kafka.consume,
    kafka.run,
    kafka.lag,
    kafka.produce,
    reading.events,
    reading.duplicates,
    failures.failures,
    projections.project,
    replay.replay,
    projections.projections,
    archive.export,
    archive.import_,
    log.verify,
    analysis.sql,
    serve.serve,
    serve.token,
    serve.init_events_api,
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command that was typed, and end the process with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    output.prepare()
    try:
        code = cli.main(arguments, prog_name="kappa-log", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except errors.KappaLogError as error:
        output.error(str(error))
        for note in getattr(error, "__notes__", ()):
            output.say(note)
        return exit_code(error)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        return _unexpected(error)
    return code if isinstance(code, int) else 0


def exit_code(error: errors.KappaLogError) -> int:
    """Return the exit code of an error."""
    codes = (EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)
    return next(codes, 1)


def _unexpected(error: Exception) -> int:
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    output.error(f"{text}; run with {DEBUG}=1 for the traceback", "Unexpected error")
    return 1
