"""kappa-log copy-migrations and migration: what a project has of migrations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kappa_log.cli import output
from kappa_log.cli.params import pass_app

if TYPE_CHECKING:
    from kappa_log.app import KappaLog

MARK = (
    "# A copy to read and to review. kappa-log db upgrade runs those of the installed\n"
    "# package, and a project's own: the files in the folder above.\n"
)


@click.command("copy-migrations")
@click.argument(
    "folder",
    metavar="[DIR]",
    default="migrations/kappa_log",
    type=click.Path(file_okay=False, path_type=Path),
)
def copy_migrations(*, folder: Path) -> None:
    """Copy the engine's migrations into DIR, to review.

    What is there already is kept.
    """
    from kappa_log.config import packaged

    for file in sorted((packaged("migrations") / "versions").glob("*.py")):
        output.write_new(folder / file.name, MARK.encode() + file.read_bytes())
    output.next_steps("kappa-log migration NAME", "kappa-log db upgrade")


@click.command()
@click.argument("name")
@pass_app
def migration(app: KappaLog, /, *, name: str) -> None:
    """Write an empty migration of the project's own.

    Whatever is no letter, digit or underscore in NAME becomes an underscore.
    """
    target, is_new = app.write_migration(name)
    shown = target
    if target.is_relative_to(Path.cwd()):
        shown = target.relative_to(Path.cwd())
    output.line(f"{'create' if is_new else 'exists'}  {output.safe(shown)}")
    output.next_steps("kappa-log db upgrade")
