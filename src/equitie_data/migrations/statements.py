"""SQL text taken apart: where a statement ends, and what it says without its comments. No I/O."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, cast

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import LiteralString

__all__ = ["NAME", "WORD", "Statement", "bare", "checksum", "split_statements"]

WORD = r'(?:"(?:[^"]|"")+"|[A-Za-z_\u0080-\uffff][\w$]*)'
"""A pattern for a single name as SQL has it, quoted or not."""

NAME = rf"(?:{WORD}(?:\.{WORD})*)"
"""A pattern for a name with or without its schema."""

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
_BLANKS = re.compile(r"\s+")


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
class _Token:
    kind: str  # "comment", "quoted", "word" or "end"
    start: int
    end: int


def split_statements(text: str) -> tuple[Statement, ...]:
    """Split SQL at its semicolons, minding quotes, dollar quotes and comments.

    ``BEGIN ATOMIC`` bodies are not understood; function bodies are to be quoted.

    Raises:
        ValueError: A quote or comment is not closed.
    """
    statements: list[Statement] = []
    start = 0
    for token in _tokens(text):
        if token.kind == "end":
            _append_statement(statements, text, start, token.start)
            start = token.end
    _append_statement(statements, text, start, len(text))
    return tuple(statements)


def bare(text: str) -> str:
    """Return a statement without comments, and with one space where it has blanks outside of quotes."""
    pieces: list[str] = []
    position = 0
    for token in _tokens(text):
        if token.kind == "comment":
            pieces += [_BLANKS.sub(" ", text[position : token.start]), " "]
        elif token.kind == "quoted":
            pieces += [_BLANKS.sub(" ", text[position : token.start]), text[token.start : token.end]]
        else:
            continue
        position = token.end
    pieces.append(_BLANKS.sub(" ", text[position:]))
    # Blanks inside a quote are its own; only those between pieces are made one.
    joined = ""
    for piece in pieces:
        joined += piece[1:] if piece.startswith(" ") and (joined.endswith(" ") or not joined) else piece
    return joined.strip()


def checksum(text: str) -> str:
    """Return the SHA-256 of a text with its newlines normalised, so that a checkout's line endings are no drift."""
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").encode()).hexdigest()


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while found := _TOKEN.search(text, position):
        start, position = found.span()
        word = found.group()
        if word == ";":
            yield _Token("end", start, position)
        elif word == "/*":
            position = _end_of_comment(text, position)
            yield _Token("comment", start, position)
        elif word.startswith("--"):
            yield _Token("comment", start, position)
        elif word.startswith("$") and word.endswith("$"):
            end = text.find(word, position)
            if end < 0:
                raise ValueError(f"the dollar quote {word} on line {_line_of(text, start)} is not closed")
            position = end + len(word)
            yield _Token("quoted", start, position)
        elif word in {"'", '"'}:
            raise ValueError(f"the quote on line {_line_of(text, start)} is not closed")
        else:
            yield _Token("quoted" if word[-1] in "'\"" else "word", start, position)


def _append_statement(statements: list[Statement], text: str, start: int, end: int) -> None:
    blank = _LEADING_BLANK.match(text, start, end)
    begin = blank.end() if blank else start
    body = text[begin:end].rstrip()
    if body:
        # A migration is code, as literal as if it stood in a program: see _sql.query.
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
