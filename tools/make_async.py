"""Write the asyncio twins of the executor: what waits is awaited, all else stays as it is.

    python tools/make_async.py [--check]

A function that waits for the server becomes ``async``, and so does everything that calls it; what blocks and has no
asyncio counterpart runs in a thread; classes get the names of their asyncio counterparts. The twins are committed, and
a test compares them with what this program writes.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "equitie_data"
TWINS = {
    "nodes": "_async_nodes",
    "attempts": "_async_attempts",
    "pool": "_async_pool",
    "transactions": "_async_transactions",
}

HEAD = """\
# Written by tools/make_async.py from {source}.py: change that one, and run the program.
# fmt: off
# ruff: noqa: ASYNC110, E501, F401, I001, PLR0917, RUF022, RUF100, SLF001
# mypy: disable-error-code="arg-type,assignment,attr-defined,list-item,no-any-return,unused-ignore"
# pyright: reportArgumentType=false, reportUnusedImport=false
"""

# What waits for the server or for others, by the name it is called by.
AWAITED = {
    "_execute_read",
    "_execute_write",
    "acquire",
    "ask_password",
    "close",
    "execute",
    "fetchall",
    "fetchone",
    "flush_prologue",
    "getconn",
    "open",
    "putconn",
    "resize",
    "retrying",
    "sleep",
    "wait",
}
# Given by the application or by subscribers, which may return what has to be awaited.
GIVEN = {"action", "operation"}
# What blocks: on connections of its own, or for the health watch's thread.
BLOCKING = {"connect", "fence", "resolve_commit", "self._health.start", "self._health.stop"}
# Called by the health watch in its own thread.
IN_THREADS = {"probe"}
# Has no meaning in an event loop, or another form.
LEFT_OUT = {"Holder", "_of_the_parent", "after_fork", "_open_after_fork"}

WORDS = {
    "Attempts": "AsyncAttempts",
    "Call": "AsyncCall",
    "Connection": "AsyncConnection",
    "ConnectionPool": "AsyncConnectionPool",
    "ConnectionPools": "AsyncConnectionPools",
    "Holder": "TaskHolder",
    "Node": "AsyncNode",
    "NodeConnection": "AsyncNodeConnection",
    "NodeCursor": "AsyncNodeCursor",
    "RowFactory": "AsyncRowFactory",
    "Transactions": "AsyncTransactions",
    "ask_password": "ask_password_async",
    "equitie_data.attempts": "equitie_data._async_attempts",
    "equitie_data.call": "equitie_data._async_call",
    "equitie_data.nodes": "equitie_data._async_nodes",
    "equitie_data.wire": "equitie_data._async_wire",
    "tenacity.Retrying": "tenacity.AsyncRetrying",
    "settle": "_settle",
    "sweep": "_sweep",
    "threading.BoundedSemaphore": "BoundedSemaphore",
    "time.sleep": "asyncio.sleep",
}
PHRASES = {
    "Callable[[AsyncConnection[Any]], T]": "Callable[[AsyncConnection[Any]], Awaitable[T]]",
    "a callable taking a psycopg": "an async callable taking a psycopg",
    "class AsyncNode:": "class AsyncNode(TidiedFromThread):",
    "its `with` block": "its `async with` block",
    "from collections.abc import Callable": "from collections.abc import Awaitable, Callable",
    "from __future__ import annotations\n": (
        "from __future__ import annotations\n\nimport asyncio\n\n"
        "from equitie_data._event_loop import BoundedSemaphore, TaskHolder, TidiedFromThread, in_thread, settled\n"
    ),
}


class Module:
    """A module's source, and what is to be written where."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True)
        self.tree = ast.parse(source)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.edits: list[tuple[tuple[int, int], int, str]] = []

    def write(self, line: int, column: int, text: str, *, instead_of: int = 0) -> None:
        """Note what to write before a place, instead of so many characters."""
        self.edits.append(((line - 1, column), instead_of, text))

    def text(self) -> str:
        """The source with everything written."""
        for (line, column), length, text in sorted(self.edits, key=lambda edit: edit[0], reverse=True):
            row = self.lines[line].encode()
            self.lines[line] = (row[:column] + text.encode() + row[column + length :]).decode()
        return "".join(self.lines)

    def function_of(self, node: ast.AST) -> ast.FunctionDef | None:
        """The innermost function around a node."""
        while not isinstance(node, ast.FunctionDef):
            if isinstance(node, ast.Lambda) or node not in self.parents:
                return None
            node = self.parents[node]
        return node


