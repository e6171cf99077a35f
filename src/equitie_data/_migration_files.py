"""Migration files: their names, headers, checksums and statements. No I/O but reading the package."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from typing import TYPE_CHECKING, cast

import attrs

from equitie_data import _sql
from equitie_data.errors import MigrationError

if TYPE_CHECKING:
    from typing_extensions import LiteralString

__all__ = ["Migration", "Statement", "migrations", "parse_migration", "split_statements", "verifications"]

_NAME = re.compile(r"(?P<version>\d{4})_(?P<name>[a-z][a-z0-9]*(?:_[a-z0-9]+)*)")
_HEADER = re.compile(r"^--\s*equitie:\s*(?P<options>.*)$", re.MULTILINE)

# What can hide a semicolon, in the order PostgreSQL's scanner tells them apart (manual, section 4.1).
_TOKEN = re.compile(
    r"""
      --[^\n]*
    | /\*
    | [eE]'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | [A-Za-z_\u0080-\uffff][\w$]*
    | \$(?:[A-Za-z_\u0080-\uffff]\w*)?\$
    | ['"]
    | ;
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_MARK = re.compile(r"/\*|\*/")
_LEADING_BLANK = re.compile(r"(?:\s+|--[^\n]*(?:\n|\Z))*")


@attrs.frozen
class Statement:
    """One statement of a file.

    Attributes:
        text: The statement, without its semicolon.
        line: The line of the file it begins on, counted from 1.
    """

    text: LiteralString
    line: int


@attrs.frozen
class Migration:
    """One migration of this release.

    Attributes:
        version: Its number.
        name: Its name, without the number.
        summary: The first sentence of its leading comment.
        sha256: Checksum of its text with newlines normalised, so that a checkout's line endings are no drift.
        transactional: Whether it runs in one transaction together with its history record.
        statements: What it does.
    """

    version: int
    name: str
    summary: str
    sha256: str
    transactional: bool
    statements: tuple[Statement, ...]

    @property
    def label(self) -> str:
        """Number and name, as the file has them."""
        return f"{self.version:04d}_{self.name}"


def split_statements(text: str) -> tuple[Statement, ...]:
    """Split SQL at its semicolons, minding quotes, dollar quotes and comments.

    ``BEGIN ATOMIC`` bodies are not understood; function bodies are to be quoted.

    Raises:
        ValueError: A quote or comment is not closed.
    """
    statements: list[Statement] = []
    start = 0
    position = 0
    while token := _TOKEN.search(text, position):
        position = token.end()
        word = token.group()
        if word == ";":
            _append_statement(statements, text, start, token.start())
            start = position
        elif word == "/*":
            position = _end_of_comment(text, position)
        elif word.startswith("$") and word.endswith("$"):
            end = text.find(word, position)
            if end < 0:
                raise ValueError(f"the dollar quote {word} on line {_line_of(text, token.start())} is not closed")
            position = end + len(word)
        elif word in {"'", '"'}:
            raise ValueError(f"the quote on line {_line_of(text, token.start())} is not closed")
    _append_statement(statements, text, start, len(text))
    return tuple(statements)


def _append_statement(statements: list[Statement], text: str, start: int, end: int) -> None:
    blank = _LEADING_BLANK.match(text, start, end)
    begin = blank.end() if blank else start
    body = text[begin:end].rstrip()
    if body:
        # The package's own files: see _sql.query.
        statements.append(Statement(cast("LiteralString", body), _line_of(text, begin)))


def _end_of_comment(text: str, position: int) -> int:
    depth = 1
    while mark := _COMMENT_MARK.search(text, position):
        position = mark.end()
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return position
    raise ValueError("a /* comment is not closed")


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def parse_migration(file_name: str, text: str) -> Migration:
    """Read one migration file.

    Args:
        file_name: Name of the file without ``.sql``: four digits, an underscore, the name.
        text: What it holds.

    Raises:
        MigrationError: Name, header or quoting is wrong.
    """
    match = _NAME.fullmatch(file_name)
    if match is None:
        raise MigrationError(f"{file_name}.sql is no name for a migration: call it like 0042_add_some_table.sql.")
    normalised = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        statements = split_statements(normalised)
    except ValueError as error:
        raise MigrationError(f"{file_name}.sql cannot be read: {error}.") from None
    return Migration(
        version=int(match["version"]),
        name=match["name"],
        summary=_summary_of(normalised),
        sha256=hashlib.sha256(normalised.encode()).hexdigest(),
        transactional=_is_transactional(file_name, normalised),
        statements=statements,
    )


def _is_transactional(file_name: str, text: str) -> bool:
    header = _HEADER.search(text)
    options = header["options"].split() if header else []
    for option in options:
        if option not in {"transaction=true", "transaction=false"}:
            raise MigrationError(f"{file_name}.sql has the unknown option {option}; there is only transaction=false.")
    return "transaction=false" not in options


def _summary_of(text: str) -> str:
    words: list[str] = []
    for line in text.splitlines():
        comment = line.removeprefix("--").strip()
        if not line.startswith("--") or (words and not comment):
            break
        if not comment.startswith("equitie:"):
            words += comment.split()
    return re.split(r"(?<=\.)\s", " ".join(words), maxsplit=1)[0]


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Return this release's migrations, in order.

    Raises:
        MigrationError: Two files have the same number, or one cannot be read.
    """
    found = [parse_migration(name, text) for name, text in _sql.migration_texts().items() if "." not in name]
    for earlier, later in itertools.pairwise(found):
        if earlier.version == later.version:
            raise MigrationError(f"{earlier.label}.sql and {later.label}.sql have the same number: renumber one.")
    return tuple(found)


@functools.cache
def verifications() -> dict[str, tuple[Statement, ...]]:
    """Return the queries of each ``NNNN_name.verify.sql``, by the migration's label: they find problems, one a row."""
    suffix = ".verify"
    return {
        name.removesuffix(suffix): split_statements(text)
        for name, text in _sql.migration_texts().items()
        if name.endswith(suffix)
    }
