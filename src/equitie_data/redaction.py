"""What may be written down: secrets masked, everything else JSON, nothing huge.

One policy, a `Redaction`, decides for the audit log, the monitor, the logs and the messages of errors. A field is
secret by its name, whatever its case and word separators: `Password`, `api-key`, `clientSecret` and `CARD_NUMBER` all
are. A secret inside an innocent field is masked where its form gives it away: the password of a URL, a bearer token, a
JSON web token, a private key. An application adds names and forms of its own, and may have fields hashed with a salt
instead, where a reader must still see that two of them are equal.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
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
from typing import Any, Final, TypeAlias, cast
from uuid import UUID

import attrs

from equitie_data.errors import ConfigurationError

__all__ = [
    "CUT",
    "DEEPEST",
    "DEFAULT",
    "LONGEST_TEXT",
    "MASK",
    "MOST_ENTRIES",
    "MOST_VALUES",
    "JsonValue",
    "Redaction",
    "is_secret",
    "on_one_line",
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
    # Keys whose makers gave them a form of their own, so that they can be found: AWS, GitHub, Slack, Stripe, Supabase.
    r"|\b(?:A[KS]IA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{10,}|sb_secret_[A-Za-z0-9_-]{10,}|sbp_[a-f0-9]{20,})"
    r"|(?P<keyword>\b(?i:password|passwd|pwd|secret|token|api_?key) *[=:] *)(?:'[^']*'|[^\s'&,;]+)",
    re.DOTALL,
)
# PostgreSQL's jsonb stores neither NUL nor half of a surrogate pair; one of them would have the whole batch refused.
_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
# What starts a new line in some reader, moves a terminal's cursor, or turns the direction of writing.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORTEST_SALT: Final = 16  # bytes


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _words(name: str) -> list[str]:
    return [_singular(word.lower()) for word in _WORD.findall(name[:200])]


@lru_cache(maxsize=4096)
def _is_named(name: str, names: frozenset[str]) -> bool:
    words = _words(name)
    return "".join(words) in names or not names.isdisjoint(words)


@lru_cache(maxsize=4096)
def _is_secret(name: str, also: frozenset[str]) -> bool:
    words = _words(name)
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


def _names(values: Iterable[str]) -> frozenset[str]:
    return _squashed([values] if isinstance(values, str) else values)


def _compiled(values: Iterable[str | re.Pattern[str]]) -> tuple[re.Pattern[str], ...]:
    try:
        return tuple(re.compile(value) for value in ([values] if isinstance(values, str) else values))
    except (re.error, TypeError):
        raise ConfigurationError("Redaction: patterns must be regular expressions.") from None


@attrs.frozen(kw_only=True)
class Redaction:
    """What must not be written down, and what stands in its place.

    The built-in names and forms are always covered; a policy adds to them.

    Attributes:
        secret_names: Fields whose values are masked, written in any case and with any word separator.
        patterns: Regular expressions; what they match in any text is masked.
        hashed_names: Fields whose values are replaced by a salted hash: equal values have equal hashes, so that
            they can be joined and counted. It goes before ``secret_names``.
        salt: The key of the hash, 16 bytes or more; without it nobody can try values out. Keep it as a password.

    Raises:
        ConfigurationError: ``hashed_names`` without a ``salt`` that long, or a pattern that is none.
    """

    secret_names: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    patterns: tuple[re.Pattern[str], ...] = attrs.field(default=(), converter=_compiled)
    hashed_names: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    salt: bytes = attrs.field(default=b"", repr=False)

    def __attrs_post_init__(self) -> None:
        if self.hashed_names and len(self.salt) < _SHORTEST_SALT:
            raise ConfigurationError(
                f"Redaction: hashed_names need a salt of {_SHORTEST_SALT} bytes or more, kept as a password is."
            )

    def and_secret(self, names: Iterable[str]) -> Redaction:
        """Return this policy with more secret names."""
        return attrs.evolve(self, secret_names=self.secret_names | _names(names))

    def is_secret(self, name: str) -> bool:
        """Whether a field's value must be masked."""
        return _is_secret(name, self.secret_names) and not self.is_hashed(name)

    def is_hashed(self, name: str) -> bool:
        """Whether a field's value must be replaced by its hash."""
        return bool(self.hashed_names) and _is_named(name, self.hashed_names)

    def covers(self, name: str) -> bool:
        """Whether a field's value must not be written down as it is."""
        return _is_secret(name, self.secret_names) or self.is_hashed(name)

    def cover(self, name: str, value: object) -> str | None:
        """Return what stands for the value of a field that `covers` names."""
        if value is None:
            return None  # nothing there is a fact worth keeping, and no secret
        return self.hashed(value) if self.is_hashed(name) else MASK

    def hashed(self, value: object) -> str:
        """Return a value's salted hash, 128 bits of HMAC-SHA-256 in hexadecimal; equal texts have equal hashes."""
        return self._digest(value).hex()

    def hashed_uuid(self, value: UUID) -> UUID:
        """Return the same as a UUID of version 8, for columns that take nothing else."""
        bits = int.from_bytes(self._digest(value), "big")
        return UUID(int=bits & ~(0xF << 76) & ~(0x3 << 62) | 0x8 << 76 | 0x2 << 62)

    def _digest(self, value: object) -> bytes:
        return hmac.new(self.salt, str(value).encode("utf-8", "surrogatepass"), hashlib.sha256).digest()[:16]

    def text(self, value: str) -> str:
        """Return a text with the secrets in it masked, storable and of bounded length."""
        # Masked before it is cut: half a secret at the cut would no longer look like one.
        text = _SECRET_VALUE.sub(_masked, str(value[: 2 * LONGEST_TEXT]))
        for pattern in self.patterns:
            text = pattern.sub(MASK, text)
        if not text.isascii() or "\x00" in text:
            text = _NOT_STORABLE.sub("\ufffd", text)
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + CUT

    def value(self, value: object, *, name: str | None = None) -> JsonValue:
        """Return a copy of a value that may be written down; see `redacted`."""
        if name is not None and self.covers(name):
            return self.cover(name, value)
        return _Walk(self).of(value, 0)

    def mapping(self, mapping: Mapping[Any, object]) -> dict[str, JsonValue]:
        """Return `value` of a mapping."""
        return cast("dict[str, JsonValue]", self.value(dict(mapping)))

    def log_field(self, name: str, value: object) -> object:
        """Return a field of a log event: a text on one line, a number as it is, everything else as in `value`."""
        if self.covers(name):
            return self.cover(name, value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        safe = self.value(value)
        return on_one_line(safe) if isinstance(safe, str) else safe


def on_one_line(text: str) -> str:
    """Return a text with everything spelled out that would start a line or steer a terminal.

    A line break in somebody's name must not become a second line of a log, nor an escape sequence a command to the
    terminal that shows it.
    """
    return _STEERING.sub(_spelled_out, text)


def _spelled_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


class _Walk:
    """One value on its way through a policy, and how much of it may still be taken."""

    __slots__ = ("policy", "values_left")

    def __init__(self, policy: Redaction) -> None:
        self.policy = policy
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
            return self.policy.text(value)
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
        return _scalar(value, self.policy)

    def _mapping(self, mapping: Mapping[Any, object], depth: int) -> JsonValue:
        entries: dict[str, JsonValue] = {}
        for key, value in mapping.items():
            if len(entries) >= MOST_ENTRIES or self.values_left <= 0:
                entries[CUT] = len(mapping) - len(entries)
                break
            if type(key) is str:
                name = self.policy.text(key)
            else:
                name = str(_scalar(key.value if isinstance(key, Enum) else key, self.policy))
            if self.policy.covers(name):
                self.values_left -= 1
                entries[name] = self.policy.cover(name, value)
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


def _masked(match: re.Match[str]) -> str:
    return (match["url"] or match["scheme"] or match["keyword"] or "") + MASK


def _scalar(value: object, policy: Redaction) -> str | int | float | bool | None:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return policy.text(value)
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
        return policy.text(str(value))
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
    return (Redaction(secret_names=frozenset(also)) if also else DEFAULT).value(value, name=name)


def redacted_mapping(mapping: Mapping[Any, object], *, also: Collection[str] = ()) -> dict[str, JsonValue]:
    """`redacted` of a mapping."""
    return cast("dict[str, JsonValue]", redacted(dict(mapping), also=also))


DEFAULT: Final = Redaction()
"""The built-in policy."""
