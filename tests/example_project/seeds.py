"""What a new shop begins with."""

from pathlib import Path

from kappa_log import KappaLog


def seed(log: KappaLog) -> None:
    """Take the catalogue in, through its handler."""
    log.ingest(Path(__file__).with_name("catalogue.jsonl"), topic="catalogue")
