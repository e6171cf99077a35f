"""The command line: ``python -m equitie_data legacy COMMAND``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.cli import Progress, resolve_dsn, run_cli
from equitie_data.legacy.ledger import Options
from equitie_data.legacy.report import lines_of, size, wrapped
from equitie_data.legacy.run import inspect, migrate, plan
from equitie_data.legacy.verification import rollback, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from equitie_data.legacy.sources import Inventory

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m equitie_data legacy``.

    Returns:
        The exit code: 0 done; 1 it failed, or found something wrong.
    """
    arguments = _parser().parse_args(argv)
    return run_cli(
        lambda: _COMMANDS[arguments.command](
            resolve_dsn(arguments.dsn, "MIGRATION_DATABASE_URL", "DATABASE_URL"), arguments
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data legacy",
        description="Take over the platform's old tables, whose names have dots in them.",
        epilog="exit codes: 0 done; 1 it failed or found something wrong; 2 wrong usage; 130 interrupted",
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def add(name: str, purpose: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=purpose)
        _add_common(command)
        return command

    add("inspect", "say what the old tables hold and where it goes; exit 1 if something has to be settled")
    _add_choices(add("plan", "say what `migrate` would do, exactly; changes nothing"))
    migrating = add("migrate", "take the old tables over, or go on with a run that was broken off")
    _add_choices(migrating)
    migrating.add_argument("--batch-rows", type=_positive, metavar="N", help="rows per batch (20000)", default=20_000)
    migrating.add_argument("--in-batches", action="store_true", help="copy in batches even if the tables are small")
    migrating.add_argument(
        "--lock-timeout",
        type=float,
        metavar="S",
        default=5.0,
        help="seconds to wait for a lock before trying again (5)",
    )
    add("verify", "look for every row of the originals; exit 1 if one is nowhere")
    add("rollback", "give the old tables their names again").add_argument(
        "--discard-new", action="store_true", help="even if rows were changed since, of which they know nothing"
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dsn", help="the database, as its owner (default: $MIGRATION_DATABASE_URL, $DATABASE_URL)")
    parser.add_argument("--json", action="store_true", help="print machine-readable output")


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-conflict",
        choices=("fail", "latest", "first"),
        default="fail",
        metavar="RULE",
        help="of copies that differ, take the latest, the first, or fail (fail)",
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="COLUMN", help="carry a column along that no clean one takes"
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="COLUMN", help="leave such a column in the backup alone"
    )
    parser.add_argument(
        "--months",
        choices=("auto", "each", "one"),
        default="auto",
        metavar="HOW",
        help="partitions for old months: each its own, one for all, or as many as are worth it (auto)",
    )
    parser.add_argument("--rejects", type=Path, metavar="FILE", help="write what is not taken over here, as JSON lines")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        on_conflict=arguments.on_conflict,
        keep=tuple(arguments.keep),
        drop=tuple(arguments.drop),
        months=arguments.months,
    )


def _is_default(arguments: argparse.Namespace) -> bool:
    return _options(arguments) == Options()


@contextlib.contextmanager
def _rejects(path: Path | None) -> Iterator[Callable[[dict[str, Any]], object] | None]:
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _progress() -> tuple[contextlib.ExitStack, Callable[[str, int], object]]:
    stack = contextlib.ExitStack()
    bars: dict[str, Progress] = {}

    def advance(step: str, rows: int) -> None:
        if step not in bars:
            stack.close()
            bars.clear()
            bars[step] = stack.enter_context(Progress(step))
        bars[step].advance(rows)

    return stack, advance


def _run_inspect(dsn: str, arguments: argparse.Namespace) -> int:
    found = inspect(dsn)
    if arguments.json:
        print(json.dumps(_inventory(found), ensure_ascii=False, indent=2))
    else:
        print("\n".join(_inventory_lines(found)))
    return 1 if found.problems else 0


def _inventory(found: Inventory) -> dict[str, Any]:
    return {
        "tables": [
            {
                "table": source.label,
                "kind": source.kind,
                "rows": source.rows,
                "bytes": source.bytes,
                "columns": [
                    {
                        "name": column.name,
                        "type": column.type,
                        "filled": column.filled,
                        "becomes": source.home_of(column),
                        "carried": column in source.carried,
                    }
                    for column in source.columns
                ],
                "empty": list(source.empty),
                "undecided": list(source.homeless),
            }
            for source in found.sources
        ],
        "views": list(found.views),
        "unknown": list(found.unknown),
        "problems": list(found.problems),
        "lost_grants": [list(grant) for grant in found.lost_grants],
    }


def _inventory_lines(found: Inventory) -> list[str]:
    lines = []
    for source in found.sources:
        lines.append(f"{source.label}: {source.rows:,} {source.spec.plural}, {size(source.bytes)}")
        carried = {column.name for column in source.carried}
        for column in source.columns:
            home = source.home_of(column)
            if home is not None:
                where = home if home != column.name else "the same"
            elif column.name in source.twins:
                where = "gone, repeats the id"
            elif column.name in carried:
                where = "carried along"
            elif not column.filled:
                where = "gone, empty"
            else:
                where = "--keep or --drop?"
            type_ = column.type.replace(" with time zone", "tz").replace(" without time zone", "")
            lines.append(f"  {column.name:<33.33}{type_:<12.12}{column.filled:>10,}  {where}"[:80])
    lines += [f"{view} is a view already." for view in found.views]
    lines += [
        f"{table} has a dot in its name, but is none of the old tables: it is left alone." for table in found.unknown
    ]
    lines += [f"{role} has privileges on {table} that the view will not have." for table, role in found.lost_grants]
    if not found.sources:
        lines.append("None of the old tables is there.")
    lines += [line for problem in found.problems for line in wrapped(problem)]
    return lines


def _run_plan(dsn: str, arguments: argparse.Namespace) -> int:
    bars, advance = _progress()
    with bars, _rejects(arguments.rejects) as on_reject:
        report = plan(dsn, _options(arguments), on_progress=advance, on_reject=on_reject)
    losers = sum(report.rows(kind, "loser") for kind in report.counts)
    if arguments.json:
        print(report.to_json())
    else:
        print("\n".join(lines_of(report)))
        print("Nothing was changed.")
        if losers and arguments.on_conflict == "fail":
            print(f"{losers:,} copies differ from another of the same id: migrate needs --on-conflict latest or first.")
    return 1 if losers and arguments.on_conflict == "fail" else 0


def _run_migrate(dsn: str, arguments: argparse.Namespace) -> int:
    bars, advance = _progress()
    with bars, _rejects(arguments.rejects) as on_reject:
        report = migrate(
            dsn,
            None if _is_default(arguments) else _options(arguments),
            batch_rows=arguments.batch_rows,
            in_batches=True if arguments.in_batches else None,
            lock_timeout=arguments.lock_timeout,
            on_progress=advance,
            on_reject=on_reject,
        )
    if arguments.json:
        print(report.to_json())
    else:
        print("\n".join(lines_of(report)))
        print(f"Run {report.run_id}: the old names are views over the clean tables, {report.seconds:.1f} s.")
    return 0


def _run_verify(dsn: str, arguments: argparse.Namespace) -> int:
    found = verify(dsn)
    if arguments.json:
        members = attrs.asdict(found)
        members["amounts"] = {kind: [str(read), str(there)] for kind, (read, there) in found.amounts.items()}
        print(json.dumps(members, ensure_ascii=False))
    else:
        print(f"{'original':<44}{'rows':>10}{'in clean':>10}{'changed':>8}{'listed':>8}")
        for source in found.sources:
            print(
                f"{source.table:<44.44}{source.rows:>10,}{source.in_clean:>10,}{source.changed_since:>8,}{source.listed:>8,}"
            )
        for problem in found.problems:
            print(problem)
        print(
            f"{len(found.problems)} found."
            if found.problems
            else f"Every row of the originals in {found.backup_schema} is accounted for."
        )
    return 1 if found.problems else 0


def _run_rollback(dsn: str, arguments: argparse.Namespace) -> int:
    report = rollback(dsn, discard_new=arguments.discard_new)
    if arguments.json:
        print(json.dumps(attrs.asdict(report)))
        return 0
    if report.restored:
        print(f"{len(report.restored)} old tables have their names again.")
    else:
        print("What was copied is removed; the old tables were not touched.")
    print(f"{sum(report.removed.values()):,} rows were taken out of the clean tables.")
    for kind, rows in report.kept.items():
        if rows:
            print(f"{rows:,} rows of kind {kind} stay, because other rows refer to them.")
    if report.discarded:
        changed = ", ".join(f"{rows:,} in {table}" for table, rows in report.discarded.items())
        print(f"Changes since, of which the old tables know nothing: {changed}.", file=sys.stderr)
    return 0


_COMMANDS: dict[str, Callable[[str, argparse.Namespace], int]] = {
    "inspect": _run_inspect,
    "plan": _run_plan,
    "migrate": _run_migrate,
    "verify": _run_verify,
    "rollback": _run_rollback,
}
