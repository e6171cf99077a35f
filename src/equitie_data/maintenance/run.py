"""One maintenance run: reads what stands, does what the plan says, step by step, and says what is left."""

from __future__ import annotations

import datetime as dt
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import psycopg
from psycopg.types.json import Jsonb

from equitie_data import _sql
from equitie_data.cli import Progress
from equitie_data.errors import ArchiveError, MaintenanceError
from equitie_data.maintenance.catalog import Policy, read_policies, read_state, utc_now
from equitie_data.maintenance.drain import DrainedElsewhereError, drain_months, finish_former_drain
from equitie_data.maintenance.plan import Limits, RetiredPartition, TablePlan, TableState, overdue, plan_table
from equitie_data.maintenance.report import MaintenanceReport, MaintenanceStep
from equitie_data.maintenance.retire import archive_retired, detach_partition, drop_retired, settle_retired
from equitie_data.maintenance.session import Busy, Locking, open_session, patiently, reason_of, take_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from psycopg import Connection

    from equitie_data.maintenance.period import Period

__all__ = ["Options", "maintain"]


_STARTS: Final = 3


def _ignore(_moment: Any) -> None:
    """Nobody listens."""


@attrs.frozen(kw_only=True)
class Options:
    """What one run is told; see `maintain`."""

    months_ahead: int | None = None
    keep: Mapping[str, Period] | None = None
    archive_dir: Path | None = None
    drop_after: dt.timedelta = dt.timedelta(days=30)
    locking: Locking = attrs.field(factory=Locking)
    limits: Limits = attrs.field(factory=Limits)
    today: dt.date | None = None
    on_step: Callable[[MaintenanceStep], None] = _ignore
    boundary: Callable[[str], None] = _ignore


def maintain(
    dsn: str,
    *,
    dry_run: bool = False,
    months_ahead: int | None = None,
    keep: Mapping[str, Period] | None = None,
    archive_dir: Path | str | None = None,
    drop_after: dt.timedelta = dt.timedelta(days=30),
    lock_timeout: float = 0.05,
    patience: float = 60.0,
    wait: float = 10.0,
    today: dt.date | None = None,
    on_step: Callable[[MaintenanceStep], None] | None = None,
) -> MaintenanceReport:
    """Bring the partitioned tables to where they ought to be today; a run may be repeated, interrupted and killed.

    In this order: finish interrupted detaches, make the months ahead, move late rows to their months, retire what has
    expired (detach, archive, drop), analyze parents, run the tasks. What cannot be done is reported, and does not keep
    the rest from being done.

    Args:
        dsn: The database, as the owner of its tables.
        dry_run: Say what would be done, and change nothing.
        months_ahead: How many months after the current one to have; the policies' when ``None``.
        keep: By table, how long rows are kept, instead of its policy.
        archive_dir: An existing directory for archives. Without one nothing is archived, and nothing dropped.
        drop_after: How long a retired partition's table stays, from its detaching on.
        lock_timeout: Seconds that one try waits for its locks; nobody waits behind it for much longer.
        patience: Seconds until a step that cannot have its locks is left to the next run.
        wait: Seconds to wait for another run to end.
        today: Another day to count from, for rehearsals; by default the server's, UTC.
        on_step: Told of every step once it is done.

    Raises:
        MaintenanceError: Another run is at work, the role is not the owner, or the connection was lost.
        UnavailableError: The server cannot be reached.
        ConfigurationError: An argument cannot be meant.
    """
    directory = None if archive_dir is None else Path(archive_dir)
    if directory is not None and not directory.is_dir():
        raise MaintenanceError(
            f"The archive directory {directory} does not exist: create it, or correct --archive-dir."
        )
    options = Options(
        months_ahead=months_ahead,
        keep=keep,
        archive_dir=directory,
        drop_after=drop_after,
        locking=Locking(timeout=lock_timeout, patience=patience),
        today=today,
        on_step=on_step or _ignore,
    )
    with open_session(dsn) as conn:
        if dry_run:
            return rehearse(conn, options)
        with take_turn(conn, wait):
            return _Run(conn, options).run()


def rehearse(conn: Connection[Any], options: Options) -> MaintenanceReport:
    """Say what a run would do, reading only."""
    started = time.monotonic()
    steps: list[MaintenanceStep] = []
    notes: list[str] = []
    late: list[str] = []
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        for policy in read_policies(conn, months_ahead=options.months_ahead, keep=options.keep):
            state, plan, now = _look(conn, policy, options)
            steps += _planned_steps(state, plan, options)
            notes += plan.notes()
            late += overdue(state, plan, now)
        notes += strangers(conn)
        tasks = conn.execute("SELECT s.task FROM equitie_private.maintenance_steps() AS s WHERE s.kind = 'task'")
        steps += [MaintenanceStep(kind="task", table="", subject=name) for (name,) in tasks]
    return MaintenanceReport(
        run_id=None,
        steps=tuple(steps),
        not_done=(),
        failures=(),
        overdue=tuple(late),
        notes=tuple(notes),
        seconds=round(time.monotonic() - started, 3),
    )


