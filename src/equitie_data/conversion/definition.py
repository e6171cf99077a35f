"""What a table is besides its rows, as statements that give it to another or bind it anew."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data._sql import query
from equitie_data.conversion.layout import TWIN

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["Definition", "Piece", "guard", "read_definition", "run", "signature"]


@attrs.frozen
class Piece:
    """One thing that belongs to the table or names it.

    Attributes:
        part: What kind of thing.
        name: Its name.
        statement: What gives it to the twin; for what others have, what binds it to the table anew; for a column, a
            constraint or an obstacle, a description.
    """

    part: str
    name: str
    statement: str

    def on(self, table: str) -> str:
        """Return the statement for another table than the twin."""
        return self.statement.replace(TWIN, table)


@attrs.frozen
class Definition:
    """All of it, in an order in which it can be created."""

    pieces: tuple[Piece, ...]

    def of(self, *parts: str) -> tuple[Piece, ...]:
        """Return the pieces of some kinds."""
        return tuple(piece for piece in self.pieces if piece.part in parts)

    def statements(self, *parts: str) -> list[str]:
        """Return the statements of some kinds."""
        return [piece.statement for piece in self.of(*parts)]

    def columns(self) -> tuple[str, ...]:
        """Return the columns that hold what was written: those that are computed compute themselves again."""
        return tuple(piece.name for piece in self.of("column") if " GENERATED" not in f" {piece.statement}")

    def structure(self) -> str:
        """Return a checksum of what a copy of the rows rests on: it must be the same when the copy is put to use."""
        parts = ("column", "check", "key", "index", "foreign key", "sequence", "statistics")
        return hashlib.sha256("\x1e".join(map(repr, self.of(*parts))).encode()).hexdigest()

    def type_of(self, column: str) -> str | None:
        """Return a column's type; ``None`` if there is no such column."""
        for piece in self.of("column"):
            if piece.name == column:
                return piece.statement.split(" ", 1)[0]
        return None


def read_definition(conn: Connection[Any]) -> Definition:
    """Read the definition of ``public.transactions_clean`` from the catalogs.

    Args:
        conn: The owner's session, with an empty ``search_path``.
    """
    return Definition(tuple(Piece(*row) for row in conn.execute(query("conversion_definition"))))


_SIGNATURE = (
    "SELECT md5(string_agg(concat_ws(E'\\x1f', d.part, d.name, d.statement), E'\\x1e'"
    " ORDER BY d.part, d.name, d.statement)) FROM ({definition}) AS d"
)


def signature(conn: Connection[Any]) -> str:
    """Return a checksum of the definition, to tell later whether anybody has altered the table meanwhile."""
    row = run(conn, _SIGNATURE.format(definition=query("conversion_definition"))).fetchone()
    return str(row[0]) if row else ""


def guard(expected: str) -> str:
    """Return a statement that fails unless the table is still defined as it was."""
    return (
        "DO $guard$ BEGIN IF ("
        + _SIGNATURE.format(definition=query("conversion_definition"))
        + f") IS DISTINCT FROM '{expected}' THEN RAISE EXCEPTION 'public.transactions_clean was altered since its"
        " conversion began' USING ERRCODE = 'object_not_in_prerequisite_state'; END IF; END $guard$"
    )


def run(conn: Connection[Any], *statements: str) -> Any:
    """Send statements that were composed from the catalogs, in one round trip.

    Every name in them went through ``quote_ident`` or ``format('%I')`` on the server, or is one of ours.
    """
    # Never prepared: only the simple protocol takes several statements at once.
    return conn.execute(";\n".join(statement for statement in statements if statement).encode(), prepare=False)
