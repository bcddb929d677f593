"""Commands as a person types them, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kappa_log.cli import run


class Typed(NamedTuple):
    """What a command printed."""

    out: str
    err: str

    @property
    def json(self) -> list[Any]:
        """The JSON lines of stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


Type = Callable[..., Typed]
"""Types a command; `code=` is how it must end, 0 if not given."""


def typist(capsys: pytest.CaptureFixture[str]) -> Type:
    """Return what types commands, and holds each to its exit code and no traceback."""

    def type_(*arguments: str, code: int = 0) -> Typed:
        capsys.readouterr()
        ended = run(list(arguments))
        said = Typed(*capsys.readouterr())
        assert ended == code, said
        assert "Traceback" not in said.err
        return said

    return type_


def enter_project(
    patch: pytest.MonkeyPatch,
    folder: Path,
    url: str,
    projections: Mapping[str, str],
    *,
    columns: int = 300,
) -> None:
    """Make a folder a project with a log and these projections, and go there.

    Args:
        patch: Undoes it.
        folder: An empty one.
        url: The log's database.
        projections: Name of a module and its text.
        columns: Width of the terminal.
    """
    patch.chdir(folder)
    patch.setenv("COLUMNS", str(columns))
    patch.setenv("KAPPA_LOG__DATABASE__URL", url)
    (folder / "kappa_log.toml").write_text("")
    (folder / "projections").mkdir()
    for name, text in projections.items():
        (folder / "projections" / f"{name}.py").write_text(text)