def strangers(conn: Connection[Any]) -> list[str]:
    """Return a sentence on every table among the partitions that is none."""
    return [
        f"{name} is no partition and was not retired by maintenance: its rows are in no table's reach."
        for (name,) in conn.execute(_sql.query("maintenance_strangers"))
    ]


@attrs.define(eq=False)
class _Run:
    conn: Connection[Any]
    options: Options
    steps: list[MaintenanceStep] = attrs.field(factory=list)
    not_done: list[str] = attrs.field(factory=list)
    failures: list[str] = attrs.field(factory=list)

    def run(self) -> MaintenanceReport:
        started = time.monotonic()
        (run_id,) = self.conn.execute("SELECT equitie_private.begin_maintenance_run('command')").fetchone() or (None,)
        self.options.boundary("run begun")
        policies = read_policies(self.conn, months_ahead=self.options.months_ahead, keep=self.options.keep)
        for policy in policies:
            self._finish_detaches(policy)
            self._make_months(policy)
            self._retire(policy)
        for policy in policies:
            self._analyze(policy)
        self._run_tasks()
        late: list[str] = []
        notes: list[str] = []
        for policy in policies:
            state, plan, now = _look(self.conn, policy, self.options)
            late += overdue(state, plan, now)
            notes += plan.notes()
        notes += strangers(self.conn)
        report = MaintenanceReport(
            run_id=run_id,
            steps=tuple(self.steps),
            not_done=tuple(self.not_done),
            failures=tuple(self.failures),
            overdue=tuple(late),
            notes=tuple(notes),
            seconds=round(time.monotonic() - started, 3),
        )
        self.conn.execute(
            "SELECT equitie_private.finish_maintenance_run(%s, %s, %s)",
            [run_id, report.outcome, Jsonb(report.to_dict())],
        )
        return report

    def _finish_detaches(self, policy: Policy) -> None:
        state = read_state(self.conn, policy, self._today())
        for partition in state.partitions:
            if not partition.detach_pending:
                continue

            def finalize(name: str = partition.name) -> tuple[int | None, int]:
                _, tries = patiently(
                    self.conn,
                    self.options.locking,
                    "SELECT equitie_private.finalize_detach(%s, %s::regclass, %s, %s)",
                    [policy.parent, name, state.cutoff, self.options.locking.milliseconds],
                )
                return None, tries

            self._step("finalize", policy.parent, partition.name, finalize)

    def _make_months(self, policy: Policy) -> None:
        self._finish_former_drain(policy)
        locking, limits = self.options.locking, self.options.limits
        tried: dict[tuple[dt.date, ...], int] = {}
        while True:
            state, plan, _ = _look(self.conn, policy, self.options)
            groups = [group for group in plan.drain if tried.get(group, 0) < _STARTS]
            if not groups:
                break
            group = groups[0]
            rows = sum(each.rows for each in state.late if each.month in group)

            def drain(group: tuple[dt.date, ...] = group, rows: int = rows) -> tuple[int | None, int]:
                drain_months(self.conn, policy.parent, group, locking, self.options.boundary)
                return rows, 1

            tried[group] = tried.get(group, 0) + 1
            try:
                if not self._step("drain", policy.parent, _names(policy.parent, group), drain):
                    tried[group] = _STARTS
            except DrainedElsewhereError:
                self.options.boundary("drain starts over")
                if tried[group] == _STARTS:
                    names = _names(policy.parent, group)
                    self.not_done.append(f"drain {names}: others moved its rows meanwhile, {_STARTS} times.")
        for month in plan.make:

            def make(month: dt.date = month) -> tuple[int | None, int]:
                return patiently(
                    self.conn,
                    locking,
                    "SELECT equitie_private.make_month(%s::regclass, %s, %s, %s)",
                    [policy.parent, month, limits.rows, locking.milliseconds],
                )

            self._step("month", policy.parent, _names(policy.parent, (month,)), make)

    def _finish_former_drain(self, policy: Policy) -> None:
        row = self.conn.execute(
            "SELECT d.drain_id, d.months FROM equitie_private.partition_drains AS d WHERE d.parent = %s",
            [policy.parent],
        ).fetchone()
        if row is None:
            return

        def finish() -> tuple[int | None, int]:
            return finish_former_drain(self.conn, row[0], self.options.locking, self.options.boundary), 1

        with suppress(DrainedElsewhereError):
            self._step("drain", policy.parent, f"{_names(policy.parent, row[1])}, begun by a former run", finish)

    def _retire(self, policy: Policy) -> None:
        _, plan, _ = _look(self.conn, policy, self.options)
        locking, directory = self.options.locking, self.options.archive_dir
        cutoff = read_state(self.conn, policy, self._today()).cutoff
        if cutoff is not None:
            for partition in plan.retire:

                def detach(partition: Any = partition) -> tuple[int | None, int]:
                    return None, detach_partition(self.conn, policy.parent, partition, cutoff, locking)

                self._step("detach", policy.parent, partition.name, detach)
        # Former runs may have left others in any state.
        for retired in read_state(self.conn, policy, self._today()).retired:
            self._settle_and_archive(policy, retired, directory)
        _, plan, _ = _look(self.conn, policy, self.options)
        for retired in plan.drop:

            def drop(retired: RetiredPartition = retired) -> tuple[int | None, int]:
                return retired.rows, drop_retired(self.conn, retired, directory or Path(), locking)

            self._step("drop", policy.parent, f"equitie_part.{retired.table}", drop)

    def _settle_and_archive(self, policy: Policy, retired: RetiredPartition, directory: Path | None) -> None:
        boundary = self.options.boundary
        rows = retired.rows
        if retired.state == "detached":

            def settle() -> tuple[int | None, int]:
                nonlocal rows
                rows, tries = settle_retired(self.conn, retired.retired_id, self.options.locking, boundary)
                return rows, tries

            self._step("settle", policy.parent, f"equitie_part.{retired.table}", settle)
        if rows is None or retired.state == "archived" or directory is None:
            return
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(f"archive {retired.name}", unit="bytes"))

            def archive() -> tuple[int | None, int]:
                archive_retired(self.conn, policy, retired.retired_id, directory, boundary=boundary, progress=progress)
                return rows, 1

            self._step("archive", policy.parent, f"equitie_part.{retired.table}", archive)

    def _analyze(self, policy: Policy) -> None:
        def analyze() -> tuple[int | None, int] | None:
            row = self.conn.execute("SELECT equitie_private.analyze_parent(%s)", [policy.parent]).fetchone()
            return (None, 1) if row == (True,) else None

        self._step("analyze", policy.parent, policy.parent, analyze)

    def _run_tasks(self) -> None:
        tasks = self.conn.execute("SELECT s.task FROM equitie_private.maintenance_steps() AS s WHERE s.kind = 'task'")
        for (name,) in tasks.fetchall():

            def call(name: str = name) -> tuple[int | None, int]:
                try:
                    row = self.conn.execute("SELECT equitie_private.run_maintenance_task(%s)", [name]).fetchone()
                except psycopg.Error as error:
                    if not self.conn.closed:
                        self.conn.execute("SELECT equitie_private.record_task_error(%s, %s)", [name, reason_of(error)])
                    raise
                return (None if row is None else row[0]), 1

            self._step("task", "", name, call)

    def _step(self, kind: str, table: str, subject: str, action: Callable[[], tuple[int | None, int] | None]) -> bool:
        started = time.monotonic()
        try:
            done = action()
        except Busy as busy:
            self.not_done.append(f"{kind} {subject}: {busy}.")
            return False
        except (MaintenanceError, ArchiveError) as error:
            self.failures.append(str(error))
            return False
        except psycopg.Error as error:
            if self.conn.closed:
                raise
            self.failures.append(f"{kind} {subject}: {reason_of(error)}.")
            return False
        if done is not None:
            step = MaintenanceStep(
                kind=kind,
                table=table,
                subject=subject,
                rows=done[0],
                tries=done[1],
                seconds=round(time.monotonic() - started, 3),
            )
            self.steps.append(step)
            self.options.on_step(step)
        self.options.boundary(f"{kind} done")
        return True

    def _today(self) -> dt.date:
        return self.options.today or utc_now(self.conn).date()


