"""Bring a database to this release's schema: ``python -m equitie_data.migrate``.

Every migration runs in one transaction together with its record in ``equitie_migrations.history``: it is there as
a whole or not at all. Two runs at once wait for each other; a second run finds nothing to do.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data._migration_files import migrations, verifications
from equitie_data._migration_grant import grant_login
from equitie_data._migration_history import check_current, compare, read_applied
from equitie_data._migration_run import AppliedMigration, MigrationReport, apply_pending, open_owner
from equitie_data.cli import resolve_dsn, run_cli
from equitie_data.connect import target_of
from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, MigrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from equitie_data._migration_files import Migration

__all__ = [
    "AppliedMigration",
    "MigrationReport",
    "MigrationStatus",
    "check_current",
    "grant",
    "main",
    "migrate",
    "pending",
    "status",
    "verify",
]

_LOCK_TIMEOUT = 5.0  # seconds
_WAIT = 600.0  # seconds


@attrs.frozen(kw_only=True)
class MigrationStatus:
    """Where one migration stands in one database.

    Attributes:
        version: Its number.
        name: Its name.
        state: ``applied``, ``pending``, ``changed`` (its file is not the one that was applied) or ``unknown``
            (applied, but this release does not have it).
        applied_at: When it was applied, ISO 8601; ``None`` while it is pending.
        seconds: How long that took.
    """

    version: int
    name: str
    state: str
    applied_at: str | None = None
    seconds: float | None = None


def migrate(
    dsn: str,
    *,
    to: int | str | None = None,
    lock_timeout: float = _LOCK_TIMEOUT,
    wait: float = _WAIT,
    on_begin: Callable[[Migration], None] | None = None,
    on_end: Callable[[AppliedMigration], None] | None = None,
) -> MigrationReport:
    """Apply the migrations a database lacks.

    Args:
        dsn: The database, as the role that owns its tables or is to own them. It needs CREATE on the database and,
            where the four database roles do not exist yet, CREATEROLE.
        to: Number or name of the last migration to apply; all of them by default.
        lock_timeout: Seconds a statement may wait for a lock of running transactions before the migration is rolled
            back and tried again.
        wait: Seconds to wait for another run of migrations.
        on_begin: Called before each migration.
        on_end: Called after each migration.

    Raises:
        UnavailableError: The server cannot be reached.
        HistoryTooNewError: A newer release has migrated the database.
        ChecksumDriftError: A file is not the one that was applied.
        MigrationLockTimeoutError: Another run did not end within ``wait``.
        MigrationError: A migration failed; nothing of it is there. The message names file, line and cause.
    """
    known = _up_to(to)
    with open_owner(dsn) as conn:
        return apply_pending(conn, known, lock_timeout=lock_timeout, wait=wait, on_begin=on_begin, on_end=on_end)


def _up_to(to: int | str | None) -> tuple[Migration, ...]:
    known = migrations()
    if to is None:
        return known
    for place, migration in enumerate(known, start=1):
        if str(to) in {migration.name, migration.label, str(migration.version), f"{migration.version:04d}"}:
            return known[:place]
    raise MigrationError(f"There is no migration {to}: `python -m equitie_data.migrate status` lists them.")


def status(dsn: str) -> tuple[MigrationStatus, ...]:
    """Return where each migration stands, in order. Changes nothing."""
    with open_owner(dsn) as conn:
        applied = read_applied(conn)
    known = {migration.version: migration for migration in migrations()}
    found: list[MigrationStatus] = []
    for number in sorted(known.keys() | applied.keys()):
        there = applied.get(number)
        here = known.get(number)
        if there is None:
            assert here is not None  # noqa: S101 - the number comes from one of the two
            found.append(MigrationStatus(version=number, name=here.name, state="pending"))
            continue
        if here is None:
            state = "unknown"
        else:
            state = "applied" if (here.sha256, here.name) == (there.sha256, there.name) else "changed"
        found.append(
            MigrationStatus(
                version=number,
                name=there.name,
                state=state,
                applied_at=there.finished_at.isoformat(timespec="seconds"),
                seconds=round(there.seconds, 3),
            )
        )
    return tuple(found)


def pending(dsn: str) -> tuple[Migration, ...]:
    """Return the migrations that `migrate` would apply. Changes nothing.

    Raises:
        HistoryTooNewError: A newer release has migrated the database.
        ChecksumDriftError: A file is not the one that was applied.
    """
    with open_owner(dsn) as conn:
        return compare(read_applied(conn), migrations())


def verify(dsn: str) -> tuple[str, ...]:
    """Return what is wrong with a migrated database, one sentence each; nothing when all is well. Changes nothing.

    Besides the history it looks at what somebody may have altered since: triggers of the audit trail, row-level
    security, privileges on partitions, indexes.

    Raises:
        MigrationError: The database cannot be asked.
    """
    with open_owner(dsn) as conn:
        applied = read_applied(conn)
        try:
            lacking = compare(applied, migrations())
        except (HistoryTooNewError, ChecksumDriftError) as error:
            return (str(error),)
        problems = [f"Migration {migration.label} is not applied." for migration in lacking]
        with conn.transaction():
            conn.execute("SET TRANSACTION READ ONLY")
            for migration in migrations():
                if migration.version in applied:
                    for statement in verifications().get(migration.label, ()):
                        problems += [row[0] for row in conn.execute(statement.text)]
    return tuple(problems)


def grant(dsn: str, role: str) -> None:
    """Let a login role act for users and the service, and nothing more.

    The role becomes a member of the database roles without inheriting them, may call the functions of the
    transaction prologue, and may read the history.

    Args:
        dsn: The database, as its owner.
        role: Name of the login role, as it is stored: no quotes.

    Raises:
        MigrationError: The role does not exist, may do too much already, or the owner may not grant this.
    """
    with open_owner(dsn) as conn:
        grant_login(conn, role)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_cli(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data.migrate",
        description="Bring a database to this release's schema, or say where it stands.",
        epilog="exit codes: 0 done; 1 it failed or found something wrong; 2 wrong usage; 130 interrupted",
    )
    parser.set_defaults(command="up", lock_timeout=_LOCK_TIMEOUT, wait=_WAIT)
    _add_common_options(parser)
    _add_up_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="command")

    def add_command(name: str, purpose: str) -> argparse.ArgumentParser:
        # Options may stand before or after the command; SUPPRESS keeps the command from resetting those before it.
        command = commands.add_parser(name, help=purpose, description=purpose, argument_default=argparse.SUPPRESS)
        _add_common_options(command)
        return command

    _add_up_options(add_command("up", "apply what is pending (the default)"))
    add_command("status", "list the migrations; exit 1 unless all are applied as they are")
    add_command("plan", "say what `up` would do").add_argument(
        "--sql", action="store_true", default=False, help="print the statements too"
    )
    add_command("verify", "look for what was altered since; exit 1 on findings")
    add_command("grant", "let a login role use the library").add_argument("role", help="name of the login role")
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dsn", help="the database, as its owner (default: $MIGRATION_DATABASE_URL, $DATABASE_URL)")
    # store_const takes its default from the parser, which store_true does not.
    parser.add_argument("--json", action="store_const", const=True, help="print machine-readable output")


def _add_up_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="MIGRATION", help="stop after this one (number or name)")
    parser.add_argument("--lock-timeout", type=_seconds, metavar="S", help="seconds to wait for a lock before retrying")
    parser.add_argument("--wait", type=_seconds, metavar="S", help="seconds to wait for another run")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


def _run(arguments: argparse.Namespace) -> int:
    dsn = resolve_dsn(arguments.dsn, "MIGRATION_DATABASE_URL", "DATABASE_URL")
    return _COMMANDS[arguments.command or "up"](dsn, arguments)


def _run_up(dsn: str, arguments: argparse.Namespace) -> int:
    run = functools.partial(migrate, dsn, to=arguments.to, lock_timeout=arguments.lock_timeout, wait=arguments.wait)
    if arguments.json:
        _print_json(attrs.asdict(run()))
        return 0

    line_is_open = False

    def begin(migration: Migration) -> None:
        nonlocal line_is_open
        line_is_open = True
        print(f"  {migration.label} {'.' * max(3, 58 - len(migration.label))} ", end="", flush=True)

    def end(applied: AppliedMigration) -> None:
        nonlocal line_is_open
        line_is_open = False
        again = f", attempt {applied.attempts}" if applied.attempts > 1 else ""
        print(f"{applied.seconds:8.2f} s{again}", flush=True)

    print(f"Migrating {target_of(dsn)}", flush=True)
    try:
        report = run(on_begin=begin, on_end=end)
    finally:
        # After an error, its message gets a line of its own.
        if line_is_open:
            print(flush=True)
    if not report.applied:
        print(f"Nothing to do: the database is at {report.current}.")
    else:
        count = len(report.applied)
        noun = "migration" if count == 1 else "migrations"
        print(f"{count} {noun} applied in {report.seconds:.1f} s: the database is at {report.current}.")
    return 0


def _run_status(dsn: str, arguments: argparse.Namespace) -> int:
    found = status(dsn)
    if arguments.json:
        _print_json([attrs.asdict(entry) for entry in found])
    else:
        print(f"{target_of(dsn)}")
        for entry in found:
            label = f"{entry.version:04d}_{entry.name}"
            print(f"  {entry.state:8}  {label:50.50}  {(entry.applied_at or '')[:16].replace('T', ' ')}".rstrip())
        waiting = sum(entry.state == "pending" for entry in found)
        wrong = sum(entry.state in {"changed", "unknown"} for entry in found)
        print(f"{len(found) - waiting - wrong} applied, {waiting} pending, {wrong} not as in this release.")
    return 0 if all(entry.state == "applied" for entry in found) else 1


def _run_plan(dsn: str, arguments: argparse.Namespace) -> int:
    planned = pending(dsn)
    if arguments.json:
        _print_json(
            [
                {
                    "version": migration.version,
                    "name": migration.name,
                    "summary": migration.summary,
                    "transactional": migration.transactional,
                    "statements": [statement.text for statement in migration.statements],
                }
                for migration in planned
            ]
        )
        return 0
    print(f"{len(planned)} pending on {target_of(dsn)}" if planned else f"Nothing to do on {target_of(dsn)}.")
    for migration in planned:
        how = "" if migration.transactional else ", not in one transaction"
        print(f"\n{migration.label} ({len(migration.statements)} statements{how})\n  {migration.summary}")
        if arguments.sql:
            for statement in migration.statements:
                print(f"\n{statement.text};")
    return 0


def _run_verify(dsn: str, arguments: argparse.Namespace) -> int:
    problems = verify(dsn)
    if arguments.json:
        _print_json(list(problems))
    else:
        for problem in problems:
            print(f"  {problem}")
        print(f"{len(problems)} found." if problems else "All is as the migrations left it.")
    return 1 if problems else 0


def _run_grant(dsn: str, arguments: argparse.Namespace) -> int:
    grant(dsn, arguments.role)
    if arguments.json:
        _print_json({"granted": arguments.role})
    else:
        print(f"{arguments.role} may now act for users and the service on {target_of(dsn)}.")
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


_COMMANDS = {
    "up": _run_up,
    "status": _run_status,
    "plan": _run_plan,
    "verify": _run_verify,
    "grant": _run_grant,
}

if __name__ == "__main__":
    sys.exit(main())
