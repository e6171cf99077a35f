"""Names, headers, checksums, and where a statement ends."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data import _sql
from equitie_data.errors import MigrationError
from equitie_data.migrations.directories import ours
from equitie_data.migrations.files import Migration, parse_migration
from equitie_data.migrations.statements import split_statements

PLATFORM_NAMES = [
    "optimize_indexes_and_add_foreign_keys",
    "partition_transactions_table",
    "create_audit_logs_table",
    "add_row_level_security",
    "create_performance_monitoring_tables",
]


def test_numbers_follow_each_other() -> None:
    assert [migration.version for migration in ours().migrations] == list(range(1, len(ours().migrations) + 1))


def test_the_platforms_five_migrations_come_in_their_order() -> None:
    names = [migration.name for migration in ours().migrations]
    assert [name for name in names if name in PLATFORM_NAMES] == PLATFORM_NAMES


@pytest.mark.parametrize("name", list(_sql.migration_texts()))
def test_a_file_is_named_and_written_as_the_others(name: str) -> None:
    text = _sql.migration_texts()[name]
    assert re.fullmatch(r"\d{4}_[a-z0-9]+(_[a-z0-9]+)*(\.(verify|down))?", name)
    assert text.isascii()
    assert text.endswith(";\n")
    assert "\t" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
    assert text.startswith("-- "), "a file begins with what it is for"
    assert not re.search(r"\bTODO\b|\bFIXME\b", text)


def test_every_verification_belongs_to_a_migration() -> None:
    assert set(ours().verifications) <= {migration.label for migration in ours().migrations}
    for queries in ours().verifications.values():
        assert all(re.match(r"SELECT\b", query.text) for query in queries)


@pytest.mark.parametrize("migration", ours().migrations, ids=lambda migration: migration.label)
def test_a_migration_says_what_it_is_for_and_names_schemas(migration: Migration) -> None:
    assert re.fullmatch(r".{20,200}\.", migration.summary)
    for statement in migration.statements:
        created = re.match(
            r"(?:CREATE|ALTER|DROP)(?: OR REPLACE)?(?: UNIQUE| MATERIALIZED)? (?:TABLE|FUNCTION|VIEW|SEQUENCE)"
            r"(?: IF (?:NOT )?EXISTS)? (?:ONLY )?(\S+)",
            statement.text,
        )
        assert created is None or "." in created[1], statement.text.splitlines()[0]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_of_a_checkout_are_no_drift(ending: str) -> None:
    text = "-- What.\nSELECT 1;\nSELECT 2;\n"
    assert parse_migration("0001_a", text.replace("\n", ending)) == parse_migration("0001_a", text)


def test_the_checksum_sees_every_other_change() -> None:
    checksums = {parse_migration("0001_a", text).sha256 for text in ("SELECT 1;\n", "SELECT 1; \n", "SELECT 2;\n")}
    assert len(checksums) == 3


@pytest.mark.parametrize("name", ["1_a", "0001-a", "0001_A", "0001_", "0001_a__b", "a"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(MigrationError, match="no name for a migration"):
        parse_migration(name, "SELECT 1;")


def test_the_header_decides_about_the_transaction() -> None:
    assert parse_migration("0001_a", "-- What.\nSELECT 1;").transactional
    assert parse_migration("0001_a", "-- equitie: transaction=true\nSELECT 1;").transactional
    assert not parse_migration("0001_a", "-- What.\n-- equitie: transaction=false\nSELECT 1;").transactional
    with pytest.raises(MigrationError, match="unknown option"):
        parse_migration("0001_a", "-- equitie: transactions=false\nSELECT 1;")


PIECES = {
    "word": st.sampled_from(["SELECT 1", "a$1$b", "$1", "x$y", "e", "E", "U&", "é$", "-", "/", "*", "(", "\n", " "]),
    "string": st.text(st.sampled_from("a;$-/*\n\"\\ '"), max_size=6).map(lambda s: "'" + s.replace("'", "''") + "'"),
    "escape": st.text(st.sampled_from("a;$\n\"'"), max_size=6).map(lambda s: " E'" + s.replace("'", "\\'") + "'"),
    "identifier": st.text(st.sampled_from("a;$-/*\n\"'"), max_size=6).map(lambda s: '"' + s.replace('"', '""') + '"'),
    "dollar": st.tuples(st.sampled_from(["", "a", "body_1"]), st.text(st.sampled_from("a;-/*\n\"' "), max_size=8)).map(
        lambda t: f" ${t[0]}${t[1]}${t[0]}$ "
    ),
    "line comment": st.text(st.sampled_from("a;$'\"/*"), max_size=6).map(lambda s: f" --{s}\n"),
    "block comment": st.text(st.sampled_from("a;$'\"-\n"), max_size=6).map(lambda s: f" /*{s}/*;*/{s}*/ "),
}


@given(st.lists(st.lists(st.one_of(*PIECES.values()), min_size=1, max_size=8).map(" ".join), min_size=1, max_size=5))
def test_nothing_inside_quotes_or_comments_ends_a_statement(bodies: list[str]) -> None:
    # Each body is made a statement of its own by the word it begins with.
    text = ";\n".join(f"BEGINS {body}\n" for body in bodies)
    found = split_statements(text)
    assert [statement.text for statement in found] == [f"BEGINS {body}".rstrip() for body in bodies]
    for statement in found:
        assert text.split("\n")[statement.line - 1].startswith("BEGINS ")


@pytest.mark.parametrize("text", ["", ";;", " \n", "-- only a comment", "-- a\n;-- b\n"])
def test_nothing_is_no_statement(text: str) -> None:
    assert split_statements(text) == ()


@pytest.mark.parametrize("text", ["SELECT 'a", 'SELECT "a', "DO $$ BEGIN", "SELECT 1 /* a /* b */", "DO $a$ x $b$"])
def test_an_open_quote_is_an_error(text: str) -> None:
    with pytest.raises(MigrationError, match="not closed"):
        parse_migration("0001_a", text)
