"""Subscription: the topics that a consumer reads: one, or those a pattern matches.

Patterns are matched here: librdkafka knows other regular expressions than Python, and
brokers others again, and what none of its topics matched would be read by nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from kappa_log.config import Config, ListenerConfig
from kappa_log.kafka import client
from kappa_log.kafka.cluster import Cluster


class Subscription:
    """What one consumer reads.

    Args:
        config: How often to look for new topics of a pattern.
        cluster: Where the topics are.
        listener: Which of them it wants.
        subscribe: Called with their names, whenever these change.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        listener: ListenerConfig,
        subscribe: Callable[[list[str]], None],
    ) -> None:
        self._seconds = client.refresh_seconds(config)
        self._cluster = cluster
        self._listener = listener
        self._subscribe = subscribe
        self._names: list[str] = []
        self._answer: Future[list[str]] | None = None
        self._look_at = 0.0

    def to(self, names: Sequence[str]) -> None:
        """Subscribe to these topics, which are all that there are by now."""
        if list(names) != self._names:
            self._names = list(names)
            self._subscribe(self._names)

    def look(self) -> None:
        """Follow a pattern to topics that came or went, without waiting for answers.

        Raises:
            SourceError: The cluster gave no answer; it is asked again.
        """
        if not self._listener.is_pattern or time.monotonic() < self._look_at:
            return
        if self._answer is None:
            self._answer = self._cluster.begin_topic_names()
        if not self._answer.done():
            return
        answer, self._answer = self._answer, None
        self._look_at = time.monotonic() + self._seconds
        self.to([name for name in answer.result() if self._listener.covers(name)])