def _look(conn: Connection[Any], policy: Policy, options: Options) -> tuple[TableState, TablePlan, dt.datetime]:
    now = utc_now(conn)
    if options.today is not None:
        now = dt.datetime.combine(options.today, now.timetz())
    state = read_state(conn, policy, now.date())
    plan = plan_table(
        state,
        now,
        archiving=options.archive_dir is not None,
        drop_after=options.drop_after,
        limits=options.limits,
    )
    return state, plan, now


def _planned_steps(state: TableState, plan: TablePlan, options: Options) -> list[MaintenanceStep]:
    late = {each.month: each.rows for each in state.late}

    def step(kind: str, subject: str, rows: int | None = None) -> MaintenanceStep:
        return MaintenanceStep(kind=kind, table=plan.parent, subject=subject, rows=rows)

    steps = [step("finalize", name) for name in plan.finalize]
    steps += [
        step("drain", _names(plan.parent, group), sum(late.get(month, 0) for month in group)) for group in plan.drain
    ]
    steps += [step("month", _names(plan.parent, (month,)), late.get(month, 0)) for month in plan.make]
    steps += [step("detach", each.name) for each in plan.retire]
    if options.archive_dir is not None:
        steps += [step("archive", each.name) for each in plan.retire]
    steps += [step("archive", f"equitie_part.{each.table}", each.rows) for each in plan.archive]
    steps += [step("drop", f"equitie_part.{each.table}", each.rows) for each in plan.drop]
    return steps


def _names(parent: str, months: Any) -> str:
    return f"{parent} {', '.join(f'{month:%Y-%m}' for month in months)}"
