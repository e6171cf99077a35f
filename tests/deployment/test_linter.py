"""What a security linter says of a deployed database: nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.deployment.linter_rules import RULES, SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.deployment.conftest import Deployment

SPLINTER = "EQUITIE_SPLINTER_SQL"
HOW_TO_GET_IT = (
    f"{SPLINTER} IS NOT SET: Supabase's own linter was not run. It is one file, splinter.sql of the repository"
    f" supabase/splinter; fetch it and set {SPLINTER} to its path."
)


@pytest.fixture
def admin(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    """The superuser in a transaction that is rolled back."""
    with psycopg.connect(deployment.admin_dsn) as conn:
        yield conn
        conn.rollback()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_and_notices_a_breach(admin: psycopg.Connection[Any], rule: str) -> None:
    assert [found for (found,) in admin.execute(RULES[rule].query)] == []
    admin.execute(RULES[rule].breach)
    assert len(admin.execute(RULES[rule].query).fetchall()) >= 1


# A procedure that pins its search_path may not commit between its steps (PostgreSQL refuses); this one sets the path
# first thing in every transaction of its own, which the linter does not look for.
EXCUSED = {("function_search_path_mutable", "maintain")}


@pytest.fixture
def splinter(admin: psycopg.Connection[Any]) -> Callable[[], list[dict[str, Any]]]:
    """Supabase's linter, run within the transaction."""
    if SPLINTER not in os.environ:
        pytest.skip(HOW_TO_GET_IT)
    # Without this setting nine of its lints, most of those about security, return nothing and do not say so.
    admin.execute("SET LOCAL pgrst.db_schemas = 'public'")
    # One lint reads the rows of this table by way of XML, which not every server is built with.
    admin.execute("DROP TABLE IF EXISTS storage.buckets CASCADE")

    def run() -> list[dict[str, Any]]:
        cursor = admin.execute(Path(os.environ[SPLINTER]).read_bytes())
        while cursor.nextset():
            pass
        names = [column.name for column in cursor.description or ()]
        findings = [dict(zip(names, row, strict=True)) for row in cursor]
        # What the imitation of a platform brings along is its own.
        return [finding for finding in findings if finding["metadata"].get("schema") in SCHEMAS]

    return run


def test_splinter_finds_nothing_above_info(splinter: Callable[[], list[dict[str, Any]]]) -> None:
    findings = splinter()
    assert [
        finding["detail"]
        for finding in findings
        if finding["level"] != "INFO" and (finding["name"], finding["metadata"]["name"]) not in EXCUSED
    ] == []
    # It looked: fresh databases have indexes that nobody has used yet.
    assert any(finding["name"] == "unused_index" for finding in findings)


def test_splinter_would_notice(admin: psycopg.Connection[Any], splinter: Callable[[], list[dict[str, Any]]]) -> None:
    admin.execute("CREATE TABLE public.open_table (a int PRIMARY KEY); GRANT SELECT ON public.open_table TO anon")
    assert "rls_disabled_in_public" in {finding["name"] for finding in splinter()}
