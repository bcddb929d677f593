"""Logs: lines on stderr for people, or JSON for machines, by structlog.

As JSON, all that a command tells people is a line too: one object with `event`,
`level`, `timestamp`, and the facts. What goes to stdout is data, and stays as it is.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from typing_extensions import override

from kappa_log.telemetry import notices
from kappa_log.telemetry.notices import Notice, Subscription

LEVELS = ("debug", "info", "warning", "error")

OURS = "kappa_log"
"""Name of the logger above all of ours."""


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what is stderr when something is logged."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(*, form: str, level: str) -> list[Subscription]:
    """Let this process log to stderr.

    Args:
        form: ``console``, or ``json``.
        level: The least that is logged: debug, info, warning or error. Batches and
            folds are logged at debug; failures, as JSON or at debug, at warning.

    Returns:
        What was subscribed to be logged.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.processors.JSONRenderer(default=str)
    if form == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    else:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = _Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    for before in [known for known in root.handlers if isinstance(known, _Stderr)]:
        root.removeHandler(before)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(OURS).setLevel(level.upper())
    if form == "console" and level != "debug":
        return []
    return [
        notices.subscribe("listener_crashed", _crash),
        notices.subscribe("batch_committed", _batch),
        notices.subscribe("projection_folded", _fold),
        notices.subscribe("failure_settled", _settled),
    ]


def logger(name: str = OURS) -> Any:
    """Return a logger that takes an event and facts by name."""
    return structlog.stdlib.get_logger(name)


def _batch(notice: Notice) -> None:
    facts = notice.payload
    counts = {name: count for name, count in facts["counts"].items() if count}
    log = logger()
    log.debug(
        "batch committed",
        **counts,
        first_position=facts["first_position"],
        last_position=facts["last_position"],
        milliseconds=round(notice.duration, 1),
    )
    for failure in facts["failures"]:
        log.warning("record failed", **failure)


def _crash(notice: Notice) -> None:
    facts = dict(notice.payload)
    error = facts.pop("exception_object")
    logger().error("listener crashed", **facts, exc_info=error)


def _fold(notice: Notice) -> None:
    milliseconds = round(notice.duration, 1)
    logger().debug("projection folded", **notice.payload, milliseconds=milliseconds)


def _settled(notice: Notice) -> None:
    logger().info("failure settled", **notice.payload)
