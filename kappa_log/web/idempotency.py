"""Idempotency-Key: what changes something is done once, however often it is asked.

A client that lost the answer asks again with the same key and gets the same answer.
Whoever asks something else by a known key is refused, and so is who asks while the
first request is still worked on. What the server could not do may be tried again.
"""

from __future__ import annotations

import re
from hashlib import blake2b

from flask import Flask, Response, g, request

from kappa_log.storage import requests
from kappa_log.storage.requests import Answer
from kappa_log.web.answers import json_text
from kappa_log.web.errors import SERVER_ERROR, problem
from kappa_log.web.log import log
from kappa_log.web.security import SAFE, who

HEADER = "Idempotency-Key"

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KEPT = ("Location", "Link")


def register(app: Flask) -> None:
    """Heed the header in all requests that change something."""
    app.before_request(_begin)
    app.after_request(_finish)


def _begin() -> Response | None:
    key = request.headers.get(HEADER)
    if key is None or request.method in SAFE or request.routing_exception is not None:
        return None
    if not _KEY.fullmatch(key):
        return problem(422, f"{HEADER} is 1 to 255 visible ASCII characters")
    asked = [request.method.encode(), request.full_path.encode(), request.get_data()]
    digest = blake2b(b"\0".join(asked), digest_size=16).digest()
    known = requests.begin(log().database, who(), key, digest, log().now())
    if known is None:
        g.idempotency_key = key
        return None
    if known.digest != digest:
        return problem(422, f"another request was made with this {HEADER}")
    if known.answer is None:
        return problem(409, f"the request with this {HEADER} has not been answered yet")
    found = known.answer
    again = {"Idempotency-Replayed": "true"}
    return json_text(found.body, found.status, found.headers | again)


def _finish(response: Response) -> Response:
    key = g.pop("idempotency_key", None)
    if key is not None:
        headers = {n: response.headers[n] for n in _KEPT if n in response.headers}
        answer = Answer(response.status_code, response.get_data(as_text=True), headers)
        is_done = response.status_code < SERVER_ERROR
        requests.finish(log().database, who(), key, answer if is_done else None)
    return response
