from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from ipaddress import ip_address
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data import ConfigurationError
from equitie_data.redaction import (
    CUT,
    LONGEST_TEXT,
    MASK,
    MOST_ENTRIES,
    MOST_VALUES,
    Redaction,
    is_secret,
    on_one_line,
    redacted,
)

SECRET_NAMES = [
    "password",
    "token",
    "secret",
    "api_key",
    "authorization",
    "iban",
    "ssn",
    "card",
    "card_number",
    "client_secret",
    "private_key",
    "access_token",
    "account_number",
    "pin",
    "cvv",
    "passport_number",
    "tax_id",
]


def spellings(name: str) -> list[str]:
    words = name.split("_")
    camel = words[0] + "".join(word.title() for word in words[1:])
    return [
        name,
        name.upper(),
        name.replace("_", "-"),
        name.replace("_", " "),
        name.replace("_", "."),
        camel,
        camel[0].upper() + camel[1:],
        f"user_{name}",
        f"old{camel[0].upper()}{camel[1:]}",
        f"{name}s",
    ]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_name_is_one_in_every_spelling(name: str) -> None:
    for spelling in spellings(name):
        assert is_secret(spelling), spelling


@pytest.mark.parametrize(
    "name",
    [
        "accesstoken",
        "dbpassword",
        "passwordHash",
        "APIKey",
        "apikey",
        "X-Api-Key",
        "creditcards",
        "JWT",
        "DATABASE_URL",
    ],
)
def test_words_written_together_are_recognised(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "amount",
        "discard",
        "secretary",
        "company_name",
        "spinning",
        "status",
        "author",
        "deal_id",
        "key",
        "panel",
        "currency",
        "",
    ],
)
def test_an_innocent_name_is_left_alone(name: str) -> None:
    assert not is_secret(name)


def test_an_application_adds_names_of_its_own() -> None:
    assert is_secret("NetWorth", also=["net_worth"])
    assert not is_secret("net", also=["net_worth"])
    assert redacted({"netWorth": 5, "net": 5}, also=["NET-WORTH"]) == {"netWorth": MASK, "net": 5}


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.decimals()
    | st.binary()
    | st.uuids(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(_json)
def test_whatever_goes_in_postgresql_takes_what_comes_out(value: Any) -> None:
    written = json.dumps(redacted(value), allow_nan=False, ensure_ascii=False)
    written.encode()  # half of a surrogate pair has no UTF-8
    assert "\\u0000" not in written.replace("\\\\", "")


@given(_json)
def test_redacting_again_changes_nothing(value: Any) -> None:
    once = redacted(value)
    assert redacted(once) == once


@given(st.sampled_from(SECRET_NAMES), st.integers(min_value=0, max_value=5), st.sampled_from(["dict", "list"]))
def test_no_depth_hides_a_secret(name: str, depth: int, container: str) -> None:
    value: Any = {name: "kanarie", "beside": {name: ["kanarie"], "deeper": [{name: {"a": "kanarie"}}]}}
    for _ in range(depth):
        value = {"inner": value} if container == "dict" else [value]
    written = json.dumps(redacted(value))
    assert "kanarie" not in written
    assert MASK in written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://app:hunter2@db/equitie", "postgresql://app:***@db/equitie"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("got eyJhbGciOi.eyJzdWIiOi.c2ln back", "got *** back"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "***"),
        ("host=db password=hunter2 dbname=x", "host=db password=*** dbname=x"),
        ("host=db password='hun ter2' dbname=x", "host=db password=*** dbname=x"),
        ("https://example.com:8443/path", "https://example.com:8443/path"),
        ("the bearer of this", "the bearer of this"),
    ],
)
def test_a_secret_inside_a_text_is_masked(text: str, expected: str) -> None:
    assert redacted({"note": text}) == {"note": expected}


class Colour(Enum):
    RED = "red"


@attrs.frozen
class Point:
    x: int
    token: str


@dataclass
class Pair:
    left: Decimal
    pin: int


def test_types_json_lacks() -> None:
    zone = timezone.utc
    assert redacted(
        {
            "decimal": Decimal("1.10"),
            "uuid": UUID(int=1),
            "date": date(2013, 2, 1),
            "datetime": datetime(2013, 2, 1, 3, 4, 5, 6, tzinfo=zone),
            "time": time(1, 2),
            "interval": timedelta(minutes=1.5),
            "enum": Colour.RED,
            Colour.RED: 1,
            "bytes": b"abc",
            "nan": float("nan"),
            "infinite": Decimal("-Infinity"),
            "set": {3, 1, 2},
            "tuple": (1, None, True),
            "attrs": Point(1, "t"),
            "dataclass": Pair(Decimal(2), 1234),
            "address": ip_address("203.0.113.9"),
            "path": PurePosixPath("a/b"),
            7: "seven",
            "object": object(),
            "missing_token": None,
        }
    ) == {
        "decimal": "1.10",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "date": "2013-02-01",
        "datetime": "2013-02-01T03:04:05.000006+00:00",
        "time": "01:02:00",
        "interval": 90.0,
        "enum": "red",
        "red": 1,
        "bytes": "[3 bytes]",
        "nan": "nan",
        "infinite": "-Infinity",
        "set": [1, 2, 3],
        "tuple": [1, None, True],
        "attrs": {"x": 1, "token": MASK},
        "dataclass": {"left": "2", "pin": MASK},
        "address": "203.0.113.9",
        "path": "a/b",
        "7": "seven",
        "object": "[object]",
        "missing_token": None,
    }


