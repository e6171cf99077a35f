"""``python -m equitie_data partition``."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import textwrap
import time
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.cli import Progress, resolve_dsn, run_cli
from equitie_data.connect import target_of
from equitie_data.conversion.locks import Patience
from equitie_data.conversion.run import ConversionReport, convert, plan, split, status, undo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from equitie_data.conversion.survey import Survey

__all__ = ["main"]

_ATTACH_STEPS = (
    ("indexes", "missing indexes, and a unique one on (id, date), CONCURRENTLY", "none that blocks"),
    ("constraints", "VALIDATE what is NOT VALID; SET NOT NULL by a valid CHECK", "none that blocks"),
    ("twin", "the partitioned table beside it: default, months ahead, keys", "deals, investors: a moment's writes"),
    ("boundary", "a CHECK on the date, NOT VALID, then VALIDATE", "a moment's exclusive lock"),
    ("exchange", "rename, attach; triggers, policies, grants, views, numbers", "one exclusive lock, 20 to 100 ms"),
    ("tidy", "ANALYZE; VALIDATE others' foreign keys", "none that blocks"),
)
_COPY_STEPS = (
    ("twin", "the partitioned table beside it, with all its months", "none"),
    ("capture", "a trigger that notes every change", "a moment's writes"),
    ("copy", "all rows, in batches of 20,000 by id; then indexes, foreign keys", "deals, investors: a moment's writes"),
    ("follow", "what was noted; from here on both are written", "a moment's writes"),
    ("verify", "count, sum and hash of every row, in one snapshot", "none"),
    ("exchange", "names, triggers, policies, grants, views, numbers", "one exclusive lock, 20 to 100 ms"),
    ("tidy", "drop what was replaced, piece by piece", "deals, investors: moments"),
)
_SPLIT_STEPS = (
    ("capture", "a trigger that notes every change of the one big partition", "a moment's writes"),
    ("copy", "each month's rows to a table of its own; indexes, foreign keys", "deals, investors: a moment's writes"),
    ("follow", "what was noted; from here on both are written", "a moment's writes"),
    ("verify", "count, sum and hash of every row, in one snapshot", "none"),
    ("exchange", "detach the one, attach the months", "one exclusive lock, 2 to 4 ms a month"),
    ("tidy", "drop what was replaced; ANALYZE", "deals, investors: a moment"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_cli(lambda: _COMMANDS[arguments.command](arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data partition",
        description="Turn a live, flat transactions_clean into monthly partitions, and back, while it is written.",
        epilog="A command that was interrupted goes on when it is run again."
        " Exit codes: 0 done; 1 it failed or something is in the way; 2 wrong usage; 130 interrupted",
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def add(name: str, purpose: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument(
            "--dsn", help="the database, as its owner (default: $MIGRATION_DATABASE_URL, $DATABASE_URL)"
        )
        command.add_argument("--json", action="store_true", help="print machine-readable output")
        return command

    for name, purpose in (
        ("plan", "say what would be done and what is in the way; exit 1 if something is"),
        ("convert", "partition the flat table"),
    ):
        command = add(name, purpose)
        command.add_argument(
            "--copy", action="store_true", help="copy every row to its month, instead of attaching the table"
        )
        command.add_argument("--boundary", type=_day, metavar="DAY", help="where the attached partition is to end")
        command.add_argument(
            "--drop-inbound-keys", action="store_true", help="let foreign keys go that name the id alone"
        )
        if name == "convert":
            _add_patience(command)
    _add_patience(add("split", "divide the attached partition into months"))
    _add_patience(add("undo", "go back to a flat table, or give up an unfinished conversion"))
    add("status", "say where the table and an interrupted conversion stand; exit 1 if one is under way")
    return parser


def _add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock-timeout",
        type=_seconds,
        default=0.1,
        metavar="S",
        help="seconds to wait for a lock before trying again (0.1)",
    )
    parser.add_argument("--wait", type=_seconds, default=600.0, metavar="S", help="seconds to go on trying (600)")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


def _day(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no date like 2026-01-01") from None


def _dsn(arguments: argparse.Namespace) -> str:
    return resolve_dsn(arguments.dsn, "MIGRATION_DATABASE_URL", "DATABASE_URL")


def _run_plan(arguments: argparse.Namespace) -> int:
    dsn = _dsn(arguments)
    found = plan(dsn, copy=arguments.copy, boundary=arguments.boundary, drop_inbound_keys=arguments.drop_inbound_keys)
    if arguments.json:
        value = attrs.asdict(found)
        value["boundary"] = str(found.boundary) if found.boundary else None
        print(json.dumps(value, indent=2))
    else:
        _print_plan(dsn, found)
    return 1 if found.obstacles else 0


def _print_plan(dsn: str, found: Survey) -> None:
    size = f"{found.size / 2**20:,.0f} MB" if found.size < 2**30 else f"{found.size / 2**30:,.1f} GB"
    print(f"{target_of(dsn)}\npublic.transactions_clean is {found.shape}, about {found.rows:,} rows, {size}.")
    if found.shape == "partitioned":
        print(f"Nothing to do: it has {found.partitions} partitions.")
    elif found.shape == "attached":
        print(f"split: the rows before {found.boundary} go from one partition to months.")
        _print_steps(_SPLIT_STEPS)
    elif found.reason:
        print(_wrapped(f"convert: {found.method}, because {found.reason}.", ""))
        if found.boundary:
            print(f"The table becomes the partition of all days before {found.boundary}.")
        _print_steps(_ATTACH_STEPS if found.method == "attach" else _COPY_STEPS)
    for remark in found.remarks:
        print(_wrapped(remark, "note: "))
    for obstacle in found.obstacles:
        print(_wrapped(obstacle, "in the way: "))


def _print_steps(steps: Sequence[tuple[str, str, str]]) -> None:
    for name, what, lock in steps:
        print(f"  {name:<12}{what}\n{'':14}locks: {lock}")


def _wrapped(text: str, label: str) -> str:
    return textwrap.fill(label + text, 79, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _run_status(arguments: argparse.Namespace) -> int:
    dsn = _dsn(arguments)
    found = status(dsn)
    if arguments.json:
        print(json.dumps(attrs.asdict(found), indent=2))
    else:
        parts = f", {found.partitions} partitions" if found.partitions > 1 else ""
        print(f"{target_of(dsn)}\npublic.transactions_clean is {found.shape}{parts}.")
        if found.operation:
            print(f"  last: {found.operation}, {found.state}")
        if found.state == "running":
            print(f"  done: {', '.join(found.done) or 'nothing yet'}")
            print(f"  left: {', '.join(found.left)}")
            if found.copied:
                print(f"  copied: {found.copied:,} rows")
        print(_wrapped(found.advice, ""))
    return 1 if found.state == "running" else 0


def _run_operation(arguments: argparse.Namespace, operation: Callable[..., ConversionReport], **options: Any) -> int:
    dsn = _dsn(arguments)
    patience = Patience(lock_timeout=arguments.lock_timeout, wait=arguments.wait)
    if arguments.json:
        print(json.dumps(attrs.asdict(operation(dsn, patience=patience, **options)), indent=2))
        return 0
    print(target_of(dsn), flush=True)
    with _Steps() as steps:
        report = operation(dsn, patience=patience, advanced=steps.advanced, **options)
    _print_report(report)
    return 0


class _Steps:
    """Prints each step with the time it took, and draws a bar while rows are copied."""

    def __init__(self) -> None:
        self._name = ""
        self._began = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end("" if kind is None else "  not done")

    def advanced(self, step: str, rows: int) -> None:
        """Hear of a step that begins or gets on."""
        if step != self._name:
            self._end("")
            self._name, self._began = step, time.monotonic()
            self._bar = Progress(step)
        if rows and self._bar:
            self._bar.advance(rows)

    def _end(self, note: str) -> None:
        if self._bar:
            self._bar.__exit__(None, None, None)
            print(f"  {self._name:<24}{time.monotonic() - self._began:9.2f} s{note}", flush=True)
            self._bar = None


def _print_report(report: ConversionReport) -> None:
    now = {
        "flat": "flat",
        "attached": f"partitioned, its former rows in one of {report.partitions} partitions",
        "partitioned": f"partitioned, {report.partitions} partitions",
    }[report.shape]
    if report.outcome == "nothing to do":
        print(f"Nothing to do: public.transactions_clean is {now}.")
        return
    print(f"{report.outcome.capitalize()}: public.transactions_clean is {now}.")
    if report.copied:
        print(f"{report.copied:,} rows were copied.")
    if report.exchange_seconds is not None and report.outcome == "done":
        print(f"Readers and writers had to wait for {report.exchange_seconds * 1000:.0f} ms at most.")


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _run_plan,
    "convert": lambda arguments: _run_operation(
        arguments,
        convert,
        copy=arguments.copy,
        boundary=arguments.boundary,
        drop_inbound_keys=arguments.drop_inbound_keys,
    ),
    "split": lambda arguments: _run_operation(arguments, split),
    "undo": lambda arguments: _run_operation(arguments, undo),
    "status": _run_status,
}
