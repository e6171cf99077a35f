"""Checks a real deployment against the security model: roles, privileges, policies, TLS, logs."""

from __future__ import annotations

from equitie_data.doctor.command import main
from equitie_data.doctor.examination import examine
from equitie_data.doctor.findings import Finding, Report, Severity

__all__ = ["Finding", "Report", "Severity", "examine", "main"]
