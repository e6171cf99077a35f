"""The SQL shipped with the package: named queries and migration files."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing_extensions import LiteralString

__all__ = ["migration_texts", "query"]


@functools.cache
def query(name: str) -> LiteralString:
    """Return the text of ``sql/queries/<name>.sql``.

    Raises:
        FileNotFoundError: The package has no query of that name.
    """
    # The one cast: what stands in the package's own files is as literal as if it stood in its code.
    text = (files("equitie_data") / "sql" / "queries" / f"{name}.sql").read_text("utf-8")
    return cast("LiteralString", text)


@functools.cache
def migration_texts() -> dict[str, str]:
    """Return the text of every file of ``sql/migrations`` by its name without ``.sql``, in order of the names."""
    directory = files("equitie_data") / "sql" / "migrations"
    found = sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(".sql"))
    return {name.removesuffix(".sql"): (directory / name).read_text("utf-8") for name in found}
