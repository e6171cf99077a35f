"""What is in a database's schemas, as facts that can be compared, and the differences in plain sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from equitie_data import _sql
from equitie_data.migrations.grant import DATABASE_ROLES
from equitie_data.migrations.remedies import remedy_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from psycopg import Connection

__all__ = ["SCHEMAS", "Catalog", "Difference", "differences", "read_catalog"]

SCHEMAS = ("public", "equitie_private", "equitie_part")
"""The schemas the migrations fill. In the first one, others may have tables of their own."""

_LONGEST_SHOWN = 100  # characters


@attrs.frozen(order=True)
class Object:
    """Something that has facts.

    Attributes:
        kind: ``table``, ``column``, ``index``, ...
        name: Its name.
        relation: The table it belongs to; empty if to none.
    """

    kind: str
    name: str
    relation: str


@attrs.frozen
class Catalog:
    """The facts about everything in some schemas.

    Attributes:
        objects: For each object, its properties with their values.
        months: For each partitioned table, the properties of each of its partitions but the default one, by its name.
    """

    objects: Mapping[Object, Mapping[str, str]]
    months: Mapping[str, Mapping[str, Mapping[str, str]]]


@attrs.frozen(kw_only=True)
class Difference:
    """One thing that is otherwise than the migrations would have made it.

    Attributes:
        sentence: What, for people.
        sql: A statement that makes it as it should be; ``None`` where only somebody who knows the rows can say.
        extra: Whether it is something of somebody's own beside what the migrations make.
    """

    sentence: str
    sql: str | None = None
    extra: bool = False


def read_catalog(
    conn: Connection[Any], schemas: Sequence[str] = SCHEMAS, rename: Callable[[str], str] = str
) -> Catalog:
    """Read what is in some schemas.

    Args:
        conn: The owner's session, with an empty search_path.
        schemas: The schemas that stand for `SCHEMAS`, in their order.
        rename: Turns what the server calls them into those names.
    """
    facts: dict[tuple[str, str], dict[str, str]] = {}
    relations: dict[tuple[str, str], str] = {}
    parameters = {"schemas": list(schemas), "roles": list(DATABASE_ROLES)}
    for kind, name, relation, label, value in conn.execute(_sql.query("catalog"), parameters):
        key = kind, rename(name)
        properties = facts.setdefault(key, {})
        if value is not None:
            properties[rename(label)] = rename(value)
        if label == "is":
            relations[key] = rename(relation)
    objects = {Object(*key, relations[key]): properties for key, properties in facts.items()}
    months: dict[str, dict[str, dict[str, str]]] = {}
    for thing in [each for each in objects if each.kind == "partition"]:
        properties = objects[thing]
        if properties["is"] == "a partition":
            months.setdefault(thing.relation, {})[thing.name] = objects.pop(thing)
    return Catalog(objects, months)


def differences(expected: Catalog, actual: Catalog) -> tuple[Difference, ...]:
    """Say what of a database is otherwise than it should be.

    Args:
        expected: What the migrations make.
        actual: What is there. Tables and functions in ``public`` that no migration makes are not looked at.
    """
    return (*_missing_and_other(expected, actual), *_extra(expected, actual), *_of_months(expected, actual))


def _missing_and_other(expected: Catalog, actual: Catalog) -> Iterator[Difference]:
    present = {thing.name for thing in actual.objects if thing.kind == "table"}
    by_name = {(thing.kind, thing.name): properties for thing, properties in actual.objects.items()}
    for thing in sorted(expected.objects, key=_order):
        wanted = expected.objects[thing]
        there = by_name.get((thing.kind, thing.name))
        if there is None:
            # What belongs to a table that is missing goes without saying.
            if thing.kind == "table" or not thing.relation or thing.relation in present:
                yield Difference(sentence=f"The {thing.kind} {thing.name} is missing.", sql=remedy_of(thing, wanted))
            continue
        for label in [*wanted, *(each for each in there if each not in wanted and each != "comment")]:
            should, is_now = wanted.get(label), there.get(label)
            if should != is_now:
                yield Difference(
                    sentence=_sentence(thing, label, should, is_now), sql=remedy_of(thing, wanted, label, is_now)
                )


def _extra(expected: Catalog, actual: Catalog) -> Iterator[Difference]:
    known = {(thing.kind, thing.name) for thing in expected.objects}
    tables = {thing.name for thing in expected.objects if thing.kind == "table"}
    for thing in sorted(actual.objects, key=_order):
        ours = thing.relation in tables or thing.name.startswith(tuple(f"{schema}." for schema in SCHEMAS[1:]))
        part_of_extra = thing.kind != "table" and ("table", thing.relation) not in known and thing.relation
        if (thing.kind, thing.name) in known or not ours or part_of_extra:
            continue
        told = thing.relation in {"", thing.name} or " of " in thing.name or thing.kind == "column"
        owner = "" if told else f" of {thing.relation}"
        # A policy can only widen what is seen, and a privilege too: nobody's own affair.
        yield Difference(
            sentence=f"The {thing.kind} {thing.name}{owner} is made by no migration.",
            extra=thing.kind != "policy",
        )


def _of_months(expected: Catalog, actual: Catalog) -> Iterator[Difference]:
    for relation, partitions in sorted(actual.months.items()):
        pattern = next(iter(expected.months.get(relation, {}).values()), None)
        if pattern is None:
            continue
        for name, there in sorted(partitions.items()):
            for label in sorted({*pattern, *there}):
                if pattern.get(label) != there.get(label):
                    thing = Object("partition", name, relation)
                    yield Difference(
                        sentence=_sentence(thing, label, pattern.get(label), there.get(label)),
                        sql=remedy_of(thing, pattern, label, there.get(label)),
                        extra=label.startswith(("index ", "constraint ")) and pattern.get(label) is None,
                    )


def _sentence(thing: Object, label: str, should: str | None, is_now: str | None) -> str:
    subject = f"The {thing.kind} {thing.name}"
    if label.startswith(("trigger ", "index ", "constraint ")) and (should is None or is_now is None):
        return f"{subject} {'lacks' if is_now is None else 'has'} the {label}{' of its own' if should is None else ''}."
    if label == "comment":
        return f"{subject} {'has no comment' if is_now is None else 'has another comment'}; it should have: {should}"
    if label == "is":
        return f"{subject} is {is_now}, and should be {should}."
    values = [value for value in (should, is_now) if value is not None]
    if any(len(value) > _LONGEST_SHOWN or "\n" in value for value in values):
        return f"{subject} has another {label} than the migrations give it."
    return f"{subject} has {_shown(label, is_now)}, and should have {_shown(label, should)}."


def _shown(label: str, value: str | None) -> str:
    return f"no {label}" if value is None else f"the {label} {value}"


def _order(thing: Object) -> tuple[int, str, str]:
    kinds = ("role", "schema", "type", "table", "column", "constraint", "index", "sequence", "function")
    return kinds.index(thing.kind) if thing.kind in kinds else len(kinds), thing.name, thing.relation
