"""``python -m equitie_data.migrate``: what it takes, and what it prints."""

from __future__ import annotations

import argparse
import functools
import json
import textwrap
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.cli import resolve_dsn, run_cli
from equitie_data.connect import target_of
from equitie_data.migrations import operations
from equitie_data.migrations.files import label_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.plan import PlannedMigration
    from equitie_data.migrations.run import AppliedMigration

__all__ = ["main"]


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
    parser.set_defaults(
        command="up",
        lock_timeout=operations.LOCK_TIMEOUT,
        wait=operations.WAIT,
        before_deploy=False,
        to=None,
        directories=[],
    )
    _add_common_options(parser)
    _add_up_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="command")

    def add_command(name: str, purpose: str) -> argparse.ArgumentParser:
        # Options may stand before or after the command; SUPPRESS keeps the command from resetting those before it.
        command = commands.add_parser(name, help=purpose, description=purpose, argument_default=argparse.SUPPRESS)
        _add_common_options(command)
        return command

    _add_up_options(add_command("up", "apply what is pending (the default)"))
    status = add_command("status", "list the migrations; exit 1 unless all are applied as they are")
    _add_phase_option(status)
    plan = add_command("plan", "say what `up` would do, and behind which locks")
    plan.add_argument("--to", metavar="MIGRATION", help="stop after this one (number or name)")
    _add_phase_option(plan)
    plan.add_argument("--sql", action="store_true", default=False, help="print the statements too")
    add_command("verify", "look for what was altered since; exit 1 on findings")
    baseline = add_command("baseline", "adopt a database that has the tables but no history; exit 1 on differences")
    baseline.add_argument("--to", metavar="MIGRATION", help="the last one it has (default: the one that fits best)")
    baseline.add_argument(
        "--accept-extra", action="store_true", default=False, help="let columns, indexes, ... of your own stay"
    )
    baseline.add_argument("--sql", action="store_true", default=False, help="print statements that end differences")
    repair = add_command("repair", "put right what a failure or an edited file left; says first what it would do")
    down = add_command("down", "take back the newest migration, if nothing is lost; says first what it would do")
    for command in (repair, down):
        command.add_argument("name", metavar="MIGRATION", help="its name")
        command.add_argument("--yes", action="store_true", default=False, help="do it")
        _add_wait_options(command)
    add_command("grant", "let a login role use the library").add_argument("role", help="name of the login role")
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dsn", help="the database, as its owner (default: $MIGRATION_DATABASE_URL, $DATABASE_URL)")
    # store_const takes its default from the parser, which store_true does not.
    parser.add_argument("--json", action="store_const", const=True, help="print machine-readable output")
    parser.add_argument(
        "--directory",
        action="append",
        type=_directory,
        dest="directories",
        metavar="NAME=PATH",
        help="migrations of an application, which run after the library's; may be repeated",
    )


def _add_up_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="MIGRATION", help="stop after this one (number or name)")
    _add_phase_option(parser)
    _add_wait_options(parser)


def _add_wait_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lock-timeout", type=_seconds, metavar="S", help="seconds to wait for a lock before retrying")
    parser.add_argument("--wait", type=_seconds, metavar="S", help="seconds to wait for another run")


def _add_phase_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--before-deploy",
        action="store_const",
        const=True,
        help="only what the release before this one can work with",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


