"""The access log: one line of JSON a request, on stderr, with no secret in it."""

from __future__ import annotations

import sys
import time
from typing import TextIO

import msgspec
from flask import Flask, Response, g, request

from kappa_log.web.answers import moment
from kappa_log.web.log import log


def register(app: Flask, stream: TextIO | None = None) -> None:
    """Write about each request of an application; on stderr if nothing else is said."""

    def begin() -> None:
        g.began = time.perf_counter()

    def end(response: Response) -> Response:
        line = {
            "at": moment(log().now()),
            "remote_address": request.remote_addr,
            "who": g.get("who"),
            "request_method": request.method,
            "path": request.full_path.rstrip("?"),
            "status": response.status_code,
            "content_length": response.content_length,
            "request_time": round(time.perf_counter() - g.began, 4),
        }
        # As JSON: what a path holds cannot end the line or colour a terminal.
        print(msgspec.json.encode(line).decode(), file=stream or sys.stderr, flush=True)
        return response

    # First, so that what is refused is written about, too.
    app.before_request_funcs.setdefault(None, []).insert(0, begin)
    app.after_request(end)