def without_left_out(source: str) -> str:
    """Drop what has no counterpart, with the blank lines before it."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, "name", None), getattr(getattr(node, "target", None), "id", None)]
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AnnAssign) and LEFT_OUT.intersection(names):
            first = node.lineno - 1
            while not lines[first - 1].strip():
                first -= 1
            lines[first : node.end_lineno] = [""] * ((node.end_lineno or first) - first)
    return "".join(lines)


def name_of(call: ast.Call) -> str | None:
    """The name a call is made by, without what stands before it."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def blocks(node: ast.AST | None) -> bool:
    """Whether something is a call that blocks."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in BLOCKING


def suspends(call: ast.Call, awaited: set[str]) -> bool:
    """Whether a call waits, or blocks."""
    if blocks(getattr(call.func, "value", None)):
        return False  # what a blocking function returned is no asyncio object
    return blocks(call) or name_of(call) in awaited | GIVEN


def twin(source: str, awaited: set[str]) -> str:
    """Return the asyncio twin of a module.

    Args:
        source: The module's text.
        awaited: The names of what waits; those of the module's own functions are added.
    """
    module = Module(without_left_out(source))
    calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    before = set[str]()
    while awaited != before:
        before = set(awaited)
        callers = [module.function_of(call) for call in calls if suspends(call, awaited)]
        awaited.update({function.name for function in callers if function is not None} - IN_THREADS)
    for call in reversed(calls):  # in a chain, the inner ones first
        function = module.function_of(call)
        if function is not None and function.name in awaited and suspends(call, awaited):
            await_(module, call)
    for node in ast.walk(module.tree):
        if (isinstance(node, ast.FunctionDef) and node.name in awaited) or (
            isinstance(node, ast.With) and getattr(node.items[0].context_expr, "attr", None) == "lock"
        ):
            module.write(node.lineno, node.col_offset, "async ")
    text = module.text()
    for word in sorted(WORDS, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-])((?:self|node)\.)?{re.escape(word)}(?![\w-])", rf"\g<1>{WORDS[word]}", text)
    for phrase, replacement in PHRASES.items():
        text = text.replace(phrase, replacement, 1 if "\n" in phrase else -1)
    return text


def await_(module: Module, call: ast.Call) -> None:
    """Await a call where it stands."""
    name, line, column = name_of(call), call.lineno, call.col_offset
    assert call.end_lineno is not None
    assert call.end_col_offset is not None
    function = ast.unparse(call.func)
    chained = isinstance(module.parents[call], ast.Attribute | ast.Subscript)
    opening, closing = ("(await ", ")") if chained else ("await ", "")
    if blocks(call):
        arguments = ", " if call.args or call.keywords else ""
        executor = "self.executor" if "self" in {node.arg for node in function_arguments(module, call)} else "None"
        module.write(
            line, column, f"{opening}in_thread({executor}, {function}{arguments}", instead_of=len(function) + 1
        )
    elif name in GIVEN:
        module.write(line, column, f"{opening}settled(")
        closing += ")"
    else:
        module.write(line, column, opening)
    if closing:
        module.write(call.end_lineno, call.end_col_offset, closing)


def function_arguments(module: Module, node: ast.AST) -> list[ast.arg]:
    """The arguments of the function around a node."""
    function = module.function_of(node)
    return [] if function is None else function.args.args


def main() -> int:
    """Write the twins, or say whether they are up to date."""
    stale, awaited = [], set(AWAITED)
    for source, target in TWINS.items():
        path = PACKAGE / f"{target}.py"
        text = HEAD.format(source=source) + twin((PACKAGE / f"{source}.py").read_text(encoding="utf-8"), awaited)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"{', '.join(stale)}: not what tools/make_async.py writes; run it.", file=sys.stderr)
    return len(stale) > 0


if __name__ == "__main__":
    sys.exit(main())
