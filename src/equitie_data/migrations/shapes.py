"""Statements that no transaction can hold, recognised by their text. No I/O."""

from __future__ import annotations

import re
from typing import TypeAlias

import attrs

from equitie_data.migrations.statements import NAME, WORD, bare

__all__ = ["Detach", "IndexBuild", "IndexDrop", "Outside", "Reindex", "Shape", "ends_transaction", "shape_of"]


@attrs.frozen
class IndexBuild:
    """``CREATE INDEX CONCURRENTLY``.

    Attributes:
        name: The index, as the statement has it.
        table: Its table, as the statement has it.
        unique: Whether it is a unique index.
        definition: What follows the table: method, columns, predicate.
        schema: Schema of the table, and so of the index; empty until the table was looked up.
    """

    name: str
    table: str
    unique: bool
    definition: str
    schema: str = ""

    @property
    def qualified(self) -> str:
        """The index with its schema, which ``CREATE INDEX`` does not take."""
        return f"{self.schema}.{self.name}"

    def statement(self, *, concurrently: bool, only: bool = False) -> str:
        """Write it as SQL."""
        unique, how = "UNIQUE " if self.unique else "", " CONCURRENTLY" if concurrently else ""
        return f"CREATE {unique}INDEX{how} {self.name} ON{' ONLY' if only else ''} {self.table} {self.definition}"


@attrs.frozen
class IndexDrop:
    """``DROP INDEX CONCURRENTLY``."""

    name: str


@attrs.frozen
class Reindex:
    """``REINDEX ... CONCURRENTLY`` of an index or a table."""

    name: str


@attrs.frozen
class Detach:
    """``ALTER TABLE ... DETACH PARTITION ... CONCURRENTLY``."""

    parent: str
    partition: str


@attrs.frozen
class Outside:
    """Any other statement that runs outside of transactions, or ends them itself; it must bear being run twice."""

    word: str


Shape: TypeAlias = IndexBuild | IndexDrop | Reindex | Detach | Outside

_INDEX_BUILD = re.compile(
    rf"CREATE (?P<unique>UNIQUE )?INDEX CONCURRENTLY (?:IF NOT EXISTS )?(?P<name>(?!ON\b){WORD}) ON (?P<table>{NAME})"
    r"\s*(?P<definition>(?:USING\b|\().*)",
    re.IGNORECASE | re.DOTALL,
)
_INDEX_DROP = re.compile(rf"DROP INDEX CONCURRENTLY (?:IF EXISTS )?(?P<name>{NAME})(?: RESTRICT)?", re.IGNORECASE)
_REINDEX = re.compile(rf"REINDEX (?:\([^)]*\) ?)?(?:INDEX|TABLE) (?:CONCURRENTLY )?(?P<name>{NAME})", re.IGNORECASE)
_DETACH = re.compile(
    rf"ALTER TABLE (?:IF EXISTS )?(?P<parent>{NAME}) DETACH PARTITION (?P<partition>{NAME}) CONCURRENTLY", re.IGNORECASE
)
_OUTSIDE = re.compile(
    r"(?:VACUUM|CALL|ALTER SYSTEM|(?:CREATE|DROP) (?:DATABASE|TABLESPACE)|(?:CREATE|ALTER|DROP) SUBSCRIPTION"
    r"|REINDEX (?:\([^)]*\) ?)?(?:SCHEMA|DATABASE|SYSTEM))\b",
    re.IGNORECASE,
)
_ENDS_TRANSACTION = re.compile(
    r"(?:BEGIN|START TRANSACTION|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|PREPARE TRANSACTION)\b", re.IGNORECASE
)
_CONCURRENTLY = re.compile(
    r"(?:CREATE (?:UNIQUE )?INDEX CONCURRENTLY|DROP INDEX CONCURRENTLY|REINDEX [^;]*\bCONCURRENTLY"
    r"|ALTER TABLE [^;]*? DETACH PARTITION [^;]*? CONCURRENTLY$)",
    re.IGNORECASE,
)
_COMMIT_IN_BODY = re.compile(r"\b(?:COMMIT|ROLLBACK)\s*;", re.IGNORECASE)


def ends_transaction(statement: str) -> bool:
    """Return whether a statement begins or ends transactions, which is the runner's to do."""
    return _ENDS_TRANSACTION.match(bare(statement)) is not None


def shape_of(statement: str) -> Shape | None:
    """Return what a statement does outside of transactions; ``None`` for one that a transaction can hold.

    Raises:
        ValueError: It is one of them, but written so that its outcome could not be found again.
    """
    text = bare(statement)
    if found := _INDEX_BUILD.fullmatch(text):
        return IndexBuild(found["name"], found["table"], found["unique"] is not None, found["definition"])
    if found := _INDEX_DROP.fullmatch(text):
        return IndexDrop(found["name"])
    if found := _DETACH.fullmatch(text):
        return Detach(found["parent"], found["partition"])
    if _CONCURRENTLY.match(text):
        if found := _REINDEX.fullmatch(_options_removed(text)):
            return Reindex(found["name"])
        if not text.upper().startswith("REINDEX"):
            raise ValueError(
                "name the index, or the partition, and write the statement plainly, so that the runner can find again"
                " what was built"
            )
    if found := _OUTSIDE.match(text):
        return Outside(found.group())
    if text.upper().startswith("DO ") and _COMMIT_IN_BODY.search(statement):
        return Outside("DO")
    return None


def _options_removed(text: str) -> str:
    return re.sub(r"^REINDEX \([^)]*\) ?", "REINDEX ", text, flags=re.IGNORECASE)
