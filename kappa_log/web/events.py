"""/v1/events: look at them, and hand one to its handler again."""

from __future__ import annotations

from apiflask import APIBlueprint
from flask import Response

from kappa_log.errors import NotFound
from kappa_log.storage.lists import MAX_INT
from kappa_log.web import spec
from kappa_log.web.answers import answer, array, event_json, json_text, link_to
from kappa_log.web.log import log
from kappa_log.web.query import EventQuery
from kappa_log.web.security import who

api = APIBlueprint("events", __name__, url_prefix="/v1/events")


@api.get("")
@api.input(EventQuery, location="query", arg_name="query")
@api.doc(**spec.operation("listEvents", spec.many("Event"), spec.LINK))
def list_events(query: EventQuery) -> Response:
    """List events, the latest event time first."""
    found = log().event_page(query.chosen(), query.page())
    sources = log().sources()
    headers = {}
    if len(found) == query.limit:
        last = found[-1]
        place = (last.event_time, last.recorded_at, last.position)
        headers = link_to(cursor=query.next_cursor(place), offset=None)
    texts = (event_json(event, sources) for event in found)
    return json_text(array(texts), headers=headers)


@api.get("/<identifier>")
@api.doc(**spec.operation("getEvent", spec.one("Event")))
def get_event(identifier: str) -> Response:
    """Return the event at a position."""
    event = log().event(whole("event", identifier))
    return json_text(event_json(event, log().sources()))


@api.post("/<identifier>/retry")
@api.doc(**spec.operation("retryEvent", spec.one("Acknowledged")))
def retry_event(identifier: str) -> Response:
    """Hand an event to its handler again; nothing is stored twice."""
    acknowledged = log().retry_event(whole("event", identifier), who=who())
    return answer({"acknowledged": acknowledged})


def whole(noun: str, text: str) -> int:
    """Return the whole number in a path.

    Raises:
        NotFound: It is none, so nothing has it.
    """
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_INT))
    if not digits or not 0 < int(text) <= MAX_INT:
        raise NotFound(noun, text)
    return int(text)
