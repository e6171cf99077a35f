"""Results of idempotent writes as JSON and back, exactly.

JSON alone knows no tuple, Decimal, UUID, date or bytes. Each is written as an object with the single key ``"$"``
and its parts, and a mapping that has such a key itself is wrapped too, so that what comes back is what went in.
Nothing else is accepted: no pickle, whose reader runs what the writer likes.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

__all__ = ["NotStorable", "dumps", "loads"]

_LIMIT: Final = 1_000_000  # characters; a result is a receipt, not a report


class NotStorable(Exception):  # noqa: N818 - a signal between two modules, not an error
    """The value cannot be written as JSON and read back the same."""


def dumps(value: Any) -> str:
    """Return the value as JSON text.

    Raises:
        NotStorable: It holds something that would not come back the same, or is longer than a million characters.
    """
    try:
        text = json.dumps(_encoded(value), allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise NotStorable from None
    if len(text) > _LIMIT or "\\u0000" in text:
        raise NotStorable
    return text


def loads(text: str) -> Any:
    """Return the value that `dumps` wrote."""
    return _decoded(json.loads(text))


def _encoded(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_encoded(item) for item in value]
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise NotStorable
        plain = {key: _encoded(item) for key, item in value.items()}
        return {"$": ["dict", plain]} if "$" in plain else plain
    if kind is tuple:
        return {"$": ["tuple", [_encoded(item) for item in value]]}
    if kind in (Decimal, UUID):
        return {"$": [kind.__name__, str(value)]}
    if kind in (dt.date, dt.time, dt.datetime):
        text = value.isoformat()
        # A named zone would come back as its offset.
        if kind is not dt.date and value.tzinfo is not None and not isinstance(value.tzinfo, dt.timezone):
            return _zoned(value)
        return {"$": [kind.__name__, text]}
    if kind is dt.timedelta:
        return {"$": ["timedelta", [value.days, value.seconds, value.microseconds]]}
    if kind is bytes:
        return {"$": ["bytes", base64.b64encode(value).decode()]}
    raise NotStorable


def _zoned(value: Any) -> Any:
    key = getattr(value.tzinfo, "key", None)
    if not isinstance(value, dt.datetime) or not isinstance(key, str):
        raise NotStorable
    return {"$": ["zoned", [value.replace(tzinfo=None).isoformat(), value.fold, key]]}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"$"}:
        return {key: _decoded(item) for key, item in value.items()}
    kind, content = value["$"]
    if kind == "dict":
        return {key: _decoded(item) for key, item in content.items()}
    if kind == "tuple":
        return tuple(_decoded(item) for item in content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "timedelta":
        return dt.timedelta(*content)
    if kind == "zoned":
        from zoneinfo import ZoneInfo  # noqa: PLC0415 - reads files, and only here

        return dt.datetime.fromisoformat(content[0]).replace(tzinfo=ZoneInfo(content[2]), fold=content[1])
    if kind == "datetime":
        return dt.datetime.fromisoformat(content)
    if kind == "date":
        return dt.date.fromisoformat(content)
    if kind == "time":
        return dt.time.fromisoformat(content)
    return Decimal(content) if kind == "Decimal" else UUID(content)
