"""Demo: a shop's orders, from a broker through all of kappa_log, in one process."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("kappa-log-demo")
"""Where the demo works if it is not told, in the current folder."""


def run(*, events: int = 2000, folder: Path | None = None, once: bool = False) -> int:
    """Show orders coming by Kafka, three projections, a mended one replayed, promoted.

    Args:
        events: Events to make up.
        folder: Where to work; emptied if an earlier demo made it. `FOLDER` if None.
        once: End after the tour; else orders go on coming in until Ctrl-C.

    Returns:
        The exit code: 0, or 4 if the log did not verify.

    Raises:
        UsageError: The folder is somebody else's, or KAPPA_LOG__ variables are set.
    """
    from kappa_log.demo.tour import tour

    return tour(folder or FOLDER, events=events, once=once)
