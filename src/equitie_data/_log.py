"""Loggers of the library: through the application's structlog if it has configured it, else through `logging`.

An unconfigured structlog prints to standard output, where a library has no business: it would end up in the middle
of a command's JSON. Without a configuration, events go to the `logging` logger of the same name, silent until the
application adds a handler, as libraries do. Either way no field holds a secret, and none a second line.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import structlog

from equitie_data.redaction import DEFAULT

if TYPE_CHECKING:
    from equitie_data.redaction import Redaction

__all__ = ["get_logger"]

logging.getLogger("equitie_data").addHandler(logging.NullHandler())


class _Logger:
    """Chooses at every call, because an application may configure structlog after importing the library."""

    def __init__(self, name: str, redaction: Redaction) -> None:
        self._name = name
        self._redaction = redaction
        self._standard = structlog.wrap_logger(
            logging.getLogger(name),
            processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer(key_order=["event"])],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )

    def __getattr__(self, level: str) -> Any:
        logger = structlog.get_logger(self._name) if structlog.is_configured() else self._standard
        write, policy = getattr(logger, level), self._redaction

        def log(event: str, **fields: object) -> None:
            write(event, **{name: policy.log_field(name, value) for name, value in fields.items()})

        return log


def get_logger(name: str, redaction: Redaction = DEFAULT) -> Any:
    """Return the logger of a module.

    Args:
        name: The module's name.
        redaction: What must not be written down.
    """
    return _Logger(name, redaction)
