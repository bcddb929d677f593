"""/v1/projections: what is live, its rows, and which build it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec
from apiflask import APIBlueprint
from flask import Response

from kappa_log.app import acting_as
from kappa_log.keys import part_text
from kappa_log.web import spec
from kappa_log.web.answers import answer, array, event_json, json_text, link_to
from kappa_log.web.log import log
from kappa_log.web.query import (
    DiffQuery,
    KeyQuery,
    ParkedQuery,
    PromoteBody,
    RetryBody,
    RowQuery,
    UndoBody,
)
from kappa_log.web.security import who

api = APIBlueprint("projections", __name__, url_prefix="/v1/projections")


@api.get("")
@api.doc(**spec.operation("listProjections", spec.many("ProjectionStatus")))
def list_projections() -> Response:
    """List projections: what is live, how many rows, how far behind."""
    return answer(log().projections())


@api.get("/<name>")
@api.doc(**spec.operation("getProjection", spec.one("ProjectionStatus")))
def get_projection(name: str) -> Response:
    """Return all that is known of a projection, and its builds."""
    return answer(log().projection(name))


@api.get("/<name>/rows")
@api.input(RowQuery, location="query", arg_name="query")
@api.doc(**spec.operation("listRows", spec.many("Row"), spec.LINK))
def list_rows(name: str, query: RowQuery) -> Response:
    """List rows in the order of their keys, or the one row of a key."""
    status = log().projection(name)
    found = list(log().rows(name, **query.model_dump()))
    headers = {}
    if len(found) == query.limit and query.key is None:
        keys = [] if query.build else status.key_columns
        headers = link_to(**_next_page(found[-1], keys, query))
    return json_text(msgspec.json.encode(found).decode(), headers=headers)


@api.get("/<name>/explain")
@api.input(KeyQuery, location="query", arg_name="query")
@api.doc(**spec.operation("explainRow", spec.many("Step")))
def explain(name: str, query: KeyQuery) -> Response:
    """Return the last events of a row, oldest first, and the row after each.

    A parked key ends with the event that it is parked at, and the error.
    """
    sources = log().sources()
    steps = deque(log().explain(name, query.key), maxlen=query.limit)
    texts = [
        f'{{"event":{event_json(step.event, sources)},'
        f'"state":{msgspec.json.encode(step.state).decode()},'
        f'"error":{msgspec.json.encode(step.error).decode()}}}'
        for step in steps
    ]
    return json_text(array(texts))


@api.get("/<name>/parked")
@api.input(ParkedQuery, location="query", arg_name="query")
@api.doc(**spec.operation("listParked", spec.many("ParkedKey"), spec.LINK))
def list_parked(name: str, query: ParkedQuery) -> Response:
    """List the keys whose fold raised, in log order, and what waits behind them."""
    found = log().parked(name, **query.model_dump())
    headers = {}
    if len(found) == query.limit:
        headers = link_to(offset=query.offset + query.limit)
    return answer(found, headers=headers)


@api.post("/<name>/retry")
@api.input(RetryBody, arg_name="body", example={"all": True, "dry_run": True})
@api.doc(**spec.operation("retryParked", spec.one("ParkedRetry")))
def retry_parked(name: str, body: RetryBody) -> Response:
    """Fold parked keys on, from the event at which their fold raised."""
    done = log().retry_parked(
        name, body.chosen(), dry_run=body.dry_run, who=who(), reason=body.reason
    )
    return answer(done)


@api.get("/<name>/diff")
@api.input(DiffQuery, location="query", arg_name="query")
@api.doc(**spec.operation("diffBuilds", spec.one("Diff")))
def diff(name: str, query: DiffQuery) -> Response:
    """Compare two builds at one position."""
    return answer(log().diff(name, query.old, query.new))


@api.post("/<name>/promote")
@api.input(PromoteBody, arg_name="body", example={"max_changed": "5%"})
@api.doc(**spec.operation("promote", spec.one("ReplayReport")))
def promote(name: str, body: PromoteBody) -> Response:
    """Make the build live that a replay left beside the live one."""
    with acting_as(who()):
        done = log().promote(name, max_changed=body.max_changed, reason=body.reason)
    return answer(done)


@api.post("/<name>/undo")
@api.input(UndoBody, arg_name="body", example={"reason": "wrong totals"})
@api.doc(**spec.operation("undo", spec.one("Swap")))
def undo(name: str, body: UndoBody) -> Response:
    """Make the retired build the live one again."""
    with acting_as(who()):
        return answer(log().undo(name, behind=body.behind, reason=body.reason))


def _next_page(row: Mapping[str, Any], keys: list[str], query: RowQuery) -> Any:
    """Return the parameters of the next page: past the last key, if text can say it."""
    parts = [part_text(row[name]) for name in keys]
    if not parts or (len(parts) > 1 and any("/" in part for part in parts)):
        return {"offset": query.offset + query.limit}
    return {"after": "/".join(parts), "offset": None}
