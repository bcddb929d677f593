"""The commands of the README, as typed, by somebody who has nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support import untraced
from support.kafka_broker import RealBroker

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", re.DOTALL)


def _run(
    name: str, folder: Path, url: str, bootstrap: str = "localhost:9"
) -> subprocess.CompletedProcess[str]:
    """Run the README's blocks of one name in one shell, stopping at an error."""
    commands = folder / "bin"
    commands.mkdir()
    shim = commands / "kappa-log"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kappa_log "$@"\n')
    shim.chmod(0o755)
    (folder / "tests").symlink_to(ROOT / "tests")
    script = "\n".join(text for found, text in BLOCK.findall(README) if found == name)
    assert script, f"the README has no block named {name}"
    return subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=untraced(
            PATH=f"{commands}{os.pathsep}{os.environ['PATH']}",
            KAPPA_LOG__DATABASE__URL=url,
            KAPPA_LOG__KAFKA__BOOTSTRAP_SERVERS=bootstrap,
        ),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_tour_works_and_finds_the_known_customers(
    database_url: str, tmp_path: Path
) -> None:
    """Whoever follows it, on either database, meets the numbers that it names."""
    done = _run("tour", tmp_path, database_url)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = done.stdout + done.stderr
    assert "12,757 events since touch 5,374 keys" in " ".join(said.split())
    assert "13990.93" in said or "13,990.93" in said or "13990.929999999" in said


def test_an_own_projection_prints_what_the_readme_shows(
    database_url: str, tmp_path: Path
) -> None:
    """What a reader compares with is what they will see."""
    done = _run("own", tmp_path, database_url)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    shown = [line for line in README.splitlines() if line.startswith('{"entity_id"')]
    assert len(shown) == 2
    for line in shown:
        assert line in done.stdout


def test_the_commands_for_a_cluster_work(
    database_url: str, kafka_broker: RealBroker, tmp_path: Path
) -> None:
    """Whoever has a cluster, and follows the README, meets no error."""
    done = _run("kafka", tmp_path, database_url, kafka_broker.bootstrap)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
