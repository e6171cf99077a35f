from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equitie_data.fingerprint import LONGEST_STATEMENT, OTHER, Fingerprints, fingerprint_of, normalise

CANARY = "kanarie"

# Every way PostgreSQL has of writing a constant, with the canary inside, between characters that try to end it early.
_filling = st.text(alphabet='ab \\"$%()-/*;?\n[],.1', max_size=6)


def _plain(before: str, after: str) -> str:
    return f"'{before}''{CANARY}''{after}'"


def _escaped(before: str, after: str) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\")

    return f"E'{quoted(before)}\\'{CANARY}''\\\\{quoted(after)}'"


def _dollar(before: str, after: str) -> str:
    return f"$q${before.replace('$', '')}'{CANARY}{after.replace('$', '')}$q$"


def _comment(before: str, after: str) -> str:
    return f"/*{before.replace('*', '').replace('/', '')} /* {CANARY} */ '{after.replace('*', '').replace('/', '')}*/"


def _line_comment(before: str, after: str) -> str:
    return f"--{before}{CANARY}{after}".replace("\n", " ") + "\n"


def _continued(before: str, after: str) -> str:
    note = before.replace("\n", " ")
    return f"e'a' --{note}\n '\\'{CANARY}''{after.replace(chr(92), '')}'"


_constants = st.builds(
    lambda write, before, after: write(before, after),
    st.sampled_from([_plain, _escaped, _dollar, _comment, _line_comment, _continued]),
    _filling,
    _filling,
) | st.sampled_from(
    [
        f"B'{CANARY}'",
        f"x'{CANARY}'",
        f"N'{CANARY}'",
        f"U&'\\0061{CANARY}'",
        f"$${CANARY}$$",
        f"E'a'\n'\\'{CANARY}'",
        f"E'a' -- it's\n  '\\' {CANARY}'",
        f"12{CANARY}",
        f"1_000.{CANARY}",
    ]
)
_words = st.sampled_from(
    'select a in ( ) , values array [ ] = - + * ::int . ; null "Q" where x ?| ->> @ %s $1 %(v)s 1 -1.5e-3 0x1F true'
    " 'it''s' <> := :".split()
)
# A comma after each constant: behind a line break a string would go on under the rules of the one before it.
_statements = st.lists(_words | _constants.map(lambda constant: f"{constant} ,"), max_size=25).map(" ".join)


@settings(max_examples=500)
@given(_statements)
def test_no_constant_survives(sql: str) -> None:
    assert CANARY not in normalise(sql)


@settings(max_examples=300)
@given(_statements, st.integers(min_value=0, max_value=400))
def test_no_constant_survives_where_the_statement_is_cut(sql: str, length: int) -> None:
    cut = sql[:length]
    assert CANARY not in normalise(cut)


@pytest.mark.parametrize(
    "opening",
    [
        "'",
        "E'",
        "B'",
        "x'",
        "U&'",
        "$$",
        "$tag$",
        '"',
        'U&"',
        "/* ",
        "/* /* */ ",
        "'a''",
        "E'a\\'",
        "E'a''b \\'",
        "E'a'\n'",
    ],
)
def test_an_unterminated_constant_hides_everything_after_it(opening: str) -> None:
    assert CANARY not in normalise(f"SELECT a, {opening} {CANARY} FROM {CANARY}")


