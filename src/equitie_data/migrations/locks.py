"""Which locks a statement takes on tables, as far as its text tells (manual, section 13.3.1). No I/O."""

from __future__ import annotations

import re

import attrs

from equitie_data.migrations.statements import NAME, bare

__all__ = ["MODES", "TableLock", "locks_of", "runs_code"]

MODES = {
    "ACCESS SHARE": "nothing but ACCESS EXCLUSIVE",
    "ROW EXCLUSIVE": "no reader or writer",
    "SHARE UPDATE EXCLUSIVE": "no reader or writer",
    "SHARE": "writers",
    "SHARE ROW EXCLUSIVE": "writers",
    "EXCLUSIVE": "writers",
    "ACCESS EXCLUSIVE": "readers and writers",
}
"""The modes from weak to strong, and whom each of them stands in the way of."""


@attrs.frozen
class TableLock:
    """A lock on a table, or on the table of an index.

    Attributes:
        relation: The table or index, as the statement has it.
        mode: The mode, one of `MODES`.
    """

    relation: str
    mode: str


_T = rf"(?P<table>{NAME})"
_U = rf"(?P<other>{NAME})"
_ALTER = rf"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?{_T} "
_OPTIONS = r"(?:\([^)]*\) ?)?"

# The first that matches counts; "other" is a second table, with the mode after the slash.
_RULES: tuple[tuple[str, str], ...] = (
    (rf"CREATE (?:UNIQUE )?INDEX CONCURRENTLY .*? ?ON (?:ONLY )?{_T}", "SHARE UPDATE EXCLUSIVE"),
    (rf"CREATE (?:UNIQUE )?INDEX (?:IF NOT EXISTS )?(?:.*? )?ON (?:ONLY )?{_T}", "SHARE"),
    (rf"DROP INDEX CONCURRENTLY (?:IF EXISTS )?{_T}", "SHARE UPDATE EXCLUSIVE"),
    (rf"DROP INDEX (?:IF EXISTS )?{_T}", "ACCESS EXCLUSIVE"),
    (rf"REINDEX {_OPTIONS}(?:INDEX|TABLE) CONCURRENTLY {_T}", "SHARE UPDATE EXCLUSIVE"),
    (rf"REINDEX {_OPTIONS}(?:INDEX|TABLE) {_T}", "SHARE"),
    (rf"{_ALTER}ATTACH PARTITION {_U}", "SHARE UPDATE EXCLUSIVE/ACCESS EXCLUSIVE"),
    (rf"{_ALTER}DETACH PARTITION {_U} (?:CONCURRENTLY|FINALIZE)", "SHARE UPDATE EXCLUSIVE/ACCESS EXCLUSIVE"),
    (rf"{_ALTER}DETACH PARTITION {_U}", "ACCESS EXCLUSIVE/ACCESS EXCLUSIVE"),
    (rf"{_ALTER}VALIDATE CONSTRAINT", "SHARE UPDATE EXCLUSIVE"),
    (
        rf"{_ALTER}ADD (?:CONSTRAINT \S+ )?FOREIGN KEY .*? REFERENCES {_U}",
        "SHARE ROW EXCLUSIVE/SHARE ROW EXCLUSIVE",
    ),
    (rf"{_ALTER}(?:DISABLE|ENABLE) (?:ALWAYS |REPLICA )?TRIGGER", "SHARE ROW EXCLUSIVE"),
    (rf"{_ALTER}ALTER (?:COLUMN )?\S+ SET STATISTICS", "SHARE UPDATE EXCLUSIVE"),
    (rf"{_ALTER}(?:SET|RESET) \(", "SHARE UPDATE EXCLUSIVE"),
    (rf"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?{_T}", "ACCESS EXCLUSIVE"),
    (rf"ALTER INDEX (?:IF EXISTS )?{_U} ATTACH PARTITION {_T}", "ACCESS EXCLUSIVE/SHARE UPDATE EXCLUSIVE"),
    (rf"CREATE (?:OR REPLACE )?(?:CONSTRAINT )?TRIGGER \S+ .*? ON {_T}", "SHARE ROW EXCLUSIVE"),
    (rf"DROP TRIGGER (?:IF EXISTS )?\S+ ON {_T}", "ACCESS EXCLUSIVE"),
    (rf"(?:CREATE|ALTER|DROP) POLICY (?:IF EXISTS )?\S+ ON {_T}", "ACCESS EXCLUSIVE"),
    (rf"CREATE (?:OR REPLACE )?RULE \S+ AS .*? TO {_T}", "ACCESS EXCLUSIVE"),
    (rf"CREATE TABLE (?:IF NOT EXISTS )?{NAME} PARTITION OF {_T}", "ACCESS EXCLUSIVE"),
    (rf"CREATE TABLE .*? REFERENCES {_T}", "SHARE ROW EXCLUSIVE"),
    (rf"CREATE STATISTICS .*? FROM {_T}", "SHARE UPDATE EXCLUSIVE"),
    (rf"DROP TABLE (?:IF EXISTS )?{_T}", "ACCESS EXCLUSIVE"),
    (rf"TRUNCATE (?:TABLE )?(?:ONLY )?{_T}", "ACCESS EXCLUSIVE"),
    (rf"LOCK (?:TABLE )?(?:ONLY )?{_T} IN (?P<mode>[A-Z ]+?) MODE", ""),
    (rf"LOCK (?:TABLE )?(?:ONLY )?{_T}", "ACCESS EXCLUSIVE"),
    (rf"REFRESH MATERIALIZED VIEW CONCURRENTLY {_T}", "EXCLUSIVE"),
    (rf"REFRESH MATERIALIZED VIEW {_T}", "ACCESS EXCLUSIVE"),
    (rf"CLUSTER {_OPTIONS}{_T}", "ACCESS EXCLUSIVE"),
    (rf"VACUUM \([^)]*\bFULL\b[^)]*\) {_T}", "ACCESS EXCLUSIVE"),
    (rf"VACUUM FULL (?:ANALYZE )?{_T}", "ACCESS EXCLUSIVE"),
    (rf"(?:VACUUM|ANALYZE) {_OPTIONS}(?:ANALYZE |VERBOSE )*{_T}", "SHARE UPDATE EXCLUSIVE"),
    (rf"COMMENT ON TABLE {_T}", "SHARE UPDATE EXCLUSIVE"),
    (rf"INSERT INTO {_T}", "ROW EXCLUSIVE"),
    (rf"UPDATE (?:ONLY )?{_T}", "ROW EXCLUSIVE"),
    (rf"DELETE FROM (?:ONLY )?{_T}", "ROW EXCLUSIVE"),
    (rf"MERGE INTO (?:ONLY )?{_T}", "ROW EXCLUSIVE"),
)
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE | re.DOTALL), modes) for pattern, modes in _RULES)
_CODE = re.compile(r"(?:DO|CALL|SELECT|WITH|EXECUTE)\b", re.IGNORECASE)
_COLUMN_COMMENT = re.compile(rf"COMMENT ON COLUMN (?P<column>{NAME})", re.IGNORECASE)


def locks_of(statement: str) -> tuple[TableLock, ...]:
    """Return the locks a statement takes on the tables it names; not those that functions in it may take.

    Of several tables in one ``DROP TABLE`` or ``TRUNCATE``, the first alone is read.
    """
    text = bare(statement)
    if column := _COLUMN_COMMENT.match(text):
        return (TableLock(column["column"].rpartition(".")[0], "SHARE UPDATE EXCLUSIVE"),)
    for pattern, modes in _COMPILED:
        if found := pattern.match(text):
            mode, _, other = modes.partition("/")
            names = found.groupdict()
            locks = [TableLock(names["table"], mode or names["mode"].upper())]
            if names.get("other"):
                locks.append(TableLock(names["other"], other))
            return tuple(locks)
    return ()


def runs_code(statement: str) -> bool:
    """Return whether a statement runs code whose locks its text does not tell."""
    return _CODE.match(bare(statement)) is not None
