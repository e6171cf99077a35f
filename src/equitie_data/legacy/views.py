"""Views that stand in for the old tables: the same names, columns and order, over the clean tables.

They run with the rights of whoever uses them, so row-level security holds through them. Where the platform wrote, an
INSTEAD OF trigger reads what is written as the migration read the old rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
from psycopg import sql

from equitie_data.legacy.composing import joined, name, raw, text
from equitie_data.legacy.kinds import TRANSACTION_KINDS
from equitie_data.legacy.reading import read_row

if TYPE_CHECKING:
    from equitie_data.legacy.details import Details
    from equitie_data.legacy.kinds import Field
    from equitie_data.legacy.sources import Column, Source

__all__ = ["View", "shown_kinds"]

_OF_ENTITY: Final = {
    "company": ("companies_clean", "company_id", "company_name"),
    "deal": ("deals_clean", "deal_id", "deal_name"),
    "investor": ("investors_clean", "investor_id", "full_name"),
}
_LABELS: Final = sql.SQL(
    "labels AS MATERIALIZED (SELECT n.kind, n.label, CASE WHEN count(DISTINCT n.id) = 1 THEN min(n.id) END AS id FROM ("
    "SELECT 'company' AS kind, equitie_private.legacy_name(c.company_name) AS label, c.company_id AS id"
    " FROM public.companies_clean AS c"
    " UNION ALL SELECT 'deal', equitie_private.legacy_name(d.deal_name), d.deal_id FROM public.deals_clean AS d"
    " UNION ALL SELECT 'deal', equitie_private.legacy_name(d.deal_code), d.deal_id FROM public.deals_clean AS d"
    " UNION ALL SELECT 'investor', equitie_private.legacy_name(i.full_name), i.investor_id"
    " FROM public.investors_clean AS i"
    ") AS n WHERE n.label IS NOT NULL GROUP BY n.kind, n.label), "
)


@attrs.frozen(kw_only=True)
class View:
    """The view in an old table's place.

    Attributes:
        source: The table.
        details: What goes on beside the clean rows.
        kinds: Kinds of rows it shows, if they are transactions.
        remapped: Whether any of them has another id than in the old table.
        has_details: Whether the table for details was made.
    """

    source: Source
    details: Details
    kinds: tuple[str, ...]
    remapped: bool
    has_details: bool

    @property
    def function(self) -> sql.Identifier:
        """The function behind its trigger."""
        return name("equitie_private", f"write_legacy_{self.source.number}")

    def create(self) -> list[sql.Composed]:
        """Return the statements that make the view, writable."""
        source, spec = self.source, self.source.spec
        columns = [sql.SQL("{} AS {}").format(self._shown(c), name(c.name)) for c in source.columns]
        join: sql.Composable = sql.SQL("")
        if self.has_details:
            join = sql.SQL("LEFT JOIN {} AS d ON d.{} = t.{}").format(
                self.details.identifier, name(self.details.own_key), name(spec.key)
            )
        where: sql.Composable = sql.SQL("")
        if spec.is_transaction:
            where = sql.SQL("WHERE t.transaction_type IN ({})").format(joined(map(text, self.kinds)))
        view = source.identifier
        return [
            sql.SQL("CREATE VIEW {} WITH (security_invoker = true) AS SELECT {} FROM {} AS t {} {}").format(
                view, joined(columns), name("public", spec.table), join, where
            ),
            sql.SQL("COMMENT ON VIEW {} IS {}").format(
                view,
                sql.Literal(f"Stands in for the old table of this name, over public.{spec.table}. New code uses that."),
            ),
            sql.SQL("REVOKE ALL ON {} FROM PUBLIC, anon, authenticated, equitie_staff, service_role").format(view),
            sql.SQL("GRANT SELECT ON {} TO authenticated, equitie_staff, service_role").format(view),
            sql.SQL("GRANT INSERT, UPDATE ON {} TO equitie_staff, service_role").format(view),
            sql.SQL("GRANT DELETE ON {} TO service_role").format(view),
            self._create_function(),
            sql.SQL("COMMENT ON FUNCTION {}() IS {}").format(
                self.function, sql.Literal(f"Trigger: writes to {source.label} go to public.{spec.table}.")
            ),
            sql.SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC, anon, authenticated, equitie_staff, service_role").format(
                self.function
            ),
            sql.SQL(
                "CREATE TRIGGER write_through INSTEAD OF INSERT OR UPDATE OR DELETE ON {}"
                " FOR EACH ROW EXECUTE FUNCTION {}()"
            ).format(view, self.function),
        ]

    def drop(self) -> list[sql.Composed]:
        """Return the statements that remove it."""
        return [
            sql.SQL("DROP VIEW IF EXISTS {}").format(self.source.identifier),
            sql.SQL("DROP FUNCTION IF EXISTS {}()").format(self.function),
        ]

    def _shown(self, column: Column) -> sql.Composable:
        """Return what a column of the old table shows now."""
        source = self.source
        home = source.home_of(column)
        if home == source.spec.key or column.name in source.twins:
            own = sql.SQL("t.{}").format(name(source.spec.key))
            return sql.SQL("coalesce(d.equitie_legacy_id, {})").format(own) if self.remapped else own
        if home is not None:
            return self._converted(column, home)
        carried = {each.name for each in source.carried}
        if column.name not in carried:
            return sql.SQL("NULL::{}").format(raw(column.type))
        value = sql.SQL("d.{}").format(name(column.name))
        field = next((f for f in source.spec.fields if f.refers_to and column in source.filling(f)), None)
        if field is not None and column.is_text:
            # A row written since has no spelling of its own: show the name of who it refers to.
            assert field.refers_to is not None  # noqa: S101 - the line above looked
            table, key, label = _OF_ENTITY[field.refers_to]
            return sql.SQL("coalesce({}::text, (SELECT n.{} FROM public.{} AS n WHERE n.{} = t.{}))").format(
                value, name(label), name(table), name(key), name(field.column)
            )
        return sql.SQL("{}::{}").format(value, raw(column.type))

    def _converted(self, column: Column, home: str) -> sql.Composable:
        value: sql.Composable = sql.SQL("t.{}").format(name(home))
        type_ = next((f.type for f in self.source.spec.fields if f.column == home and not f.refers_to), "integer")
        if column.is_text:
            if type_ == "date":
                return sql.SQL("to_char({}, 'YYYY-MM-DD')").format(value)
            return sql.SQL("{}::text").format(value)
        if type_ == "date" and column.type == "timestamp with time zone":
            return sql.SQL("({}::timestamp AT TIME ZONE 'UTC')").format(value)
        if type_ == "date" and column.type == "timestamp without time zone":
            return sql.SQL("{}::timestamp").format(value)
        if type_ == "timestamptz" and column.type in {"timestamp without time zone", "date"}:
            converted = sql.SQL("({} AT TIME ZONE 'UTC')").format(value)
            return sql.SQL("{}::date").format(converted) if column.type == "date" else converted
        if column.type in {"real", "double precision"}:
            return sql.SQL("{}::double precision").format(value)
        return value

    @property
    def _as_written(self) -> Source:
        """The source as who writes to the view sees it: what it shows has the clean tables' types."""
        shown = []
        for column in self.source.columns:
            home = self.source.home_of(column)
            field = next((f for f in self.source.spec.fields if f.column == home), None)
            type_ = column.type
            if home in {self.source.spec.key, "parent_transaction_id"}:
                type_ = column.type if column.is_text else "bigint"
            elif field is not None and field.type == "numeric" and column.is_number:
                type_ = "double precision" if column.type in {"real", "double precision"} else "numeric"
            shown.append(attrs.evolve(column, type=type_))
        return attrs.evolve(self.source, columns=tuple(shown))

    def _create_function(self) -> sql.Composed:
        source, spec = self._as_written, self.source.spec
        reading = read_row(source, looked_up=False)
        key = source.key
        assert key is not None  # noqa: S101 - a table without an id is a problem that stops the run
        fields = [field for field in spec.fields if field.column in reading.values]
        columns = [field.column for field in fields]
        values = [reading.values[column] for column in columns]
        if spec.is_transaction:
            columns += ["transaction_type", "parent_transaction_id"]
            values += [sql.SQL("r.kind"), sql.SQL("r.parent_ref")]
        changed = [self._changed(source, field) for field in fields]
        if spec.is_transaction:
            changed += [
                self._differs([source.type_column] if source.type_column else []),
                self._differs([source.parent] if source.parent else []),
            ]
        types = {f.column: "integer" if f.refers_to else f.type for f in fields} | {"parent_transaction_id": "bigint"}
        # Only what changes: staff may not write every column.
        assigned = [
            sql.SQL("CASE WHEN {} THEN {} END").format(
                each,
                sql.Literal(
                    sql.SQL("{} = ($1 ->> {})::{}")
                    .format(name(column), sql.Literal(column), raw(types.get(column, "text")))
                    .as_string(None)
                ),
            )
            for column, each in zip(columns, changed, strict=True)
            # The clean table's own trigger says when a row changed.
            if each is not None and column != "updated_at"
        ]
        readable = sql.SQL(" OR ").join([each for each in changed if each is not None] or [sql.SQL("false")])
        row_type = name("public", spec.table)
        body = sql.SQL(
            """
DECLARE
  w record;
  row_id bigint;
  day date;
  assigned text;
  affected bigint;
  given jsonb;
BEGIN
  IF TG_OP <> 'INSERT' THEN
    {find_row}
  END IF;
  IF TG_OP = 'DELETE' THEN
    {delete_details}
    DELETE FROM {row_type} AS t WHERE t.{key} = row_id{on_day};
    IF NOT FOUND THEN
      RETURN NULL;
    END IF;
    RETURN OLD;
  END IF;

  {refusals}
  WITH {labels}read AS (
    SELECT {read} FROM (SELECT {new}) AS s
  )
  SELECT {reason} AS reason, r.legacy_id AS given_id, {values}
  INTO STRICT w
  FROM read AS r
  {joins};

  {own_kind}
  IF TG_OP = 'INSERT' THEN
    IF w.reason IS NOT NULL THEN
      RAISE EXCEPTION 'the row cannot be written: %', w.reason USING ERRCODE = 'check_violation';
    END IF;
    given := jsonb_strip_nulls(to_jsonb(w) - 'reason' - 'given_id' || jsonb_build_object({key_name}, w.given_id));
    SELECT string_agg(quote_ident(g.column_name), ', ')
    INTO STRICT assigned
    FROM jsonb_object_keys(given) AS g (column_name);
    EXECUTE format({insert}, assigned) INTO STRICT row_id USING given;
  ELSE
    IF NEW.{legacy_key} IS DISTINCT FROM OLD.{legacy_key} THEN
      RAISE EXCEPTION 'the id of a row cannot be changed through this view' USING ERRCODE = 'check_violation';
    END IF;
    IF w.reason IS NOT NULL AND ({readable}) THEN
      RAISE EXCEPTION 'the row cannot be written: %', w.reason USING ERRCODE = 'check_violation';
    END IF;
    assigned := concat_ws(', ', {assigned});
    IF assigned <> '' THEN
      EXECUTE {update} || assigned || {where} USING to_jsonb(w), row_id, day;
      GET DIAGNOSTICS affected = ROW_COUNT;
      IF affected = 0 THEN
        RETURN NULL;
      END IF;
    END IF;
  END IF;
  {write_details}
  {give_back}
  RETURN NEW;
END
"""
        ).format(
            row_type=row_type,
            key=name(spec.key),
            legacy_key=name(key.name),
            find_row=self._find_row(key),
            delete_details=self._delete_details(),
            on_day=sql.SQL(" AND t.transaction_date = day") if spec.is_transaction else sql.SQL(""),
            refusals=self._refusals(),
            own_kind=self._own_kind(),
            labels=_LABELS
            if any(f.refers_to and not c.is_number for f in fields for c in source.filling(f)) or spec.resolved
            else sql.SQL(""),
            read=joined(sql.SQL("{} AS {}").format(value, name(alias)) for alias, value in reading.read.items()),
            new=joined(sql.SQL("NEW.{c} AS {c}").format(c=name(column.name)) for column in source.columns),
            reason=reading.reason,
            values=joined(sql.SQL("{} AS {}").format(v, name(c)) for c, v in zip(columns, values, strict=True)),
            joins=reading.joins,
            key_name=sql.Literal(spec.key),
            insert=sql.Literal(
                f"INSERT INTO public.{spec.table} (%1$s)"
                f" SELECT %1$s FROM jsonb_populate_record(NULL::public.{spec.table}, $1)"
                f" RETURNING {spec.key}"
            ),
            assigned=joined(assigned),
            update=sql.Literal(f"UPDATE public.{spec.table} AS t SET "),
            where=sql.Literal(
                f" WHERE t.{spec.key} = $2" + (" AND t.transaction_date = $3" if spec.is_transaction else "")
            ),
            readable=readable,
            write_details=self._write_details(),
            give_back=joined(
                [
                    sql.SQL("IF TG_OP = 'INSERT' THEN NEW.{} := row_id; END IF;").format(name(column))
                    for column in [key.name, *source.twins]
                ],
                "\n  ",
            ),
        )
        return sql.SQL(
            "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS {}"
        ).format(self.function, sql.Literal(body.as_string(None)))

    def _find_row(self, key: Column) -> sql.Composed:
        spec = self.source.spec
        if not spec.is_transaction:
            return sql.SQL("row_id := OLD.{};").format(name(key.name))
        find: list[sql.Composable] = []
        if self.remapped:
            find.append(
                sql.SQL(
                    "SELECT d.equitie_transaction_id INTO row_id FROM {} AS d"
                    " WHERE d.equitie_legacy_id = OLD.{}::bigint AND EXISTS ("
                    "SELECT FROM public.get_transaction(d.equitie_transaction_id) AS g"
                    " WHERE g.transaction_type IN ({}));"
                ).format(self.details.identifier, name(key.name), joined(map(text, self.kinds)))
            )
        find += [
            sql.SQL("row_id := coalesce(row_id, OLD.{}::bigint);").format(name(key.name)),
            sql.SQL("SELECT g.transaction_date INTO day FROM public.get_transaction(row_id) AS g;"),
        ]
        return joined(find, "\n    ")

    def _changed(self, source: Source, field: Field) -> sql.Composable | None:
        columns = list(source.filling(field))
        for factor in field.product or ():
            columns += source.filling(next(f for f in source.spec.fields if f.column == factor))
        if field.parent and source.parent is not None:
            columns.append(source.parent)
        return self._differs(columns)

    @staticmethod
    def _differs(columns: list[Column]) -> sql.Composable | None:
        if not columns:
            return None
        # By their text: json and the like have no equality.
        return joined(
            [sql.SQL("NEW.{c}::text IS DISTINCT FROM OLD.{c}::text").format(c=name(c.name)) for c in columns], " OR "
        )

    def _own_kind(self) -> sql.Composable:
        """Refuse a row that the view would not show."""
        if self.source.type_column is None:
            return sql.SQL("")
        return sql.SQL(
            "IF w.transaction_type NOT IN ({}) THEN RAISE EXCEPTION {} USING ERRCODE = 'check_violation'; END IF;"
        ).format(
            joined(map(text, self.kinds)),
            sql.Literal(f"transactions of type {', '.join(self.kinds)} are written here, others to transactions_clean"),
        )

    def _refusals(self) -> sql.Composable:
        """Refuse what has no place any more, instead of dropping it silently."""
        source = self.source
        carried = {column.name for column in source.carried}
        gone = [
            column.name
            for column in source.columns
            if source.home_of(column) is None and column.name not in carried and column.name not in source.twins
        ]
        if not gone:
            return sql.SQL("")
        return sql.SQL(
            "IF num_nonnulls({}) > 0 THEN RAISE EXCEPTION {} USING ERRCODE = 'check_violation'; END IF;"
        ).format(
            joined(sql.SQL("NEW.{}").format(name(column)) for column in gone),
            sql.Literal(f"{', '.join(gone)}: nothing can be written there any more".replace("%", "%%")),
        )

    def _delete_details(self) -> sql.Composable:
        if not self.has_details:
            return sql.SQL("")
        return sql.SQL("DELETE FROM {} AS d WHERE d.{} = row_id;").format(
            self.details.identifier, name(self.details.own_key)
        )

    def _write_details(self) -> sql.Composable:
        carried = [column.name for column in self.source.carried]
        if not self.has_details or not carried:
            return sql.SQL("")
        columns = [name(self.details.own_key)]
        values: list[sql.Composable] = [sql.SQL("row_id")]
        if self.details.is_transactions:
            columns.append(name("equitie_investor_id"))
            values.append(sql.SQL("(SELECT g.investor_id FROM public.get_transaction(row_id) AS g)"))
        cast = {
            column: sql.SQL("NEW.{}::{}").format(name(column), raw(self.details.columns[column])) for column in carried
        }
        return sql.SQL(
            "IF (TG_OP = 'INSERT' AND num_nonnulls({given}) > 0) OR (TG_OP = 'UPDATE' AND ({differs})) THEN"
            " INSERT INTO {table} ({columns}) VALUES ({values})"
            " ON CONFLICT ({key}) DO UPDATE SET {assigned}; END IF;"
        ).format(
            given=joined(sql.SQL("NEW.{}").format(name(column)) for column in carried),
            differs=joined(
                [sql.SQL("NEW.{c}::text IS DISTINCT FROM OLD.{c}::text").format(c=name(c)) for c in carried], " OR "
            ),
            table=self.details.identifier,
            columns=joined([*columns, *map(name, carried)]),
            values=joined([*values, *cast.values()]),
            key=name(self.details.own_key),
            assigned=joined(sql.SQL("{c} = excluded.{c}").format(c=name(column)) for column in carried),
        )


def shown_kinds(source: Source, found: set[str]) -> tuple[str, ...]:
    """Return the kinds a view shows: what the table could hold and did, its own at least."""
    if source.type_column is None:
        return (source.kind,)
    held = tuple(kind for kind in TRANSACTION_KINDS if kind in found)
    return held or TRANSACTION_KINDS
