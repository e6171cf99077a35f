"""Random old worlds, with everything that can be wrong in them, against a model that knows nothing of the code."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections import Counter, defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from equitie_data import legacy
from equitie_data.errors import LegacyError

if TYPE_CHECKING:
    from equitie_data.embedded import EmbeddedServer
    from equitie_data.testing import DatabaseTemplate

DEFINITIONS = """
CREATE SCHEMA core;
CREATE TABLE public."deals.deal" (deal_id integer, deal_name text);
CREATE TABLE public."investors.investor" (id integer, investor_id integer, full_name text, founding text);
CREATE TABLE public."transactions.transaction.primary" (
  transaction_id text, deal_id integer, investor_id integer, transaction_date text, status text, amount text,
  currency text, nominee boolean, notes text
);
CREATE TABLE public.transactions (
  transaction_id integer, deal_id integer, investor_id integer, transaction_date date, status text, amount numeric,
  updated_at timestamptz
);
CREATE TABLE core.transactions (
  transaction_id bigint, deal_id bigint, investor_id bigint, transaction_date timestamp, amount double precision
);
CREATE TABLE public."transactions.transaction.subnominee" (
  subnominee_id integer, sub_nominee_investor_link text, transaction text, gross_capital_subnominee text
);
"""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
STATUSES = ("pending", "completed", "cancelled", "failed")
CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD")

small_ids = st.integers(1, 5)
EXAMPLES = int(os.environ.get("EQUITIE_LEGACY_EXAMPLES", "12"))

id_texts = st.sampled_from(["1", "2", " 3 ", "4.0", "5", "x", "", "-7", "0"]) | st.none()


def mostly(good: list[Any], bad: list[Any]) -> st.SearchStrategy[Any]:
    """Good values, which agree with each other often, and now and then a bad one."""
    return st.sampled_from([*good] * (1 + 6 * len(bad) // len(good)) + bad)


references = mostly([1, 1, 2, 3], [9, None])
date_texts = mostly(["2024-05-06", "2024-5-6", "2019-01-31T10:00"], ["2024-02-30", "0999-12-31", "06/05/2024", " "])
amount_texts = mostly(["100", " 100.00 ", "1e2", "1,000"], ["1.000,5", "NaN", "", "-3.5", "12,34"])
status_texts = mostly(["completed", " Completed", "", None], ["PENDING", "lost"])
currencies = mostly(["USD", "usd ", None], ["XXX", "EUR"])
dates = mostly([dt.date(2024, 5, 6), dt.date(2019, 1, 31)], [dt.date(2030, 1, 1), None])
names = st.sampled_from(["Ann", "ann ", "Bob", "Bob", "Cyd  Doe", "cyd doe", "", None])


@attrs.frozen
class Old:
    """Rows of the old tables, in order."""

    deals: list[Any]
    investors: list[Any]
    primary: list[Any]
    public: list[Any]
    core: list[Any]
    subnominee: list[Any]


primary_rows = st.tuples(
    id_texts, references, references, date_texts, status_texts, amount_texts, currencies, st.booleans() | st.none()
)
public_rows = st.tuples(
    small_ids | st.none(), references, references, dates, status_texts, mostly([100, 1000], [Decimal("-3.5"), None]),
    st.sampled_from([dt.datetime(2024, 1, day, tzinfo=dt.timezone.utc) for day in (1, 2, 3)]),
)  # fmt: skip
core_rows = st.tuples(
    small_ids, references, references, dates, mostly([100.0, 1000.0], [float("nan"), float("inf"), None])
)
worlds = st.builds(
    Old,
    deals=st.lists(st.tuples(small_ids, st.sampled_from(["One", "Two", None])), max_size=3).map(
        lambda more: [(1, "One"), (2, "Two"), *more]
    ),
    investors=st.lists(st.tuples(small_ids, names), max_size=4).map(
        lambda more: [(1, "Ann"), (3, "Bob"), (2, "Cyd  Doe"), *more]
    ),
    primary=st.lists(primary_rows, max_size=8),
    public=st.lists(public_rows, max_size=5),
    core=st.lists(core_rows, max_size=4),
    subnominee=st.lists(
        st.tuples(
            small_ids | st.none(),
            mostly(["Ann", "BOB", "cyd doe", "1"], ["Nobody", "9", " ", None]),
            mostly(["1", "2", "3", "5"], ["77", "y", None]),
            amount_texts,
        ),
        max_size=5,
    ),
)

# --- the model ------------------------------------------------------------------------------------------------------


def number(text: str | None) -> Decimal | None:
    text = (text or "").strip()
    if NUMBER.fullmatch(text) or GROUPED.fullmatch(text):
        return Decimal(text.replace(",", ""))
    return None


def day(text: str | None) -> dt.date | None:
    match = re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})([T ]\d{2}:\d{2}.*)?", (text or "").strip())
    try:
        found = dt.date(*map(int, match.groups()[:3])) if match else None
    except ValueError:
        return None
    return found if found and found >= dt.date(1000, 1, 1) else None


def name(text: str | None) -> str | None:
    return " ".join((text or "").split()).lower() or None


def winners(rows: list[tuple[Any, ...]], rule: str) -> dict[int, list[tuple[Any, ...]]]:
    """Rows (key, stamp, content by column) by key, the one that is taken first."""
    groups: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        groups[row[0]].append(row)
    for group in groups.values():
        if conflicting(group):
            # Who does not say when it changed gives way to who does.
            sign = -1 if rule == "latest" else 1
            group.sort(key=lambda row: sign * row[1].timestamp() if row[1] else float("inf"))
    return groups


def conflicting(group: list[tuple[Any, ...]]) -> bool:
    return any(not agrees(a[2], b[2]) for a in group for b in group)


def agrees(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[column] == b[column] for column in a.keys() & b.keys())


@attrs.define
class Expected:
    clean: dict[tuple[str, int], dict[str, Any]] = attrs.field(factory=dict)
    rejected: Counter[str] = attrs.field(factory=Counter)
    losers: Counter[str] = attrs.field(factory=Counter)
    conflict: bool = False


def expect(old: Old, rule: str) -> Expected:
    expected = Expected()

    def settle(kind: str, rows: list[tuple[Any, ...]]) -> dict[int, dict[str, Any]]:
        chosen = {}
        for key, group in winners(rows, rule).items():
            best = group[0][2]
            expected.conflict |= conflicting(group)
            expected.losers[kind] += sum(not agrees(row[2], best) for row in group)
            merged = dict(best)
            for row in sorted(group, key=lambda row: row[3]):
                merged = {**row[2], **merged}
            chosen[key] = merged
            expected.clean[kind, key] = merged
        return chosen

    def taken(kind: str, rows: list[Any]) -> list[tuple[Any, ...]]:
        good = [row for row in rows if row is not None]
        expected.rejected[kind] += len(rows) - len(good)
        return good

    deals = settle(
        "deal", taken("deal", [(key, None, {"name": label}, 0) if label else None for key, label in old.deals])
    )
    people = settle(
        "investor",
        taken(
            "investor",
            [(key, None, {"name": label.strip()}, 0) if name(label) else None for key, label in old.investors],
        ),
    )
    by_name: dict[str | None, set[int]] = defaultdict(set)
    for key, content in people.items():
        by_name[name(content["name"])].add(key)

    def transaction(row: tuple[Any, ...], amount: Any, said: str, stamp: Any, rank: int, **more: Any) -> Any:
        key, deal, investor, on = row
        whole = key is not None and key == int(key)
        if not whole or deal not in deals or investor not in people or on is None or amount is None:
            return None
        if not amount.is_finite() or said not in STATUSES:
            return None
        content = {"deal": deal, "investor": investor, "date": on, "amount": amount, **more}
        return (int(key), stamp, content, rank)

    rows: list[Any] = []
    for key, deal, investor, on, status, amount, currency, nominee in old.primary:
        said = (status or "").strip().lower() or "completed"
        cur = (currency or "").strip().upper() or "USD"
        row = transaction(
            (number(key), deal, investor, day(on)), number(amount), said, None, 0,
            status=said, currency=cur, nominee=nominee,
        )  # fmt: skip
        rows.append(row if cur in CURRENCIES else None)
    for key, deal, investor, on, status, amount, stamp in old.public:
        said = (status or "").strip().lower() or "completed"
        money = None if amount is None else Decimal(amount)
        rows.append(transaction((key, deal, investor, on), money, said, stamp, 1, status=said))
    for key, deal, investor, on, amount in old.core:
        money = None if amount is None else Decimal(str(amount))
        rows.append(transaction((key, deal, investor, on), money, "completed", None, 2))
    primaries = settle("primary", taken("primary", rows))

    subs: list[Any] = []
    for key, link, parent, amount in old.subnominee:
        text = (link or "").strip()
        if text.isdigit():
            investor = int(text) if int(text) in people else None
        else:
            known = by_name.get(name(text), set()) if text else set()
            investor = next(iter(known)) if len(known) == 1 else None
        number_of_parent = number(parent)
        of = primaries.get(int(number_of_parent)) if number_of_parent is not None else None
        if key is None or investor is None or of is None or number(amount) is None:
            subs.append(None)
        else:
            money = number(amount)
            content = {
                "deal": of["deal"],
                "investor": investor,
                "date": of["date"],
                "amount": money,
                "link": link,
                "parent": parent,
            }
            subs.append((key, None, content, 0))
    settle("subnominee", taken("subnominee", subs))
    return expected


# --- the worlds -----------------------------------------------------------------------------------------------------


def make(conn: psycopg.Connection[Any], old: Old) -> None:
    conn.execute(DEFINITIONS.encode())
    insert = {
        "deals.deal": ("deal_id, deal_name", old.deals),
        "investors.investor": ("investor_id, full_name, id", [(*row, row[0]) for row in old.investors]),
        "transactions.transaction.primary": (
            "transaction_id, deal_id, investor_id, transaction_date, status, amount, currency, nominee", old.primary,
        ),
        "transactions": (
            "transaction_id, deal_id, investor_id, transaction_date, status, amount, updated_at", old.public,
        ),
        "transactions.transaction.subnominee": (
            "subnominee_id, sub_nominee_investor_link, transaction, gross_capital_subnominee", old.subnominee,
        ),
    }  # fmt: skip
    with conn.cursor() as cursor:
        for table, (columns, rows) in insert.items():
            values = ", ".join(["%s"] * len(columns.split(",")))
            cursor.executemany(f'INSERT INTO public."{table}" ({columns}) VALUES ({values})'.encode(), rows)
        cursor.executemany(
            b"INSERT INTO core.transactions (transaction_id, deal_id, investor_id, transaction_date, amount)"
            b" VALUES (%s, %s, %s, %s, %s)",
            old.core,
        )


def clean_rows(conn: psycopg.Connection[Any]) -> dict[tuple[str, int], dict[str, Any]]:
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in conn.execute("SELECT deal_id, deal_name FROM deals_clean"):
        found["deal", row[0]] = {"name": row[1]}
    for row in conn.execute("SELECT investor_id, full_name FROM investors_clean"):
        found["investor", row[0]] = {"name": row[1]}
    for kind, key, deal, investor, on, amount, status, currency in conn.execute(
        "SELECT m.kind, m.legacy_id, t.deal_id, t.investor_id, t.transaction_date, t.amount, t.status, t.currency"
        " FROM transactions_clean AS t JOIN equitie_private.legacy_ids AS m ON m.new_id = t.transaction_id"
        " AND m.kind = t.transaction_type"
    ):
        money = {"amount": amount, "currency": currency}
        found[kind, key] = {"deal": deal, "investor": investor, "date": on, "status": status, **money}
    return found


TWICE = [
    (2, 1, 1, dt.date(2024, 5, 6), "completed", 100, dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc)),
    (2, 1, 1, dt.date(2024, 5, 6), "completed", 1000, dt.datetime(2024, 1, 2, tzinfo=dt.timezone.utc)),
]
COPIES = Old(
    deals=[(1, "One")],
    investors=[(1, "Ann")],
    primary=[("1", 1, 1, "2024-05-06", None, "100", None, True)] * 2
    + [("2", 1, 1, "2024-05-06", "", "5", "EUR", False)],
    public=TWICE,
    core=[(1, 1, 1, dt.date(2024, 5, 6), 100.0)],
    subnominee=[(1, "ann", "1", "5"), (1, "1", "1", "5"), (2, "Ann", "2", "7")],
)


@pytest.mark.parametrize("in_batches", [False, True])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(old=worlds, rule=st.sampled_from(["fail", "first", "latest"]))
@example(old=COPIES, rule="fail")
@example(old=COPIES, rule="first")
@example(old=COPIES, rule="latest")
def test_every_row_is_somewhere_and_the_books_balance(
    equitie_server: EmbeddedServer, equitie_template: DatabaseTemplate, in_batches: bool, old: Old, rule: str
) -> None:
    expected = expect(old, rule)
    with equitie_template.copy() as dbname:
        dsn = equitie_server.dsn(dbname)
        with psycopg.connect(dsn, autocommit=True) as conn:
            make(conn, old)
            counts = conn.execute(
                "SELECT count(*) FROM deals_clean UNION ALL SELECT count(*) FROM transactions_clean"
            ).fetchall()
            assert counts == [(0,), (0,)]
            options = legacy.Options(on_conflict=rule)
            if rule == "fail" and expected.conflict:
                with pytest.raises(LegacyError, match="differ"):
                    legacy.migrate(dsn, options, in_batches=in_batches, batch_rows=3)
                assert conn.execute("SELECT count(*) FROM deals_clean").fetchone() == (0,)
                assert conn.execute("SELECT count(*) FROM transactions_clean").fetchone() == (0,)
                return
            report = legacy.migrate(dsn, options, in_batches=in_batches, batch_rows=3)
            found = clean_rows(conn)
            assert found.keys() == expected.clean.keys()
            for key, content in expected.clean.items():
                assert {c: content[c] for c in found[key] if c in content} == {
                    c: found[key][c] for c in found[key] if c in content
                }, key
            for kind in ("deal", "investor", "primary", "subnominee"):
                ends = report.counts.get(kind, {})
                assert report.rows(kind, "rejected") == expected.rejected[kind], kind
                assert report.rows(kind, "loser") == expected.losers[kind], kind
                assert report.rows(kind, "read") == sum(rows for b, (rows, _) in ends.items() if b != "read")
                assert ends == {} or ends["read"][1] == sum(money for b, (_, money) in ends.items() if b != "read")
            listed = conn.execute(
                "SELECT count(*) FROM equitie_private.legacy_rejects WHERE outcome IN ('rejected', 'loser')"
            ).fetchone()
            assert listed == (sum(expected.rejected.values()) + sum(expected.losers.values()),)
            assert len(
                {json.dumps(r) for (r,) in conn.execute("SELECT original FROM equitie_private.legacy_rejects")}
            ) <= sum(map(len, attrs.astuple(old, recurse=False)))
            checked = legacy.verify(dsn)
            assert checked.problems == ()
            legacy.rollback(dsn)
            assert conn.execute("SELECT count(*) FROM transactions_clean").fetchone() == (0,)
