"""The HTTP API over a large log, retries, and a storm of poison records.

    python -m benchmarks.api [--events 1000000] [--poison 1000000] [--only sqlite]

The server is `kappa-log serve` in a process of its own; times are those of a client
over a connection that stays open: the request sent until its answer is read. The
deepest page of events is found by following Link headers from the first to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from typing_extensions import override

from benchmarks.__main__ import _databases as databases
from benchmarks.shop import TOPIC, write_lines
from benchmarks.work import FIELDS, open_log
from kappa_log import Handler, KappaLog, ack
from kappa_log.config import load_config
from kappa_log.decide import Portion
from kappa_log.ingest import ingest_batch
from kappa_log.records import Lane, Record
from kappa_log.storage import ledger
from kappa_log.web.query import DEFAULT_LIMIT, FailureQuery

TARGET_MS = 20
REQUESTS = 300
READERS = 50
READ_SECONDS = 10.0
RETRIES = 5_000
"""Of each kind that is retried."""

GROUP = "bench"
FIXED = "KAPPA_LOG_BENCHMARK_FIXED"
"""Variable that mends the handler."""


class Broken(Handler):
    """Fails on everything until it is mended."""

    @override
    def consume(self, payload: Any, metadata: Any) -> object:
        """Raise, or acknowledge."""
        if FIXED not in os.environ:
            msg = f"no price for {payload['customer']}"
            raise KeyError(msg)
        return ack(payload["customer"], payload["time"], payload["type"])


def broken_log(url: str) -> KappaLog:
    """Return a log whose listener fails on everything."""
    listener = {
        "topic": TOPIC,
        "group_id": GROUP,
        "handler": "benchmarks.api:Broken",
        "max_retries": 0,
    }
    config = load_config(
        Path("/"),
        {"database.url": url, "listeners": [listener], "projections.modules": []},
    )
    app = KappaLog(config=config)
    app.create_database()
    return app


# --- what is measured in processes of their own ---------------------------------


def fill(url: str, file: str) -> Any:
    """Ingest a file, unless it is in the log already."""
    return {
        "events": open_log(url).ingest(file, topic=TOPIC, fields=FIELDS).counts.acked
    }


def feed(url: str, file: str) -> Any:
    """Ingest files of events again and again, each under another name, until killed."""
    app = open_log(url)
    for number in range(1_000_000):
        done = app.ingest(
            file, topic=f"{TOPIC}-{number}", fields=FIELDS, source=f"feed-{number}"
        )
        print(done.counts.acked, flush=True)
    return {}


def storm(url: str, file: str) -> Any:
    """Ingest a file of which every record fails."""
    app = broken_log(url)
    began = time.perf_counter()
    report = app.ingest(file, topic=TOPIC)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "failed": report.counts.failed, "peak_mb": peak}


def retry(url: str, _: str) -> Any:
    """Let records fail as from a topic, with keys and without; retry all of them."""
    app = broken_log(url)
    listener = app.listener(TOPIC)
    rates = {}
    for name, keys in (("without keys", 0), ("with 100 keys", 100)):
        os.environ.pop(FIXED, None)
        lane = Lane("kafka:benchmark", TOPIC, GROUP, keys)
        with app.database.write() as connection:
            held = ledger.assign(
                connection,
                app.database,
                lane,
                ledger.Reader("payload", None),
                app.now(),
            )
        for start in range(0, RETRIES, 1000):
            records = [
                _poison(start + n, f"key {n % keys}" if keys else None)
                for n in range(1000)
            ]
            end = start + 1000
            portion = Portion(lane, held, listener, records, end)
            ingest_batch(app.database, [portion], app.now)
            held = held.moved(end)
        os.environ[FIXED] = "1"
        began = time.perf_counter()
        done = app.retry_failures()
        assert done.acked == RETRIES, done
        rates[name] = RETRIES / (time.perf_counter() - began)
    return rates


def _poison(number: int, key: str | None) -> Record:
    line = {
        "customer": f"c{number}",
        "time": "2026-01-01T00:00:00Z",
        "type": "order_placed",
        "key": key,
    }
    value = json.dumps(line).encode()
    return Record(number, value, None if key is None else key.encode())


def read(address: str, deepest: str) -> Any:
    """Read by many clients at once; return the seconds of each request."""
    head = int(json.loads(Client(address).get("/v1/events?limit=1")[0])[0]["id"])
    end = time.monotonic() + READ_SECONDS
    taken: list[float] = []

    def ask(number: int) -> None:
        choose, client = random.Random(number), Client(address)
        while time.monotonic() < end:
            event = f"/v1/events/{choose.randint(1, head)}"
            path = choose.choice(["/v1/events", deepest, event, "/v1/failures"])
            began = time.perf_counter()
            client.get(path)
            taken.append(time.perf_counter() - began)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


WORK: dict[str, Callable[[str, str], Any]] = {
    "fill": fill,
    "feed": feed,
    "storm": storm,
    "retry": retry,
    "read": read,
}


def _work(name: str, url: str, file: str | Path = "") -> Any:
    command = [sys.executable, "-m", "benchmarks.api", name, url, str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


# --- a client ---------------------------------------------------------------------


class Client:
    """One connection that stays open."""

    def __init__(self, address: str) -> None:
        self._connection = HTTPConnection(address.removeprefix("http://"), timeout=300)

    def get(self, path: str) -> tuple[bytes, str | None]:
        """Return an answer, and the path of the next page if there is one."""
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, (path, response.status, body)
        link = response.getheader("Link")
        return body, None if link is None else link[1 : link.index(">")]

    def times(self, path: str, requests: int = REQUESTS) -> list[float]:
        """Return the seconds of requests, one after the other."""
        taken = []
        for _ in range(requests):
            began = time.perf_counter()
            self.get(path)
            taken.append(time.perf_counter() - began)
        return taken

    def deepest(self, path: str) -> tuple[str, int]:
        """Return the last page that a cursor leads to, and how many rows there are."""
        body, link = self.get(f"{path}?limit=500")
        rows, deepest = body.count(b'"created_at":'), ""
        while link is not None:
            page, following = self.get(link)
            if page != b"[]":
                deepest = link
            rows += page.count(b'"created_at":')
            link = following
        return deepest.replace("limit=500", "limit=20"), rows


@contextlib.contextmanager
def served(url: str, folder: Path) -> Iterator[str]:
    """Serve a log; give the address."""
    with subprocess.Popen(
        [sys.executable, "-m", "kappa_log", "serve", "--port", "0"],
        cwd=folder,
        env=os.environ
        | {
            "KAPPA_LOG__DATABASE__URL": url,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


# --- the runs ---------------------------------------------------------------------


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--poison", type=int, default=100_000)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("sqlite", "postgresql"):
            if chosen.only in (None, kind):
                with databases(kind, Path(folder)) as urls:
                    _measure_pages(kind, next(urls), Path(folder), chosen.events)
                    _measure_retries(kind, next(urls))
                    _measure_storm(kind, next(urls), Path(folder), chosen.poison)


def _measure_pages(kind: str, url: str, folder: Path, events: int) -> None:
    file = folder / f"{events}.jsonl"
    write_lines(file, events)
    assert _work("fill", url, file)["events"] == events
    with served(url, folder) as address:
        client = Client(address)
        deepest, rows = client.deepest("/v1/events")
        assert rows == events, (rows, events)
        name = f"events page at {events:,}"
        _report(kind, f"{name}, first", client.times("/v1/events"), TARGET_MS)
        _report(kind, f"{name}, deepest", client.times(deepest), TARGET_MS)
        small = folder / "feed.jsonl"
        write_lines(small, 20_000)
        with _feeding(url, small):
            name = f"{READERS} readers while it ingests"
            _report(kind, name, _work("read", address, deepest))


@contextlib.contextmanager
def _feeding(url: str, file: Path) -> Iterator[None]:
    """Ingest while the block goes on."""
    command = [sys.executable, "-m", "benchmarks.api", "feed", url, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def _measure_retries(kind: str, url: str) -> None:
    for name, rate in _work("retry", url).items():
        print(f"{kind:11} retry {RETRIES:,} {name}: {rate:,.0f}/s", flush=True)


def _measure_storm(kind: str, url: str, folder: Path, poison: int) -> None:
    file = folder / f"{poison}.jsonl"
    write_lines(file, poison)
    done = _work("storm", url, file)
    assert done["failed"] == poison, done
    print(
        f"{kind:11} storm of {poison:,}: {poison / done['seconds']:,.0f} failures/s, "
        f"peak {done['peak_mb']:.0f} MB",
        flush=True,
    )
    with served(url, folder) as address:
        client = Client(address)
        past = json.loads(client.get("/v1/failures/21")[0])
        place = (None, datetime.fromisoformat(past["created_at"]), past["id"])
        cursor = FailureQuery().next_cursor(place)
        deepest = f"/v1/failures?cursor={cursor}"
        assert len(json.loads(client.get(deepest)[0])) == DEFAULT_LIMIT
        name = f"failures at {poison:,}"
        _report(kind, f"{name}, first page", client.times("/v1/failures"))
        _report(kind, f"{name}, deepest", client.times(deepest))
        _report(kind, f"{name}, count", client.times("/v1/failures/count", 20))
        _report(kind, f"{name}, groups", client.times("/v1/failures/groups", 20))


def _report(
    kind: str, name: str, taken: Sequence[float], target: int | None = None
) -> None:
    """Print the middle and the slow end of what requests took."""
    slow = sorted(taken)[int(len(taken) * 0.95)]
    wanted = "" if target is None else f" (target {target})"
    print(
        f"{kind:11} {name}: p50 {1000 * statistics.median(taken):.1f} ms, "
        f"p95 {1000 * slow:.1f} ms{wanted}, {len(taken):,} requests",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in WORK:
        print(json.dumps(WORK[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
