"""Takes over the platform's old tables: ``python -m equitie_data legacy {inspect,plan,migrate,verify,rollback}``.

The old tables have dots inside their names and hold the same transactions up to three times. `migrate` brings every
row into the clean tables, or lists it with the reason; afterwards the old names are views, and the untouched originals
are in a backup schema. `verify` looks for every row of the originals at any later time, `rollback` is the way back.
"""

from __future__ import annotations

from equitie_data.legacy.command_line import main
from equitie_data.legacy.ledger import Options
from equitie_data.legacy.report import LegacyReport, Storage, TableReport
from equitie_data.legacy.run import inspect, migrate, plan
from equitie_data.legacy.sources import Inventory
from equitie_data.legacy.undoing import RollbackReport
from equitie_data.legacy.verification import LegacyVerification, SourceVerification, rollback, verify

__all__ = [
    "Inventory",
    "LegacyReport",
    "LegacyVerification",
    "Options",
    "RollbackReport",
    "SourceVerification",
    "Storage",
    "TableReport",
    "inspect",
    "main",
    "migrate",
    "plan",
    "rollback",
    "verify",
]
