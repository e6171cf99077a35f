"""Every error the library raises of its own.

::

    EquitieDataError
    ├── ConfigurationError                 also ValueError
    ├── NoActorError
    ├── InvalidTokenError
    ├── NotOpenError
    ├── UnavailableError                   also psycopg.OperationalError
    │   └── CheckoutTimeoutError           also psycopg_pool.PoolTimeout
    ├── ReadOnlyError                      also psycopg.errors.ReadOnlySqlTransaction
    ├── TransactionError
    │   ├── SwallowedErrorError
    │   ├── OperationEndedTransactionError
    │   ├── ResultLostError
    │   └── CommitOutcomeUnknown
    ├── TransactionNotFoundError           also LookupError
    ├── MigrationError
    │   ├── NotMigratedError
    │   ├── HistoryTooNewError
    │   ├── ChecksumDriftError
    │   └── MigrationLockTimeoutError
    ├── ConversionError
    ├── MaintenanceError
    │   └── ArchiveError
    ├── ImportFileError                    also ValueError
    ├── BulkLoadError                      also ValueError
    ├── LegacyError
    └── EmbeddedServerError

An error of the caller's own statement (a unique violation, a syntax error, a statement timeout) is psycopg's
and passes through unchanged, so handlers written for psycopg stay valid. What the library adds is about what it
does: configuration, identity, routing, retries, commits, migrations, imports.

Every message is one clear sentence that says what happened, to what, and what to do. No message holds a password
or a parameter value.
"""

from __future__ import annotations

import psycopg
import psycopg_pool

__all__ = [
    "ArchiveError",
    "BulkLoadError",
    "CheckoutTimeoutError",
    "ChecksumDriftError",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "ConversionError",
    "EmbeddedServerError",
    "EquitieDataError",
    "HistoryTooNewError",
    "ImportFileError",
    "InvalidTokenError",
    "LegacyError",
    "MaintenanceError",
    "MigrationError",
    "MigrationLockTimeoutError",
    "NoActorError",
    "NotMigratedError",
    "NotOpenError",
    "OperationEndedTransactionError",
    "ReadOnlyError",
    "ResultLostError",
    "SwallowedErrorError",
    "TransactionError",
    "TransactionNotFoundError",
    "UnavailableError",
]


class EquitieDataError(Exception):
    """The root of every error the library raises of its own."""


class ConfigurationError(EquitieDataError, ValueError):
    """A setting is wrong, contradicts another, or is not known."""


class NoActorError(EquitieDataError):
    """A statement was about to run as nobody."""

    def __init__(self) -> None:
        super().__init__(
            "Nobody is acting: wrap the call in `with acting_as(user_id):` for a user, or in "
            "`with as_service(reason):` for the application itself."
        )


class InvalidTokenError(EquitieDataError):
    """A JSON web token does not hold: nobody may act on its strength. Answer 401.

    Args:
        reason: Which check failed, without anything the token says.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"The token was refused: {reason}.")
        self.reason = reason

    def __reduce__(self) -> tuple[type[InvalidTokenError], tuple[str]]:
        return type(self), (self.reason,)


class NotOpenError(EquitieDataError):
    """The database is not open: it was never opened, or it was closed already."""


class UnavailableError(EquitieDataError, psycopg.OperationalError):
    """No node could serve the call before its deadline. Nothing was committed."""


class CheckoutTimeoutError(UnavailableError, psycopg_pool.PoolTimeout):
    """Every connection of the pool was in use until the deadline. Nothing was sent."""


class ReadOnlyError(EquitieDataError, psycopg.errors.ReadOnlySqlTransaction):
    """A read tried to write; `execute_write` is for that."""


class TransactionError(EquitieDataError):
    """A transaction did not end the way its operation asked for."""


class SwallowedErrorError(TransactionError):
    """The operation caught a database error and returned; the transaction was rolled back."""


class OperationEndedTransactionError(TransactionError):
    """The operation committed or rolled back the transaction it runs in."""


class ResultLostError(TransactionError):
    """The write is committed, exactly once, but what it returned is not known any more."""


class CommitOutcomeUnknown(TransactionError):  # noqa: N818 - the field's name for it is the state, not an error
    """The connection was lost during COMMIT, and whether the write is there could not be established."""


class TransactionNotFoundError(EquitieDataError, LookupError):
    """No investment transaction has the id, or the acting user may not change it."""

    def __init__(self) -> None:
        super().__init__(
            "No transaction has this id, or the acting user may not change it: check the id, and who is acting."
        )


class MigrationError(EquitieDataError):
    """A migration could not be applied; the message names it and says what is left to do."""


class NotMigratedError(MigrationError):
    """The database lacks migrations that this release needs."""


class HistoryTooNewError(MigrationError):
    """The database was migrated by a newer release than this one."""


class ChecksumDriftError(MigrationError):
    """A migration file is not the one that was applied."""


class MigrationLockTimeoutError(MigrationError):
    """Another migration run held the lock for longer than this one would wait."""


class ConversionError(EquitieDataError):
    """The table could not be converted between flat and partitioned; no row of it was lost or changed."""


class MaintenanceError(EquitieDataError):
    """Maintenance cannot run or go on; what it had done until then stays done."""


class ArchiveError(MaintenanceError):
    """An archive could not be written, or is not what its manifest says."""


class ImportFileError(EquitieDataError, ValueError):
    """The file cannot be imported: nothing of it was."""


class BulkLoadError(EquitieDataError, ValueError):
    """A bulk load cannot go on; the message names the row or the batch."""


class LegacyError(EquitieDataError):
    """The old tables cannot be taken over, checked or restored; the message says why and what is left to do."""


class EmbeddedServerError(EquitieDataError):
    """The embedded PostgreSQL server could not be found, started or stopped."""
