"""Turning a live, flat ``transactions_clean`` into monthly partitions, and back, with readers and writers at work."""

from __future__ import annotations

from equitie_data.conversion.command_line import main
from equitie_data.conversion.locks import Patience
from equitie_data.conversion.run import (
    ConversionReport,
    ConversionStatus,
    convert,
    plan,
    split,
    status,
    undo,
)
from equitie_data.conversion.survey import Survey
from equitie_data.errors import ConversionError

__all__ = [
    "ConversionError",
    "ConversionReport",
    "ConversionStatus",
    "Patience",
    "Survey",
    "convert",
    "main",
    "plan",
    "split",
    "status",
    "undo",
]
