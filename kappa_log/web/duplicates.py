"""/v1/duplicates: what was dropped, and how it becomes an event after all."""

from __future__ import annotations

from apiflask import APIBlueprint
from flask import Response

from kappa_log.app import acting_as
from kappa_log.web import spec
from kappa_log.web.answers import answer, past
from kappa_log.web.events import whole
from kappa_log.web.log import log
from kappa_log.web.query import After, ReasonBody
from kappa_log.web.security import who

api = APIBlueprint("duplicates", __name__, url_prefix="/v1/duplicates")


@api.get("")
@api.input(After, location="query", arg_name="query")
@api.doc(**spec.operation("listDuplicates", spec.many("Duplicate"), spec.LINK))
def list_duplicates(query: After) -> Response:
    """List dropped duplicates by id."""
    found = log().duplicates(limit=query.limit, after=query.after)
    last = found[-1].id if len(found) == query.limit else None
    return answer(found, headers=past(last))


@api.post("/<identifier>/admit")
@api.input(ReasonBody, arg_name="body", example={"reason": "two orders, same text"})
@api.doc(**spec.operation("admitDuplicate", spec.one("Admitted")))
def admit_duplicate(identifier: str, body: ReasonBody) -> Response:
    """Make a duplicate an event after all."""
    number = whole("duplicate", identifier)
    with acting_as(who()):
        position = log().admit(number, body.reason)
    return answer({"id": number, "position": position})
