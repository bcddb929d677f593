"""Testing: users' handlers and folds, tried on the very code that runs them.

`process_message` takes one record the whole way into a log: identity, decoder, handler,
one transaction. `given(events).fold(projection)` folds as replays do. pytest finds the
fixture ``kappa_log``, an empty log of its own for each test, by itself.
"""

from __future__ import annotations

from kappa_log.testing.folds import Folded, Given, given
from kappa_log.testing.logs import temporary_log
from kappa_log.testing.messages import Processed, process_message

__all__ = [
    "Folded",
    "Given",
    "Processed",
    "given",
    "process_message",
    "temporary_log",
]
