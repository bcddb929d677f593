"""The tree of errors: what went wrong, where, what state is left, what to do.

    KappaLogError
    ├── ConfigError              bad settings; before any I/O
    ├── UsageError               a request that cannot be met as it stands
    │   └── NotFound             no such event, failure, build, replay …
    ├── RegistrationError        a projection or handler declared wrongly; at import
    │   └── ProjectionNotFound   names the registered ones
    ├── HandlerError             a handler's start or stop raised
    ├── DecodeError              a record is no event → becomes a Failure
    ├── RetryFailed              a kept record failed again; it is kept still
    ├── ProjectionError          a fold raised or returned what no column holds
    ├── StaleCode                a build's code is not the registered code
    ├── SourceError              a source of records cannot be read
    │   ├── SourceDiverged       it was read before and is now something else
    │   └── SourceGap            records were deleted before they were read
    ├── VerificationError        the log or a view is not what it should be
    ├── ArchiveError             an archive cannot be read or written
    │   ├── ArchiveMissing       there is none
    │   ├── ArchiveNewer         a later version of kappa_log wrote it
    │   ├── ArchiveDiverged      it is of another log, or ahead of this one
    │   └── ArchiveDamaged       a file is missing or not what was written
    └── StorageError             the database refused; the driver's error is the cause
        ├── DatabaseBusy         locked by another process; try later
        ├── DatabaseUnavailable  away, or out of disk; it may come back
        ├── SchemaOutOfDate      empty, behind or ahead of this version
        ├── Fenced               another writer owns these offsets now
        ├── CursorConflict       another runner moved the cursor first
        ├── AlreadyRunning       the lock of a replay is held
        └── LostRace             somebody else acted on the same thing first

Families end in ``Error``, leaves say what happened. The facts are attributes, set
by the constructor that also writes the message. Exit codes and HTTP statuses are
tables in `kappa_log.cli` and `kappa_log.web`: the core knows neither.
"""

from __future__ import annotations


class KappaLogError(Exception):
    """Base of every error that kappa_log raises on purpose."""

    retryable: bool = False
    """Whether the same call may succeed later with nothing changed by the user."""


class ConfigError(KappaLogError):
    """A setting is wrong; nothing was opened or written."""


class UsageError(KappaLogError):
    """What was asked cannot be done as asked; nothing was changed."""


class NotFound(UsageError):
    """No such thing in the log.

    Attributes:
        noun: What was looked for, for instance ``event``.
        wanted: Its identifier as given.
    """

    def __init__(self, noun: str, wanted: object, hint: str = "") -> None:
        """Write the message from the noun and what was wanted."""
        self.noun = noun
        self.wanted = wanted
        super().__init__(f"{noun} {wanted} not found{'. ' + hint if hint else ''}")


class RegistrationError(KappaLogError):
    """A projection or handler is declared in a way that cannot work."""


class ProjectionNotFound(RegistrationError):
    """No projection of that name is registered.

    Attributes:
        name: The name asked for.
        known: The registered names, sorted.
    """

    def __init__(self, name: str, known: list[str], hint: str = "") -> None:
        """Name the registered projections beside the missing one."""
        self.name = name
        self.known = known
        if known:
            text = f"projection '{name}' is not registered; known: {', '.join(known)}"
        else:
            text = (
                f"projection '{name}' is not registered, nor is any other; put one "
                "into a module of [projections] modules (default: projections/)"
            )
        super().__init__(f"{text}{'. ' + hint if hint else ''}")


class HandlerError(KappaLogError):
    """A handler's start or stop raised; what was committed before is kept.

    Attributes:
        handler: The handler's class as ``module:Class``.
        hook: ``start`` or ``stop``.
    """

    def __init__(self, handler: str, hook: str, error: BaseException) -> None:
        """Say whose hook raised what, and what state is left."""
        self.handler = handler
        self.hook = hook
        kept = "nothing was read" if hook == "start" else "what was committed is kept"
        super().__init__(
            f"handler {handler}: {hook}() raised {type(error).__name__}: "
            f"{message_of(error)}; {kept}"
        )


class DecodeError(KappaLogError):
    """Received bytes are no event; the record is kept whole as a Failure."""


class RetryFailed(KappaLogError):
    """A kept record was handled again and failed again; it is kept still.

    Attributes:
        noun: What was handled: ``failure`` or ``event``.
        identifier: Its id or position.
        reason: What the handler said.
    """

    def __init__(self, noun: str, identifier: int, error: BaseException | None) -> None:
        """Say what failed, and why."""
        self.noun = noun
        self.identifier = identifier
        self.reason = "it was not tried" if error is None else message_of(error)
        kind = "" if error is None else f"{type(error).__name__}: "
        super().__init__(
            f"{noun} {identifier} failed again: {kind}{self.reason}; it is kept"
        )


