"""A statement that failed: where it stands in its file, and what to tell whoever ran it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from equitie_data.migrations.session import cause_of

if TYPE_CHECKING:
    import psycopg

    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.statements import Statement

__all__ = ["StatementFailedError"]

_DO_BLOCK_LINE = re.compile(r"PL/pgSQL function inline_code_block line (\d+)")


class StatementFailedError(Exception):
    """A statement of a file failed; the server's error is its cause.

    Args:
        statement: The statement.
        error: What the server said.
    """

    def __init__(self, statement: Statement, error: psycopg.Error) -> None:
        super().__init__(statement, error)
        self.error = error
        self.line = _line_of(statement, error)

    def describe(self, migration: Migration, what: str, left: str) -> str:
        """Write one sentence for people.

        Args:
            migration: The file.
            what: What became of it: ``failed``, ``failed 3 times``, ...
            left: What the database has of it now.
        """
        diag = self.error.diag
        hint = f" {diag.message_hint}" if diag.message_hint else ""
        where = f"{migration.path}, line {self.line}"
        return f"Migration {migration.label} {what} ({where}): {cause_of(self.error)}.{hint} {left}."


def _line_of(statement: Statement, error: psycopg.Error) -> int:
    if error.diag.statement_position:
        return statement.line + statement.text.count("\n", 0, int(error.diag.statement_position) - 1)
    inside = _DO_BLOCK_LINE.findall(error.diag.context or "")
    if inside and (body := statement.text.find("$")) >= 0:
        # PL/pgSQL counts from the line on which the body is opened.
        return statement.line + statement.text.count("\n", 0, body) + int(inside[-1]) - 1
    return statement.line
