"""``python -m equitie_data maintain``: the run, its status, legal holds, and the way back from an archive."""

from __future__ import annotations

import argparse
import datetime as dt
import getpass
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from equitie_data.cli import Progress, resolve_dsn, run_cli
from equitie_data.connect import target_of
from equitie_data.errors import ConfigurationError
from equitie_data.maintenance.archive import verify_archive
from equitie_data.maintenance.holds import LegalHold, list_holds, place_hold, release_hold
from equitie_data.maintenance.inspection import status
from equitie_data.maintenance.period import Period, parse_period
from equitie_data.maintenance.restoration import restore
from equitie_data.maintenance.run import maintain
from equitie_data.maintenance.session import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from equitie_data.maintenance.report import MaintenanceReport, MaintenanceStep

__all__ = ["main"]

_WIDTH: Final = 80
_TRANSACTIONS: Final = "public.transactions_clean"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m equitie_data maintain``.

    Returns:
        The exit code: 0 done; 1 it failed, or something is overdue; 2 wrong usage; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    parser = _parser(command)
    parsed = parser.parse_args(arguments)
    return run_cli(lambda: COMMANDS[command](parsed))


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data maintain" + ("" if command == "run" else f" {command}"),
        description=_DESCRIPTIONS[command],
        epilog=(
            "Other commands: " + ", ".join(f"maintain {name}" for name in COMMANDS if name != "run") + "."
            if command == "run"
            else None
        ),
    )
    parser.add_argument(
        "--dsn", metavar="DSN", help="the database, as its owner (default: MIGRATION_DATABASE_URL, then DATABASE_URL)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    _ARGUMENTS[command](parser)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    parser.add_argument("--months-ahead", metavar="N", type=int, help="months to have ahead (default: the policies')")
    parser.add_argument(
        "--keep",
        metavar="PERIOD",
        action="append",
        default=[],
        help="keep transactions for this long, such as 7y; TABLE=PERIOD for another table; may be repeated",
    )
    parser.add_argument(
        "--archive-dir", metavar="DIR", type=Path, help="archive retired partitions here; without it none is dropped"
    )
    parser.add_argument(
        "--drop-after",
        metavar="PERIOD",
        default="30d",
        help="drop the table of an archived partition so long after it was detached (30d)",
    )
    _add_locking(parser)


def _add_locking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lock-timeout", metavar="S", type=float, default=0.05, help="seconds one try waits (0.05)")
    parser.add_argument("--patience", metavar="S", type=float, default=60.0, help="seconds to keep trying a step (60)")
    parser.add_argument("--wait", metavar="S", type=float, default=10.0, help="seconds to wait for another run (10)")


def _add_hold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reason", metavar="REASON", help="why, such as the number of a case")
    parser.add_argument("--table", metavar="TABLE", help="this table alone, such as public.transactions_clean")
    parser.add_argument("--from", metavar="DAY", dest="first_day", type=dt.date.fromisoformat, help="from this day on")
    parser.add_argument("--to", metavar="DAY", dest="last_day", type=dt.date.fromisoformat, help="up to this day")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--investor", metavar="ID", type=int, help="partitions with rows of this investor")
    subject.add_argument("--deal", metavar="ID", type=int, help="partitions with rows of this deal")
    parser.add_argument("--by", metavar="NAME", help="by whose order (default: the account you are logged in as)")


def _add_release(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hold", metavar="HOLD", type=int, help="the key of the hold")
    parser.add_argument("--by", metavar="NAME", help="by whose order (default: the account you are logged in as)")


def _add_holds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="those that were released, too")


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archive", metavar="FILE", type=Path, help="the archive (.csv.gz); its manifest stands beside it"
    )
    parser.add_argument(
        "--reason", metavar="TEXT", default="restored from its archive", help="why it is kept from now on"
    )
    parser.add_argument("--no-hold", action="store_true", help="place no legal hold: the next run retires it again")
    parser.add_argument("--by", metavar="NAME", help="by whose order (default: the account you are logged in as)")
    _add_locking(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archives", metavar="FILE", type=Path, nargs="+", help="archives (.csv.gz)")


def _add_nothing(_parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def _run(arguments: argparse.Namespace) -> int:
    dsn = _dsn(arguments)
    if not arguments.json:
        _print(f"{'Rehearsing on' if arguments.dry_run else 'Maintaining'} {target_of(dsn)}")
    report = maintain(
        dsn,
        dry_run=arguments.dry_run,
        months_ahead=arguments.months_ahead,
        keep=_keep(arguments.keep),
        archive_dir=arguments.archive_dir,
        drop_after=_days(arguments.drop_after),
        lock_timeout=arguments.lock_timeout,
        patience=arguments.patience,
        wait=arguments.wait,
        on_step=None if arguments.json else _print_step,
    )
    if arguments.json:
        _print(report.to_json())
    else:
        _print_report(report, dry_run=arguments.dry_run)
    return int(report.needs_attention)


def _print_step(step: MaintenanceStep) -> None:
    _print(f"  {step}")


def _print_report(report: MaintenanceReport, *, dry_run: bool) -> None:
    if dry_run:
        for step in report.steps:
            rows = "" if step.rows is None else f"  {step.rows:,} rows"
            _print(f"  would {step.kind:<9}{step.subject}{rows}")
    _print_list("Not done this time:", report.not_done)
    _print_list("Failed:", report.failures)
    _print_list("Overdue:", report.overdue)
    _print_list("Note:", report.notes)
    if dry_run:
        _print(f"{len(report.steps)} steps would be done; nothing was changed.")
    else:
        _print(f"{len(report.steps)} steps done in {report.seconds:.1f} s: {report.outcome}.")


def _status(arguments: argparse.Namespace) -> int:
    found = status(_dsn(arguments))
    if arguments.json:
        _print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return int(bool(found.overdue))
    for table in found.tables:
        _print(table.table)
        _print(f"  {table.partitions} partitions, the first month without one is {table.next_gap:%Y-%m}")
        waiting = f"  {table.late_rows:,} rows in the default partition"
        if table.late_rows:
            waiting += f", {table.outside_rows:,} of them in months that are not made"
        _print(waiting)
        kept = ", ".join(f"{count} {state}" for state, count in sorted(table.retired.items()))
        _print(f"  {len(table.expired)} expired, {len(table.held)} held; retired: {kept or 'none'}")
    when = f"{found.last_run:%Y-%m-%d %H:%M} UTC, {found.last_outcome}" if found.last_run else "never"
    _print(f"last run: {when}; legal holds in force: {found.holds}")
    _print_list("Overdue:", found.overdue)
    _print_list("Note:", found.notes)
    return int(bool(found.overdue))


def _hold(arguments: argparse.Namespace) -> int:
    hold = LegalHold(
        reason=arguments.reason,
        placed_by=arguments.by or _account(),
        table=arguments.table,
        first_day=arguments.first_day,
        last_day=arguments.last_day,
        investor_id=arguments.investor,
        deal_id=arguments.deal,
    )
    with open_session(_dsn(arguments)) as conn:
        hold_id = place_hold(conn, hold)
    if arguments.json:
        _print(json.dumps({"hold_id": hold_id}))
    else:
        _print(f"Legal hold {hold_id} is in force: {hold.describe_scope()}.")
    return 0


def _release(arguments: argparse.Namespace) -> int:
    with open_session(_dsn(arguments)) as conn:
        release_hold(conn, arguments.hold, arguments.by or _account())
    _print(json.dumps({"released": arguments.hold}) if arguments.json else f"Legal hold {arguments.hold} is released.")
    return 0


def _holds(arguments: argparse.Namespace) -> int:
    with open_session(_dsn(arguments)) as conn:
        found = list_holds(conn, released=arguments.all)
    if arguments.json:
        _print(json.dumps([attrs.asdict(hold) for hold in found], indent=2, default=str, ensure_ascii=False))
        return 0
    for hold in found:
        ended = f", released by {hold.released_by} on {hold.released_at:%Y-%m-%d}" if hold.released_at else ""
        _print(f"{hold.hold_id:>4}  {hold.describe_scope()}")
        _print(f"      {hold.reason} (by {hold.placed_by} on {hold.placed_at:%Y-%m-%d}{ended})")
    _print(f"{len(found)} legal holds{'' if arguments.all else ' in force'}.")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    with Progress("restore", unit="bytes") as progress:
        report = restore(
            _dsn(arguments),
            arguments.archive,
            hold_reason=None if arguments.no_hold else arguments.reason,
            placed_by=arguments.by or _account(),
            lock_timeout=arguments.lock_timeout,
            patience=arguments.patience,
            wait=arguments.wait,
            progress=progress,
        )
    if arguments.json:
        _print(json.dumps(attrs.asdict(report), indent=2))
        return 0
    amount = "" if report.amount is None else f", sum {report.amount}"
    _print(f"{report.rows:,} rows{amount} are back in {report.table}, as {report.partition}.")
    if report.late_rows:
        _print(f"{report.late_rows:,} rows that had come since moved there from the default partition.")
    if report.hold_id is None:
        _print("The next run retires it again: no legal hold was placed.")
    else:
        _print(f"Legal hold {report.hold_id} keeps it: release that when it may be retired again.")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    manifests = [verify_archive(path) for path in arguments.archives]
    if arguments.json:
        _print(json.dumps([attrs.asdict(manifest) for manifest in manifests], indent=2))
        return 0
    for path, manifest in zip(arguments.archives, manifests, strict=True):
        amount = "" if manifest.amount is None else f", sum {manifest.amount}"
        _print(f"{path.name}: {manifest.rows:,} rows of {manifest.parent}{amount}: as its manifest says.")
    return 0


def _dsn(arguments: argparse.Namespace) -> str:
    return resolve_dsn(arguments.dsn, "MIGRATION_DATABASE_URL", "DATABASE_URL")


def _keep(given: Iterable[str]) -> dict[str, Period]:
    periods = {}
    for text in given:
        table, equals, period = text.rpartition("=")
        periods[table if equals else _TRANSACTIONS] = parse_period(period)
    return periods


def _days(text: str) -> dt.timedelta:
    period = parse_period(text)
    if period.months > 12 * 100:
        raise ConfigurationError(f"{text!r} is longer than a grace period can be.")
    # A grace period is no matter of the calendar: a month is thirty days, a year 365.
    years, months = divmod(period.months, 12)
    return dt.timedelta(days=period.days + years * 365 + months * 30)


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in containers
        return "unknown"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _print_list(title: str, sentences: Sequence[str]) -> None:
    if sentences:
        _print(title)
    for sentence in sentences:
        _print(textwrap.fill(sentence, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False))


_DESCRIPTIONS: Final = {
    "run": "Make months ahead, move late rows to their months, retire what has expired, run the tasks.",
    "status": "Say how the partitioned tables stand, and what is overdue; changes nothing.",
    "hold": "Place a legal hold: what it keeps is neither retired nor dropped.",
    "release": "End a legal hold.",
    "holds": "List the legal holds in force.",
    "restore": "Put an archive's rows back, exactly once.",
    "verify": "Read archives and compare them with their manifests; needs no database.",
}
_ARGUMENTS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "run": _add_run,
    "status": _add_nothing,
    "hold": _add_hold,
    "release": _add_release,
    "holds": _add_holds,
    "restore": _add_restore,
    "verify": _add_verify,
}
COMMANDS: Final[dict[str, Callable[[Any], int]]] = {
    "run": _run,
    "status": _status,
    "hold": _hold,
    "release": _release,
    "holds": _holds,
    "restore": _restore,
    "verify": _verify,
}