class ProjectionError(KappaLogError):
    """A projection failed on one event; its cursor did not pass that event.

    Attributes:
        projection: Name of the projection.
        position: Position of the event.
        key: The row's key, or None where no key is known yet.
    """

    def __init__(
        self,
        projection: str,
        position: int,
        reason: str,
        *,
        key: object = None,
        remedy: str = "",
    ) -> None:
        """Say which fold failed on which event, and what to do."""
        self.projection = projection
        self.position = position
        self.key = key
        self.reason = reason
        at = f" for key {key!r}" if key is not None else ""
        super().__init__(
            f"projection '{projection}' failed on the event at position {position}"
            f"{at}: {reason}. {remedy or 'Its cursor did not pass that event.'}"
        )


class StaleCode(KappaLogError):
    """A build was made by other code than the one registered now.

    Attributes:
        projection: Name of the projection.
        build: Number of the build.
        parts: Which fingerprints differ: code, state, payload, upcasters, routing.
    """

    def __init__(
        self, projection: str, build: int, parts: list[str], message: str
    ) -> None:
        """Keep the facts; the caller knows what its user was doing."""
        self.projection = projection
        self.build = build
        self.parts = parts
        super().__init__(message)


class SourceError(KappaLogError):
    """A source of records cannot be read."""

    retryable = True


class SourceDiverged(SourceError):
    """What was read before is now something else; nothing was ingested."""

    retryable = False


class SourceGap(SourceError):
    """A topic's records were deleted before they were read; nothing was passed over.

    Attributes:
        topic: Name of the topic.
        partition: Which of its partitions.
        wanted: The offset to be read next.
        available: The lowest offset that is still there.
    """

    retryable = False

    def __init__(self, topic: str, partition: int, wanted: int, available: int) -> None:
        """Name the span that is lost, and the way to go on without it."""
        self.topic = topic
        self.partition = partition
        self.wanted = wanted
        self.available = available
        super().__init__(
            f"{topic} partition {partition}: offsets {wanted} to {available - 1} were "
            f"deleted by the broker before they were read; the next one there is "
            f"{available}. Nothing was passed over; to go on without them, run: "
            "kappa-log consume --accept-gap"
        )


class VerificationError(KappaLogError):
    """The log, its ledger or a view is not what it should be."""


class ArchiveError(KappaLogError):
    """An archive cannot be read or written; what it held before is still whole."""

    retryable = True


class ArchiveMissing(ArchiveError):
    """There is no archive at the address."""

    retryable = False


class ArchiveNewer(ArchiveError):
    """A later version of kappa_log wrote the archive; it was not touched."""

    retryable = False


class ArchiveDiverged(ArchiveError):
    """The archive is of another log, or holds what this log does not have."""

    retryable = False


class ArchiveDamaged(ArchiveError):
    """A file of an archive is missing or is not what was written.

    Attributes:
        url: The archive.
        path: The file, in the archive.
    """

    retryable = False

    def __init__(self, url: str, path: str, reason: str) -> None:
        """Name the file, and say what is wrong with it."""
        self.url = url
        self.path = path
        self.reason = reason
        super().__init__(f"archive {url}: {path}: {reason}")


class StorageError(KappaLogError):
    """The database refused; the driver's error is the cause."""


class DatabaseBusy(StorageError):
    """Another process holds the database; nothing was changed."""

    retryable = True


class DatabaseUnavailable(StorageError):
    """The database is away or its disk is full; what was committed is kept."""

    retryable = True


class SchemaOutOfDate(StorageError):
    """The database's tables are not of this version; the message names the command.

    Attributes:
        found: Revision in the database; None when it has no tables of ours.
        wanted: Newest revision that this version knows.
    """

    def __init__(self, found: str | None, wanted: str, message: str) -> None:
        """Keep both revisions beside the message."""
        self.found = found
        self.wanted = wanted
        super().__init__(message)


class Fenced(StorageError):
    """Another writer owns these offsets now; this batch was rolled back."""


class CursorConflict(StorageError):
    """Another runner moved the cursor first; nothing of this batch was kept."""

    retryable = True


class AlreadyRunning(StorageError):
    """The lock is held by a living process; nothing was changed."""

    retryable = True


class LostRace(StorageError):
    """Somebody else acted on the same thing first; nothing of this act was kept."""


def message_of(error: BaseException) -> str:
    """Return what an error of the user's code says; some raise when they are asked."""
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001 - whatever it is, the first one counts
        return f"(its message cannot be read: {type(second).__name__})"
