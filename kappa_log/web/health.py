"""/ping, /livez, /readyz: whether it lives, and whether it is of use."""

from __future__ import annotations

from datetime import datetime

from apiflask import APIBlueprint
from flask import Response

from kappa_log.errors import KappaLogError, SchemaOutOfDate
from kappa_log.status import CursorStatus
from kappa_log.web import spec
from kappa_log.web.answers import answer
from kappa_log.web.log import log

api = APIBlueprint("health", __name__)

STUCK_SECONDS = 300
"""A cursor that has not moved for so long while events wait is stuck."""


@api.get("/ping")
@api.doc(**spec.operation("ping", spec.text("text/html", "PONG")))
def ping() -> Response:
    """Say PONG."""
    return Response("PONG", content_type="text/html;charset=utf-8")


@api.get("/livez")
@api.doc(**spec.operation("live", spec.one("Alive")))
def live() -> Response:
    """Tell that the process answers; nothing else is looked at."""
    return answer({"alive": True})


@api.get("/readyz")
@api.doc(**spec.readiness())
def ready() -> Response:
    """Tell whether the database is there and the live read models move on."""
    checks = {"database": "ok", "cursors": "ok"}
    try:
        stuck = [c for c in log().cursors() if is_stuck(c, log().now())]
    except SchemaOutOfDate:
        checks = {"database": "not at the revision of this version"}
    except KappaLogError:
        checks = {"database": "away"}
    else:
        if stuck:
            checks["cursors"] = f"{len(stuck)} stuck"
    is_ready = all(said == "ok" for said in checks.values())
    return answer({"ready": is_ready, "checks": checks}, 200 if is_ready else 503)


def is_stuck(cursor: CursorStatus, now: datetime) -> bool:
    """Tell whether events wait for a cursor that does not move.

    What is caught up and what is dead both stand still; only one has events to fold.
    """
    idle = (now - cursor.updated_at).total_seconds()
    return cursor.lag.events > 0 and min(idle, cursor.lag.seconds) > STUCK_SECONDS
