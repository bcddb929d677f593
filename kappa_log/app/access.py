"""Access: the tokens of the HTTP API."""

from __future__ import annotations

import re
import secrets

from kappa_log.app.intake import Intake
from kappa_log.errors import UsageError
from kappa_log.storage import tokens
from kappa_log.storage.tokens import Token

_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Access(Intake):
    """The part about who may ask."""

    def create_token(self, name: str, role: str) -> str:
        """Make a token for the API and return it; it is not kept, only its digest.

        Args:
            name: Whom the audit trail names.
            role: ``read``, or ``operate``, which may also change things.

        Raises:
            UsageError: The name is none, or is taken.
        """
        if not _TOKEN_NAME.fullmatch(name):
            msg = "a token's name is 1 to 64 letters, digits, dots, dashes, underscores"
            raise UsageError(msg)
        self._require()
        secret = f"kl_{secrets.token_urlsafe(32)}"
        tokens.keep(self.database, name, role, secret, self._clock())
        return secret

    def tokens(self) -> list[Token]:
        """Return all tokens, those that were revoked too."""
        self._require()
        with self.database.read() as connection:
            return tokens.listed(connection, self.database)

    def has_tokens(self) -> bool:
        """Tell whether there is a token that opens something."""
        self._require()
        with self.database.read() as connection:
            return tokens.active(connection, self.database) > 0

    def token(self, secret: str) -> Token | None:
        """Return whose token this is; None if it opens nothing."""
        self._require()
        with self.database.read() as connection:
            return tokens.found_by(connection, self.database, secret)

    def revoke_token(self, name: str) -> None:
        """Let a token open nothing any more."""
        self._require()
        with self.database.write() as connection:
            tokens.revoke(connection, self.database, name, self._clock())
            self._audit(connection, "revoke token", name, None)
