"""What a data directory holds, PostgreSQL's "database cluster": made by initdb, copied from a primary, or opened."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from typing import TYPE_CHECKING

from psycopg.conninfo import conninfo_to_dict

from equitie_data._postgres.binaries import find_servers
from equitie_data._postgres.process import run_program
from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from equitie_data._postgres.directory import DataDirectory

__all__ = ["LOG_FILE", "copy_cluster", "create_cluster", "in_use", "open_cluster", "settings_text", "write_settings"]

LOG_FILE = "server.log"
_SETTINGS_FILE = "equitie_data.conf"
_PASSWORD_FILE = "equitie_data.password"  # noqa: S105 - a file's name
_DECIDED_HERE = frozenset(
    {"port", "listen_addresses", "unix_socket_directories", "logging_collector", "log_destination"}
    | {"data_directory", "config_file", "hba_file", "ident_file", "external_pid_file"}
)


def create_cluster(bin_dir: Path, major: int, directory: DataDirectory) -> str:
    """Make a cluster with initdb: UTF8, strings compared by code point, everybody asked for a password.

    Returns:
        The password of its superuser `postgres`, which a file of mode 0600 in the directory keeps.

    Raises:
        EmbeddedServerError: initdb failed.
    """
    password = secrets.token_urlsafe(24)
    # A file without a name: nothing is left of it, whatever interrupts initdb.
    with tempfile.TemporaryFile() as file:
        file.write(password.encode())
        file.seek(0)
        if directory.account:
            os.fchown(file.fileno(), directory.account.uid, directory.account.gid)
        arguments = ["-D", str(directory.path), "-U", "postgres", f"--pwfile=/dev/fd/{file.fileno()}"]
        arguments += ["--auth=scram-sha-256", "--encoding=UTF8", *_locale_options(major), "--no-instructions"]
        arguments += ["--data-checksums"] if directory.durable else ["--no-sync"]
        if major >= 16 and not directory.durable:
            # Stretching a random password adds nothing, and at the default of 4096 rounds it is most of a connect.
            arguments += ["--set", "scram_iterations=1"]
        run_program(bin_dir, "initdb", arguments, directory, pass_fds=[file.fileno()])
    directory.append("postgresql.conf", f"\ninclude_if_exists = '{_SETTINGS_FILE}'\n")
    # Last: a directory with this file is complete.
    directory.write(_PASSWORD_FILE, password)
    return password


def copy_cluster(bin_dir: Path, directory: DataDirectory, primary_dsn: str, slot: str) -> str:
    """Copy a running primary with pg_basebackup, to stream from it through a new replication slot.

    Returns:
        The superuser's password, which is the primary's.

    Raises:
        EmbeddedServerError: pg_basebackup failed.
    """
    primary = conninfo_to_dict(primary_dsn)
    # Part by part: everybody can read the arguments of a process, and the DSN holds the password.
    arguments = ["-h", str(primary["host"]), "-p", str(primary["port"]), "-U", str(primary["user"]), "--no-password"]
    arguments += ["-D", str(directory.path), "--write-recovery-conf", "--create-slot", f"--slot={slot}"]
    arguments += ["--wal-method=stream", "--checkpoint=fast", *([] if directory.durable else ["--no-sync"])]
    run_program(bin_dir, "pg_basebackup", arguments, directory, environment={"PGPASSWORD": str(primary["password"])})
    for log in (LOG_FILE, f"{LOG_FILE}.1"):
        (directory.path / log).unlink(missing_ok=True)
    return directory.read(_PASSWORD_FILE).strip()


def open_cluster(major: int, directory: DataDirectory, environ: Mapping[str, str]) -> str:
    """See to it that a server can be started on an existing cluster.

    Args:
        major: The major version of the server.
        directory: The cluster's directory.
        environ: Where `find_servers` looks for a server that fits, should this one not.

    Returns:
        The password of its superuser.

    Raises:
        EmbeddedServerError: Another major version made it, a live server holds it, or it was not made here.
    """
    made_by = directory.made_by
    if made_by != str(major):
        fitting = [str(found.bin_dir) for found in find_servers(environ) if str(found.major) == made_by]
        way_out = f"pass bin_dir={fitting[0]!r}" if fitting else f"install PostgreSQL {made_by}"
        raise EmbeddedServerError(
            f"The data directory {str(directory.path)!r} was made by PostgreSQL {made_by} and cannot be opened by "
            f"{major}: {way_out}, or dump and restore it."
        )
    if directory.server_pid() is not None:
        raise in_use(directory)
    directory.forget_dead_server()
    password = directory.read(_PASSWORD_FILE).strip()
    if not password:
        raise EmbeddedServerError(
            f"The data directory {str(directory.path)!r} has no {_PASSWORD_FILE}: it was not made by EmbeddedServer, "
            "or its making was interrupted. Choose another directory, or delete this one."
        )
    return password


def in_use(directory: DataDirectory) -> EmbeddedServerError:
    """Make the error for a directory that a live server holds."""
    holder = directory.server_pid()
    by = f" (process {holder})" if holder else ""
    return EmbeddedServerError(
        f"The data directory {str(directory.path)!r} is in use by another server{by}: stop it or choose another."
    )


def settings_text(settings: Mapping[str, str]) -> str:
    """Write settings in the syntax of postgresql.conf.

    Raises:
        EmbeddedServerError: A name is none, or its setting is one that is decided here.
    """
    lines = []
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$.]*", name):
            raise EmbeddedServerError(f"{name!r} is no name of a server setting.")
        if name.lower() in _DECIDED_HERE:
            raise EmbeddedServerError(f"The setting {name!r} is decided by EmbeddedServer: leave it out.")
        # The escapes of a quoted value: PostgreSQL's guc-file.l, DeescapeQuotedString.
        escaped = value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n")
        lines.append(f"{name} = '{escaped}'\n")
    return "".join(lines)


def write_settings(directory: DataDirectory, text: str) -> None:
    """Put settings where postgresql.conf includes them; what ALTER SYSTEM sets still comes after them."""
    durability = "" if directory.durable else "fsync = off\n"
    # A failed statement is its client's business, who hears of it; its message and its text can hold people's values.
    quiet = "log_min_messages = log\n"
    directory.write(_SETTINGS_FILE, f"timezone = UTC\nlog_timezone = UTC\n{quiet}{durability}{text}")


def _locale_options(major: int) -> list[str]:
    """What makes initdb compare strings by code point and know Unicode's letters, on every major version alike."""
    # macOS has no C.UTF-8, and its C knows ASCII's letters only.
    is_macos = os.uname().sysname == "Darwin"
    options = ["--locale=C", "--lc-ctype=en_US.UTF-8"] if is_macos else ["--locale=C.UTF-8"]
    if major >= 17:
        options += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    # The errors of a failed start are read by last_word.
    return [*options, "--lc-messages=C"]
