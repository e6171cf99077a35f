"""``python -m equitie_data doctor``: what is wrong with a deployment, why it matters, and the SQL that mends it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

import attrs

from equitie_data.cli import resolve_dsn, run_cli
from equitie_data.doctor.examination import examine
from equitie_data.doctor.findings import Severity
from equitie_data.redaction import on_one_line
from equitie_data.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equitie_data.doctor.findings import Report

__all__ = ["main"]

_WIDTH = 80


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_cli(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data doctor",
        description="Check a deployment's roles, privileges, policies, TLS and logs. Changes nothing.",
        epilog="exit codes: 0 nothing wrong; 1 it failed or found something wrong; 2 wrong usage; 130 interrupted",
    )
    parser.add_argument("--dsn", help="the database, as the application logs in (default: $DATABASE_URL)")
    parser.add_argument(
        "--owner-dsn", metavar="DSN", help="the same as its owner, to look deeper (default: $MIGRATION_DATABASE_URL)"
    )
    parser.add_argument("--json", action="store_true", help="print machine-readable output")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    dsn = resolve_dsn(arguments.dsn, "DATABASE_URL")
    # The replicas, the password and the time limits are those that the application would have.
    settings = Settings.from_env(dsn=dsn)
    report = examine(settings, arguments.owner_dsn or os.environ.get("MIGRATION_DATABASE_URL") or None)
    if arguments.json:
        sys.stdout.write(json.dumps({**attrs.asdict(report), "passed": report.passed}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(report)) + "\n")
    return 0 if report.passed else 1


def _lines(report: Report) -> list[str]:
    lines = [f"Checked {on_one_line(report.target)}", ""]
    for found in report.findings:
        # Names of roles and tables are other people's: one of them must not steer a terminal.
        lines.append(f"{found.severity.upper():9} {found.code}")
        lines += _wrapped(on_one_line(found.what)) + _wrapped(found.why)
        lines += [f"    {on_one_line(found.fix)}", ""]
    for what in report.skipped:
        lines += textwrap.wrap(f"not checked: {on_one_line(what)}", _WIDTH, subsequent_indent="  ")
    counts = Counter(found.severity for found in report.findings)
    told = ", ".join(f"{counts[severity]} {severity}" for severity in Severity if counts[severity])
    lines.append(f"{told}." if told else "Nothing is wrong.")
    return lines


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(
        sentence, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
