"""The application: blueprints, errors, safety and the document, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apiflask import APIFlask

import kappa_log
from kappa_log.web import (
    duplicates,
    errors,
    events,
    failures,
    health,
    idempotency,
    ledger,
    metrics,
    projections,
    replays,
    security,
    spec,
)
from kappa_log.web.jobs import Jobs
from kappa_log.web.log import KEY
from kappa_log.web.requests import ApiRequest

if TYPE_CHECKING:
    from kappa_log.app import KappaLog

BLUEPRINTS = (
    health.api,
    metrics.api,
    events.api,
    failures.api,
    duplicates.api,
    projections.api,
    replays.api,
    ledger.api,
)


def create_app(
    log: KappaLog | None = None,
    *,
    needs_token: bool = True,
    hosts: list[str] | None = None,
) -> APIFlask:
    """Return the WSGI application of a log.

    Args:
        log: The log; that of the configuration from the current folder upwards if
            None.
        needs_token: Whether nothing is answered without a token. False is for a
            server that only this machine reaches.
        hosts: Names by which it may be called. None takes all, or without tokens
            those of loopback.

    Raises:
        ConfigError: A setting is wrong.
    """
    if log is None:
        from kappa_log.app import KappaLog

        log = KappaLog.open()
    app = APIFlask(
        __name__,
        title="kappa_log",
        version=kappa_log.__version__,
        spec_path="/openapi.json",
        docs_path=None,
        json_errors=False,
        static_folder=None,  # type: ignore[arg-type]  # Flask takes it
    )
    app.request_class = ApiRequest
    app.extensions[KEY] = log
    app.extensions[replays.JOBS] = Jobs()
    app.config.update(
        AUTO_404_RESPONSE=False,
        AUTO_VALIDATION_ERROR_RESPONSE=False,
        AUTO_SERVERS=False,
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    # A path with two slashes or one at its end is another path, and is not there.
    app.url_map.merge_slashes = False
    if hosts is None and not needs_token:
        hosts = security.LOOPBACK_HOSTS
    rate = log.config.api.rate_per_second
    security.protect(app, hosts=hosts, needs_token=needs_token, rate_per_second=rate)
    idempotency.register(app)
    errors.register(app)
    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)

    @app.spec_processor
    def complete(document: Any) -> Any:
        return spec.complete(document, needs_token=needs_token)

    return app
