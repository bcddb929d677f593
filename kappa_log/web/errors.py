"""Errors as answers: one status for each, and no word about the inside.

The members are those that the API always had (``error``, ``message``) and those of
RFC 9457. What a database or its driver said stays here: it names files, tables and
statements. So does the place where something was raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from apiflask import APIFlask, HTTPError
from flask import Response, current_app, request
from werkzeug.exceptions import HTTPException

from kappa_log import errors
from kappa_log.web.answers import answer

STATUSES: Mapping[type[errors.KappaLogError], int] = {
    errors.ConfigError: 422,
    errors.UsageError: 422,
    errors.NotFound: 404,
    errors.RegistrationError: 500,
    errors.ProjectionNotFound: 404,
    errors.HandlerError: 422,
    errors.DecodeError: 422,
    errors.RetryFailed: 422,
    errors.ProjectionError: 422,
    errors.StaleCode: 409,
    errors.SourceError: 503,
    errors.SourceDiverged: 409,
    errors.SourceGap: 409,
    errors.VerificationError: 409,
    errors.ArchiveError: 503,
    errors.ArchiveMissing: 409,
    errors.ArchiveNewer: 409,
    errors.ArchiveDiverged: 409,
    errors.ArchiveDamaged: 409,
    errors.StorageError: 500,
    errors.DatabaseBusy: 503,
    errors.DatabaseUnavailable: 503,
    errors.SchemaOutOfDate: 503,
    errors.Fenced: 409,
    errors.CursorConflict: 409,
    errors.AlreadyRunning: 409,
    errors.LostRace: 409,
}
"""Status of each error; one that is not here has that of its nearest parent."""

_SAID: Mapping[type[errors.KappaLogError], str] = {
    errors.StorageError: "the database refused; the server's log says why",
    errors.DatabaseBusy: "the database is busy; nothing was changed; try again later",
    errors.DatabaseUnavailable: "the database cannot be used now; try again later",
    errors.SchemaOutOfDate: (
        "the database is not at the revision that this version needs; "
        "run: kappa-log db status"
    ),
    errors.RegistrationError: "a projection or handler is declared wrongly",
    # Their own messages are for whoever asked.
    errors.Fenced: "",
    errors.CursorConflict: "",
    errors.AlreadyRunning: "",
    errors.LostRace: "",
    errors.ProjectionNotFound: "",
}
"""What is said instead of messages that tell about the inside."""

RETRY_SECONDS = 5
"""After which a busy or unavailable server may be asked again."""

NOT_FOUND, METHOD_NOT_ALLOWED, SERVER_ERROR, UNAVAILABLE = 404, 405, 500, 503

_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,;()]+/)+(?=[^\s/'\":,;()])")
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def register(app: APIFlask) -> None:
    """Let all errors of an application end here."""
    app.register_error_handler(errors.KappaLogError, _from_ours)
    app.register_error_handler(HTTPError, _from_validation)
    app.register_error_handler(HTTPException, _from_http)
    app.register_error_handler(Exception, _from_bug)


def status_of(error: errors.KappaLogError) -> int:
    """Return the status of an error."""
    return int(_nearest(STATUSES, type(error), SERVER_ERROR))


def problem(
    status: int,
    message: str,
    *,
    kind: str = "",
    detail: str = "",
    headers: Mapping[str, str] = {},
    **more: Any,
) -> Response:
    """Return an error as an answer.

    Args:
        status: HTTP status.
        message: What went wrong, as the API always said it.
        kind: Name of the error's class; that of the status if empty.
        detail: The longer story; the message if empty.
        headers: Further headers.
        more: Further members.
    """
    body = members(status, message, kind=kind, detail=detail, instance=request.path)
    return answer(body | more, status, headers)


def members(
    status: int, message: str, *, kind: str = "", detail: str = "", instance: str
) -> dict[str, Any]:
    """Return the members of an error's answer; arguments as `problem`."""
    title = HTTPStatus(status).phrase
    name = _WORDS.sub("-", kind or title.replace(" ", "-")).lower()
    return {
        "error": True,
        "message": message,
        "type": f"urn:kappa-log:problem:{name}",
        "title": title,
        "status": status,
        "detail": detail or message,
        "instance": instance,
    }


def public(text: str) -> str:
    """Return a message with the folders of paths left out."""
    return _PATH.sub("…/", text)


def _from_ours(error: errors.KappaLogError) -> Response:
    status = status_of(error)
    if status >= SERVER_ERROR:
        current_app.logger.error("%s: %r", type(error).__name__, str(error))
    said = _nearest(_SAID, type(error), "")
    detail = said or public(str(error))
    message = detail
    if isinstance(error, errors.NotFound) and " " not in error.noun:
        message = f"{error.noun} not found"
    elif isinstance(error, errors.RetryFailed):
        message = public(error.reason)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == UNAVAILABLE else {}
    kind = type(error).__name__
    return problem(status, message, kind=kind, detail=detail, headers=headers)


def _from_validation(error: HTTPError) -> Response:
    """Answer what apiflask refuses: parameters and bodies that are not as described."""
    found = {
        f"{field}": [said.removeprefix("Value error, ") for said in messages]
        for fields in error.detail.values()
        if isinstance(fields, dict)
        for field, messages in fields.items()
    }
    said = f"{error.message}"
    first = next((f"{name}: {why[0]}" for name, why in found.items()), said)
    return problem(error.status_code, first, errors=found)


def _from_http(error: HTTPException) -> Response:
    """Answer what Flask refuses. A wrong method is not found, as it always was."""
    status = error.code or SERVER_ERROR
    if status in (NOT_FOUND, METHOD_NOT_ALLOWED):
        return problem(NOT_FOUND, "not found")
    if error.response is not None:
        return problem(status, HTTPStatus(status).phrase.lower())
    return problem(status, error.description or error.name)


def _from_bug(error: Exception) -> Response:
    current_app.logger.error("%r %r", request.method, request.path, exc_info=error)
    return problem(SERVER_ERROR, "internal error; the server's log says more")


def _nearest(
    table: Mapping[type[errors.KappaLogError], Any], kind: type, other: Any
) -> Any:
    return next((table[found] for found in kind.__mro__ if found in table), other)
