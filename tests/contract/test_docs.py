"""The README is true: every command, setting, error and method is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from kappa_log import errors
from kappa_log.app import KappaLog
from kappa_log.cli import cli
from kappa_log.config import Config
from kappa_log.storage import database

README = (Path(__file__).parents[2] / "README.md").read_text()


def _commands(group: click.Group, path: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}"


def _settings(model: Any, path: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            yield from _settings(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _errors() -> Iterator[str]:
    for module in (errors, database):
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, errors.KappaLogError):
                yield name


@pytest.mark.parametrize("command", sorted(_commands(cli)))
def test_every_command_is_in_the_readme(command: str) -> None:
    """A command that nobody can read about is not there."""
    assert f"`kappa-log {command}`" in README or f"`{command}`" in README


@pytest.mark.parametrize("setting", sorted(_settings(Config)))
def test_every_setting_is_in_the_readme(setting: str) -> None:
    """A setting that nobody can read about is not there."""
    assert setting in README


@pytest.mark.parametrize("error", sorted(set(_errors()) - {"KappaLogError"}))
def test_every_error_is_in_the_readme(error: str) -> None:
    """Users write except clauses by what they can read."""
    assert f"`{error}`" in README


@pytest.mark.parametrize(
    "method", sorted(n for n in vars(KappaLog) if not n.startswith("_"))
)
def test_every_method_is_in_the_readme(method: str) -> None:
    """The Python API does all that the command line does, and says so."""
    assert method in README
