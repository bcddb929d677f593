"""The README is true: every command, setting, error and method is in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic_core import PydanticUndefined

from kappa_log import errors
from kappa_log.app import KappaLog
from kappa_log.cli import cli
from kappa_log.cli.start import TEMPLATE
from kappa_log.config import Config, ListenerConfig
from kappa_log.storage import database

COMMENTED = re.compile(r'^# (?=\[|["\w.]+ = )', re.MULTILINE)
"""Before a setting of the template that shows its default."""

README = (Path(__file__).parents[2] / "README.md").read_text()


def _commands(group: click.Group, path: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}"


def _defaults(model: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            yield from _defaults(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", field.default


def _errors() -> Iterator[str]:
    for module in (errors, database):
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, errors.KappaLogError):
                yield name


@pytest.mark.parametrize("command", sorted(_commands(cli)))
def test_every_command_is_in_the_readme(command: str) -> None:
    """A command that nobody can read about is not there."""
    assert f"`kappa-log {command}`" in README or f"`{command}`" in README


@pytest.mark.parametrize("setting", sorted(dict(_defaults(Config))))
def test_every_setting_is_in_the_readme(setting: str) -> None:
    """A setting that nobody can read about is not there."""
    assert setting in README


def test_what_init_writes_shows_every_setting_with_its_default() -> None:
    """An example of all there is; who uncomments a line is safe.

    SEED G7, X1, X6 to X9.
    """
    written = tomllib.loads(COMMENTED.sub("", TEMPLATE))
    Config(**written)
    (listener,) = written["listeners"]

    changed: set[str] = set()
    for model, values in ((Config, written), (ListenerConfig, listener)):
        shown, defaults = dict(_shown(model, values)), dict(_defaults(model))
        assert shown.keys() == defaults.keys()
        changed |= {
            name
            for name, default in defaults.items()
            if default not in (None, {}, PydanticUndefined) and shown[name] != default
        }

    # What a project has of its own from the start.
    assert changed == {"listeners", "projections.modules"}


def _shown(model: Any, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a file, by the names of `_defaults`."""
    for name, value in values.items():
        inner = model.model_fields[name].annotation
        if hasattr(inner, "model_fields"):
            yield from ((f"{name}.{key}", v) for key, v in _shown(inner, value))
        else:
            yield name, value


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