@settings(max_examples=500)
@given(_statements | st.text(alphabet="aE$'\"()[],.-+*/:=<>?%s1 \n\\;&U\u00e9\xa0_") | st.text())
def test_normalising_again_changes_nothing(sql: str) -> None:
    once = normalise(sql)
    assert normalise(once) == once


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT  1 ;", "select ?;"),
        ("select * from T where A=%s AND b=$2", "select * from t where a = ? and b = ?"),
        ("select * from t where a = %(name)s", "select * from t where a = ?"),
        ("select a-1, -1, b * -2, c - - 3", "select a - ?, ?, b * ?, c - ?"),
        ("select * from t where a in (1, 2, 3)", "select * from t where a in (?)"),
        ("select * from t where a in (1, null, -3)", "select * from t where a in (?)"),
        ("select * from t where a in (%s::uuid, %s::uuid)", "select * from t where a in (?::uuid)"),
        ("select * from t where (a, b) in ((1, 2), (3, 4))", "select * from t where (a, b) in ((?))"),
        ("select * from t where a in (select b from c)", "select * from t where a in (select b from c)"),
        ("insert into t (a, b) values (1, 'x'), (2, null)", "insert into t(a, b) values (?)"),
        ("insert into t values (1, now()), (2, now()) returning *", "insert into t values (?, now()) returning *"),
        ("select array[1, 2, 3]", "select array[?]"),
        ("select array[[1, 2], [3, 4]]", "select array[[?]]"),
        ("select f(1, 2)", "select f(?, ?)"),
        ("select a::text, a :: text", "select a::text, a::text"),
        ('SELECT "Mixed Case"."Col" FROM x', 'select "Mixed Case"."Col" from x'),
        ("select 1 -- note\n, 2 /* a /* nested */ b */", "select ?, ?"),
        ("select $$a$$, $t$ $$ $t$", "select ?, ?"),
        ("select d ->> 'k', d ? 'k', d ?| array['a','b']", "select d ->> ?, d ? ?, d ?| array[?]"),
        ("select 1e5, .5, 0xFF, 1_000, 1.5E-3", "select ?, ?, ?, ?, ?"),
        ("select x is null, true", "select x is null, true"),
        ("select 5 % 2, a %% b", "select ? % ?, a %% b"),
        ("", ""),
    ],
)
def test_the_normal_form(sql: str, expected: str) -> None:
    assert normalise(sql) == expected


@pytest.mark.parametrize(
    "other",
    [
        "SELECT amount FROM t WHERE id = 'abc' AND kind IN (1)",
        "select amount\n\tfrom t -- hint\n where id=%s and kind in (%s, %s)",
        "select amount from t where id = $1 and kind in ($2,$3,$4)",
        "SELECT amount FROM t WHERE id=-5 AND kind IN (NULL, 'x')",
    ],
)
def test_one_statement_has_one_fingerprint_however_it_is_called(other: str) -> None:
    assert fingerprint_of(normalise(other)) == fingerprint_of(
        normalise("select amount from t where id = 1 and kind in (1)")
    )


def test_other_statements_have_other_fingerprints() -> None:
    statements = [
        "select a from t",
        "select b from t",
        'select "A" from t',
        "select a - 1 from t",
        "select a from t limit 1",
    ]
    assert len({fingerprint_of(normalise(sql)) for sql in statements}) == len(statements)


def test_a_line_of_dashes_is_read_in_linear_time() -> None:
    # Exponential backtracking would never come back from this.
    assert normalise("E'a' " + "-- " * 3000 + "\n x") == "? x"
    assert normalise("E'a' " + "-- \n" * 1000 + "'b") == "?"


def test_a_fingerprint_is_sixteen_hexadecimal_digits() -> None:
    found = fingerprint_of(normalise("select 1"))
    assert len(found) == 16
    int(found, 16)


def test_texts_and_fingerprints_are_bounded() -> None:
    fingerprints = Fingerprints(capacity=3)
    found = [fingerprints.of(f"select c{number} from t") for number in range(5)]
    assert len(set(found[:3])) == 3
    assert found[3:] == [OTHER, OTHER]
    assert fingerprints.overflowed == 2
    assert set(fingerprints.texts) == set(found[:3])


def test_statements_with_their_values_inside_share_one_entry() -> None:
    fingerprints = Fingerprints(capacity=3)
    found = {fingerprints.of(f"select a from t where id = {number}") for number in range(50)}
    assert len(found) == 1
    assert fingerprints.overflowed == 0


def test_forgotten_fingerprints_make_room() -> None:
    fingerprints = Fingerprints(capacity=1)
    kept = fingerprints.of("select a from t")
    assert fingerprints.of("select b from t") == OTHER
    fingerprints.keep_only(set())
    assert fingerprints.of("select b from t") not in (OTHER, kept)


def test_a_statement_of_megabytes_is_read_only_to_the_limit() -> None:
    sql = "select a from t where id in (" + ", ".join(f"'{CANARY}{n}'" for n in range(100_000)) + ")"
    fingerprints = Fingerprints()
    found = fingerprints.of(sql)
    assert CANARY not in fingerprints.texts[found]
    assert fingerprints.of(sql.replace("t where", "t where", 1)[: LONGEST_STATEMENT + 50]) == found
