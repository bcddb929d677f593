"""The Python of the README, as somebody who reads it pastes it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from support import untraced
from support.mock_broker import MockBroker

README = (Path(__file__).parents[2] / "README.md").read_text()

HANDLER = re.search(
    r"```python\n(from kappa_log import Handler, ack\n.*?)```", README, re.DOTALL
)
BIKES = re.search(r"cat > projections/bikes.py <<'END'\n(.*?)END\n", README, re.DOTALL)

SETTINGS = """
[kafka]
"bootstrap.servers" = "{bootstrap}"
"fetch.wait.max.ms" = 10
[[listeners]]
topic = "orders"
group_id = "billing"
handler = "handlers:OrdersHandler"
"""


def block(name: str) -> str:
    """Return a block of the README."""
    found = re.search(
        rf"<!-- python: {name} -->\n```python\n(.*?)```", README, re.DOTALL
    )
    assert found is not None, f"the README has no block named {name}"
    return found[1]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=untraced(PYTEST_ADDOPTS="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the README's handler and its mended projection."""
    assert HANDLER is not None
    assert BIKES is not None
    (tmp_path / "handlers.py").write_text(HANDLER[1])
    (tmp_path / "projections").mkdir()
    # As `init` writes it; else Python would prefer the examples' own package.
    (tmp_path / "projections" / "__init__.py").touch()
    (tmp_path / "projections" / "bikes.py").write_text(
        BIKES[1].replace('event.payload["km"]', 'max(0.0, event.payload["km"])')
    )
    return tmp_path


def test_a_service_runs_inside_of_a_program(
    mock_broker: MockBroker, project: Path
) -> None:
    """SEED L7, L9: it starts in a thread, and ends when it is told to."""
    for topic in ("orders", "refunds"):
        mock_broker.create_topic(topic, 1)
    # Two listeners: the example holds for any number.
    _, listeners = re.split(r"(?=\[\[listeners)", SETTINGS)
    settings = SETTINGS + listeners.replace("orders", "refunds").replace(
        "billing", "till"
    )
    (project / "kappa_log.toml").write_text(
        settings.format(bootstrap=mock_broker.bootstrap).replace("Orders", "Till")
    )
    with (project / "handlers.py").open("a") as file:
        file.write(block("around"))
    (project / "service.py").write_text(
        "from kappa_log import KappaLog\nKappaLog.open().create_database()\n"
        + block("embedded")
    )

    done = run(project, "service.py")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1"


def test_records_are_produced(mock_broker: MockBroker, project: Path) -> None:
    """SEED L10: the four names, and a transaction."""
    for topic in ("orders", "invoices"):
        mock_broker.create_topic(topic, 1)
    (project / "kappa_log.toml").write_text(
        SETTINGS.format(bootstrap=mock_broker.bootstrap)
    )
    (project / "shop.py").write_text(block("producing"))

    done = run(project, "shop.py")

    assert (done.returncode, done.stdout) == (0, "0 0\n"), done.stderr


def test_handlers_and_folds_are_tested(project: Path) -> None:
    """SEED L15; the fixture comes along, and each test has a log of its own."""
    (plugin,) = entry_points(group="pytest11", name="kappa_log")
    (project / "test_mine.py").write_text(block("testing"))

    # Loaded by its name: the other plugins that are here take seconds to start.
    options = ("-q", "-p", plugin.value, "--import-mode=prepend", "--rootdir=.")
    done = run(project, "-m", "pytest", *options)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    assert not (project / "kappa_log.db").exists()
