"""The promises of the package itself: what it exports, what importing it does, and which module may know which."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import equitie_data

PACKAGE = Path(equitie_data.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))

# They put a Database together for somebody, and nothing builds on them. Command lines, which define main(), too.
ENTRY_POINTS = {"__init__", "__main__", "_default", "bulk", "demo", "embedded", "testing"}
WATCHERS = [module for module in MODULES if module.startswith(("audit", "cache", "monitor"))]

IMPORTED_UNDER_WATCH = """
import importlib.util, json, logging, os, sys, threading

# What the dependencies do on import is theirs to answer for.
import attrs, psycopg, psycopg_pool, structlog, tenacity

read, connected = [], []
package = os.path.dirname(importlib.util.find_spec("equitie_data").origin)
passed_through = ("os.py", "_collections_abc.py", "<frozen os>", "<frozen _collections_abc>")

class WatchedEnviron(type(os.environ)):
    def __getitem__(self, name):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(passed_through):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(package):
            read.append(name if isinstance(name, str) else name.decode())
        return super().__getitem__(name)

os.environ.__class__ = WatchedEnviron
sys.addaudithook(lambda event, arguments: connected.append(event) if event.startswith("socket.") else None)
threads, modules, handlers = threading.active_count(), set(sys.modules), list(logging.root.handlers)

import equitie_data

print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "read": read,
    "connected": connected,
    "threads": threading.active_count() - threads,
    "handlers": len(logging.root.handlers) - len(handlers),
    "configured": structlog.is_configured(),
}))
"""


def imports(module: str) -> set[str]:
    """Every module that `module` imports when it runs: ours without the package's name, others by their full one."""
    tree = WithoutTypeChecking().visit(syntax(module))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, which this test cannot follow"
            assert node.module is not None
            found.add(node.module)
            # `from equitie_data import pool` imports a module, `from psycopg import sql` too.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("equitie_data.") for name in found}


class WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out what only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def syntax(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def ours(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & {module.partition(".")[0] for module in MODULES}


def test_exports_are_listed_in_order_and_once() -> None:
    assert list(equitie_data.__all__) == sorted(set(equitie_data.__all__))


def test_everything_public_is_exported_and_nothing_else() -> None:
    public = {
        name
        for name, value in vars(equitie_data).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    # Lazily loaded names are not in vars() before their first use.
    assert public - set(equitie_data.__all__) == set()
    for name in equitie_data.__all__:
        assert getattr(equitie_data, name) is not None, name


def test_every_export_is_ours_and_documented() -> None:
    for name in equitie_data.__all__:
        exported = getattr(equitie_data, name)
        if not (inspect.isclass(exported) or inspect.isroutine(exported)):
            continue
        assert exported.__module__.split(".")[0] == "equitie_data", name
        assert (exported.__doc__ or "").strip().partition("\n")[0].endswith((".", "?")), f"{name} has no summary line"
        if inspect.isclass(exported):
            undocumented = [
                f"{name}.{member}"
                for member, value in vars(exported).items()
                if not member.startswith("_")
                and (inspect.isroutine(value) or isinstance(value, property))
                and not inspect.getdoc(value)
            ]
            assert not undocumented


def test_the_error_tree_is_drawn_as_it_is() -> None:
    errors = importlib.import_module("equitie_data.errors")
    above: dict[int, str] = {}
    drawn: set[tuple[str, str]] = set()
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            depth = len(match[1]) // 4
            above[depth] = match[2]
            drawn.add((match[2], above[depth - 1] if depth else "Exception"))
    assert drawn == {(name, getattr(errors, name).__bases__[0].__name__) for name in errors.__all__}


def test_importing_the_package_does_nothing_but_import() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTED_UNDER_WATCH], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    assert seen["read"] == [], "the environment is read by from_env(), not by an import"
    assert seen["connected"] == []
    assert seen["threads"] == 0
    assert seen["handlers"] == 0
    assert seen["configured"] is False
    optional = {
        re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower()
        for requirement in metadata.requires("equitie-data") or []
        if "extra ==" in requirement
    } - {"equitie-data"}
    assert optional, "the package has extras"
    distributions = metadata.packages_distributions()
    loaded = {name.lower() for module in seen["modules"] for name in distributions.get(module, [])}
    assert loaded & optional == set()


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    impostor = tmp_path / "equitie_data"
    impostor.mkdir()
    (impostor / "__init__.py").write_text(
        "import os, socket, threading, pytest\n"
        "os.environ.get('DATABASE_URL'); os.getenv('HOME')\n"
        "socket.socket().close()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORTED_UNDER_WATCH}"],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert seen["read"] == ["DATABASE_URL", "HOME"]
    assert "socket.__new__" in seen["connected"]
    assert seen["threads"] == 1
    assert "pytest" in seen["modules"]


def test_the_root_is_short() -> None:
    assert len((PACKAGE / "__init__.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("module", MODULES)
def test_no_module_outgrows_its_meaning(module: str) -> None:
    lines = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 500, "split it by meaning"


@pytest.mark.parametrize("module", ["errors", "settings", "context"])
def test_the_leaves_import_nothing_of_ours_but_errors(module: str) -> None:
    assert ours(imports(module)) <= {"errors"}


@pytest.mark.parametrize("module", ["routing", "retry", "commit"])
def test_decisions_do_no_io(module: str) -> None:
    names = imports(module)
    roots = {name.partition(".")[0] for name in names}
    assert not roots & {"asyncio", "os", "psycopg_pool", "select", "selectors", "socket", "subprocess", "threading"}
    assert not {name for name in names if re.match(r"psycopg(\.|$)", name)} - {"psycopg.errors", "psycopg.pq"}
    assert not ours(names) & {"aio", "database", "pool"}


@pytest.mark.parametrize("module", WATCHERS)
def test_watchers_see_the_pool_only_through_its_hooks(module: str) -> None:
    assert not ours(imports(module)) & {"aio", "database", "pool"}


@pytest.mark.parametrize("module", MODULES)
def test_only_entry_points_import_the_database(module: str) -> None:
    is_command = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in syntax(module).body)
    if not is_command and module not in ENTRY_POINTS | {"database"}:
        assert "database" not in ours(imports(module))