def _directory(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH")
    return name, path


def _run(arguments: argparse.Namespace) -> int:
    dsn = resolve_dsn(arguments.dsn, "MIGRATION_DATABASE_URL", "DATABASE_URL")
    arguments.directories = dict(arguments.directories)
    return _COMMANDS[arguments.command or "up"](dsn, arguments)


def _run_up(dsn: str, arguments: argparse.Namespace) -> int:
    run = functools.partial(
        operations.migrate,
        dsn,
        to=arguments.to,
        before_deployment=bool(arguments.before_deploy),
        directories=arguments.directories,
        lock_timeout=arguments.lock_timeout,
        wait=arguments.wait,
    )
    if arguments.json:
        _print_json(attrs.asdict(run()))
        return 0

    line_is_open = False

    def begin(migration: Migration) -> None:
        nonlocal line_is_open
        line_is_open = migration.transactional
        if migration.transactional:
            print(f"  {migration.label} {'.' * max(3, 58 - len(migration.label))} ", end="", flush=True)
        else:
            print(f"  {migration.label}, step by step", flush=True)

    def step(number: int, count: int, seconds: float) -> None:
        print(f"    step {number} of {count} {'.' * 44} {seconds:8.2f} s", flush=True)

    def end(applied: AppliedMigration) -> None:
        nonlocal line_is_open
        if line_is_open:
            again = f", attempt {applied.attempts}" if applied.attempts > 1 else ""
            print(f"{applied.seconds:8.2f} s{again}", flush=True)
        line_is_open = False

    print(f"Migrating {target_of(dsn)}", flush=True)
    try:
        report = run(on_begin=begin, on_step=step, on_end=end)
    finally:
        # After an error, its message gets a line of its own.
        if line_is_open:
            print(flush=True)
    if not report.applied:
        print(f"Nothing to do: the database is at {report.current}.")
    else:
        print(f"{_count(len(report.applied), 'migration')} applied in {report.seconds:.1f} s: the database is at")
        print(f"{report.current}.")
    if report.left_for_after:
        print(f"{len(report.left_for_after)} left for after the deployment: run `up` without --before-deploy then.")
    return 0


def _run_status(dsn: str, arguments: argparse.Namespace) -> int:
    found = operations.status(dsn, directories=arguments.directories)
    if arguments.json:
        _print_json([attrs.asdict(entry) for entry in found])
    else:
        print(f"{target_of(dsn)}")
        for entry in found:
            when = (entry.applied_at or "")[:16].replace("T", " ")
            if entry.state == "pending":
                when = "after the deployment" if entry.phase == "post" else ""
                when = f"{_count(entry.steps_done, 'step')} done" if entry.steps_done else when
            print(f"  {entry.state:9}  {entry.label:45.45}  {when}".rstrip())
        waiting = sum(entry.state == "pending" for entry in found)
        wrong = sum(entry.state in {"changed", "unknown"} for entry in found)
        print(f"{len(found) - waiting - wrong} applied, {waiting} pending, {wrong} not as in this release.")
    due = [entry for entry in found if not (arguments.before_deploy and entry.phase == "post")]
    return 0 if all(entry.state in {"applied", "baselined"} for entry in due) else 1


def _run_plan(dsn: str, arguments: argparse.Namespace) -> int:
    planned = operations.plan(
        dsn,
        to=arguments.to,
        before_deployment=bool(arguments.before_deploy),
        directories=arguments.directories,
    )
    if arguments.json:
        _print_json([attrs.asdict(migration) for migration in planned])
        return 0
    print(f"{len(planned)} pending on {target_of(dsn)}" if planned else f"Nothing to do on {target_of(dsn)}.")
    for migration in planned:
        _print_planned(migration, sql=arguments.sql)
    return 0


def _print_planned(migration: PlannedMigration, *, sql: bool) -> None:
    label = label_of(migration.directory, migration.version, migration.name)
    count = len(migration.statements)
    how = _count(count, "statement") if migration.transactional else f"{_count(count, 'step')}, no transaction"
    if migration.steps_done:
        how += f", {migration.steps_done} of them done"
    if migration.phase == "post":
        how += ", after the deployment"
    print(f"\n{label} ({how})")
    if migration.summary:
        print(_indented(migration.summary))
    for lock in migration.locks:
        size = f"{_bytes(lock.bytes)}, about {lock.rows:,} rows"
        print(_indented(f"{lock.table}: {lock.mode}, stops {lock.stops} ({size})"))
    if migration.code:
        print(f"  {_count(migration.code, 'statement')} of code, whose locks its text does not tell")
    if sql:
        for statement in migration.statements[migration.steps_done :]:
            print(f"\n{statement};")


def _run_verify(dsn: str, arguments: argparse.Namespace) -> int:
    problems = operations.verify(dsn, directories=arguments.directories)
    if arguments.json:
        _print_json(list(problems))
    else:
        for problem in problems:
            print(_indented(problem))
        print(f"{len(problems)} found." if problems else "All is as the migrations left it.")
    return 1 if problems else 0


def _run_baseline(dsn: str, arguments: argparse.Namespace) -> int:
    report = operations.baseline(
        dsn,
        to=arguments.to,
        accept_extra=arguments.accept_extra,
        directories=arguments.directories,
        wait=arguments.wait,
    )
    if arguments.json:
        _print_json(attrs.asdict(report))
    elif arguments.sql:
        for difference in report.differences:
            comment = textwrap.fill(difference.sentence, 79, initial_indent="-- ", subsequent_indent="-- ")
            print(f"{comment}\n{difference.sql};\n" if difference.sql else f"{comment} -- by hand\n")
    else:
        print(f"{target_of(dsn)}\nCompared with what the migrations up to {report.place} make:")
        for difference in (*report.differences, *report.accepted):
            print(_indented(difference.sentence))
        if report.differences:
            print(f"{_count(len(report.differences), 'difference')}: nothing was recorded.")
        else:
            print(f"{_count(len(report.recorded), 'migration')} recorded as there.")
    return 1 if report.differences else 0


def _run_repair(dsn: str, arguments: argparse.Namespace) -> int:
    def say(sentence: str) -> None:
        if not arguments.json:
            print(_indented(sentence), flush=True)

    found = operations.repair(
        dsn,
        arguments.name,
        apply=arguments.yes,
        directories=arguments.directories,
        lock_timeout=arguments.lock_timeout,
        wait=arguments.wait,
        on_repair=say,
    )
    if arguments.json:
        _print_json({"migration": arguments.name, "repairs": list(found), "done": bool(arguments.yes)})
        return 0 if arguments.yes or not found else 1
    if not found:
        print(f"Nothing of {arguments.name} needs a repair.")
        return 0
    if arguments.yes:
        print(f"{_count(len(found), 'repair')} done.")
        return 0
    for sentence in found:
        say(sentence)
    print("Nothing was done: to do it, add --yes.")
    return 1


def _run_down(dsn: str, arguments: argparse.Namespace) -> int:
    statements = operations.down(
        dsn,
        arguments.name,
        apply=arguments.yes,
        directories=arguments.directories,
        lock_timeout=arguments.lock_timeout,
        wait=arguments.wait,
    )
    if arguments.json:
        _print_json({"migration": arguments.name, "statements": list(statements), "done": bool(arguments.yes)})
    elif arguments.yes:
        print(f"Migration {arguments.name} is taken back on {target_of(dsn)}.")
    else:
        for statement in statements:
            print(f"{statement};\n")
        print("Nothing was done: to run these statements, add --yes.")
    return 0 if arguments.yes else 1


def _run_grant(dsn: str, arguments: argparse.Namespace) -> int:
    operations.grant(dsn, arguments.role)
    if arguments.json:
        _print_json({"granted": arguments.role})
    else:
        print(f"{arguments.role} may now act for users and the service on {target_of(dsn)}.")
    return 0


def _indented(text: str) -> str:
    return textwrap.fill(
        text, 79, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


_COMMANDS = {
    "up": _run_up,
    "status": _run_status,
    "plan": _run_plan,
    "verify": _run_verify,
    "baseline": _run_baseline,
    "repair": _run_repair,
    "down": _run_down,
    "grant": _run_grant,
}
