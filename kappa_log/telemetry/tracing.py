"""Tracing: OpenTelemetry spans of records, batches and folds, linked to each other.

Spans are made where the process has a tracer provider, and nothing is where it has
none. A record's producer is told by its ``traceparent`` header, which our own producer
writes where a span is active. The log keeps headers
as they were received, so the span of a record and that of a fold, however much later,
link to the same producer: that is what ties record, event and fold together. Links
and not parents, as is the rule for work on batches.

All names of the conventions for messaging, which still may change, are in here.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kappa_log.events import Header
from kappa_log.records import Lane, Record

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span, Tracer

SYSTEM = "messaging.system"
OPERATION_NAME = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
PARTITION = "messaging.destination.partition.id"
GROUP = "messaging.consumer.group.name"
OFFSET = "messaging.kafka.offset"
TOMBSTONE = "messaging.kafka.message.tombstone"
ERROR_TYPE = "error.type"
SOURCE = "kappa_log.source"
FIRST = "kappa_log.position.first"
LAST = "kappa_log.position.last"
PROJECTION = "kappa_log.projection"
BUILD = "kappa_log.build"
EVENTS = "kappa_log.events"

MAX_LINKS = 128
"""Links a span has at most: what exporters take by default."""

HEADERS = ("traceparent", "tracestate")
"""Of the W3C: which span a record is from."""


def tracer() -> Tracer | None:
    """Return what makes spans; None where the process has no tracer provider.

    Who never imported OpenTelemetry has none, and is not made to import it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or isinstance(
        provider := trace.get_tracer_provider(), trace.ProxyTracerProvider
    ):
        return None
    return provider.get_tracer("kappa_log")  # type: ignore[no-any-return]


@contextlib.contextmanager
def processing(tracer: Tracer, lane: Lane, record: Record) -> Iterator[Span]:
    """Work on one record in a span of its own; what its handler traces is inside."""
    from opentelemetry.trace import SpanKind

    facts: dict[str, Any] = {
        OPERATION_NAME: "process",
        OPERATION_TYPE: "process",
        DESTINATION: lane.topic,
        PARTITION: str(lane.partition),
        GROUP: lane.group_id,
        OFFSET: record.offset,
        SOURCE: lane.source,
    }
    if lane.source.startswith("kafka:"):
        facts[SYSTEM] = "kafka"
    if record.value is None:
        facts[TOMBSTONE] = True
    with tracer.start_as_current_span(
        f"process {lane.topic}",
        kind=SpanKind.CONSUMER,
        attributes=facts,
        links=links_of([record.headers]),
    ) as span:
        yield span


def failed(span: Span, error: BaseException | None) -> None:
    """Say in a record's span that it became no event, and why."""
    from opentelemetry.trace import StatusCode

    if error is None:
        return
    span.record_exception(error)
    span.set_attribute(ERROR_TYPE, type(error).__qualname__)
    span.set_status(StatusCode.ERROR, type(error).__name__)


def committed(
    tracer: Tracer,
    positions: tuple[int, int],
    seconds: float,
    records: Iterable[Record],
) -> None:
    """Make the span of a batch that was committed just now.

    Args:
        tracer: What makes it.
        positions: First and last of its events.
        seconds: How long its transaction took.
        records: Those that became its events.
    """
    end = time.time_ns()  # noqa: TID251 - spans are told when they were
    tracer.start_span(
        "commit",
        attributes={FIRST: positions[0], LAST: positions[1]},
        links=links_of(record.headers for record in records),
        start_time=end - int(seconds * 1e9),
    ).end(end)


@contextlib.contextmanager
def folding(tracer: Tracer | None, projection: str, build: int) -> Iterator[Traced]:
    """Work on some pages of a fold, in a span where spans are wanted."""
    if tracer is None:
        yield Traced(None)
        return
    facts: dict[str, Any] = {PROJECTION: projection, BUILD: build}
    with tracer.start_as_current_span(
        f"fold {projection}", attributes=facts, links=[]
    ) as span:
        yield Traced(span)


class Traced:
    """The span of a fold, or none."""

    def __init__(self, span: Span | None) -> None:
        self._span = span
        self._room = 0 if span is None else MAX_LINKS

    @property
    def is_wanted(self) -> bool:
        """Tell whether headers are worth being read."""
        return self._room > 0

    def saw(self, headers: Iterable[Sequence[Header]]) -> None:
        """Link the span to the producers of events that are folded."""
        for link in links_of(headers, self._room):
            assert self._span is not None
            self._span.add_link(link.context)
            self._room -= 1

    def wrote(self, first: int, last: int, events: int) -> None:
        """Say what was folded and written."""
        if self._span is not None:
            self._span.set_attributes({FIRST: first, LAST: last, EVENTS: events})


def carried() -> list[tuple[str, bytes | None]]:
    """Return the headers that tell a record's readers of the active span, if any."""
    # Who never imported OpenTelemetry has no span, and is not made to import it.
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return []
    from opentelemetry.trace.propagation.tracecontext import (
        TraceContextTextMapPropagator,
    )

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return [(name, carrier[name].encode()) for name in HEADERS if name in carrier]


def links_of(found: Iterable[Sequence[Header]], most: int = MAX_LINKS) -> list[Link]:
    """Return links to the producers that headers name, the first few."""
    from opentelemetry.trace import Link

    contexts = (_context_of(headers) for headers in found if headers)
    known = (context for context in contexts if context is not None)
    return [Link(context) for context in itertools.islice(known, most)]


def _context_of(headers: Sequence[Header]) -> Any:
    """Return the context of the producer's span; None if headers name none."""
    carrier = {
        name: value.decode("ascii", "replace")
        for name, value in headers
        if name in HEADERS and value is not None
    }
    if "traceparent" not in carrier:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import (
        TraceContextTextMapPropagator,
    )

    context = TraceContextTextMapPropagator().extract(carrier, Context())
    found = trace.get_current_span(context).get_span_context()
    return found if found.is_valid else None
