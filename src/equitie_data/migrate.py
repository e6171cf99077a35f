"""Bring a database to this release's schema: ``python -m equitie_data.migrate``.

Every migration runs in one transaction together with its record in ``equitie_migrations.history``: it is there as
a whole or not at all. One that no transaction can hold runs step by step, and is resumed where it stopped. Two runs
at once wait for each other; a second run finds nothing to do.
"""

from __future__ import annotations

import sys

from equitie_data.migrations.baseline import BaselineReport
from equitie_data.migrations.catalog import Difference
from equitie_data.migrations.command_line import main
from equitie_data.migrations.current import check_current
from equitie_data.migrations.operations import (
    MigrationStatus,
    baseline,
    down,
    grant,
    migrate,
    pending,
    plan,
    repair,
    status,
    verify,
)
from equitie_data.migrations.plan import ExpectedLock, PlannedMigration
from equitie_data.migrations.run import AppliedMigration, MigrationReport

__all__ = [
    "AppliedMigration",
    "BaselineReport",
    "Difference",
    "ExpectedLock",
    "MigrationReport",
    "MigrationStatus",
    "PlannedMigration",
    "baseline",
    "check_current",
    "down",
    "grant",
    "main",
    "migrate",
    "pending",
    "plan",
    "repair",
    "status",
    "verify",
]

if __name__ == "__main__":
    sys.exit(main())
