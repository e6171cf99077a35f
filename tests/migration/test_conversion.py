"""What a conversion leaves behind is what migration 0004 would have made; what is in its way, it names."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.migration.flat_table import DEALS, INVESTORS, TODAY, contents, make_flat

from equitie_data import conversion, migrate
from equitie_data.conversion.layout import add_months
from equitie_data.errors import ConversionError, EquitieDataError
from equitie_data.migrations.catalog import differences, read_catalog
from equitie_data.testing import fresh_database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from equitie_data.embedded import EmbeddedServer

NAMES = """
SELECT c.oid::regclass::text, c.relkind, pg_get_userbyid(c.relowner), c.relrowsecurity, c.relacl::text,
  obj_description(c.oid, 'pg_class'), pg_get_expr(c.relpartbound, c.oid)
FROM pg_class AS c
WHERE c.relnamespace::regnamespace::text IN ('public', 'equitie_part') AND c.relname !~ '^pg_toast'
UNION ALL
SELECT k.conrelid::regclass::text, k.contype, k.conname, k.convalidated, pg_get_constraintdef(k.oid),
  (k.conparentid <> 0)::text, NULL
FROM pg_constraint AS k WHERE k.conrelid <> 0 AND k.connamespace::regnamespace::text IN ('public', 'equitie_part')
UNION ALL
SELECT t.tgrelid::regclass::text, 't', t.tgname, t.tgparentid <> 0, pg_get_triggerdef(t.oid), t.tgenabled::text, NULL
FROM pg_trigger AS t WHERE NOT t.tgisinternal AND t.tgrelid::regclass::text ~ 'transactions_clean'
UNION ALL
SELECT a.attrelid::regclass::text, 'a', a.attname, a.attnotnull, format_type(a.atttypid, a.atttypmod),
  col_description(a.attrelid, a.attnum), pg_get_expr(d.adbin, d.adrelid)
FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attnum > 0 AND a.attrelid::regclass::text ~ '^(public|equitie_part).transactions_clean'
"""


def owner(dsn: str) -> psycopg.Connection[Any]:
    conn = psycopg.connect(dsn, autocommit=True)
    conn.execute("SET search_path = ''")
    return conn


def names(dsn: str) -> list[Any]:
    with owner(dsn) as conn:
        return sorted(map(str, conn.execute(NAMES).fetchall()))


def one(dsn: str, query: str, *params: Any) -> Any:
    with owner(dsn) as conn:
        row = conn.execute(query, params or None).fetchone()
    assert row is not None
    return row[0]


@pytest.fixture(scope="module")
def template(server: EmbeddedServer) -> Iterator[str]:
    with fresh_database(server) as dbname:
        make_flat(server.dsn(dbname), 1000)
        yield dbname


@pytest.fixture
def flat_dsn(server: EmbeddedServer, template: str) -> Iterator[str]:
    """The owner's DSN of a database with a flat table of a thousand rows."""
    with fresh_database(server, template) as dbname:
        yield server.dsn(dbname)


@pytest.fixture
def migrated_dsn(server: EmbeddedServer, template: str) -> Iterator[str]:
    """The same rows, partitioned by migration 0004."""
    with fresh_database(server, template) as dbname:
        migrate.migrate(server.dsn(dbname), to=4)
        yield server.dsn(dbname)


@pytest.mark.parametrize("way", ["split", "copy"])
def test_the_catalogs_are_those_of_the_migration(flat_dsn: str, migrated_dsn: str, way: str) -> None:
    before = contents(flat_dsn)
    assert conversion.convert(flat_dsn, copy=way == "copy").outcome == "done"
    if way == "split":
        assert conversion.split(flat_dsn).shape == "partitioned"
    assert contents(flat_dsn) == before
    with owner(migrated_dsn) as expected, owner(flat_dsn) as actual:
        found = [each.sentence for each in differences(read_catalog(expected), read_catalog(actual))]
    assert found == [
        "The table equitie_private.partition_conversions is made by no migration.",
        "The index equitie_private.partition_conversions_running is made by no migration.",
    ] or all("partition_conversions" in sentence for sentence in found)  # fmt: skip
    assert names(flat_dsn) == names(migrated_dsn)


