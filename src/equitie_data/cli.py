"""What the command lines share: one line for an error, exit codes, a progress bar.

Exit codes: 0 done; 1 it failed or found something wrong; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING

import psycopg
from psycopg.conninfo import conninfo_to_dict

from equitie_data.errors import EquitieDataError
from equitie_data.redaction import DEFAULT, on_one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Progress", "describe", "resolve_dsn", "run_cli"]

_REDRAW_SECONDS = 0.1
_BAR_WIDTH = 24


def describe(error: BaseException) -> str:
    """Return one line that says what happened, without values.

    psycopg's own text can go over several lines and its DETAIL holds the row's values, so only the primary
    message is kept; and of a value that was refused not even that, because it quotes the value.
    """
    if isinstance(error, psycopg.Error):
        primary, sqlstate = error.diag.message_primary, error.sqlstate or ""
        if primary and not isinstance(error, EquitieDataError):
            if sqlstate.startswith("22"):
                return f"The server refused a value: {type(error).__name__} (SQLSTATE {sqlstate})."
            return f"The server refused a statement: {_shown(primary)} (SQLSTATE {sqlstate})."
    return _shown(" ".join(str(error).split())) or type(error).__name__


def _shown(text: str) -> str:
    # Names of files, roles and tables are other people's: none of them may steer the terminal.
    return on_one_line(DEFAULT.text(text))


def run_cli(main: Callable[[], int]) -> int:
    """Run a command, turning errors into one line on standard error.

    Returns:
        The exit code.
    """
    # A command says what matters itself; psycopg's warnings on lost connections would only tear its output.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    try:
        return main()
    except (EquitieDataError, psycopg.Error) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output went away (`| head`); say nothing more, and keep the interpreter from
            # failing on the same pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        where = f" {error.filename}" if error.filename else ""
        print(f"error: The operating system refused{where}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def resolve_dsn(given: str | None, *names: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the DSN of the option, else of the first of the environment variables that is set.

    A person who types a password as an argument is told that everybody on the machine can read it.

    Raises:
        EquitieDataError: None of them is there.
    """
    env = os.environ if environ is None else environ
    if given and sys.stderr.isatty() and _holds_password(given):
        print(
            f"warning: everybody on this machine can read the password in --dsn: put the DSN into {names[-1]}, or the"
            " password into PGPASSWORD or ~/.pgpass.",
            file=sys.stderr,
        )
    for value in (given, *(env.get(name) for name in names)):
        if value:
            return value
    raise EquitieDataError(f"No database was named: pass --dsn or set {' or '.join(names)}.")


def _holds_password(dsn: str) -> bool:
    try:
        return bool(conninfo_to_dict(dsn).get("password"))
    except psycopg.ProgrammingError:
        return False


class Progress:
    """A one-line progress bar on standard error; silent when that is not a terminal.

    Args:
        label: What is going on.
        total: How many units there are in all; ``None`` when that is not known.
        unit: What is counted.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "rows") -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._started = time.monotonic()
        self._drawn = 0.0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units, redrawing at most ten times a second."""
        self._done += count
        if self._live:
            now = time.monotonic()
            if now - self._drawn >= _REDRAW_SECONDS:
                self._drawn = now
                sys.stderr.write("\r\x1b[K" + self._line(now)[:79])
                sys.stderr.flush()

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._started, 1e-9)
        if not self._total:
            return f"{self._label}  {self._done:,} {self._unit}  {rate:,.0f}/s"
        share = min(self._done / self._total, 1.0)
        filled = round(share * _BAR_WIDTH)
        left = (self._total - self._done) / rate if rate else 0.0
        return f"{self._label}  [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {share:4.0%}  {max(left, 0):,.0f} s left"
