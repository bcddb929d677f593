"""Run notebooks without Jupyter: python -m support.notebook FILE…

All cells of a notebook run in one namespace, as in a kernel. What a cell ends in is
shown, since DuckDB computes a result when it is looked at, and figures are drawn.
Prints for each notebook how many figures it has.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def main(files: list[str]) -> None:
    """Run notebooks, and stop at the first error."""
    import matplotlib as mpl

    mpl.use("Agg")
    warnings.simplefilter("error")
    for file in files:
        drawn = _run(Path(file))
        sys.stdout.write(f"\n{Path(file).name}: {drawn} figures\n")


def _run(file: Path) -> int:
    from matplotlib import pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    drawn = 0
    for number, cell in enumerate(json.loads(file.read_text())["cells"], start=1):
        if cell["cell_type"] == "code":
            _run_cell("".join(cell["source"]), f"{file.name}, cell {number}", names)
        for figure in plt.get_fignums():
            with tempfile.TemporaryFile() as image:
                plt.figure(figure).savefig(image)
            plt.close(figure)
            drawn += 1
    return drawn


def _run_cell(source: str, where: str, names: dict[str, Any]) -> None:
    """Run a cell, and show what it ends in."""
    parsed = ast.parse(source)
    last = parsed.body.pop() if isinstance(parsed.body[-1], ast.Expr) else None
    exec(compile(parsed, where, "exec"), names)  # noqa: S102 - that is what it is for
    if isinstance(last, ast.Expr):
        shown = eval(compile(ast.Expression(last.value), where, "eval"), names)  # noqa: S307
        if shown is not None:
            repr(shown)


if __name__ == "__main__":
    main(sys.argv[1:])