@pytest.mark.parametrize("way", ["attach", "split", "copy"])
def test_migrations_go_on_after_it(flat_dsn: str, way: str) -> None:
    before = contents(flat_dsn)
    conversion.convert(flat_dsn, copy=way == "copy")
    if way == "split":
        conversion.split(flat_dsn)
    states = {entry.version: entry.state for entry in migrate.status(flat_dsn)}
    assert states[4] == "applied"
    assert states[5] == "pending"
    applied = migrate.migrate(flat_dsn).applied
    assert applied[0].version == 5
    assert migrate.verify(flat_dsn) == ()
    assert contents(flat_dsn) == before
    # The sequence went on where it was: ids from before are small, those from now on carry their day.
    with owner(flat_dsn) as conn:
        conn.execute(
            "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " VALUES (1, 1, %s, 1)",
            (TODAY,),
        )


def test_a_flat_table_comes_back_as_it_was(flat_dsn: str) -> None:
    before, rows = names(flat_dsn), contents(flat_dsn)
    for way in ("attach", "split", "copy"):
        conversion.convert(flat_dsn, copy=way == "copy")
        if way == "split":
            conversion.split(flat_dsn)
        assert conversion.undo(flat_dsn).shape == "flat"
        assert names(flat_dsn) == before
        assert contents(flat_dsn) == rows
        assert one(flat_dsn, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'equitie_conversion%'") == 0


def test_a_fully_migrated_database_can_go_back_and_forth(server: EmbeddedServer, flat_dsn: str) -> None:
    conversion.convert(flat_dsn)
    migrate.migrate(flat_dsn)
    with owner(flat_dsn) as conn:
        conn.execute(
            "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT 1, 1, %s::date + g, g FROM generate_series(0, 200) AS g",
            (TODAY,),
        )
    rows = contents(flat_dsn)
    partitioned = names(flat_dsn)
    audited = one(flat_dsn, "SELECT count(*) FROM public.audit_logs")
    for step in (conversion.undo, conversion.convert, conversion.split):
        step(flat_dsn)
        assert contents(flat_dsn) == rows
    assert migrate.verify(flat_dsn) == ()
    assert one(flat_dsn, "SELECT count(*) FROM public.audit_logs") == audited
    assert one(flat_dsn, "SELECT amount FROM public.get_transaction(7)") == 7
    # Apart from the partitions, which are others now, everything is what it was.
    parent = [line for line in partitioned if "'public." in line]
    assert [line for line in names(flat_dsn) if "'public." in line] == parent


def test_without_the_migrations_before_it_says_which(empty_dsn: str) -> None:
    migrate.migrate(empty_dsn, to=2)
    with pytest.raises(ConversionError, match="lacks migration 0003"):
        conversion.convert(empty_dsn)


def test_a_second_run_has_nothing_to_do(flat_dsn: str) -> None:
    assert conversion.undo(flat_dsn).outcome == "nothing to do"
    with pytest.raises(ConversionError, match="is not partitioned"):
        conversion.split(flat_dsn)
    conversion.convert(flat_dsn)
    assert conversion.convert(flat_dsn).outcome == "nothing to do"
    conversion.split(flat_dsn)
    assert conversion.split(flat_dsn).outcome == "nothing to do"


OBSTACLES = {
    "a unique key without the date": (
        "ALTER TABLE public.transactions_clean ADD CONSTRAINT once UNIQUE (parent_transaction_id)",
        "unique index once does not hold transaction_date",
    ),
    "a materialized view": (
        "CREATE MATERIALIZED VIEW public.totals AS SELECT sum(amount) FROM public.transactions_clean",
        "rule _RETURN on materialized view public.totals depends on the table",
    ),
    "a foreign key to the id": (
        "CREATE TABLE public.letters (id bigint REFERENCES public.transactions_clean)",
        "letters_id_fkey of public.letters names the id alone",
    ),
    "a foreign key to itself": (
        (
            "ALTER TABLE public.transactions_clean ADD CONSTRAINT parent FOREIGN KEY (parent_transaction_id)"
            " REFERENCES public.transactions_clean"
        ),
        "parent of public.transactions_clean names the id alone",
    ),
    "a table of the row type": (
        "CREATE TABLE public.kept (old public.transactions_clean)",
        "table public.kept depends on the table",
    ),
    "forced row-level security": (
        "ALTER TABLE public.transactions_clean FORCE ROW LEVEL SECURITY",
        "FORCEd",
    ),
    "a publication of leaves": (
        "CREATE PUBLICATION p FOR TABLE public.transactions_clean",
        "publish_via_partition_root",
    ),
    "an inherited table": (
        "CREATE TABLE public.more () INHERITS (public.transactions_clean)",
        "no plain table",
    ),
    "a date in the far future": (
        "UPDATE public.transactions_clean SET transaction_date = 'infinity' WHERE transaction_id = 3",
        "1 rows are dated .* or later",
    ),
    "a table where a partition will stand": (
        "CREATE TABLE equitie_part.transactions_clean_legacy ()",
        "equitie_part.transactions_clean_legacy exists",
    ),
    "a row trigger with transition tables": (
        (
            "CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER t AFTER INSERT ON public.transactions_clean REFERENCING NEW TABLE AS n FOR EACH ROW"
            " EXECUTE FUNCTION public.f()"
        ),
        "row trigger t has transition tables",
    ),
    "a row without a date": (
        (
            "ALTER TABLE public.transactions_clean ALTER COLUMN transaction_date DROP NOT NULL;"
            "UPDATE public.transactions_clean SET transaction_date = NULL WHERE transaction_id = 3"
        ),
        "rows without a transaction_date",
    ),
    "an index that replicates": (
        "ALTER TABLE public.transactions_clean REPLICA IDENTITY USING INDEX transactions_clean_pkey",
        "REPLICA IDENTITY",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_in_the_way_is_named_and_nothing_is_changed(flat_dsn: str, name: str) -> None:
    statement, sentence = OBSTACLES[name]
    with owner(flat_dsn) as conn:
        conn.execute(statement)
    before = names(flat_dsn)
    found = conversion.plan(flat_dsn).obstacles
    assert found
    with pytest.raises(ConversionError, match=sentence):
        conversion.convert(flat_dsn)
    assert names(flat_dsn) == before


def test_what_others_have_refers_to_the_new_table(flat_dsn: str, server: EmbeddedServer) -> None:
    with owner(flat_dsn) as conn:
        conn.execute(
            """
            CREATE VIEW public.big WITH (security_invoker = true, check_option = local) AS
              SELECT * FROM public.transactions_clean WHERE amount > 500;
            COMMENT ON VIEW public.big IS 'kept';
            GRANT SELECT ON public.big TO authenticated;
            CREATE VIEW public.bigger AS SELECT * FROM public.big WHERE amount > 900;
            CREATE FUNCTION public.total() RETURNS numeric STABLE BEGIN ATOMIC
              SELECT sum(amount) FROM public.transactions_clean; END;
            CREATE FUNCTION public.newest() RETURNS SETOF public.transactions_clean LANGUAGE sql STABLE
              SET search_path = '' AS 'SELECT * FROM public.transactions_clean ORDER BY transaction_id DESC LIMIT 1';
            REVOKE ALL ON FUNCTION public.newest() FROM PUBLIC;
            GRANT EXECUTE ON FUNCTION public.newest() TO service_role;
            COMMENT ON FUNCTION public.newest() IS 'kept';
            ALTER TABLE public.deals_clean ENABLE ROW LEVEL SECURITY;
            CREATE POLICY mine ON public.deals_clean USING (
              EXISTS (SELECT FROM public.transactions_clean AS t
                WHERE t.deal_id = deals_clean.deal_id AND t.amount > 900)
            );
            ALTER TABLE public.transactions_clean ENABLE ROW LEVEL SECURITY;
            CREATE POLICY own ON public.transactions_clean AS RESTRICTIVE FOR SELECT TO authenticated, anon
              USING (investor_id = 1);
            COMMENT ON POLICY own ON public.transactions_clean IS 'kept';
            GRANT SELECT, UPDATE (amount) ON public.transactions_clean TO authenticated WITH GRANT OPTION;
            GRANT USAGE ON SEQUENCE public.transactions_clean_transaction_id_seq TO service_role;
            CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
            CREATE TRIGGER note BEFORE INSERT OR UPDATE OF amount ON public.transactions_clean FOR EACH ROW
              EXECUTE FUNCTION public.note();
            COMMENT ON TRIGGER note ON public.transactions_clean IS 'kept';
            ALTER TABLE public.transactions_clean ENABLE ALWAYS TRIGGER note;
            CREATE TRIGGER told AFTER UPDATE ON public.transactions_clean EXECUTE FUNCTION public.note();
            ALTER TABLE public.transactions_clean DISABLE TRIGGER told;
            CREATE INDEX "of ours ON it" ON public.transactions_clean (lower(status)) WHERE units > 1;
            COMMENT ON INDEX public."of ours ON it" IS 'kept';
            CREATE STATISTICS public.together (dependencies) ON deal_id, investor_id FROM public.transactions_clean;
            ALTER TABLE public.transactions_clean ALTER COLUMN deal_id SET STATISTICS 500;
            ALTER TABLE public.transactions_clean ADD CONSTRAINT small CHECK (units < 1000000) NOT VALID;
            ALTER TABLE public.transactions_clean REPLICA IDENTITY FULL;
            CREATE PUBLICATION feed FOR TABLE public.transactions_clean (transaction_id, transaction_date, amount)
              WHERE (amount > 1) WITH (publish = 'insert', publish_via_partition_root = true);
            CREATE UNIQUE INDEX by_both ON public.transactions_clean (transaction_id, transaction_date);
            CREATE TABLE public.letters (
              id bigint, day date,
              CONSTRAINT letter_of FOREIGN KEY (id, day)
                REFERENCES public.transactions_clean (transaction_id, transaction_date) ON DELETE CASCADE
            );
            INSERT INTO public.letters SELECT transaction_id, transaction_date FROM public.transactions_clean LIMIT 10;
            CREATE TABLE public.drafts (id bigint, day date);
            INSERT INTO public.drafts VALUES (-1, '2020-01-01');
            ALTER TABLE public.drafts ADD CONSTRAINT draft_of FOREIGN KEY (id, day)
              REFERENCES public.transactions_clean (transaction_id, transaction_date) NOT VALID;
            CREATE TABLE public.notes (id bigint CONSTRAINT note_of REFERENCES public.transactions_clean);
            """
        )
        query = """
        SELECT 'view', pg_get_viewdef(oid), reloptions::text, relacl::text, obj_description(oid, 'pg_class')
        FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace
        UNION ALL SELECT 'function', pg_get_functiondef(oid), proacl::text, obj_description(oid, 'pg_proc'), NULL
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT 'policy', polrelid::regclass::text || polname,
          polroles::regrole[]::text || polcmd::text || polpermissive,
          coalesce(pg_get_expr(polqual, polrelid), ''), obj_description(oid, 'pg_policy') FROM pg_policy
        UNION ALL SELECT 'acl', relname, relacl::text, relrowsecurity::text, relreplident::text FROM pg_class
          WHERE relname IN ('transactions_clean', 'transactions_clean_transaction_id_seq')
        UNION ALL SELECT 'column', attname, attacl::text, attgenerated::text, attstattarget::text FROM pg_attribute
          WHERE attrelid = 'public.transactions_clean'::regclass AND attnum > 0
        UNION ALL SELECT 'trigger', pg_get_triggerdef(oid), tgenabled::text, obj_description(oid, 'pg_trigger'), NULL
          FROM pg_trigger WHERE tgrelid = 'public.transactions_clean'::regclass AND NOT tgisinternal
        UNION ALL SELECT 'index', indexname, replace(indexdef, 'ON ONLY', 'ON'),
          obj_description(indexname::regclass, 'pg_class'), NULL
          FROM (SELECT format('%I.%I', schemaname, indexname) AS indexname, indexdef FROM pg_indexes
            WHERE schemaname = 'public' AND tablename = 'transactions_clean'
              AND indexname <> 'transactions_clean_pkey') AS i
        UNION ALL SELECT 'publication', pubname, attnames::text, rowfilter, NULL FROM pg_publication_tables
        UNION ALL SELECT 'statistics', pg_get_statisticsobjdef(oid), NULL, NULL, NULL FROM pg_statistic_ext
          WHERE stxrelid = 'public.transactions_clean'::regclass
        UNION ALL SELECT 'check', conname, pg_get_constraintdef(oid), NULL, NULL FROM pg_constraint
          WHERE conrelid = 'public.transactions_clean'::regclass AND contype = 'c' AND conname <> 'small'
        """
        before = sorted(map(str, conn.execute(query)))
        inbound = (
            "SELECT conname, pg_get_constraintdef(oid), convalidated FROM pg_constraint WHERE conparentid = 0"
            " AND confrelid = 'public.transactions_clean'::regclass ORDER BY 1"
        )
        keys = conn.execute(inbound).fetchall()
        assert len(keys) == 3

        with pytest.raises(ConversionError, match="--drop-inbound-keys"):
            conversion.convert(flat_dsn)
        for operation in (
            lambda: conversion.convert(flat_dsn, drop_inbound_keys=True),
            lambda: conversion.split(flat_dsn),
            lambda: conversion.undo(flat_dsn),
            lambda: conversion.convert(flat_dsn, copy=True, drop_inbound_keys=True),
            lambda: conversion.undo(flat_dsn),
        ):
            report = operation()
            assert sorted(map(str, conn.execute(query))) == before
            expected = keys if report.shape == "flat" else keys[:2]
            assert conn.execute(inbound).fetchall() == expected
            # They are the new table's: a row that is written now is in all of them.
            conn.execute(
                "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
                " VALUES (1, 1, %s, 1000000)",
                (add_months(TODAY, 7),),
            )
            assert conn.execute("SELECT max(amount) FROM public.bigger").fetchone() == (1000000,)
            assert conn.execute(
                "SELECT (SELECT sum(amount) FROM public.transactions_clean) = public.total()"
            ).fetchone() == (True,)
            assert conn.execute("SELECT amount FROM public.newest()").fetchone() == (1000000,)
            assert conn.execute("SELECT count(*) FROM public.letters").fetchone() == (10,)
            with pytest.raises(psycopg.errors.ForeignKeyViolation):
                conn.execute("INSERT INTO public.letters VALUES (-5, current_date)")
    leaves = one(
        flat_dsn,
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'equitie_part'::regnamespace AND relkind = 'r'"
        " AND EXISTS (SELECT FROM aclexplode(relacl) AS a WHERE a.grantee <> relowner)",
    )
    assert leaves == 0


def test_serial_ids_and_nullable_dates(empty_dsn: str) -> None:
    make_flat(empty_dsn, 100)
    with owner(empty_dsn) as conn:
        conn.execute(
            "ALTER TABLE public.transactions_clean ALTER COLUMN transaction_id DROP IDENTITY;"
            "ALTER TABLE public.transactions_clean ALTER COLUMN transaction_date DROP NOT NULL;"
            "CREATE SEQUENCE public.serial_of_old AS integer OWNED BY public.transactions_clean.transaction_id;"
            "SELECT setval('public.serial_of_old', 100);"
            "ALTER TABLE public.transactions_clean"
            " ALTER COLUMN transaction_id SET DEFAULT nextval('public.serial_of_old');"
        )
        for step in (conversion.convert, conversion.split, conversion.undo):
            step(empty_dsn)
            row = conn.execute(
                "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
                " VALUES (1, 1, %s, 1) RETURNING transaction_id",
                (TODAY,),
            ).fetchone()
            assert row is not None
        assert row == (103,)
        assert one(
            empty_dsn,
            "SELECT attidentity = 'd' AND attnotnull FROM pg_attribute"
            " WHERE attrelid = 'public.transactions_clean'::regclass AND attname = 'transaction_id'",
        )


def test_computed_columns_compute_themselves_again(flat_dsn: str) -> None:
    with owner(flat_dsn) as conn:
        conn.execute(
            "ALTER TABLE public.transactions_clean DROP COLUMN admin_fee, ADD COLUMN doubled numeric"
            " GENERATED ALWAYS AS (amount * 2) STORED"
        )
    before = contents(flat_dsn)
    # A trigger of the platform's that compares whole rows cannot be created beside such a column.
    with pytest.raises(EquitieDataError, match="generated columns"):
        conversion.convert(flat_dsn, copy=True)
    assert conversion.status(flat_dsn).done == ("functions", "missing indexes", "constraints")
    with owner(flat_dsn) as conn:
        conn.execute("DROP TRIGGER set_updated_at ON public.transactions_clean")
    for step in (lambda dsn: conversion.convert(dsn, copy=True), conversion.undo):
        step(flat_dsn)
        assert contents(flat_dsn) == before


def test_an_owner_who_is_no_superuser(server: EmbeddedServer, template: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as superuser:
        superuser.execute("CREATE ROLE plain_converter LOGIN PASSWORD 'only for a test'")
        try:
            with fresh_database(server, template) as dbname:
                superuser.execute(f"ALTER DATABASE {dbname} OWNER TO plain_converter")
                with owner(server.dsn(dbname)) as conn:
                    conn.execute(
                        """
                        DO $$ DECLARE one record; BEGIN
                          FOR one IN SELECT format('%s %I', 'SCHEMA', nspname) AS name FROM pg_namespace
                              WHERE nspname ~ '^(equitie|auth)'
                            UNION ALL SELECT 'TABLE ' || c.oid::regclass FROM pg_class AS c
                              WHERE relkind = 'r' AND relnamespace::regnamespace::text ~ '^(equitie|public)'
                            UNION ALL SELECT 'FUNCTION ' || p.oid::regprocedure FROM pg_proc AS p
                              WHERE pronamespace::regnamespace::text ~ '^(equitie|auth)'
                          LOOP EXECUTE format('ALTER %s OWNER TO plain_converter', one.name); END LOOP;
                        END $$
                        """
                    )
                dsn = server.dsn(dbname, "plain_converter", "only for a test")
                before = contents(dsn)
                assert conversion.plan(dsn).free is None
                for step in (conversion.convert, conversion.split, conversion.undo):
                    assert step(dsn).outcome == "done"
                    assert contents(dsn) == before
                with pytest.raises(ConversionError, match="belongs to"):
                    conversion.convert(other_owner(server, dbname))
        finally:
            superuser.execute("DROP ROLE plain_converter")


def other_owner(server: EmbeddedServer, dbname: str) -> str:
    with owner(server.dsn(dbname)) as conn:
        conn.execute("ALTER TABLE public.transactions_clean OWNER TO service_role")
    return server.dsn(dbname, "plain_converter", "only for a test")


def test_narrow_ids_are_copied_to_wide_ones(flat_dsn: str) -> None:
    with owner(flat_dsn) as conn:
        conn.execute(
            "ALTER TABLE public.transactions_clean ALTER COLUMN transaction_id TYPE integer,"
            " ALTER COLUMN parent_transaction_id TYPE integer"
        )
        before = contents(flat_dsn)
        found = conversion.plan(flat_dsn)
        assert found.method == "copy"
        assert "bigint" in found.reason
        conn.execute("CREATE VIEW public.ids AS SELECT transaction_id FROM public.transactions_clean")
        with pytest.raises(ConversionError, match=r"The view public\.ids shows ids as integers"):
            conversion.convert(flat_dsn)
        conn.execute("DROP VIEW public.ids")
    conversion.convert(flat_dsn)
    assert contents(flat_dsn) == before
    migrate.migrate(flat_dsn)
    assert migrate.verify(flat_dsn) == ()


def test_dates_that_are_older_and_later_than_partitions(flat_dsn: str) -> None:
    with owner(flat_dsn) as conn:
        for number, day in enumerate(("0001-01-01", "1990-02-28", "-infinity", str(add_months(TODAY, 9))), start=2):
            conn.execute(
                "UPDATE public.transactions_clean SET transaction_date = %s WHERE transaction_id = %s", (day, number)
            )
    before = contents(flat_dsn)
    found = conversion.plan(flat_dsn)
    assert found.boundary == add_months(TODAY, 11)
    conversion.convert(flat_dsn)
    assert contents(flat_dsn) == before
    conversion.split(flat_dsn)
    assert contents(flat_dsn) == before
    assert one(flat_dsn, "SELECT count(*) FROM ONLY equitie_part.transactions_clean_default") == 3
    conversion.undo(flat_dsn)
    assert contents(flat_dsn) == before


@pytest.mark.parametrize("boundary", [TODAY, add_months(TODAY, 1), add_months(TODAY, 3) + dt.timedelta(days=1)])
def test_a_boundary_that_is_none(flat_dsn: str, boundary: dt.date) -> None:
    with pytest.raises(ConversionError, match="must be the first day of a month"):
        conversion.convert(flat_dsn, boundary=boundary)


def test_a_boundary_that_is_asked_for(flat_dsn: str) -> None:
    conversion.convert(flat_dsn, boundary=add_months(TODAY, 30))
    found = conversion.plan(flat_dsn)
    assert (found.shape, found.boundary) == ("attached", add_months(TODAY, 30))


def test_a_lock_that_is_never_free_is_given_up_and_the_run_can_go_on(flat_dsn: str) -> None:
    patience = conversion.Patience(lock_timeout=0.02, wait=0.3)
    with owner(flat_dsn) as conn:
        with conn.transaction():
            conn.execute("SELECT FROM public.transactions_clean LIMIT 1")
            with pytest.raises(EquitieDataError, match=f"held by server process {conn.info.backend_pid}"):
                conversion.convert(flat_dsn, patience=patience)
        found = conversion.status(flat_dsn)
        assert found.state == "running"
        assert "go on" in found.advice
    assert conversion.convert(flat_dsn, patience=patience).outcome == "done"


def test_a_column_that_is_added_meanwhile_is_not_lost(flat_dsn: str) -> None:
    def alter(step: str, rows: int) -> None:
        if step == "exchange":
            with owner(flat_dsn) as conn:
                conn.execute("ALTER TABLE public.transactions_clean ADD COLUMN iban text DEFAULT 'x'")

    with pytest.raises(ConversionError, match="another column"):
        conversion.convert(flat_dsn, copy=True, advanced=alter)
    assert conversion.undo(flat_dsn).outcome == "abandoned"
    assert one(flat_dsn, "SELECT count(iban) FROM public.transactions_clean") == 1000


def test_a_partition_that_is_detached_meanwhile_does_not_come_back(flat_dsn: str) -> None:
    conversion.convert(flat_dsn)
    later = f"equitie_part.transactions_clean_{add_months(TODAY, 5):%Y_%m}"

    def detach(step: str, rows: int) -> None:
        if step == "exchange":
            with owner(flat_dsn) as conn:
                conn.execute(f"ALTER TABLE public.transactions_clean DETACH PARTITION {later}")

    with pytest.raises(ConversionError, match="was detached since"):
        conversion.split(flat_dsn, advanced=detach)
    assert conversion.undo(flat_dsn).outcome == "abandoned"
    with pytest.raises(ConversionError, match="exists, but is not a partition"):
        conversion.split(flat_dsn)
    with owner(flat_dsn) as conn:
        conn.execute(f"ALTER TABLE {later} RENAME TO kept")
    assert conversion.split(flat_dsn).outcome == "done"
    assert one(flat_dsn, "SELECT count(*) FROM equitie_part.kept") == 0


def test_a_snapshot_from_before_the_copy_is_waited_for(flat_dsn: str) -> None:
    count = "SELECT count(*) FROM public.transactions_clean"
    with owner(flat_dsn) as conn:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT FROM public.companies_clean")
        with pytest.raises(EquitieDataError, match=f"still open after .* process {conn.info.backend_pid}"):
            conversion.convert(flat_dsn, copy=True, patience=conversion.Patience(wait=0.2))
        assert conversion.status(flat_dsn).left[0] == "settle"
        assert conn.execute(count).fetchone() == (1000,)
        conn.execute("COMMIT")
    assert conversion.convert(flat_dsn, copy=True).outcome == "done"
    assert one(flat_dsn, count) == 1000


def test_a_write_with_a_snapshot_from_before_the_copy_is_refused_and_not_lost(flat_dsn: str) -> None:
    with owner(flat_dsn) as conn:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT FROM public.companies_clean")

        def write(step: str, rows: int) -> None:
            if step == "settle":
                for statement in (
                    "UPDATE public.transactions_clean SET amount = 0 WHERE transaction_id = 5",
                    "DELETE FROM public.transactions_clean WHERE transaction_id = 5",
                ):
                    conn.execute("SAVEPOINT before")
                    with pytest.raises(psycopg.errors.SerializationFailure, match="older than the copy"):
                        conn.execute(statement)
                    conn.execute("ROLLBACK TO before")
                conn.execute("COMMIT")

        assert conversion.convert(flat_dsn, copy=True, advanced=write).outcome == "done"
    assert one(flat_dsn, "SELECT amount FROM public.transactions_clean WHERE transaction_id = 5") == 5


def test_truncate_is_refused_while_a_copy_is_made(flat_dsn: str) -> None:
    def truncate(step: str, rows: int) -> None:
        if step == "verify":
            with owner(flat_dsn) as conn, pytest.raises(psycopg.errors.ObjectInUse):
                conn.execute("TRUNCATE public.transactions_clean")

    assert conversion.convert(flat_dsn, copy=True, advanced=truncate).outcome == "done"
    assert len(contents(flat_dsn)) == 1000


def test_a_copy_that_differs_is_not_put_to_use(flat_dsn: str) -> None:
    before = contents(flat_dsn)

    def damage(step: str, rows: int) -> None:
        if step == "verify":
            with owner(flat_dsn) as conn:
                conn.execute(
                    "UPDATE equitie_conversion.transactions_clean SET units = units + 1 WHERE transaction_id = 5"
                )

    with pytest.raises(ConversionError, match="The copy differs"):
        conversion.convert(flat_dsn, copy=True, advanced=damage)
    assert conversion.undo(flat_dsn).outcome == "abandoned"
    assert contents(flat_dsn) == before


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["insert", "amount", "date", "key", "delete", "delete deal", "rename deal", "rolled back"]),
        st.integers(1, 60),
        st.integers(-90, 40),
    ),
    max_size=6,
)


# Each example converts a table twice: a failure is reported as it is found, without minutes of making it smaller.
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_change_between_any_two_steps_is_in_the_new_table(
    server: EmbeddedServer, template: str, data: st.DataObject
) -> None:
    with fresh_database(server, template) as dbname:
        dsn = server.dsn(dbname)
        with owner(dsn) as conn, owner(dsn) as witness:

            def change(step: str, rows: int) -> None:
                if step in {"twin", "functions", "missing indexes", "constraints", "tidy"}:
                    return
                for kind, number, days in data.draw(CHANGES, label=step):
                    apply(conn, kind, number, days)

            witness.execute("CREATE TABLE public.expected AS TABLE public.transactions_clean")
            witness.execute(
                "CREATE FUNCTION public.follow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
                " IF TG_OP <> 'INSERT' THEN"
                " DELETE FROM public.expected WHERE transaction_id = OLD.transaction_id; END IF;"
                " IF TG_OP <> 'DELETE' THEN INSERT INTO public.expected SELECT NEW.*; END IF; RETURN NULL; END$$"
            )
            witness.execute(
                "CREATE TRIGGER follow AFTER INSERT OR UPDATE OR DELETE ON public.transactions_clean FOR EACH ROW"
                " EXECUTE FUNCTION public.follow()"
            )
            for operation in (
                lambda: conversion.convert(dsn, copy=True, advanced=change),
                lambda: conversion.undo(dsn, advanced=change),
            ):
                operation()
                missing = witness.execute(
                    "SELECT 'lost', t::text"
                    " FROM (TABLE public.expected EXCEPT ALL TABLE public.transactions_clean) AS t"
                    " UNION ALL"
                    " SELECT 'invented', t::text"
                    " FROM (TABLE public.transactions_clean EXCEPT ALL TABLE public.expected) AS t"
                ).fetchall()
                assert missing == []


def apply(conn: psycopg.Connection[Any], kind: str, number: int, days: int) -> None:
    day = TODAY + dt.timedelta(days=days)
    if kind == "insert":
        conn.execute(
            "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT d.deal_id, %s, %s, %s FROM public.deals_clean AS d ORDER BY 1 LIMIT 1",
            (1 + number % INVESTORS, day, number),
        )
    elif kind == "amount":
        conn.execute("UPDATE public.transactions_clean SET amount = %s WHERE transaction_id = %s", (days, number))
    elif kind == "date":
        conn.execute(
            "UPDATE public.transactions_clean SET transaction_date = %s WHERE transaction_id = %s", (day, number)
        )
    elif kind == "key":
        conn.execute(
            "UPDATE public.transactions_clean SET transaction_id = transaction_id + 1000000"
            " WHERE transaction_id = %s AND NOT EXISTS ("
            " SELECT FROM public.transactions_clean AS t"
            " WHERE t.transaction_id = transactions_clean.transaction_id + 1000000)",
            (number,),
        )
    elif kind == "delete":
        conn.execute("DELETE FROM public.transactions_clean WHERE transaction_id = %s", (number,))
    elif kind == "delete deal":
        conn.execute("DELETE FROM public.deals_clean WHERE deal_id = %s", (1 + number % DEALS,))
    elif kind == "rename deal":
        conn.execute("UPDATE public.deals_clean SET deal_id = deal_id + 100 WHERE deal_id = %s", (1 + number % DEALS,))
    else:
        with conn.transaction(force_rollback=True):
            conn.execute("DELETE FROM public.transactions_clean WHERE transaction_id %% 2 = %s", (number % 2,))


def test_the_command_line(flat_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = conversion.main([*arguments, "--dsn", flat_dsn])
        return code, capsys.readouterr().out

    code, out = run("plan", "--json")
    assert (code, json.loads(out)["method"]) == (0, "attach")
    code, out = run("convert")
    assert code == 0
    assert "exchange" in out
    assert "Readers and writers had to wait" in out
    assert run("plan")[1].splitlines()[2].startswith("split: ")
    assert json.loads(run("status", "--json")[1])["shape"] == "attached"
    assert json.loads(run("split", "--json")[1])["copied"] == 1000
    code, out = run("undo")
    assert code == 0
    assert "is flat" in out
    with owner(flat_dsn) as conn:
        conn.execute("CREATE MATERIALIZED VIEW public.m AS TABLE public.transactions_clean")
    code, out = run("plan")
    assert code == 1
    assert "in the way: " in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert run("convert")[0] == 1


def test_every_option_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/command-line.md").read_text("utf-8")
    section = page.split("## `python -m equitie_data partition`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([a-z, ]+) \| `(--[^`]+)` \|", section, re.MULTILINE)
    for command in ("plan", "convert", "split", "undo", "status"):
        exits(lambda name=command: conversion.main([name, "--help"]))
        helped = re.findall(r"^  (--[\w-]+(?: [A-Z=]+)?)(?=\s)", capsys.readouterr().out, re.MULTILINE)
        assert sorted(helped) == sorted(name for of, name in rows if of == "all" or command in of.split(", "))


def exits(call: Callable[[], object]) -> int:
    with pytest.raises(SystemExit) as caught:
        call()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("arguments", [[], ["melt"], ["convert", "--boundary", "soon"], ["split", "--wait", "0"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(lambda: conversion.main(arguments)) == 2
    assert "usage:" in capsys.readouterr().err


@given(st.dates(dt.date(1, 1, 1), dt.date(9000, 1, 1)), st.integers(0, 500), st.integers(0, 500))
def test_months_add_up(day: dt.date, first: int, second: int) -> None:
    assert add_months(add_months(day, first), second) == add_months(day, first + second)
    assert add_months(day, 0) == day.replace(day=1)
