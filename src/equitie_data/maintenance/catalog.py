"""Reads what stands: policies, partitions, late rows, holds, retired partitions."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import attrs
from psycopg import sql

from equitie_data import _sql
from equitie_data.errors import ConfigurationError
from equitie_data.maintenance.period import Period
from equitie_data.maintenance.plan import LateMonth, Partition, RetiredPartition, TableState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg import Connection

__all__ = ["Policy", "read_policies", "read_state", "utc_now"]

_SHORTEST = Period(months=1)


@attrs.frozen(kw_only=True)
class Policy:
    """What is wanted of one table.

    Attributes:
        parent: The table, with its schema.
        months_ahead: How many months after the current one have a partition.
        keep: How long rows are kept; ``None`` for ever.
        amount_column: Column whose sum is a control total.
    """

    parent: str
    months_ahead: int
    keep: Period | None
    amount_column: str | None


def read_policies(
    conn: Connection[Any], *, months_ahead: int | None = None, keep: Mapping[str, Period] | None = None
) -> tuple[Policy, ...]:
    """Read the policies, with what this one run wants otherwise.

    Args:
        conn: The owner's session.
        months_ahead: Instead of the policies'.
        keep: By table, instead of its policy's.

    Raises:
        ConfigurationError: A table of ``keep`` has no policy, or a period is too short to be meant.
    """
    keep = keep or {}
    policies = []
    for parent, ahead, months, days, amount_column, *_ in conn.execute(_sql.query("maintenance_policies")):
        policy_keep = None if months is None else Period(months=months, days=days)
        policies.append(
            Policy(
                parent=parent,
                months_ahead=ahead if months_ahead is None else months_ahead,
                keep=keep.get(parent, policy_keep),
                amount_column=amount_column,
            )
        )
    unknown = sorted(set(keep) - {policy.parent for policy in policies})
    if unknown:
        raise ConfigurationError(f"{unknown[0]} has no retention policy; there are ones for {_names(policies)}.")
    today = dt.date(2000, 3, 31)
    for period in keep.values():
        if period.before(today) > _SHORTEST.before(today):
            raise ConfigurationError(f"Rows cannot be kept for less than a month, {period} was asked for.")
    return tuple(policies)


def read_state(conn: Connection[Any], policy: Policy, today: dt.date) -> TableState:
    """Read one table as it stands."""
    cutoff = policy.keep.before(today) if policy.keep is not None else None
    (built,) = conn.execute(
        "SELECT m.key_column, m.default_partition::text, pg_catalog.pg_relation_size(m.default_partition),"
        " (SELECT a.atttypid = 'date'::regtype FROM pg_catalog.pg_attribute AS a"
        "  WHERE a.attrelid = %(parent)s::regclass AND a.attname = m.key_column),"
        " EXISTS (SELECT FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = %(parent)s::regclass"
        "  AND a.attname = 'created_at' AND a.atttypid = 'timestamptz'::regtype AND NOT a.attisdropped)"
        " FROM equitie_private.month_partitioning(%(parent)s::regclass) AS m",
        {"parent": policy.parent},
    ).fetchall()
    key_column, default_partition, default_bytes, key_is_date, knows_arrival = built
    partitions = tuple(
        Partition(name=name, start=start, end=end, detach_pending=pending, holds=tuple(holds))
        for name, start, end, pending, holds in conn.execute(
            _sql.query("maintenance_partitions"), {"parent": policy.parent, "cutoff": cutoff}
        )
    )
    drain = conn.execute(
        "SELECT drain_id FROM equitie_private.partition_drains WHERE parent = %s", [policy.parent]
    ).fetchone()
    return TableState(
        parent=policy.parent,
        months_ahead=policy.months_ahead,
        cutoff=cutoff,
        partitions=partitions,
        late=_read_late(conn, default_partition, key_column, key_is_date=key_is_date, knows_arrival=knows_arrival),
        default_partition=default_partition,
        default_bytes=default_bytes,
        drain_id=None if drain is None else drain[0],
        retired=tuple(
            RetiredPartition(
                retired_id=retired_id,
                name=name,
                table=table,
                state=state,
                detached_at=detached_at,
                rows=rows,
                archive_file=file,
                holds=tuple(holds),
            )
            for retired_id, name, table, state, detached_at, rows, file, holds in conn.execute(
                _sql.query("maintenance_retired"), {"parent": policy.parent}
            )
        ),
    )


def _read_late(
    conn: Connection[Any], default_partition: str, key_column: str, *, key_is_date: bool, knows_arrival: bool
) -> tuple[LateMonth, ...]:
    key = sql.Identifier(key_column)
    moment = sql.SQL("{}::timestamp" if key_is_date else "({} AT TIME ZONE 'UTC')").format(key)
    # Python's calendar ends before PostgreSQL's; what lies beyond has no month.
    month = sql.SQL(
        "CASE WHEN isfinite({key}) AND extract(year FROM {moment}) BETWEEN 1 AND 9999"
        " THEN date_trunc('month', {moment})::date END"
    ).format(key=key, moment=moment)
    schema, _, table = default_partition.partition(".")
    rows = conn.execute(
        sql.SQL("SELECT {month}, count(*), {since} FROM ONLY {table} GROUP BY 1 ORDER BY 1").format(
            month=month,
            since=sql.SQL("min(created_at)" if knows_arrival else "NULL::timestamptz"),
            table=sql.Identifier(schema.strip('"'), table.strip('"')),
        )
    )
    return tuple(LateMonth(month=month, rows=count, since=since) for month, count, since in rows)


def utc_now(conn: Connection[Any]) -> dt.datetime:
    """Return the server's time; the client's clock has no say in what expires."""
    row = conn.execute("SELECT clock_timestamp()").fetchone()
    if row is None:
        raise AssertionError("a SELECT without FROM returns a row")
    now: dt.datetime = row[0]
    return now.astimezone(dt.timezone.utc)


def _names(policies: list[Policy]) -> str:
    return ", ".join(policy.parent for policy in policies)
