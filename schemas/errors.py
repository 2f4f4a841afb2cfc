"""Every error tokentape raises, in one tree.

::

    TokentapeError                 exit code 1
    ├── UsageError                 2   the caller asked for something that cannot be
    │   ├── SettingsError          2   a settings file, variable or flag is wrong
    │   ├── UnknownSession         3   no event of that session is known
    │   ├── UnknownEvent           3   no event of that id is known
    │   ├── UnknownName            2   no breakpoint or stopped request of that name
    │   └── QueryError             4   SQL that is invalid, refused or over a limit
    ├── DataError                  5   bytes or rows that are not what they should be
    │   ├── InvalidEvent           5   an event that breaks a rule of the schema
    │   ├── UnknownSchema          5   a fingerprint that no registry explains
    │   ├── NewerSchema            5   a schema with columns that these tables lack
    │   ├── NewerFormat            5   a data directory that a newer version of this program made
    │   └── CorruptStore           5   a file that fails its checksum or cannot be opened
    ├── ProofError                 6   verification found modified, missing or unsigned data
    ├── ConflictError              7   somebody else was first, or holds what is asked for
    │   ├── AlreadyExists          7   a create-once object stands already
    │   └── Fenced                 7   another process owns the partition, shard or directory
    ├── Unavailable                8   a part does not answer (retryable)
    │   ├── LogUnavailable         8
    │   ├── StoreUnavailable       8
    │   ├── EngineUnavailable      8
    │   │   └── RequestFailed      8   at one request; others it may do
    │   └── StorageFull            8   the disk or the spool is full
    └── LogChanged                 9   log id or partition count differ, or offsets have expired

Exit codes are part of the command line's contract. Each error names the operation, the place, the
cause and a hint; ``str(error)`` is the one line that a person reads.
"""

from __future__ import annotations


class TokentapeError(Exception):
    """Base of every error: one line that states the fault, and a hint that says what to do.

    ``operation`` is the verb that failed ("append", "read settings"); ``place`` is where (a path, a
    topic, a URL without credentials); ``hint`` is what is valid or what to do now.
    """

    exit_code = 1
    retryable = False

    def __init__(self, fault: str, *, operation: str = "", place: str = "", hint: str = "") -> None:
        super().__init__(fault)
        self.fault = fault
        self.operation = operation
        self.place = place
        self.hint = hint

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        what = f"{self.operation}: " if self.operation else ""
        return f"{what}{self.fault}{where}"


class UsageError(TokentapeError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class SettingsError(UsageError):
    """A settings file, variable or flag is wrong."""


class UnknownSession(UsageError):
    """No event of that session is known."""

    exit_code = 3


class UnknownEvent(UsageError):
    """No event of that id is known."""

    exit_code = 3


class UnknownName(UsageError):
    """No breakpoint or stopped request is called that."""


class QueryError(UsageError):
    """SQL that is invalid, refused by the sandbox, or over one of its limits."""

    exit_code = 4


class DataError(TokentapeError):
    """Bytes or rows that are not what they should be."""

    exit_code = 5


class InvalidEvent(DataError):
    """An event that breaks a rule of the schema."""


class UnknownSchema(DataError):
    """A schema fingerprint that no registry explains."""


class NewerSchema(DataError):
    """A known schema with columns that this version's tables lack."""


class NewerFormat(DataError):
    """A data directory whose format this program does not know; it is left as it is."""


class CorruptStore(DataError):
    """A file that fails its checksum or cannot be opened."""


class ProofError(TokentapeError):
    """Verification found modified, missing or unsigned data."""

    exit_code = 6


class ConflictError(TokentapeError):
    """Somebody else was first, or holds what is asked for."""

    exit_code = 7


class AlreadyExists(ConflictError):
    """A create-once object stands already."""


class Fenced(ConflictError):
    """Another process owns the partition, the shard or the data directory."""


class Unavailable(TokentapeError):
    """A part does not answer; trying again may help."""

    exit_code = 8
    retryable = True


class LogUnavailable(Unavailable):
    """The event log does not answer."""


class StoreUnavailable(Unavailable):
    """The object store does not answer."""


class EngineUnavailable(Unavailable):
    """The inference engine does not answer."""


class RequestFailed(EngineUnavailable):
    """An inference engine that others ask, too, failed at one request: it may do others, or be gone."""


class StorageFull(Unavailable):
    """The disk, the spool or the memory that is allowed is full."""


class LogChanged(TokentapeError):
    """The log is not the one that was read before: another id, partition count, or expired offsets."""

    exit_code = 9
