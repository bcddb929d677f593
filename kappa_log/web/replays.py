"""/v1/replays: fold a range of the log anew, and see how far it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import msgspec
from apiflask import APIBlueprint
from flask import Response, current_app

from kappa_log.errors import AlreadyRunning
from kappa_log.plan import ReplayPlan
from kappa_log.storage.replays import ReplayRow
from kappa_log.web import spec
from kappa_log.web.answers import answer, moment
from kappa_log.web.errors import public
from kappa_log.web.events import whole
from kappa_log.web.jobs import STOP_SECONDS, Job, Jobs
from kappa_log.web.log import log
from kappa_log.web.query import ReplayBody, ReplayQuery
from kappa_log.web.security import who

api = APIBlueprint("replays", __name__, url_prefix="/v1/replays")

JOBS = "kappa_log_jobs"

_ACCEPTED = {"status_202": ("It runs.", spec.one("Replay"), spec.LOCATION)}


@api.get("")
@api.input(ReplayQuery, location="query", arg_name="query")
@api.doc(**spec.operation("listReplays", spec.many("Replay")))
def list_replays(query: ReplayQuery) -> Response:
    """List replays, newest first."""
    running = jobs().running()
    found = log().replays(**query.model_dump())
    return answer([_shown(row, running) for row in found])


@api.post("")
@api.input(
    ReplayBody,
    arg_name="body",
    example={"projection": "customer_totals", "since": "2026-01-31", "dry_run": True},
)
@api.doc(**spec.operation("startReplay", spec.one("ReplayPlan"), None, **_ACCEPTED))
def start_replay(body: ReplayBody) -> Response:
    """Start a replay; with dry_run return what it would do."""
    if body.dry_run:
        return answer(_plan(log().plan_replay(body.projection, **body.request())))
    found, request = log(), body.request()

    def work(job: Job) -> Any:
        return found.replay(
            body.projection,
            on_start=job.started,
            on_progress=job.on_progress,
            **request,
        )

    job = jobs().start(work, who())
    if job.id is None:
        # Its start is past the head: there is nothing to do, and so no row.
        return answer(_plan(found.plan_replay(body.projection, **request)))
    return _accepted(job.id)


@api.get("/<identifier>")
@api.doc(**spec.operation("getReplay", spec.one("Replay")))
def get_replay(identifier: str) -> Response:
    """Return a replay, and how far it is."""
    return answer(_found(whole("replay", identifier)))


@api.post("/<identifier>/cancel")
@api.doc(**spec.operation("cancelReplay", spec.one("Replay")))
def cancel_replay(identifier: str) -> Response:
    """End a replay and drop what it built; the live build is not changed."""
    number = whole("replay", identifier)
    job = jobs().of(number)
    if job is not None and job.is_running:
        job.stop()
        if not job.wait(STOP_SECONDS):
            msg = f"replay {number} is still writing; cancel it again in a moment"
            raise AlreadyRunning(msg)
    return answer(_shown(log().cancel(number), jobs().running()))


@api.post("/<identifier>/resume")
@api.doc(**spec.operation("resumeReplay", spec.one("Replay"), None, **_ACCEPTED))
def resume_replay(identifier: str) -> Response:
    """Go on with a replay that was interrupted."""
    number, found = whole("replay", identifier), log()

    def work(job: Job) -> Any:
        return found.resume(number, on_start=job.started, on_progress=job.on_progress)

    jobs().start(work, who())
    return _accepted(number)


def jobs() -> Jobs:
    """Return the jobs of the application at hand."""
    return cast("Jobs", current_app.extensions[JOBS])


def _accepted(identifier: int) -> Response:
    location = {"Location": f"/v1/replays/{identifier}"}
    return answer(_found(identifier), 202, location)


def _found(identifier: int) -> dict[str, Any]:
    # Asked before the row is read: a job that ends in between has ended its row.
    running = jobs().running()
    return _shown(log().replay_row(identifier), running)


def _plan(plan: ReplayPlan) -> dict[str, Any]:
    """Return a plan with the folders of its archive left out."""
    shown: dict[str, Any] = msgspec.to_builtins(plan)
    if plan.archive is not None:
        shown["archive"] = public(plan.archive)
    return shown


def _shown(row: ReplayRow, running: Collection[int]) -> dict[str, Any]:
    job = jobs().of(row.id)
    progress = job.progress if job is not None and row.outcome is None else None
    return {
        "id": row.id,
        "projection": row.projection,
        "build": row.build,
        "state": _state(row, running),
        "phase": row.phase,
        "outcome": row.outcome,
        "position": progress and progress.cursor,
        "target": progress and progress.target,
        "events": row.progress.get("events", 0) + (progress.events if progress else 0),
        "request": row.request,
        "plan": _plan(msgspec.convert(row.plan, ReplayPlan)),
        "diff": row.progress.get("diff"),
        "reason": row.reason,
        "error": public(str(job.error)) if job is not None and job.error else None,
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
    }


def _state(row: ReplayRow, running: Collection[int]) -> str:
    if row.outcome is not None:
        return "ended"
    return "running" if row.id in running else "unfinished"
