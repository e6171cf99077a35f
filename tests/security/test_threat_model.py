"""SECURITY.md says which test shows each defence: it is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|$", re.MULTILINE)
SHOWN = re.compile(r"\[(?P<name>[\w.]+)\]\((?P<path>[\w/.]+)\): (?P<tests>`\w+`(?:, `\w+`)*)")


def functions_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def rows() -> list[tuple[str, str, str, str]]:
    found = ROW.findall((ROOT / "SECURITY.md").read_text("utf-8"))
    return [row for row in found if row[0].strip() != "asset" and set(row[0]) != {"-"}]


def test_every_row_names_tests_that_exist() -> None:
    assert len(rows()) > 15
    for asset, attacker, defence, shown in rows():
        assert asset.strip()
        assert attacker.strip()
        assert defence.strip()
        files = list(SHOWN.finditer(shown))
        assert files, shown
        assert SHOWN.sub("", shown).strip(" ;") == "", shown
        for file in files:
            assert Path(file["path"]).name == file["name"]
            named = set(re.findall(r"`(\w+)`", file["tests"]))
            assert named - functions_of(ROOT / file["path"]) == set()


def test_every_file_of_attacks_stands_in_the_table() -> None:
    shown = {path for *_, cell in rows() for path in re.findall(r"\((tests/[\w/.]+)\)", cell)}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "security").glob("test_*.py")}
    assert files - shown == {"tests/security/test_threat_model.py"}
