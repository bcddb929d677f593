"""Front: the whole of KappaLog, made of its parts."""

from __future__ import annotations

from collections.abc import Sequence

from kappa_log import verify
from kappa_log.app.access import Access
from kappa_log.doctor import Check, examine
from kappa_log.verify import VerifyReport


class KappaLog(Access):
    """One log with its projections.

    Args:
        url: Database; the configuration's if None.
        config: Configuration; found from the current folder upwards if None.
        projections: Projections to use instead of those that the configuration's
            modules declare.
        clock: The time; for tests.

    Raises:
        ConfigError: A setting is wrong.
    """

    def verify(
        self,
        *,
        head: str | None = None,
        names: Sequence[str] = (),
        on_step: verify.OnStep | None = None,
    ) -> VerifyReport:
        """Recompute the chain, prove the ledger, fold the named views afresh.

        Args:
            head: A head kept elsewhere, in hex.
            names: Projections whose live rows are compared with a fresh fold.
            on_step: Called as it goes on.
        """
        self._require()
        return verify.verify(
            self.database, self.registry, head=head, names=names, on_step=on_step
        )

    def doctor(self) -> list[Check]:
        """Look at what commonly goes wrong; nothing is changed."""
        return list(examine(self))
