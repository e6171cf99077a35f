"""Maintenance of the partitioned tables: months ahead, late rows, retention, archives, legal holds, refreshes.

``python -m equitie_data maintain`` is one run, to be repeated every day; ``CALL equitie_private.maintain()`` is the
part of it that SQL can do by itself.
"""

from __future__ import annotations

from equitie_data.maintenance.command import main
from equitie_data.maintenance.inspection import MaintenanceStatus, PartitionStatus, status
from equitie_data.maintenance.period import Period, parse_period
from equitie_data.maintenance.report import MaintenanceReport, MaintenanceStep
from equitie_data.maintenance.restoration import RestoreReport, restore
from equitie_data.maintenance.run import maintain

__all__ = [
    "MaintenanceReport",
    "MaintenanceStatus",
    "MaintenanceStep",
    "PartitionStatus",
    "Period",
    "RestoreReport",
    "main",
    "maintain",
    "parse_period",
    "restore",
    "status",
]
