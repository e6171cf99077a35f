"""What decides who may do what, compared with what this release's migrations make.

The baseline is a file of the package, written by ``tools/make_security_baseline.py`` from a freshly migrated database:
every policy, privilege and function of the library's schemas. What a database has besides, or lacks, is drift.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from equitie_data._sql import query
from equitie_data.doctor.findings import Finding, finding, quoted
from equitie_data.migrations.grant import DATABASE_ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

__all__ = ["Fact", "baseline", "check_baseline", "our_tables", "security_facts"]

_LOGIN: Final = "<login>"
_OTHER_LOGIN: Final = "-"


class Fact(NamedTuple):
    """One thing that decides who may do what.

    Attributes:
        kind: ``row security``, ``policy``, ``privilege``, ``function``, ``view`` or ``sequence``.
        object: What it is about.
        grantee: Who has the privilege; of a policy its name; else empty.
        detail: The privilege, or the definition.
    """

    kind: str
    object: str
    grantee: str
    detail: str


def security_facts(conn: Connection[Any], login: str | None) -> set[Fact]:
    """Return everything that decides who may do what in the library's schemas.

    Args:
        conn: A connection with an empty search path, so that names are written in full.
        login: The application's login role, which appears as ``<login>``.
    """
    rows = conn.execute(query("doctor_security"), {"login": login or _OTHER_LOGIN, "roles": list(DATABASE_ROLES)})
    return {Fact(*row) for row in rows}


@functools.cache
def baseline() -> frozenset[Fact]:
    """Return what a freshly migrated database has."""
    text = files("equitie_data").joinpath("doctor").joinpath("baseline.json").read_text("utf-8")
    return frozenset(Fact(*row) for row in json.loads(text))


def our_tables() -> list[str]:
    """Return the library's tables and views, by their full names."""
    return sorted(fact.object for fact in baseline() if fact.kind in ("row security", "view"))


def check_baseline(conn: Connection[Any], login: str | None) -> Iterator[Finding]:
    """Yield how the database differs from what the migrations make.

    Args:
        conn: As in `security_facts`.
        login: The application's login role; without it, its privileges are not looked at.
    """
    wanted = {fact for fact in baseline() if login is not None or fact.grantee != _LOGIN}
    found = security_facts(conn, login)
    known = {fact.object for fact in wanted}
    there = {fact.object for fact in found}
    # Once and for itself: its policies and privileges went with it.
    gone = {fact.object for fact in wanted if fact.kind in ("row security", "view", "function")} - there
    for name in sorted(gone):
        yield finding("object-missing", name, f"{name} is not there.", "python -m equitie_data migrate verify")
    for fact in sorted(found - wanted):
        # Of a privilege the object's kind stands before its name; the schemas are ours, whoever has privileges on them.
        kind, _, name = fact.object.partition(" ")
        if fact.object in known or name in known or kind == "SCHEMA":
            yield from _extra(fact, wanted, login)
    for fact in sorted(wanted - found):
        if fact.object not in gone and fact.object.partition(" ")[2] not in gone:
            yield from _missing(fact, found, login)


def _extra(fact: Fact, wanted: set[Fact], login: str | None) -> Iterator[Finding]:
    if fact.kind == "privilege":
        who = quoted(login or "") if fact.grantee == _LOGIN else quoted(fact.grantee)
        yield finding(
            "privilege-extra",
            f"{fact.object} to {who}",
            f"{who} has {fact.detail} on {fact.object}.",
            f"REVOKE {fact.detail} ON {fact.object} FROM {who};",
        )
    elif fact.kind == "policy":
        name = quoted(fact.grantee)
        drop = f"DROP POLICY {name} ON {fact.object};"
        before = next((each for each in wanted if each[:3] == fact[:3]), None)
        if before is not None:
            what = f"The policy {name} on {fact.object} is {fact.detail}."
            fix = f"{drop} CREATE POLICY {name} ON {fact.object} {before.detail};"
            yield finding("policy-altered", f"{name} on {fact.object}", what, fix)
        else:
            what = f"There is a policy {name} on {fact.object}: {fact.detail}."
            yield finding("policy-extra", f"{name} on {fact.object}", what, drop)
    elif fact.kind == "function":
        yield finding(
            "function-altered",
            fact.object,
            f"{fact.object} is not the function that the migrations made: {fact.detail.partition(' BODY ')[0]}.",
            "Restore it from the migration that made it.",
        )
    elif fact.kind == "view":
        fix = f"ALTER VIEW {fact.object} SET (security_invoker = true);"
        yield finding("view-altered", fact.object, f"The view {fact.object} runs {fact.detail}.", fix)
    elif fact.detail == "off":
        fix = f"ALTER TABLE {fact.object} ENABLE ROW LEVEL SECURITY;"
        yield finding("policies-off", fact.object, f"Row-level security is off on {fact.object}.", fix)


def _missing(fact: Fact, found: set[Fact], login: str | None) -> Iterator[Finding]:
    if fact.kind == "privilege":
        who = quoted(login or "") if fact.grantee == _LOGIN else quoted(fact.grantee)
        yield finding(
            "privilege-missing",
            f"{fact.object} to {who}",
            f"{who} lacks {fact.detail} on {fact.object}.",
            f"GRANT {fact.detail} ON {fact.object} TO {who};",
        )
    elif fact.kind == "policy" and not any(each[:3] == fact[:3] for each in found):
        name = quoted(fact.grantee)
        yield finding(
            "policy-missing",
            f"{name} on {fact.object}",
            f"The policy {name} on {fact.object} is not there.",
            f"CREATE POLICY {name} ON {fact.object} {fact.detail};",
        )
