"""A process that does one thing with a log, to be killed while it does.

It is forked (see `forks`), and its socket is its standard input and output. It prints
``ready``, works, and prints one line of JSON: what came of it, or the error. With
``pause`` it prints ``paused`` at its first progress and waits for a line; with ``tell``
it prints ``progress`` each time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kappa_log import FieldOptions, KappaLog, KappaLogError
from support.logs import open_log, set_bounds
from support.purchases import OLD, TOPIC, registered

FIELDS = FieldOptions(entity_id="customer_id", event_time="time", event_type="type")


def live(channel: socket.socket, task: dict[str, Any]) -> None:
    """Do a task and end the process."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for standard in (0, 1):
            os.dup2(channel.fileno(), standard)
        channel.close()
        _do(task)
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the test's output shows it
        traceback.print_exc()
    finally:
        os._exit(code)


def _do(task: dict[str, Any]) -> None:
    set_bounds(page_events=task.get("page_events", 500), flush_seconds=0.0)
    app = open_log(
        task["url"],
        Path(task["folder"]),
        *registered(task.get("versions", [1])),
        batch_size=task.get("batch_size", 200),
    )
    _say("ready")
    try:
        with app:
            result = WORK[task["work"]](app, task)
    except KappaLogError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    _say(json.dumps(result))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _pausing(task: dict[str, Any]) -> Callable[[object], None]:
    left = [task.get("pause", False)]

    def on_progress(_: object) -> None:
        if left[0]:
            left[0] = False
            _say("paused")
            sys.stdin.readline()
        elif task.get("tell"):
            _say("progress")

    return on_progress


def _ingest(app: KappaLog, task: dict[str, Any]) -> Any:
    done = app.ingest(
        task["file"], topic=TOPIC, fields=FIELDS, on_progress=_pausing(task)
    )
    return {"resumed_at": done.resumed_at, "acked": done.counts.acked}


def _project(app: KappaLog, task: dict[str, Any]) -> Any:
    (done,) = app.project([OLD.name], on_progress=_pausing(task))
    return {"from": done.from_position, "to": done.to_position, "events": done.events}


def _replay(app: KappaLog, task: dict[str, Any]) -> Any:
    done = app.replay(OLD.name, on_progress=_pausing(task), **task.get("request", {}))
    return {"outcome": done.outcome}


def _resume(app: KappaLog, task: dict[str, Any]) -> Any:
    done = app.resume(task["id"], on_progress=_pausing(task))
    return {"outcome": done.outcome}


def _import_phobos(app: KappaLog, task: dict[str, Any]) -> Any:
    done = app.import_phobos(task["old"], source="shop", on_progress=_pausing(task))
    return {"rows": sum(found.rows for found in done.tables)}


def _export(app: KappaLog, task: dict[str, Any]) -> Any:
    die_before_file(task.get("die_at"))
    done = app.export()
    return {"position": done.position, "segments_written": done.segments_written}


def _import(app: KappaLog, task: dict[str, Any]) -> Any:
    from kappa_log.archive import bring

    bring.SLICE = 200  # type: ignore[attr-defined]
    show = _pausing(task)
    done = app.import_archive(task["archive"], on_step=lambda *step: show(step))
    return {"position": done.position, "head": done.head}


def die_before_file(number: int | None) -> None:
    """Die when so many files are in their place and the next is about to be."""
    from kappa_log.archive.store import Store

    put, left = Store._put, [number]  # noqa: SLF001 - a place to die at

    def dying(self: Store, temporary: Path, path: Path) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] is not None:
            left[0] -= 1
        put(self, temporary, path)

    Store._put = dying  # type: ignore[method-assign]  # noqa: SLF001


WORK = {
    "import_phobos": _import_phobos,
    "ingest": _ingest,
    "export": _export,
    "import": _import,
    "project": _project,
    "replay": _replay,
    "resume": _resume,
}
