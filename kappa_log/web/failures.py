"""/v1/failures: look at them, retry them, give them up."""

from __future__ import annotations

from typing import Any

import msgspec
from apiflask import APIBlueprint
from flask import Response

from kappa_log.errors import NotFound, UsageError
from kappa_log.trial import Trial
from kappa_log.web import spec
from kappa_log.web.answers import (
    answer,
    array,
    failure_json,
    json_text,
    link_to,
)
from kappa_log.web.errors import public
from kappa_log.web.events import whole
from kappa_log.web.log import log
from kappa_log.web.query import (
    Because,
    FailureFilterBody,
    FailureQuery,
    Limited,
    RetryQuery,
)
from kappa_log.web.security import who

api = APIBlueprint("failures", __name__, url_prefix="/v1/failures")

MAX_AT_ONCE = 10_000
"""Failures that one request may act on."""

_FILTER = {"fingerprint": "a1b2c3d4", "dry_run": True, "reason": "fixed in 1.2.3"}


@api.get("")
@api.input(FailureQuery, location="query", arg_name="query")
@api.doc(**spec.operation("listFailures", spec.many("Failure"), spec.LINK))
def list_failures(query: FailureQuery) -> Response:
    """List failures in the order of events."""
    found = log().failure_page(query.chosen(), query.page())
    headers = {}
    if len(found) == query.limit:
        last = found[-1]
        place = (last.event_time, last.first_at, last.id)
        headers = link_to(cursor=query.next_cursor(place), offset=None)
    return json_text(array(map(failure_json, found)), headers=headers)


@api.get("/count")
@api.doc(**spec.operation("countFailures", spec.one("Count")))
def count_failures() -> Response:
    """Return the number of all failures."""
    return answer({"count": log().count_failures()})


@api.get("/groups")
@api.input(Limited, location="query", arg_name="query")
@api.doc(**spec.operation("groupFailures", spec.many("FailureGroup")))
def group_failures(query: Limited) -> Response:
    """List failures by error and place, the largest groups first."""
    return answer(log().failure_groups(limit=query.limit))


@api.post("/retry")
@api.input(FailureFilterBody, arg_name="body", example=_FILTER)
@api.doc(**spec.operation("retryFailures", spec.one("BulkRetry")))
def retry_failures(body: FailureFilterBody) -> Response:
    """Hand all matching failures to their handlers again, key by key in order."""
    done = log().retry_failures(who=who(), **_bounded(body))
    done.errors = [public(text) for text in done.errors]
    done.trials = [_public(trial) for trial in done.trials]
    return answer(done)


@api.post("/discard")
@api.input(FailureFilterBody, arg_name="body", example=_FILTER)
@api.doc(**spec.operation("discardFailures", spec.one("Count")))
def discard_failures(body: FailureFilterBody) -> Response:
    """Give all matching failures up; return how many."""
    count = log().discard_failures(who=who(), **_bounded(body))
    return answer({"count": count})


@api.get("/<identifier>")
@api.doc(**spec.operation("getFailure", spec.one("Failure")))
def get_failure(identifier: str) -> Response:
    """Return one failure, whole."""
    return json_text(failure_json(log().failure(whole("failure", identifier))))


@api.delete("/<identifier>")
@api.input(Because, location="query", arg_name="query")
@api.doc(**spec.operation("discardFailure", spec.one("Acknowledged")))
def discard_failure(identifier: str, query: Because) -> Response:
    """Give a failure up."""
    number = whole("failure", identifier)
    log().discard_failure(number, who=who(), reason=query.reason)
    return answer({"acknowledged": True})


@api.post("/<identifier>/retry")
@api.input(RetryQuery, location="query", arg_name="query")
@api.doc(**spec.operation("retryFailure", spec.one("Retried")))
def retry_failure(identifier: str, query: RetryQuery) -> Response:
    """Hand a failure to its handler again; an ack makes it an event."""
    number = whole("failure", identifier)
    try:
        if query.dry_run:
            tried = _public(log().try_failure(number))
            found = msgspec.structs.asdict(tried) | {"dry_run": True}
        else:
            done = log().retry_failure(number, who=who(), reason=query.reason)
            found = msgspec.structs.asdict(done)
    except NotFound:
        raise
    except UsageError:
        _check_listener(number)
        raise
    return answer({"acknowledged": found["outcome"] == "acked"} | found)


def _public(trial: Trial) -> Trial:
    """Return a trial whose error names no places of the machine."""
    if trial.error_message is None:
        return trial
    return msgspec.structs.replace(trial, error_message=public(trial.error_message))


def _bounded(body: FailureFilterBody) -> dict[str, Any]:
    """Return the filters, for no more than can be done while a client waits.

    Raises:
        UsageError: More match.
    """
    chosen = body.chosen()
    if not body.dry_run:
        count = log().count_failures(**chosen)
        if count > MAX_AT_ONCE:
            msg = (
                f"{count:,} failures match, and {MAX_AT_ONCE:,} are acted on at once; "
                "filter further, or use the command line: kappa-log failures"
            )
            raise UsageError(msg)
    return chosen | {"dry_run": body.dry_run, "reason": body.reason}


def _check_listener(number: int) -> None:
    """Say as it was always said that nobody reads a failure's group any more.

    Raises:
        UsageError: No listener has the group.
    """
    group = log().failure(number).group_id
    if group not in {listener.group_id for listener in log().config.listeners}:
        msg = f"Phobos Listener not found for group id '{group}'"
        raise UsageError(msg)
