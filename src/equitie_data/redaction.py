"""What may be written down: secrets masked, everything else JSON, nothing huge.

A field is secret by its name, whatever its case and word separators: `Password`, `api-key`, `clientSecret` and
`CARD_NUMBER` all are. A secret inside an innocent field is masked where its form gives it away: the password of a URL,
a bearer token, a JSON web token, a private key.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from pathlib import PurePath
from typing import Any, TypeAlias, cast
from uuid import UUID

import attrs

__all__ = [
    "CUT",
    "DEEPEST",
    "LONGEST_TEXT",
    "MASK",
    "MOST_ENTRIES",
    "MOST_VALUES",
    "JsonValue",
    "is_secret",
    "redacted",
    "redacted_mapping",
]

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"

MASK = "***"
"""Stands for a secret."""

CUT = "[cut]"
"""Stands for what was beyond a limit."""

LONGEST_TEXT = 4096
"""Characters of one string."""

MOST_ENTRIES = 500
"""Entries of one mapping or list."""

MOST_VALUES = 2000
"""Values of the whole."""

DEEPEST = 12
"""Levels of nesting."""

# Secret as a word of the name: `card` masks `card_number`, and leaves `discard` alone.
_SECRET_WORDS = frozenset(
    "auth authorization authorisation bearer bic card cookie credential creditcard csrf cvc cvv dsn iban jwt mfa nonce"
    " otp pan passcode passphrase passport passwd password pin privatekey pwd salt secret ssn token totp xsrf".split()
)
# Secret as neighbouring words, or written as one.
_SECRET_COMPOUNDS = frozenset(
    "accesskey accountno accountnumber apikey bankaccount cardno cardnumber connectionstring databaseurl encryptionkey"
    " driverlicence driverlicense nationalid privatekey recoverycode routingnumber secretkey securitycode sessionkey"
    " signingkey socialsecurity sortcode swiftcode taxid taxnumber".split()
)
# Secret wherever they stand in a word nobody separated: `dbpassword`, `passwordhash`, `accesstoken`.
_SECRET_PARTS = re.compile(
    r"password|passwd|passphrase|apikey|privatekey|secretkey|credential|creditcard|secret$|token$"
)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_A-Za-z]+")
_SECRET_VALUE = re.compile(
    r"(?P<url>\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s:/@]*:)[^\s@/]+(?=@)"
    r"|(?P<scheme>\b(?:[Bb]earer|[Bb]asic) +)[A-Za-z0-9._~+/=-]{8,}"
    r"|\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?P<keyword>\b(?i:password|passwd|pwd|secret|token|api_?key) *[=:] *)(?:'[^']*'|[^\s'&,;]+)",
    re.DOTALL,
)
# PostgreSQL's jsonb stores neither NUL nor half of a surrogate pair; one of them would have the whole batch refused.
_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


@lru_cache(maxsize=4096)
def _is_secret(name: str, also: frozenset[str]) -> bool:
    words = [_singular(word.lower()) for word in _WORD.findall(name[:200])]
    squashed = "".join(words)
    if squashed in also or not also.isdisjoint(words):
        return True
    return (
        not _SECRET_WORDS.isdisjoint(words)
        or squashed in _SECRET_COMPOUNDS
        or any(first + second in _SECRET_COMPOUNDS for first, second in pairwise(words))
        or any(word in _SECRET_COMPOUNDS or _SECRET_PARTS.search(word) for word in words)
    )


def _squashed(names: Iterable[str]) -> frozenset[str]:
    return frozenset("".join(_singular(word.lower()) for word in _WORD.findall(name)) for name in names)


def is_secret(name: str, also: Collection[str] = ()) -> bool:
    """Whether a field's value must be masked.

    Args:
        name: the field's name, in any case and with any word separator.
        also: names that are secret besides the built-in ones, written in any way.
    """
    return _is_secret(name, _squashed(also))


class _Redaction:
    __slots__ = ("also", "values_left")

    def __init__(self, also: frozenset[str]) -> None:
        self.also = also
        self.values_left = MOST_VALUES

    def of(self, value: object, depth: int) -> JsonValue:
        self.values_left -= 1
        if self.values_left < 0 or depth > DEEPEST:
            return CUT
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Enum):
            return self.of(value.value, depth + 1)
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, int):
            # Longer than that is no quantity, and Python refuses to write out more than 4,300 digits.
            return int(value) if value.bit_length() <= 1024 else CUT
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, (list, tuple, AbstractSet)):
            return self._list(value, depth)
        cls: type[Any] = type(value)
        if attrs.has(cls):
            return self._mapping({field.name: getattr(value, field.name) for field in attrs.fields(cls)}, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._mapping({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, depth)
        return _scalar(value)

    def _mapping(self, mapping: Mapping[Any, object], depth: int) -> JsonValue:
        entries: dict[str, JsonValue] = {}
        for key, value in mapping.items():
            if len(entries) >= MOST_ENTRIES or self.values_left <= 0:
                entries[CUT] = len(mapping) - len(entries)
                break
            name = _text(key) if type(key) is str else str(_scalar(key.value if isinstance(key, Enum) else key))
            if _is_secret(name, self.also):
                self.values_left -= 1
                # Nothing there is a fact worth keeping, and no secret.
                entries[name] = None if value is None else MASK
            else:
                entries[name] = self.of(value, depth + 1)
        return entries

    def _list(self, values: Collection[object], depth: int) -> JsonValue:
        entries: list[JsonValue] = []
        for value in values:
            if len(entries) >= MOST_ENTRIES or self.values_left <= 0:
                entries.append(CUT)
                break
            entries.append(self.of(value, depth + 1))
        return sorted(entries, key=str) if isinstance(values, AbstractSet) else entries


def _text(value: str) -> str:
    # Masked before it is cut: half a secret at the cut would no longer look like one.
    text = _SECRET_VALUE.sub(_masked, str(value[: 2 * LONGEST_TEXT]))
    if not text.isascii() or "\x00" in text:
        text = _NOT_STORABLE.sub("\ufffd", text)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + CUT


def _masked(match: re.Match[str]) -> str:
    return (match["url"] or match["scheme"] or match["keyword"] or "") + MASK


def _scalar(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    # A string, because a JSON number loses the cents in most readers.
    if isinstance(value, (Decimal, UUID)):
        return str(value)[:LONGEST_TEXT]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"[{memoryview(value).nbytes} bytes]"
    if isinstance(value, (IPv4Address, IPv6Address, IPv4Network, IPv6Network, PurePath)):
        return _text(str(value))
    # An object's own text may hold anything, a password included.
    return f"[{type(value).__qualname__}]"


def redacted(value: object, *, name: str | None = None, also: Collection[str] = ()) -> JsonValue:
    """A copy of a value that may be written to a log: JSON-safe, bounded, without secrets.

    Args:
        value: mappings, lists, attrs and data classes, nested; numbers, text, dates, UUIDs, enumerations, bytes.
        name: the field the value belongs to, if it has one; a secret name masks all of it.
        also: names that are secret besides the built-in ones.

    Returns:
        A new structure `json.dumps` takes and PostgreSQL's `jsonb` stores. A decimal is a string, an interval its
        seconds, bytes only their number, an object of an unknown class its class; beyond a limit of this module stands
        `CUT`.
    """
    secret_names = _squashed(also)
    if name is not None and value is not None and _is_secret(name, secret_names):
        return MASK
    return _Redaction(secret_names).of(value, 0)


def redacted_mapping(mapping: Mapping[Any, object], *, also: Collection[str] = ()) -> dict[str, JsonValue]:
    """`redacted` of a mapping."""
    return cast("dict[str, JsonValue]", redacted(dict(mapping), also=also))
