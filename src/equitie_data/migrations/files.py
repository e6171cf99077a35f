"""Migration files: their names, headers, checksums and statements. No I/O."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import attrs

from equitie_data.errors import MigrationError
from equitie_data.migrations.shapes import Outside, Shape, ends_transaction, shape_of
from equitie_data.migrations.statements import Statement, checksum, split_statements

__all__ = ["OURS", "Migration", "Phase", "label_of", "parse_migration"]

OURS = "equitie_data"
"""Name of the directory of the library's own migrations."""

Phase: TypeAlias = Literal["pre", "post"]

_NAME = re.compile(r"(?P<version>\d{4})_(?P<name>[a-z][a-z0-9]*(?:_[a-z0-9]+)*)")
_HEADER = re.compile(r"^--\s*equitie:\s*(?P<options>.*)$", re.MULTILINE)
_DURATION = re.compile(r"(?P<number>\d+)(?P<unit>ms|s|min|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_OPTIONS = {
    "transaction": re.compile(r"true|false"),
    "lock_timeout": _DURATION,
    "statement_timeout": _DURATION,
    "phase": re.compile(r"pre|post"),
    "compatible_since": re.compile(r"\d{4}"),
}


@attrs.frozen
class Migration:
    """One migration.

    Attributes:
        version: Its number.
        name: Its name, without the number.
        summary: The first sentence of its leading comment.
        sha256: Checksum of its text with newlines normalised, so that a checkout's line endings are no drift.
        transactional: Whether it runs in one transaction together with its history record. Otherwise each statement is
            a step with a record of its own.
        statements: What it does.
        directory: Name of the directory of migrations it belongs to.
        phase: ``pre`` for what code of the release before can work with, ``post`` for what it cannot.
        compatible_since: Last migration of the oldest release that works on a database with this one; 0 for every one.
        lock_timeout: Seconds a statement may wait for a lock; ``None`` for what the run says.
        statement_timeout: Seconds a statement may take; ``None`` for no bound.
        path: Where the file is, as messages name it.
    """

    version: int
    name: str
    summary: str
    sha256: str
    transactional: bool
    statements: tuple[Statement, ...]
    directory: str = OURS
    phase: Phase = "pre"
    compatible_since: int = 0
    lock_timeout: float | None = None
    statement_timeout: float | None = None
    path: str = ""

    @property
    def label(self) -> str:
        """Number and name, as the file has them; before them the directory, unless it is the library's own."""
        return label_of(self.directory, self.version, self.name)

    @property
    def shapes(self) -> tuple[Shape | None, ...]:
        """For each statement, what it does outside of transactions."""
        return tuple(shape_of(statement.text) for statement in self.statements)


def label_of(directory: str, version: int, name: str) -> str:
    """Write a migration's label: ``0003_add_index``, or ``billing/0003_add_index`` outside the library's directory."""
    return f"{'' if directory == OURS else f'{directory}/'}{version:04d}_{name}"


def parse_migration(file_name: str, text: str, *, directory: str = OURS, where: str = "sql/migrations") -> Migration:
    """Read one migration file.

    Args:
        file_name: Name of the file without ``.sql``: four digits, an underscore, the name; ``.down`` may follow.
        text: What it holds.
        directory: Name of its directory of migrations.
        where: Path of that directory, for messages.

    Raises:
        MigrationError: Name, header, quoting or a statement is wrong.
    """
    match = _NAME.fullmatch(file_name.removesuffix(".down"))
    path = f"{where}/{file_name}.sql"
    if match is None:
        raise MigrationError(f"{path} has no name for a migration: call it like 0042_add_some_table.sql.")
    normalised = text.replace("\r\n", "\n").replace("\r", "\n")
    options = _options_of(path, normalised)
    version = int(match["version"])
    phase: Phase = "post" if options.get("phase") == "post" else "pre"
    migration = Migration(
        version=version,
        name=match["name"],
        summary=_summary_of(normalised),
        sha256=checksum(normalised),
        transactional=options.get("transaction") != "false",
        statements=_statements_of(path, normalised),
        directory=directory,
        phase=phase,
        # Without a word of its own, the half after the deployment is for those releases only that come with it.
        compatible_since=int(options.get("compatible_since", version if phase == "post" else 0)),
        lock_timeout=_seconds(options.get("lock_timeout")),
        statement_timeout=_seconds(options.get("statement_timeout")),
        path=path,
    )
    if migration.compatible_since > version:
        raise MigrationError(f"{path} is compatible_since={migration.compatible_since:04d}, which comes after it.")
    _check_statements(migration)
    return migration


def _statements_of(path: str, text: str) -> tuple[Statement, ...]:
    try:
        return split_statements(text)
    except ValueError as error:
        raise MigrationError(f"{path} cannot be read: {error}.") from None


def _check_statements(migration: Migration) -> None:
    for statement in migration.statements:
        line = f"{migration.path}, line {statement.line}"
        if ends_transaction(statement.text):
            raise MigrationError(f"{line}: transactions are the runner's: take the statement out.")
        try:
            shape = shape_of(statement.text)
        except ValueError as error:
            raise MigrationError(f"{line}: {error}.") from None
        # Code may do without transactions of its own, which its text does not tell.
        is_code = isinstance(shape, Outside) and shape.word.upper() in {"CALL", "DO"}
        if shape is not None and migration.transactional and not is_code:
            raise MigrationError(
                f"{line}: no transaction can hold this statement: put `-- equitie: transaction=false` into the file's"
                " leading comment."
            )


def _options_of(path: str, text: str) -> dict[str, str]:
    header = _HEADER.search(text)
    options: dict[str, str] = {}
    for option in re.split(r"[;\s]+", header["options"].strip(" ;")) if header else ():
        name, _, value = option.partition("=")
        if name not in _OPTIONS:
            raise MigrationError(f"{path} has the unknown option {option}; there are {', '.join(_OPTIONS)}.")
        if _OPTIONS[name].fullmatch(value) is None:
            raise MigrationError(f"{path} has the option {option}, whose value cannot be read.")
        if name in options:
            raise MigrationError(f"{path} has the option {name} twice.")
        options[name] = value
    return options


def _seconds(duration: str | None) -> float | None:
    found = _DURATION.fullmatch(duration or "")
    return None if found is None else int(found["number"]) * _UNITS[found["unit"]]


def _summary_of(text: str) -> str:
    words: list[str] = []
    for line in text.splitlines():
        comment = line.removeprefix("--").strip()
        if not line.startswith("--") or (words and not comment):
            break
        if not comment.startswith("equitie:"):
            words += comment.split()
    return re.split(r"(?<=\.)\s", " ".join(words), maxsplit=1)[0]
