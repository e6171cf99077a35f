#!/usr/bin/env python3
"""Developer commands that need nothing but Python and this checkout.

::

    python3 dev.py demo [arguments]         the library at work on a PostgreSQL of its own
    python3 dev.py test [arguments]         pytest, with the arguments passed on
    python3 dev.py lint                     ruff and squawk
    python3 dev.py typing                   mypy and basedpyright
    python3 dev.py benchmarks [names]       figures next to those of named peers

The first use of a command makes `.venv` beside this file and installs what the command needs; later uses start at
once. `dev.py --here COMMAND` skips that and uses the interpreter it runs on, as noxfile.py does.
"""

import sys

# Before every other import and in old syntax, so that an old interpreter gets this sentence and no traceback.
if sys.version_info < (3, 10):
    sys.exit("dev.py needs Python 3.10 or newer; this is Python %d.%d." % sys.version_info[:2])

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "made-by-dev.json"

REQUIREMENTS: dict[str, list[str]] = {
    "demo": ["--editable", ".[embedded]"],
    "test": ["--editable", ".", "--group", "test"],
    "lint": ["--editable", ".", "--group", "lint"],
    "typing": ["--editable", ".", "--group", "typing"],
    "benchmarks": ["--editable", ".", "--group", "benchmark"],
}

# The rules of squawk that no migration here follows; an exception of one file stands in it, with its reason.
SQUAWK_EXCLUDED = [
    "require-lock-timeout",  # the runner sets it for every migration
    "require-statement-timeout",  # the lock timeout bounds what others wait; the rest takes what its rows take
    "prefer-bigint-over-int",  # the platform's keys are integers; transactions, which grow, have bigint
    "ban-char-field",  # ISO 4217 currency codes have three letters, always
]

# What breaks code that is still running, and so what the half after the deployment is for; what takes a migration back
# does nothing else.
SQUAWK_ALLOWED_AFTERWARDS = [
    "ban-drop-column",
    "ban-drop-constraint",
    "ban-drop-function",
    "ban-drop-not-null",
    "ban-drop-table",
    "ban-drop-view",
    "renaming-column",
    "renaming-table",
]


def command_lines(command: str, arguments: list[str], python: Path) -> list[list[str]]:
    """What `command` runs, one program after the other."""
    module = [str(python), "-m"]
    if command == "lint":
        return [
            [*module, "ruff", "check", *arguments],
            [*module, "ruff", "format", "--check", *arguments],
            *squawk_lines(str(python.with_name("squawk"))),
        ]
    if command == "typing":
        return [[*module, "mypy", *arguments], [*module, "basedpyright", *arguments]]
    if command == "benchmarks":
        programs = [path for path in sorted(ROOT.glob("benchmarks/*.py")) if "__main__" in path.read_text("utf-8")]
        chosen = [path for path in programs if path.stem in arguments] or programs
        options = [argument for argument in arguments if argument not in {path.stem for path in programs}]
        return [[str(python), str(path), *options] for path in chosen]
    if command == "test":
        # All of it takes minutes, half of which is waiting: workers share it out, two to a processor. What is picked
        # out runs alone.
        workers = min(2 * (os.cpu_count() or 1), 4)
        return [[*module, "pytest", *(arguments or ["-n", str(workers)])]]
    return [[*module, "equitie_data", "demo", *arguments]]


def squawk_lines(squawk: str) -> list[list[str]]:
    """Check the migrations as the runner runs them: in a transaction or not, before the deployment or after it."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(ROOT.glob("sql/migrations/*.sql")):
        header = re.search(r"^--\s*equitie:(.*)$", path.read_text("utf-8"), re.MULTILINE)
        options = re.split(r"[;\s]+", header[1]) if header else []
        transaction = "--no-assume-in-transaction" if "transaction=false" in options else "--assume-in-transaction"
        breaking = "phase=post" in options or path.name.endswith(".down.sql")
        excluded = SQUAWK_EXCLUDED + (SQUAWK_ALLOWED_AFTERWARDS if breaking else [])
        groups.setdefault((transaction, "--exclude", ",".join(excluded)), []).append(str(path.relative_to(ROOT)))
    return [[squawk, "--pg-version", "15", *options, *group] for options, group in groups.items()]


def fail(sentence: str, output: str = "") -> NoReturn:
    """Leave with one sentence, below the last lines of the output that explains it."""
    tail = [f"    {line}" for line in output.strip().splitlines()[-15:]]
    sys.exit("\n".join([*tail, f"dev.py: {sentence}"]))


def call(arguments: Sequence[str | Path]) -> tuple[int, str]:
    """Run one step of the set-up; returns its exit code and what it printed."""
    # `PIP_USER=1` in somebody's environment would make every install into a virtual environment fail.
    environment = {**os.environ, "PIP_USER": "0", "PIP_NO_INPUT": "1"}
    # A file and not a pipe: a pipe stays open as long as any grandchild holds it.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [str(argument) for argument in arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            return 127, str(error)
        output.seek(0)
        return done.returncode, output.read().decode(errors="replace")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let one set-up of this checkout run at a time; the kernel lifts the lock when its process ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    directory = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def ready_commands(key: str) -> list[str]:
    """The commands that `.venv` is complete for, if it was made for `key`."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
        return list(stamp["ready"]) if stamp["key"] == key and VENV_PYTHON.exists() else []
    except (OSError, ValueError, LookupError, TypeError):
        return []


