"""One name for all the calls of one statement: SQL without its values, and a hash of that.

Two statements share a fingerprint when they differ only in literals, placeholders, comments, white space, the case of
unquoted words, or how many entries an `IN` list, a `VALUES` list or an `ARRAY[...]` has. No literal survives: what the
normaliser cannot read to its end (an unterminated string, a statement cut at `LONGEST_STATEMENT`) is masked to the end.

The lexical rules are PostgreSQL's (manual, 4.1), with `standard_conforming_strings` on, as it is by default.
"""

from __future__ import annotations

import re
from hashlib import blake2b

__all__ = ["LONGEST_STATEMENT", "OTHER", "Fingerprints", "fingerprint_of", "normalise"]

OTHER = "other"
"""The fingerprint of every statement there was no more room for."""

LONGEST_STATEMENT = 4096
"""Only this many characters of a statement are read, so that none costs more than a few milliseconds."""

_SPACE = r"[ \t\r\n\f\v]"
# A comment runs to the end of its line and no less: were it free to stop at any inner `--`, a line of dashes would take
# the engine exponential time.
_LINE_COMMENT = r"--[^\r\n]*(?=[\r\n]|\Z)"
# A string goes on, under the same escapes, behind white space that holds a line break, and only then.
_GOES_ON = rf"(?:[ \t\f\v]|{_LINE_COMMENT})*[\r\n](?:{_SPACE}|{_LINE_COMMENT})*'"
_PLACEHOLDER = r"%(?:\([^)]*\))?[sbt](?![A-Za-z0-9_])"

