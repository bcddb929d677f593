"""The demo's folder: made fresh, filled, and never somebody else's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kappa_log.config import ENV_PREFIX, FILE_NAME, packaged
from kappa_log.errors import UsageError

MARK = "# Made by kappa-log demo, which empties this folder when it runs here again."
"""First line of the settings; by it the demo knows its own folder."""

SETTINGS = f"""\
{MARK}
[database]
url = "sqlite:///kappa_log.db"

[projections]
modules = ["projections"]

# The demo's own broker ends with it. With one that stays, try: kappa-log run
# [kafka]
# "bootstrap.servers" = "localhost:9092"

[[listeners]]
topic = "orders"
group_id = "shop"
handler = "handlers:OrdersHandler"
max_retries = 0                # what fails is kept at once; without this, tried again
"""

HANDLERS = '''\
"""The shop's handler: it decides about each record of the topic."""

from typing import Any

from kappa_log import Handler, Metadata, ack


class OrdersHandler(Handler):
    """Keeps what happens to orders; the till's heartbeats are no events."""

    def consume(self, payload: Any, metadata: Metadata) -> object:
        """Say what an event is about and when it happened, or skip the record."""
        if payload["type"] == "heartbeat":
            return None
        return ack(payload["order_id"], payload["time"], payload["type"])
'''

NAMES = ("orders", "product_sales", "daily_revenue")
"""The projections over the shop's orders."""

MENDED = "projections/daily_revenue.py"
"""The fold that has a bug at first. What it lacks:"""

_FIX = (
    ("version=1", "version=2"),
    ("was paid.", "was paid; from version 2 on, take off what went back."),
    (
        "    return state\n",
        """\
        case "order_cancelled" if event.payload["refund_cents"]:
            cents = total.cents - event.payload["refund_cents"]
            return DailyRevenue(total.payments, cents)
    return state
""",
    ),
)


def make(folder: Path) -> None:
    """Fill a fresh folder with settings, handler and projections.

    Raises:
        UsageError: The folder is not empty and no demo made it, or variables are
            set that would lead the demo into another database.
    """
    _check_variables()
    _empty(folder)
    (folder / FILE_NAME).write_text(SETTINGS, encoding="utf-8")
    (folder / "handlers.py").write_text(HANDLERS, encoding="utf-8")
    (folder / "projections").mkdir()
    for name in ("__init__", *NAMES):
        shutil.copy(packaged("projections") / f"{name}.py", folder / "projections")
    (folder / MENDED).write_text(unmended(mended()), encoding="utf-8")


def mend(folder: Path) -> None:
    """Save the fold with its bug fixed, as a developer would."""
    (folder / MENDED).write_text(mended(), encoding="utf-8")


def mended() -> str:
    """Return the fold as it should be: the example that kappa_log comes with."""
    return (packaged("projections") / Path(MENDED).name).read_text("utf-8")


def unmended(text: str) -> str:
    """Return the fold as it was before its bug was found."""
    for before, after in _FIX:
        assert after in text, f"the example has no {after!r} to take out"
        text = text.replace(after, before)
    return text


def _check_variables() -> None:
    names = sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX))
    if names:
        msg = (
            f"the demo works with settings of its own, but {', '.join(names)} would go "
            "before them, perhaps into another database. Unset what is named, then run "
            "it again; nothing was changed"
        )
        raise UsageError(msg)


def _empty(folder: Path) -> None:
    """Make the folder, or take out what an earlier demo left in it."""
    if folder.exists() and not folder.is_dir():
        msg = f"{folder} is a file; name a folder by --dir. Nothing was changed"
        raise UsageError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    found = list(folder.iterdir())
    if found and not _is_ours(folder):
        msg = (
            f"the folder {folder} is not empty and was not made by the demo. Move it "
            "away, or name another by --dir; nothing in it was changed"
        )
        raise UsageError(msg)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_ours(folder: Path) -> bool:
    try:
        text = (folder / FILE_NAME).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return text.startswith(MARK)
