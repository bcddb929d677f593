"""The notebooks run from a fresh checkout, and draw what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import untraced

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_all_notebooks_run(tmp_path: Path) -> None:
    """Whoever opens one and runs all cells meets no error and no warning."""
    done = subprocess.run(
        [sys.executable, "-m", "support.notebook", *map(str, NOTEBOOKS)],
        cwd=FOLDER,
        env=untraced(TMPDIR=str(tmp_path), MPLCONFIGDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    figures = [line for line in done.stdout.splitlines() if line.endswith(" figures")]
    assert figures == [
        "1_tour.ipynb: 1 figures",
        "2_customers.ipynb: 3 figures",
        "3_two_builds.ipynb: 1 figures",
        "4_failures.ipynb: 1 figures",
    ]


def test_notebooks_are_kept_without_output() -> None:
    """Output grows stale, hides changes, and may hold what nobody meant to publish."""
    for file in NOTEBOOKS:
        for cell in json.loads(file.read_text())["cells"]:
            assert not cell.get("outputs"), file.name
            assert cell.get("execution_count") is None, file.name
