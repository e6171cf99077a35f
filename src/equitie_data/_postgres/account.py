"""The operating system account a PostgreSQL server runs under, and what it may reach.

PostgreSQL refuses to run as root. Root's servers run under an account that exists already: none is created, and no
permission of the system is changed for it.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Account", "first_path_closed_to", "unprivileged_account"]


class Account(NamedTuple):
    """The account to switch to."""

    name: str
    uid: int
    gid: int

    @property
    def popen_options(self) -> dict[str, Any]:
        """What makes `subprocess` switch to the account, with none of root's supplementary groups."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def unprivileged_account() -> Account | None:
    """Choose the account of a new server: `postgres` where the system has it, otherwise `nobody`.

    Returns:
        The account to switch to, or None when the process is no root and its own account serves.

    Raises:
        EmbeddedServerError: The process is root and the system has neither account.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "_postgres", "nobody"):  # _postgres is macOS's
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedServerError(
        "PostgreSQL does not run as root, and the system has no account `postgres` or `nobody` to run it under: "
        "create one, or start the program as an ordinary user."
    )


def first_path_closed_to(account: Account | None, paths: Iterable[Path]) -> Path | None:
    """Find the first path the account may not search (a directory) or execute (a file).

    The question is put to the system as that account: mode bits alone would miss access control lists and mounts.
    """
    script = 'for path; do test -x "$path" || { printf %s "$path"; exit; }; done'
    options = account.popen_options if account else {}
    answer = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        **options,
    ).stdout
    return Path(answer) if answer else None
