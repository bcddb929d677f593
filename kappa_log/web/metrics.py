"""/metrics: what a monitoring system asks for."""

from __future__ import annotations

from apiflask import APIBlueprint
from flask import Response
from prometheus_client import generate_latest

from kappa_log.web import spec
from kappa_log.web.collector import registry_of
from kappa_log.web.log import log

api = APIBlueprint("metrics", __name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@api.get("/metrics")
@api.doc(
    **spec.operation("metrics", spec.text("text/plain", "kappa_log_head_position 4117"))
)
def metrics() -> Response:
    """Return what is counted, for Prometheus."""
    return Response(generate_latest(registry_of(log())), content_type=CONTENT_TYPE)