def test_an_object_of_an_unknown_class_never_speaks_for_itself() -> None:
    class Connection:
        def __repr__(self) -> str:
            return "password=kanarie"

        __str__ = __repr__

    assert "kanarie" not in json.dumps(redacted({"c": Connection(), "d": [Connection()]}))


def test_huge_values_are_cut_visibly() -> None:
    text: Any = redacted({"a": "x" * 1_000_000})
    assert text["a"] == "x" * LONGEST_TEXT + CUT
    many: Any = redacted(list(range(10_000)))
    assert len(many) == MOST_ENTRIES + 1
    assert many[-1] == CUT
    wide: Any = redacted({f"k{n}": n for n in range(10_000)})
    assert wide[CUT] == 10_000 - MOST_ENTRIES
    nested: Any = redacted([[[n] * 100 for n in range(100)] for _ in range(100)])
    assert len(json.dumps(nested)) < 20 * MOST_VALUES
    assert redacted(2**5000) == CUT


def test_a_secret_does_not_escape_at_the_cut() -> None:
    text = "x" * (LONGEST_TEXT - 30) + " postgresql://app:" + "h" * 40 + "@db/x"
    assert "hhh" not in json.dumps(redacted(text))


def test_a_structure_that_holds_itself_ends() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    assert CUT in json.dumps(redacted(loop))


def test_text_postgresql_cannot_store_is_replaced() -> None:
    assert redacted("a\x00b\ud800c") == "a\ufffdb\ufffdc"


def test_what_was_passed_is_left_as_it_was() -> None:
    value = {"password": "p", "list": [{"token": "t"}]}
    redacted(value)
    assert value == {"password": "p", "list": [{"token": "t"}]}


def test_a_secret_name_masks_the_whole_value() -> None:
    assert redacted({"a": 1}, name="apiKey") == MASK
    assert redacted(None, name="apiKey") is None


# --- the policy ---------------------------------------------------------------------------------------------------


def test_a_policy_adds_names_forms_and_hashes() -> None:
    policy = Redaction(secret_names="net worth", patterns=r"\bDE\d{20}\b", hashed_names=["taxId"], salt=b"s" * 16)
    seen = policy.mapping({"NetWorth": 7, "note": "from DE02120300000000202051.", "tax_id": "12/345", "password": "x"})
    assert seen == {"NetWorth": MASK, "note": f"from {MASK}.", "tax_id": policy.hashed("12/345"), "password": MASK}
    # A name that is secret by itself may be hashed instead, where somebody has to join by it.
    assert policy.is_hashed("tax_id")
    assert not policy.is_secret("tax_id")
    assert policy.and_secret(["iq"]).value({"IQ": 1, "netWorth": 2}) == {"IQ": MASK, "netWorth": MASK}
    assert policy.value(None, name="tax_id") is None
    assert policy.value("x", name="net-worth") == MASK


@given(st.text(), st.text())
def test_hashes_are_equal_for_equal_values_alone(one: str, other: str) -> None:
    policy = Redaction(hashed_names=["a"], salt=b"0123456789abcdef")
    assert (policy.hashed(one) == policy.hashed(other)) == (one == other)


def test_a_hashed_user_is_a_user_id_still() -> None:
    policy = Redaction(hashed_names=["user_id"], salt=b"0123456789abcdef")
    user = UUID("6f1e0e8a-0000-4000-8000-000000000001")
    assert policy.hashed_uuid(user) == policy.hashed_uuid(user) != user
    assert policy.hashed_uuid(user).version == 8
    assert policy.log_field("user_id", user) == policy.hashed(user)


@pytest.mark.parametrize("salt", [b"", b"short"])
def test_hashes_that_could_be_tried_out_are_refused(salt: bytes) -> None:
    with pytest.raises(ConfigurationError, match="salt of 16 bytes") as caught:
        Redaction(hashed_names=["a"], salt=salt)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["(", "[a-", 7])
def test_a_pattern_that_is_none_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigurationError, match="regular expressions"):
        Redaction(patterns=[pattern])


@pytest.mark.parametrize(
    "key",
    ["AKIA" + "A1B2" * 4, "ghp_" + "a1" * 18, "xoxb-1234567890-abc", "sk_live_" + "a1" * 8, "sb_secret_" + "a1" * 8],
)
def test_keys_with_a_form_of_their_own_are_masked_in_any_text(key: str) -> None:
    assert redacted(f"see {key}, please") == f"see {MASK}, please"


def test_a_field_of_a_log_is_one_line_and_numbers_stay_numbers() -> None:
    policy = Redaction()
    assert policy.log_field("n", 7) == 7
    assert policy.log_field("seconds", 0.5) == 0.5
    assert policy.log_field("name", "a\nb\x1b[2J") == "a\\nb\\x1b[2J"
    assert policy.log_field("api_key", "x") == MASK
    assert policy.log_field("nothing", None) is None
    assert on_one_line("a\u2028b\u202ec\ud800") == "a\\u2028b\\u202ec\\ud800"
    assert on_one_line("plain ünïcode") == "plain ünïcode"


def test_a_policy_shows_no_salt() -> None:
    assert "0123456789abcdef" not in repr(Redaction(hashed_names=["a"], salt=b"0123456789abcdef"))
