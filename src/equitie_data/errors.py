"""Every error the library raises of its own.

::

    EquitieDataError
    ├── ConfigurationError                 also ValueError
    ├── NoActorError
    ├── NotOpenError
    ├── UnavailableError                   also psycopg.OperationalError
    │   └── CheckoutTimeoutError           also psycopg_pool.PoolTimeout
    ├── ReadOnlyError                      also psycopg.errors.ReadOnlySqlTransaction
    ├── TransactionError
    │   ├── SwallowedErrorError
    │   ├── OperationEndedTransactionError
    │   ├── ResultLostError
    │   └── CommitOutcomeUnknown
    ├── MigrationError
    │   ├── NotMigratedError
    │   ├── HistoryTooNewError
    │   ├── ChecksumDriftError
    │   └── MigrationLockTimeoutError
    ├── ImportFileError                    also ValueError
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
    "CheckoutTimeoutError",
    "ChecksumDriftError",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "EmbeddedServerError",
    "EquitieDataError",
    "HistoryTooNewError",
    "ImportFileError",
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


class ImportFileError(EquitieDataError, ValueError):
    """The file cannot be imported: nothing of it was."""


class EmbeddedServerError(EquitieDataError):
    """The embedded PostgreSQL server could not be found, started or stopped."""
