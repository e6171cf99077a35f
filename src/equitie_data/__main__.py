"""The command line: ``python -m equitie_data COMMAND``."""

from __future__ import annotations

import sys
from importlib import import_module

_COMMANDS = {
    "demo": ("equitie_data.demo", "the main job on real data, end to end, on a server of its own"),
    "migrate": ("equitie_data.migrate", "bring a database to the current schema"),
    "import": ("equitie_data.csv_import", "import investments from a CSV file"),
    "maintain": ("equitie_data.maintenance", "months ahead, retention and refreshes, in one run that may be repeated"),
    "partition": ("equitie_data.conversion", "turn a live, flat transactions table into monthly partitions"),
    "legacy": ("equitie_data.legacy", "take over the platform's tables with dots in their names"),
    "doctor": ("equitie_data.doctor", "check a deployment's roles, privileges and policies"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in _COMMANDS:
        # Only the chosen command is imported: `migrate` must not need what `demo` needs.
        return int(import_module(_COMMANDS[arguments[0]][0]).main(arguments[1:]))
    wants_help = arguments[:1] in (["-h"], ["--help"])
    lines = ["usage: python -m equitie_data COMMAND [OPTION ...]", ""]
    lines += [f"  {name:<9}  {summary}" for name, (_, summary) in _COMMANDS.items()]
    lines += ["", "Each command explains itself with --help."]
    if arguments and not wants_help:
        lines.insert(0, f"error: {arguments[0]!r} is not a command.")
    print("\n".join(lines), file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


if __name__ == "__main__":
    raise SystemExit(main())