def write_stamp(key: str, ready: list[str]) -> None:
    """Record what `.venv` is complete for, in one step."""
    draft = STAMP.with_suffix(".new")
    draft.write_text(json.dumps({"key": key, "ready": ready}), encoding="utf-8")
    draft.replace(STAMP)


def make_venv() -> None:
    """Make `.venv` with pip in it, by the first way this interpreter offers."""
    if VENV.exists() and not STAMP.exists() and any(VENV.iterdir()):
        fail(
            f"{VENV} is there but was not made by dev.py: move it away, or install the project with its dependency "
            "group `dev` into it and run dev.py on its python as `dev.py --here COMMAND`."
        )
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    write_stamp("", [])
    # dev.py may be running on the interpreter of the very `.venv` that was just removed.
    python = str(getattr(sys, "_base_executable", sys.executable))
    with_pip: list[Sequence[str | Path]] = [[python, "-m", "venv", VENV]]
    by_virtualenv: list[Sequence[str | Path]] = [[python, "-m", "virtualenv", VENV]]
    pip_from_outside: list[Sequence[str | Path]] = [
        [python, "-m", "venv", "--without-pip", VENV],
        [python, "-m", "pip", "--python", VENV_PYTHON, "install", "pip"],
    ]
    # Debian and Ubuntu keep ensurepip, which `venv` takes pip from, in a package of its own.
    ways = [with_pip] if importlib.util.find_spec("ensurepip") else [by_virtualenv, pip_from_outside]
    output = ""
    for way in ways:
        for step in way:
            returncode, output = call(step)
            if returncode:
                break
        else:
            return
    fail(
        f"{python} cannot make a virtual environment with pip; install what it lacks (on Debian and Ubuntu "
        "`apt install python3-venv`) and run this command again.",
        output,
    )


def prepare(command: str) -> None:
    """Bring `.venv` to what `command` needs, unless it is there already."""
    fingerprint = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    # The path too: an editable install in a copied checkout would import the original.
    fingerprint.update(f"{sys.version}\0{sys.base_prefix}\0{ROOT}".encode())
    key = fingerprint.hexdigest()
    if command in ready_commands(key):
        return
    with alone():
        ready = ready_commands(key)
        if command in ready:  # another process was faster
            return
        print(f"dev.py: preparing .venv for `{command}`, which is done once ...", file=sys.stderr, flush=True)
        if not ready:
            make_venv()
        # Until pip is done the stamp claims nothing, so that an interrupted set-up starts anew.
        write_stamp("", [])
        reads_groups = "import sys, pip; sys.exit(tuple(map(int, pip.__version__.split('.')[:2])) < (25, 1))"
        steps: list[list[str | Path]] = [[VENV_PYTHON, "-m", "pip", "install", *REQUIREMENTS[command]]]
        if call([VENV_PYTHON, "-c", reads_groups])[0]:
            steps.insert(0, [VENV_PYTHON, "-m", "pip", "install", "--upgrade", "pip>=25.1"])
        for step in steps:
            returncode, output = call(step)
            if returncode:
                write_stamp(key, ready)
                fail(f"`{shlex.join(map(str, step))}` failed, its last lines are above.", output)
        write_stamp(key, [*ready, command])


def main() -> int:
    """Prepare `.venv` and run the command in it."""
    arguments = sys.argv[1:]
    here = arguments[:1] == ["--here"]
    command, *rest = arguments[here:] or ["--help"]
    if command in {"-h", "--help"}:
        print(__doc__.strip())
        return 0
    if command not in REQUIREMENTS:
        print(f"dev.py: there is no command `{command}`; there are {', '.join(REQUIREMENTS)}.", file=sys.stderr)
        return 2
    if not here:
        prepare(command)
    lines = command_lines(command, rest, Path(sys.executable) if here else VENV_PYTHON)
    os.chdir(ROOT)
    if len(lines) == 1 and os.name == "posix":
        os.execv(lines[0][0], lines[0])  # the command itself gets the signals and gives the exit code
    # All of them, so that one run shows everything there is to mend.
    return max([subprocess.run(line, check=False).returncode for line in lines], key=abs)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        fail(f"{error}.")
