"""Read and write an investment platform's PostgreSQL: exactly once, as somebody, audited and measured."""

from __future__ import annotations

from equitie_data._default import (
    configure,
    execute_read,
    execute_write,
    get_audit_logger,
    get_connection_pool,
    get_database,
    get_performance_monitor,
)
from equitie_data.aio import AsyncDatabase
from equitie_data.audit import AuditAction, AuditLogger
from equitie_data.context import Actor, acting_as, as_service, current_actor
from equitie_data.database import Database
from equitie_data.errors import (
    CommitOutcomeUnknown,
    ConfigurationError,
    EquitieDataError,
    NoActorError,
    UnavailableError,
)
from equitie_data.monitor import PerformanceMonitor
from equitie_data.settings import Settings

__all__ = [
    "Actor",
    "AsyncDatabase",
    "AuditAction",
    "AuditLogger",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "Database",
    "EquitieDataError",
    "NoActorError",
    "PerformanceMonitor",
    "Settings",
    "UnavailableError",
    "acting_as",
    "as_service",
    "configure",
    "current_actor",
    "execute_read",
    "execute_write",
    "get_audit_logger",
    "get_connection_pool",
    "get_database",
    "get_performance_monitor",
]