# The alternatives are tried in this order. `(?!')` after a closing quote keeps the engine from stepping back to an
# inner `''` and taking that for the end: the rest of the literal would then be read as SQL, and shown.
_TOKEN = re.compile(
    rf"""
      (?P<blank>    {_SPACE}+ | --[^\r\n]* )
    | (?P<comment>  /\* )
    | (?P<escape>   [eE]'(?:[^'\\]|\\.|'')*'(?!') (?:{_GOES_ON}(?:[^'\\]|\\.|'')*'(?!'))* (?!{_GOES_ON}) )
    | (?P<open_e>   [eE]' )
    | (?P<string>   (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'(?!') )
    | (?P<open_s>   (?:[bBxXnN]|[uU]&)?' )
    | (?P<name>     [uU]&"(?:[^"]|"")*"(?!") | "(?:[^"]|"")*"(?!") )
    | (?P<open_n>   (?:[uU]&)?" )
    | (?P<word>     [A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]* )
    | (?P<dollar>   \$(?:[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_\u0080-\U0010ffff]*)?\$ )
    | (?P<value>    \$[0-9]\w* | {_PLACEHOLDER} | \?(?![+\-*/<>=~!@\#%^&|`?])
                  | (?:[0-9]|\.[0-9])(?:[eE][+-](?=[0-9])|[\w.])* )
    | (?P<cast>     ::|:= )
    | (?P<operator> (?:(?!--|/\*|{_PLACEHOLDER})[+\-*/<>=~!@\#%^&|`?])+ )
    | (?P<other>    . )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_VALUE = "?"
_OPERATOR_MAY_END_IN_SIGN = frozenset("~!@#%^&|`?")
_OPERATOR_CHARACTERS = frozenset("+-*/<>=~!@#%^&|`")
# Words after which a sign belongs to the number, and after which a bracket does not make a function call.
_KEYWORDS = frozenset(
    "all and any array as between by case distinct else end except exists filter from group having in intersect into"
    " is join like limit not offset on or order over partition returning select set some then union using values when"
    " where with within".split()
)
_STANDS_FOR_A_VALUE = frozenset({"null", "default", "true", "false"})
_CLOSING = {"(": ")", "[": "]"}


def _tokens(sql: str) -> list[str]:
    found: list[str] = []
    position, end = 0, len(sql)
    match = _TOKEN.match
    while position < end:
        token = match(sql, position)
        if token is None:  # pragma: no cover - the last alternative takes any character
            break
        kind, position = token.lastgroup, token.end()
        if kind == "blank":
            continue
        if kind == "word":
            found.append(token.group().translate(_LOWER))
        elif kind in ("other", "cast", "name"):
            found.append(token.group())
        elif kind == "operator":
            text = token.group()
            # PostgreSQL 4.1.3: an operator ends in a sign only if it holds one of these; otherwise the sign is its own.
            while len(text) > 1 and text[-1] in "+-" and not _OPERATOR_MAY_END_IN_SIGN.intersection(text):
                text = text[:-1]
            position = token.start() + len(text)
            found.append(text)
        elif kind == "comment":
            position = _end_of_comment(sql, position)
        else:
            if kind == "dollar":
                closing = sql.find(token.group(), position)
                position = end if closing < 0 else closing + len(token.group())
            elif kind in ("open_e", "open_s", "open_n"):
                position = end
            _drop_sign(found)
            found.append(_VALUE)
    return found


def _end_of_comment(sql: str, position: int) -> int:
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, position):
        depth += 1 if edge.group() == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(sql)


def _drop_sign(found: list[str]) -> None:
    # `-1` and `1` are one statement; `a - 1` is another one than `a`.
    while found and found[-1] in ("-", "+"):
        if len(found) > 1:
            before = found[-2]
            if not (before in ("(", ",", "[") or before in _KEYWORDS or before[0] in _OPERATOR_CHARACTERS):
                return
        found.pop()


class _Group:
    """An open bracket while its entries are being collapsed."""

    __slots__ = (
        "collapses",
        "entry_start",
        "is_values_row",
        "previous_entry",
        "start",
        "values_row",
        "values_row_start",
    )

    def __init__(self, start: int, *, collapses: bool, is_values_row: bool) -> None:
        self.start = start
        self.collapses = collapses
        self.is_values_row = is_values_row
        self.entry_start = start + 1
        self.previous_entry: list[str] | None = None
        self.values_row: list[str] | None = None
        self.values_row_start = -1

    def end_entry(self, out: list[str]) -> bool:
        """Drop the entry that ends here if it repeats the one before; say whether it was dropped."""
        entry = out[self.entry_start :]
        if len(entry) == 1 and entry[0] in _STANDS_FOR_A_VALUE:
            entry = out[self.entry_start :] = [_VALUE]
        if entry and entry == self.previous_entry:
            del out[self.entry_start - 1 :]
            return True
        self.previous_entry = entry
        return False


def _collapse(tokens: list[str]) -> list[str]:
    out: list[str] = []
    groups = [_Group(-1, collapses=False, is_values_row=False)]
    for token in tokens:
        group = groups[-1]
        if token in _CLOSING:
            before = out[-1] if out else ""
            row = token == "(" and (
                before == "values"
                or (before == "," and group.values_row is not None and len(out) - 1 == group.values_row_start)
            )
            listed = (token == "(" and before == "in") or (token == "[" and before == "array")
            nested = group.collapses and len(out) == group.entry_start
            if before == "values":
                group.values_row = None
            groups.append(_Group(len(out), collapses=row or listed or nested, is_values_row=row))
            out.append(token)
        elif token == "," and group.collapses:
            group.end_entry(out)
            out.append(token)
            group.entry_start = len(out)
        elif len(groups) > 1 and token == _CLOSING[out[group.start]]:
            if group.collapses:
                group.end_entry(out)
            groups.pop()
            out.append(token)
            if group.is_values_row:
                _end_values_row(groups[-1], group.start, out)
        else:
            out.append(token)
    return out


def _end_values_row(outer: _Group, start: int, out: list[str]) -> None:
    row = out[start:]
    if outer.values_row == row:
        del out[start - 1 :]
    outer.values_row = row
    outer.values_row_start = len(out)


def _spaced(tokens: list[str]) -> str:
    parts: list[str] = []
    before = ""
    for token in tokens:
        if before and not (
            (token in (",", ")", "]", ";", ".", "::") and before != ":")
            or before in ("(", "[", ".", "::")
            or (token == "(" and _is_name(before) and before not in _KEYWORDS)
            or (token == "[" and (_is_name(before) or before == "]"))
        ):
            parts.append(" ")
        parts.append(token)
        before = token
    return "".join(parts)


def _is_name(token: str) -> bool:
    return token[0] in '"_' or token[0].isalpha() or token[0] >= "\u0080"


def normalise(sql: str) -> str:
    """The statement without its values, comments and layout.

    Args:
        sql: any text, SQL or not; with psycopg's placeholders (`%s`, `%(name)s`), the server's (`$1`), or literals.

    Returns:
        The statement with every value as `?` and canonical spacing. Normalising it again changes nothing.
    """
    return _spaced(_collapse(_tokens(sql)))


def fingerprint_of(normalised: str) -> str:
    """Sixteen hexadecimal digits that stand for a normalised statement (BLAKE2b, 8 bytes)."""
    return blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Fingerprints:
    """Fingerprints remembered by the text of the statement.

    Bounded twice: it remembers `capacity` texts (the oldest is forgotten first, and read again if it returns) and
    `capacity` fingerprints; a statement that would need one more is `OTHER`, and counted in `overflowed`.
    It takes no lock: whoever shares one between threads holds theirs.

    Args:
        capacity: how many texts, and how many fingerprints.
    """

    __slots__ = ("_by_text", "capacity", "overflowed", "texts")

    def __init__(self, capacity: int = 5000) -> None:
        self.capacity = capacity
        self.overflowed = 0
        self.texts: dict[str, str] = {}
        """Fingerprint to normalised statement."""
        self._by_text: dict[str, str] = {}

    def of(self, sql: str) -> str:
        """The fingerprint of a statement: 0.1 µs if its text is remembered."""
        found = self._by_text.get(sql)
        return self._read(sql) if found is None else found

    def keep_only(self, fingerprints: set[str]) -> None:
        """Forget every other fingerprint, making room for new ones."""
        self.texts = {key: text for key, text in self.texts.items() if key in fingerprints}
        self._by_text = {sql: key for sql, key in self._by_text.items() if key in self.texts}

    def _read(self, sql: str) -> str:
        # PostgreSQL stores neither NUL nor half of a surrogate pair; a statement with one failed, but is counted.
        text = normalise(sql[:LONGEST_STATEMENT]).replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
        found = fingerprint_of(text)
        if found not in self.texts:
            if len(self.texts) >= self.capacity:
                self.overflowed += 1
                return OTHER
            self.texts[found] = text
        # A text longer than that is not worth its memory: one statement may be megabytes of literals.
        if len(sql) <= LONGEST_STATEMENT:
            if len(self._by_text) >= self.capacity:
                del self._by_text[next(iter(self._by_text))]
            self._by_text[sql] = found
        return found
