"""The asyncio twins of the executor are what their program writes, and it writes what it promises."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import util
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "make_async.py"


@pytest.fixture(scope="module")
def make_async() -> Any:
    spec = util.spec_from_file_location("make_async", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_twins_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, PROGRAM, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [
        ("def f(c):\n    c.wait(g)", "async def f(c):\n    await c.wait(g)"),
        # A caller becomes async too, however far away; what does not wait stays as it is.
        (
            "def a():\n    b()\ndef b():\n    x.wait()\ndef c():\n    pass",
            "async def a():\n    await b()\nasync def b():\n    await x.wait()\ndef c():\n    pass",
        ),
        (
            "def f(c):\n    return c.execute(q).fetchone()[0]  # why",
            "async def f(c):\n    return (await (await c.execute(q)).fetchone())[0]  # why",
        ),
        (
            "def f(é):\n    g(é.wait(1), é.execute(\n        2))",
            "async def f(é):\n    g(await é.wait(1), await é.execute(\n        2))",
        ),
        (
            "def f(self):\n    self._health.stop(5)\n    connect(d, t=1).close()",
            (
                "async def f(self):\n    await in_thread(self.executor, self._health.stop, 5)\n"
                "    (await in_thread(self.executor, connect, d, t=1)).close()"
            ),
        ),
        (
            "def f(c):\n    with c.lock:\n        c.wait(g)",
            "async def f(c):\n    async with c.lock:\n        await c.wait(g)",
        ),
        ("def f(c):\n    with c._lock:\n        pass", "def f(c):\n    with c._lock:\n        pass"),
        ("def f(call, c):\n    call.operation(c)", "async def f(call, c):\n    await settled(call.operation(c))"),
        ("def probe(c):\n    connect(c).wait()", "def probe(c):\n    connect(c).wait()"),
        ("def f(c):\n    g(lambda: c.wait(1))", "def f(c):\n    g(lambda: c.wait(1))"),
        ("x = 1\n\n\ndef after_fork():\n    pass", "x = 1"),
        ("a: Node = NodeConnection(x.Node, time.sleep)", "a: AsyncNode = AsyncNodeConnection(x.Node, asyncio.sleep)"),
    ],
)
def test_what_is_written(make_async: Any, blocking: str, awaited: str) -> None:
    assert make_async.twin(blocking, set(make_async.AWAITED)).strip() == awaited


def test_a_stale_twin_is_named(make_async: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, target in make_async.TWINS.items():
        tmp_path.joinpath(f"{source}.py").write_text("def f(c):\n    c.wait(g)\n", encoding="utf-8")
        tmp_path.joinpath(f"{target}.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(make_async, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_async.py", "--check"])
    assert make_async.main() == 1
    monkeypatch.setattr(sys, "argv", ["make_async.py"])
    assert make_async.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_async.py", "--check"])
    assert make_async.main() == 0
    assert textwrap.dedent("""\
        async def f(c):
            await c.wait(g)
    """) in tmp_path.joinpath("_async_pool.py").read_text(encoding="utf-8")
