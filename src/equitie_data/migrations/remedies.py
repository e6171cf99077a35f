"""The statement that would make a difference between two catalogs go away, where the catalogs alone can say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from equitie_data.migrations.grant import DATABASE_ROLES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["remedy_of"]


class _Thing(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def relation(self) -> str: ...


def remedy_of(
    thing: _Thing, wanted: Mapping[str, str], label: str | None = None, is_now: str | None = None
) -> str | None:
    """Return the statement that makes something as it should be.

    Args:
        thing: What it is about.
        wanted: Its properties as they should be.
        label: The property that differs; ``None`` if all of it is missing.
        is_now: The property as it is.
    """
    if label is None:
        parts = [_made(thing, wanted), *(_comment(thing, wanted) if wanted.get("comment") else ())]
        if thing.kind in {"function", "schema"}:
            # PostgreSQL lets everybody call a new function, and platforms grant more by default.
            noun = "ROUTINE" if thing.kind == "function" else "SCHEMA"
            parts.append(f"REVOKE ALL ON {noun} {thing.name} FROM PUBLIC, {', '.join(DATABASE_ROLES)}")
        parts += [_privileges(thing, each, wanted[each], None) for each in wanted if each.startswith("privileges of ")]
        return None if parts[0] is None else ";\n".join(part for part in parts if part)
    if label == "comment":
        return next(iter(_comment(thing, wanted)), None)
    if label.startswith("privileges of "):
        return _privileges(thing, label, wanted.get(label), is_now)
    return _altered(thing, wanted, label)


def _made(thing: _Thing, wanted: Mapping[str, str]) -> str | None:
    own_name = thing.name.partition(" of ")[0]
    definition = wanted.get("definition", "")
    if thing.kind == "schema":
        return f"CREATE SCHEMA {thing.name}"
    if thing.kind in {"trigger", "index", "function"} and wanted.get("is") != "an aggregate":
        made = definition.rstrip()
        return f"{made};\n{_firing(thing, wanted)}" if wanted.get("firing", "enabled") != "enabled" else made
    if thing.kind == "constraint":
        return f"ALTER TABLE {thing.relation} ADD CONSTRAINT {own_name} {definition}"
    if thing.kind == "policy":
        return f"CREATE POLICY {own_name} ON {thing.relation} {definition}"
    if thing.kind == "column" and "identity" not in wanted and "generation" not in wanted:
        column = thing.name.removeprefix(f"{thing.relation}.")
        default = f" DEFAULT {wanted['default']}" if "default" in wanted else ""
        required = " NOT NULL" if wanted.get("nullability") == "NOT NULL" else ""
        return f"ALTER TABLE {thing.relation} ADD COLUMN {column} {wanted['type']}{default}{required}"
    return None


def _altered(thing: _Thing, wanted: Mapping[str, str], label: str) -> str | None:
    should = wanted.get(label)
    own_name = thing.name.partition(" of ")[0]
    if thing.kind == "column":
        column = thing.name.removeprefix(f"{thing.relation}.")
        change = {
            "type": f"TYPE {should}",
            "default": "DROP DEFAULT" if should is None else f"SET DEFAULT {should}",
            "nullability": "SET NOT NULL" if should == "NOT NULL" else "DROP NOT NULL",
        }.get(label)
        return f"ALTER TABLE {thing.relation} ALTER COLUMN {column} {change}" if change else None
    if thing.kind == "constraint" and label == "validity":
        return f"ALTER TABLE {thing.relation} VALIDATE CONSTRAINT {own_name}"
    if thing.kind == "constraint" and label == "definition":
        return f"ALTER TABLE {thing.relation} DROP CONSTRAINT {own_name},\n  ADD CONSTRAINT {own_name} {wanted[label]}"
    if thing.kind == "index":
        return f"REINDEX INDEX CONCURRENTLY {thing.name}" if label == "validity" else None
    if thing.kind == "policy":
        return f"DROP POLICY {own_name} ON {thing.relation};\n{_made(thing, wanted)}"
    if thing.kind == "trigger":
        return _firing(thing, wanted) if label == "firing" else _replaced(wanted["definition"])
    if thing.kind == "function" and label == "definition" and wanted.get("is") != "an aggregate":
        return wanted["definition"].rstrip()
    if label == "row-level security" and should in {"on", "off"}:
        return f"ALTER TABLE {thing.name} {'ENABLE' if should == 'on' else 'DISABLE'} ROW LEVEL SECURITY"
    if label.startswith("trigger ") and thing.kind == "partition":
        # The audit's triggers; what makes them on a new partition makes them on this one.
        return f"SELECT equitie_private.track('{thing.name}')"
    if label == "owner":
        noun = {"function": "ROUTINE", "partition": "TABLE"}.get(thing.kind, thing.kind.upper())
        return f"ALTER {noun} {thing.name} OWNER TO CURRENT_USER"
    return None


def _replaced(definition: str) -> str:
    return definition.replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", 1)


def _firing(thing: _Thing, wanted: Mapping[str, str]) -> str:
    how = {"always": "ENABLE ALWAYS", "on replicas": "ENABLE REPLICA", "disabled": "DISABLE"}
    own_name = thing.name.partition(" of ")[0]
    return f"ALTER TABLE {thing.relation} {how.get(wanted['firing'], 'ENABLE')} TRIGGER {own_name}"


def _comment(thing: _Thing, wanted: Mapping[str, str]) -> tuple[str, ...]:
    text = "'" + wanted.get("comment", "").replace("'", "''") + "'"
    own_name, of, table = thing.name.partition(" of ")
    noun = {"function": "ROUTINE", "partition": "TABLE"}.get(thing.kind, thing.kind.upper())
    if thing.kind == "function" and wanted.get("is") == "an aggregate":
        noun = "AGGREGATE"
    if thing.kind == "table" and wanted.get("is") in {"a view", "a materialized view"}:
        noun = wanted["is"].removeprefix("a ").upper()
    return (f"COMMENT ON {noun} {own_name}{f' ON {table}' if of else ''} IS {text}",)


def _privileges(thing: _Thing, label: str, should: str | None, is_now: str | None) -> str | None:
    role = label.removeprefix("privileges of ")
    noun = {"column": "", "table": "TABLE ", "partition": "TABLE "}.get(thing.kind, f"{thing.kind.upper()} ")
    noun = "ROUTINE " if thing.kind == "function" else noun
    steps: list[str] = []
    if thing.kind == "column":
        column = thing.name.removeprefix(f"{thing.relation}.")
        if is_now:
            steps.append(f"REVOKE {_of_column(is_now, column)} ON {thing.relation} FROM {role}")
        if should:
            steps.append(f"GRANT {_of_column(should, column)} ON {thing.relation} TO {role}")
    else:
        if is_now:
            steps.append(f"REVOKE ALL ON {noun}{thing.name} FROM {role}")
        if should:
            steps.append(f"GRANT {should} ON {noun}{thing.name} TO {role}")
    return ";\n".join(steps) or None


def _of_column(privileges: str, column: str) -> str:
    return ", ".join(f"{privilege} ({column})" for privilege in privileges.split(", "))
