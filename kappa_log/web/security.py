"""Who may ask what: trusted hosts, same-origin writes, tokens, headers.

Loopback is no boundary by itself: a page of any site can make its visitor's browser
ask 127.0.0.1. So the Host must be a name that is expected here (DNS rebinding), and
what changes something must not come from another origin. Where others can connect,
only tokens open anything. Nobody may ask for too much, or too often.
"""

from __future__ import annotations

import math
from typing import Any

from flask import Flask, Response, current_app, g, request

from kappa_log.web.errors import problem
from kappa_log.web.log import log
from kappa_log.web.rates import TOKEN_RATE, Rates

LOOPBACK = "api@loopback"
"""Who acts where no token is needed."""

LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

MAX_BODY = 1024 * 1024
MAX_QUERY = 4096

SAFE = ("GET", "HEAD")
OPEN = ("/ping", "/livez", "/readyz")
"""What anybody may ask, however often: whether it lives."""

RATES = "kappa_log_rates"
"""Where an application keeps its rates, if it has any."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

_BEARER = "Bearer "


def protect(
    app: Flask,
    *,
    hosts: list[str] | None,
    needs_token: bool,
    rate_per_second: float | None = None,
) -> None:
    """Check all requests of an application before any of its views.

    Args:
        app: The application.
        hosts: Names by which it may be called; None takes all, for servers whose
            tokens protect them.
        needs_token: Whether nothing but OPEN is answered without a token.
        rate_per_second: Requests of each token, and of each address without one; 0 is
            no limit, None is one for tokens and none for this machine.
    """
    if rate_per_second is None:
        rate_per_second = TOKEN_RATE if needs_token else 0
    if rate_per_second:
        app.extensions[RATES] = Rates(rate_per_second)
    app.config["TRUSTED_HOSTS"] = hosts
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["KAPPA_LOG_NEEDS_TOKEN"] = needs_token
    app.before_request(_check)
    app.after_request(_seal)


def who() -> str:
    """Return whom the audit trail names."""
    return str(g.who)


def _check() -> Response | None:
    """Refuse what may not be asked; else remember who asks."""
    if request.routing_exception is not None:
        # Unknown hosts and paths: nothing is looked up for them.
        return None
    if len(request.query_string) > MAX_QUERY:
        return problem(414, f"the query is longer than {MAX_QUERY} bytes")
    if request.method not in SAFE and not _is_same_origin():
        return problem(403, "this came from another origin")
    refused = _authenticate()
    if request.path in OPEN:
        return refused
    return _too_often(is_known=refused is None) or refused


def _too_often(*, is_known: bool) -> Response | None:
    """Refuse who asked too often; whoever has no good token is one with its address."""
    rates: Rates | None = current_app.extensions.get(RATES)
    if rates is None:
        return None
    has_name = is_known and g.who != LOOPBACK
    # No token's name has a space.
    name = g.who if has_name else f"address {request.remote_addr}"
    wait = rates.take(name)
    if not wait:
        return None
    later = {"Retry-After": str(math.ceil(wait))}
    return problem(429, "too many requests; see Retry-After", headers=later)


def _is_same_origin() -> bool:
    """Tell whether a browser says that a page of ours asks; no browser says nothing."""
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return False
    ours = f"{request.scheme}://{request.host}"
    return request.headers.get("Origin", ours) == ours


def _authenticate() -> Response | None:
    given = request.headers.get("Authorization", "")
    needs_token = current_app.config["KAPPA_LOG_NEEDS_TOKEN"]
    if not given and (not needs_token or request.path in OPEN):
        g.who = LOOPBACK
        return None
    found = (
        log().token(given.removeprefix(_BEARER)) if given.startswith(_BEARER) else None
    )
    if found is None:
        return problem(401, "a token is needed", headers={"WWW-Authenticate": "Bearer"})
    if request.method not in SAFE and found.role != "operate":
        return problem(403, f"the token '{found.name}' may only read")
    g.who = found.name
    return None


def _seal(response: Response) -> Any:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response
