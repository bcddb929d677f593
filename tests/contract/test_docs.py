"""The README is true: every command, setting, error and method is in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import click
import pytest

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


def test_what_init_writes_shows_every_setting_with_its_default() -> None:
    """SEED X1, X6 to X9: an example of all there is; who uncomments a line is safe."""
    written = tomllib.loads(COMMENTED.sub("", TEMPLATE))
    (listener,) = written.pop("listeners")

    assert sorted(_settings(Config)) == sorted(
        [*_written(Config, written), "listeners"]
    )
    assert sorted(_settings(ListenerConfig)) == sorted(
        _written(ListenerConfig, listener)
    )
    made = Config(**written, listeners=[listener])
    for setting in set(_settings(Config)) - {"listeners", "projections.modules"}:
        default = reduce(getattr, setting.split("."), Config())
        if default not in (None, {}):
            assert reduce(getattr, setting.split("."), made) == default, setting
    needed = {name: listener[name] for name in ("topic", "group_id", "handler")}
    for setting in _settings(ListenerConfig):
        default = reduce(getattr, setting.split("."), ListenerConfig(**needed))
        if default not in (None, {}):
            found = reduce(getattr, setting.split("."), made.listeners[0])
            assert found == default, setting


def _written(model: Any, values: dict[str, Any]) -> Iterator[str]:
    """Yield the settings that a file sets, by the names of `_settings`."""
    for name, value in values.items():
        inner = model.model_fields[name].annotation
        if hasattr(inner, "model_fields"):
            yield from (f"{name}.{found}" for found in _written(inner, value))
        else:
            yield name


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
