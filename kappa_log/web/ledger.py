"""/v1/checkpoints and /v1/verify: what was read, and whether it is what it was."""

from __future__ import annotations

from apiflask import APIBlueprint
from flask import Response

from kappa_log.errors import UsageError
from kappa_log.web import spec
from kappa_log.web.answers import answer, past
from kappa_log.web.log import log
from kappa_log.web.query import After, VerifyBody

api = APIBlueprint("ledger", __name__, url_prefix="/v1")

MAX_VERIFIED = 1_000_000
"""Events that are verified while a client waits; about ten seconds of work."""


@api.get("/checkpoints")
@api.input(After, location="query", arg_name="query")
@api.doc(**spec.operation("listCheckpoints", spec.many("Checkpointed"), spec.LINK))
def list_checkpoints(query: After) -> Response:
    """List the ledger's rows by id."""
    found = log().checkpoints(limit=query.limit, after=query.after)
    last = found[-1].id if len(found) == query.limit else None
    return answer(found, headers=past(last))


@api.post("/verify")
@api.input(VerifyBody, arg_name="body", example={"projections": ["customer_totals"]})
@api.doc(**spec.operation("verify", spec.one("VerifyReport")))
def verify(body: VerifyBody) -> Response:
    """Recompute the chain, prove the ledger, fold the named views afresh."""
    position = log().head().position
    if position > MAX_VERIFIED:
        msg = (
            f"the log has {position:,} events; more than {MAX_VERIFIED:,} are "
            "verified on the command line: kappa-log verify"
        )
        raise UsageError(msg)
    for name in body.projections:
        log().projection(name)
    return answer(log().verify(head=body.head, names=body.projections))
