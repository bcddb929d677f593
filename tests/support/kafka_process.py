"""A real Kafka broker's process, without Docker: Java, and Maven for its libraries.

Who uses a broker holds a lock on a file in its folder, for as long as the process
lives. A shell of its own waits for the same lock alone: it gets it when the last user
has ended, however that was, and then kills the broker and deletes the folder. So no
killed test run leaves a Java behind, and no worker ends what others still use.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from uuid import uuid4

from confluent_kafka.admin import AdminClient
from filelock import FileLock
from typing_extensions import override

POM = Path(__file__).with_name("kafka-pom.xml")

DOWNLOAD_SECONDS = 240
START_SECONDS = 60
ANSWER_SECONDS = 30

SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/data
auto.create.topics.enable=false

# One broker: nothing can have three replicas, and few partitions start sooner.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=5
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=5
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1

# What takes minutes in production happens while a test waits.
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=1000
group.consumer.min.heartbeat.interval.ms=200
group.consumer.heartbeat.interval.ms=200
log.initial.task.delay.ms=100
log.retention.check.interval.ms=500
log.segment.delete.delay.ms=0
log.cleaner.backoff.ms=100
log.cleaner.dedupe.buffer.size=2097152
transaction.abort.timed.out.transaction.cleanup.interval.ms=200
"""

# The shell becomes the broker, so its number is the broker's, and it is written
# before there is a broker to forget. If the folder is gone already, none is started.
RUN = """\
echo $$ >"$1/pid" || exit
java="java -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
java="$java -Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
[ -e "$1/data/meta.properties" ] || $java -cp "$2/*" \
    kafka.tools.StorageTool format -t "$3" -c "$1/server.properties" || exit
exec $java -Xmx512m -cp "$2/*" kafka.Kafka "$1/server.properties"
"""

GUARD = """\
(   flock -x 9
    kill -9 "$(cat "$1/pid")"
    until rm -rf "$1"; do sleep 0.1; done
) 9<"$1/users" &
"""


class Unavailable(Exception):
    """No broker can run here."""

    def __init__(self, what: str, detail: str = "") -> None:
        """Tell what went wrong, and what was heard of it."""
        super().__init__(f"{what}: {detail}" if detail else what)


# --- libraries ---------------------------------------------------------------


def libraries() -> Path:
    """Return the folder of the broker's libraries, fetched if it is not there yet.

    Raises:
        Unavailable: A program is missing, or the download failed.
    """
    _require("java", "flock")
    version = re.search(r"kafka_2\.13</artifactId><version>(.*?)<", POM.read_text())
    assert version is not None
    folder = _cache() / f"kafka-{version[1]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _fetch(folder)
    return folder


def _require(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise Unavailable("missing on the PATH", ", ".join(missing))


def _cache() -> Path:
    own = os.environ.get("KAPPA_LOG_TEST_CACHE")
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own or users) / "kappa-log-tests"


def _fetch(folder: Path) -> None:
    """Fetch into a folder beside, which gets its name when it is complete."""
    _require("mvn")
    for left in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    goal = ["dependency:copy-dependencies", f"-DoutputDirectory={part / 'libs'}"]
    # Not in tests/support: Maven writes `target` beside the file it reads.
    pom = shutil.copy(POM, part / "pom.xml")
    try:
        subprocess.run(
            ["mvn", "-q", "-B", "-f", pom, *goal],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
        (part / "libs").rename(folder)
    except subprocess.TimeoutExpired as error:
        raise Unavailable("Maven got no download", f"{error.timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable("mvn failed", _gist(error.stdout)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _gist(text: str) -> str:
    """Return the line of some output that says best what went wrong."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Exception" in line]
    return (errors or lines[-1:] or ["it said nothing"])[0][:200]


# --- the process -------------------------------------------------------------


class _Child(subprocess.Popen[bytes]):
    """A process that may outlive this one, since others use it."""

    @override
    def __del__(self) -> None:
        """Do not warn of it; the guard will not forget it."""


class BrokerProcess:
    """A broker in a folder and on ports of its own; it can be killed and restarted."""

    def __init__(self, libs: Path, settings: str = "") -> None:
        """Start it, and wait until it answers.

        Args:
            libs: Where its libraries are.
            settings: More lines of server.properties.

        Raises:
            Unavailable: It did not start.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="kl-kafka-"))
        self._libs = libs
        self._cluster_id = _random_id()
        (self.folder / "users").touch()
        users = hold(self.folder)
        assert users is not None
        self.users = users
        guard(self.folder)
        self._write_settings(settings)
        try:
            self.start()
        except BaseException:
            self.users.close()
            raise

    def start(self) -> None:
        """Start it on its ports and data, and wait until it answers.

        Raises:
            Unavailable: It did not start.
        """
        with (self.folder / "log").open("ab") as log:
            self._process = _Child(
                ["sh", "-c", RUN, "sh", self.folder, self._libs, self._cluster_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the tests; the guard ends what they leave.
                start_new_session=True,
            )
        try:
            wait_for(self._answers, "the broker to answer", START_SECONDS)
        except TimeoutError as error:
            raise Unavailable(str(error), self._said()) from error

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.wait(ANSWER_SECONDS)

    def _write_settings(self, more: str) -> None:
        with socket.socket() as broker, socket.socket() as controller:
            for listener in (broker, controller):
                listener.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in (broker, controller)]
        self.bootstrap = f"127.0.0.1:{ports[0]}"
        text = SETTINGS.format(broker=ports[0], controller=ports[1], folder=self.folder)
        (self.folder / "server.properties").write_text(text + more)

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise Unavailable("the broker ended at once", self._said())
        host, port = self.bootstrap.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            # Not asked by librdkafka yet: it would print each refusal.
            return False
        return bool(admin_of(self.bootstrap).list_topics(timeout=START_SECONDS).brokers)

    def _said(self) -> str:
        return _gist((self.folder / "log").read_text(errors="replace"))


def _random_id() -> str:
    """Return an identity as Kafka writes them; a minus in front would be an option."""
    return base64.urlsafe_b64encode(uuid4().bytes).decode().strip("=").replace("-", "_")


def hold(folder: Path) -> IO[bytes] | None:
    """Keep a broker alive until the file is closed; None if it is past that."""
    try:
        users = (folder / "users").open("rb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        users.close()
        return None
    if (folder / "users").exists():
        return users
    users.close()
    return None


def guard(folder: Path) -> None:
    """Have the broker killed and the folder deleted when nobody holds it any more."""
    subprocess.run(
        ["sh", "-c", GUARD, "sh", folder],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def admin_of(bootstrap: str) -> AdminClient:
    """Return an admin client that is soon back when its broker is."""
    return AdminClient(
        {
            "bootstrap.servers": bootstrap,
            "reconnect.backoff.ms": 20,
            "reconnect.backoff.max.ms": 200,
            "log_level": 0,
        }
    )


def wait_for(
    fact: Callable[[], object], name: str, seconds: float = ANSWER_SECONDS
) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: It was not in time.
    """
    end = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > end:
            message = f"waited {seconds:.0f} s for {name}"
            raise TimeoutError(message)
        time.sleep(0.02)
