"""Pieces of composed SQL.

Statements are composed with identifiers and literals and run without parameters: a ``%`` in an old column's name is
then no placeholder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import LiteralString

__all__ = ["joined", "name", "raw", "text"]


def raw(statement: str) -> sql.SQL:
    """Return a piece as it stands: a literal of this package, or what the server has quoted itself, such as a type."""
    return sql.SQL(cast("LiteralString", statement))


def name(*parts: str) -> sql.Identifier:
    """Return a quoted identifier."""
    return sql.Identifier(*parts)


def text(value: str) -> sql.Composable:
    """Return a literal that is typed as text."""
    return sql.SQL("{}::text").format(sql.Literal(value))


def joined(parts: Iterable[sql.Composable], separator: str = ", ") -> sql.Composed:
    """Join pieces of a statement."""
    return raw(separator).join(parts)
