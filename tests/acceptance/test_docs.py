"""The documentation is true: its examples run, what they show is what comes, its tables are those of the code.

Fenced blocks say by their info string what is done with them:

- ``python``: run; the blocks of a page share a namespace. Lines ``#> ...`` are the block's expected output.
- ``console``: each command behind ``$ `` is run by a shell, the lines below it are its expected output. A command
  that ends in ``# exits N`` must exit with N, every other one with 0.
- ``sql``: run as the database's owner.
- ``LANGUAGE NAME.EXT``: written to that file in the page's working directory, for the commands that follow.
- anything else is only shown, and must say why in parentheses: ``text (needs a network)``.

In expected output ``...`` stands for anything. Every page works in a directory of its own on a migrated database of
its own, named by DATABASE_URL (the login role) and MIGRATION_DATABASE_URL (the owner). A page changes that by a
comment: ``<!-- database: empty -->``, or ``<!-- setup`` with Python code that runs first, with ``server`` and ``stack``
at hand.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import doctest
import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import attrs
import psycopg
import pytest

import equitie_data
from equitie_data import __main__ as command_line
from equitie_data import _default, errors, hooks, migrate, retry, settings
from equitie_data.embedded import EmbeddedServer
from equitie_data.migrations.command_line import _COMMANDS as MIGRATE_COMMANDS
from equitie_data.migrations.grant import DATABASE_ROLES
from equitie_data.pool import ConnectionPools
from equitie_data.testing import DatabaseTemplate, fresh_database

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
SETUP = re.compile(r"<!-- setup\n(?P<code>.*?)-->", re.DOTALL)
RUN = ("python", "console", "sql")
EXITS = re.compile(r"# exits (\d+)$")
CHECKER = doctest.OutputChecker()


class Block(NamedTuple):
    line: int
    language: str
    note: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(source):
        language, _, note = match["info"].partition(" ")
        found.append(Block(source.count("\n", 0, match.start()) + 1, language, note.strip(), match["text"]))
    return found


def is_file(block: Block) -> bool:
    return re.fullmatch(r"[\w.-]+\.\w+", block.note) is not None


def is_run(block: Block) -> bool:
    return block.language in RUN and not block.note


RUNNABLE = [page for page in PAGES if any(map(is_run, blocks_of(page)))]


# --- examples -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="module")
def template(documented_server: EmbeddedServer) -> Iterator[DatabaseTemplate]:
    def load(owner_dsn: str, app_role: str) -> None:
        migrate.migrate(owner_dsn)
        migrate.grant(owner_dsn, app_role)

    with DatabaseTemplate(documented_server, load).loaded() as loaded:
        yield loaded


@pytest.fixture
def working_directory() -> Iterator[Path]:
    # Not pytest's tmp_path: as root a server runs under another account, which may not enter it.
    directory = Path(tempfile.mkdtemp(prefix="equitie-docs-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_examples_run_and_print_what_they_show(
    page: Path,
    documented_server: EmbeddedServer,
    template: DatabaseTemplate,
    working_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = page.read_text(encoding="utf-8")
    empty = "<!-- database: empty -->" in source
    for variable in [name for name in os.environ if name.startswith("EQUITIE_") and name != "EQUITIE_PG_BIN"]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("READ_REPLICA_URLS", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.chdir(working_directory)
    with contextlib.ExitStack() as databases:
        dbname = databases.enter_context(fresh_database(documented_server) if empty else template.copy())
        owner_dsn = documented_server.dsn(dbname)
        monkeypatch.setenv("DATABASE_URL", template.app_dsn(dbname))
        monkeypatch.setenv("MIGRATION_DATABASE_URL", owner_dsn)
        # A context of its own, as a reader's process has: nobody acts, nothing was written.
        contextvars.Context().run(follow, page, documented_server, owner_dsn)


def follow(page: Path, server: EmbeddedServer, owner_dsn: str) -> None:
    """Do what the page says, from top to bottom."""
    source = page.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        namespace: dict[str, Any] = {"__name__": "__main__", "server": server, "stack": stack}
        stack.callback(close_default)
        for setup in SETUP.finditer(source):
            run_python(page, source.count("\n", 0, setup.start("code")), setup["code"], namespace)
        for block in blocks_of(page):
            if is_file(block):
                Path(block.note).write_text(block.text, encoding="utf-8")
            elif block.language == "sql" and is_run(block):
                with psycopg.connect(owner_dsn, autocommit=True) as owner:
                    owner.execute(block.text.encode())
            elif block.language == "console" and is_run(block):
                run_commands(page, block)
            elif is_run(block):
                run_python(page, block.line, block.text, namespace)


def close_default() -> None:
    if _default._default is not None:
        _default._default.close()
        _default._default = None


def run_python(page: Path, line: int, text: str, namespace: dict[str, Any]) -> None:
    # Blank lines before it, so that a traceback names the line of the page.
    code = compile("\n" * line + text, str(page), "exec", dont_inherit=True)
    expected = "".join(f"{line.strip()[2:].strip()}\n" for line in text.splitlines() if line.strip().startswith("#>"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)  # noqa: S102 - it is what the page tells its reader to do
    check_output(f"{name_of(page)}:{line}", expected, printed.getvalue())


def run_commands(page: Path, block: Block) -> None:
    assert block.text.startswith("$ "), f"{name_of(page)}:{block.line} starts with no command"
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        while command.endswith("\\"):
            more, _, expected = expected.partition("\n")
            command = f"{command}\n{more}"
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        promised = EXITS.search(command)
        where = f"{name_of(page)}:{block.line}: $ {command}"
        assert done.returncode == (int(promised[1]) if promised else 0), f"{where}\n{done.stdout}"
        check_output(where, expected, done.stdout)


def check_output(where: str, expected: str, printed: str) -> None:
    # `print` ends its lines; a page shows no trailing space.
    printed = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    if not CHECKER.check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE):
        pytest.fail(f"{where}\nshows:\n{expected}\nprints:\n{printed}", pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_written_or_says_why_not(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    blocks = blocks_of(page)
    assert source.count("```") == 2 * len(blocks), "a fence is indented, unbalanced or not of three backquotes"
    silent = [
        f"{name_of(page)}:{block.line}: {block.language or 'no language'}"
        for block in blocks
        if not (is_run(block) or is_file(block) or re.fullmatch(r"\(.{5,}\)", block.note))
    ]
    assert not silent


def test_every_public_name_has_an_example_that_runs() -> None:
    code = "\n".join(block.text for page in RUNNABLE for block in blocks_of(page) if block.language == "python")
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(equitie_data.__all__) - used == set()


def test_the_readme_shows_the_demo_as_it_is() -> None:
    shown = next(block.text for block in blocks_of(ROOT / "README.md") if "the demo" in block.note)
    assert max(map(len, shown.splitlines())) <= 80
    done = subprocess.run(
        [sys.executable, "-m", "equitie_data", "demo", "--rows", "2000"], capture_output=True, text=True, check=True
    )
    assert without_figures(shown) == without_figures(done.stdout)


def without_figures(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", re.sub(r"[\d.,]*\d", "N", line)).strip() for line in text.splitlines() if line.strip()]


# --- links --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^):#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) - reached == set()


# --- tables -------------------------------------------------------------------------------------------------------


def tables(text: str, *header: str) -> list[list[str]]:
    """The rows of every table whose header begins so, without the backquotes of cells that are one code span."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        cells = [re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            inside = False
        elif inside:
            rows.append([cell.replace("\\|", "|") for cell in cells])
        else:
            inside = tuple(cells[: len(header)]) == header
    return [row for row in rows if set(row[0]) != {"-"}]


def test_the_settings_are_all_described_with_their_variables_and_defaults() -> None:
    fields = {field.name: field for field in attrs.fields(settings.Settings)}
    described = {row[0]: row for row in tables(read("docs/reference/settings.md"), "attribute", "variable", "default")}
    assert list(described) == list(fields)
    for name, (_, variable, default, *_) in described.items():
        assert variable == settings._VARIABLES[name]
        if isinstance(fields[name].default, attrs.Factory):  # type: ignore[arg-type]
            assert default == "by environment"
        elif fields[name].default is attrs.NOTHING:
            assert default == "required"
        else:
            assert ast.literal_eval(default) == fields[name].default, name
    configured = tables(read("docs/how-to/install-and-configure.md"), "variable", "attribute")
    others = {row[0] for row in configured if row[1] == "-"}
    assert {row[1]: row[0] for row in configured if row[1] != "-"} == settings._VARIABLES
    assert others == settings._OTHER_VARIABLES | {"MIGRATION_DATABASE_URL"}


def test_the_presets_are_those_of_the_code() -> None:
    rows = tables(read("docs/reference/settings.md"), "environment", "min_size", "max_size")
    assert {row[0]: (int(row[1]), int(row[2])) for row in rows} == settings.PRESETS


def test_the_error_tree_and_every_error_are_described() -> None:
    page = read("docs/reference/errors.md")
    tree = "\n".join(line[4:] for line in (errors.__doc__ or "").splitlines() if line.startswith("    "))
    assert tree in page
    assert sorted(row[0] for row in tables(page, "error", "raised when")) == sorted(errors.__all__)


def test_the_commands_and_their_options_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    page = read("docs/reference/command-line.md")
    sections = dict(
        re.findall(r"^## `python -m equitie_data ([a-z ]+)`$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    )
    commands = set(command_line._COMMANDS) | {f"migrate {name}" for name in MIGRATE_COMMANDS}
    assert set(sections) == commands
    for command, section in sections.items():
        with pytest.raises(SystemExit):
            command_line.main([*command.split(), "--help"])
        helped = re.findall(r"^  (--[\w-]+(?: [A-Z=]+)?)(?=\s)", capsys.readouterr().out, re.MULTILINE)
        assert sorted(row[0] for row in tables(section, "option")) == sorted(helped), command


def test_the_events_and_their_fields_are_those_of_the_code() -> None:
    page = read("docs/reference/events.md")
    sections = dict(re.findall(r"^## `(\w+)`$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    events = {event.__name__: event for event in get_args(hooks.Event)}
    assert set(events) <= set(sections)
    for name, event in events.items():
        described = [row[0] for row in tables(sections[name], "field")]
        assert described == [field.name for field in attrs.fields(event)], name


def test_the_signatures_are_those_of_the_code() -> None:
    page = read("docs/reference/api.md")
    described = {match[1]: match[2] for match in re.finditer(r"^#+ `([\w.]+)(?:\((.*)\))?`$", page, re.MULTILINE)}
    assert set(equitie_data.__all__) <= {name.partition(".")[0] for name in described}
    for name, parameters in described.items():
        found = resolve(name)
        if parameters is not None:
            assert written(parameters) == actual(found), name


def resolve(name: str) -> Any:
    first, *rest = name.split(".")
    if name in {"Database.execute_read", "Database.execute_write"}:
        return getattr(ConnectionPools, rest[0])
    names = ["bulk", "context", "csv_import", "doctor", "embedded", "maintenance", "migrate", "monitor", "pool"]
    names += ["redaction", "transaction_id", "transactions"]
    modules = [equitie_data, *(importlib.import_module(f"equitie_data.{name}") for name in names)]
    # `equitie_data.migrate` is a module, and the function of that name is in it.
    candidates = (getattr(module, first, None) for module in modules)
    found: Any = next(each for each in candidates if each is not None and not inspect.ismodule(each))
    for part in rest:
        found = getattr(found, part)
    return found


def written(parameters: str) -> list[tuple[str, str, str | None]]:
    """Name, kind and default of every parameter as the page has them."""
    arguments = ast.parse(f"def f({parameters}): ...").body[0].args  # type: ignore[attr-defined]
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    pairs = [(each, "plain", default) for each, default in zip(plain, defaults, strict=True)]
    pairs += [
        (each, "keyword", default) for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        pairs.append((arguments.kwarg, "keywords", None))
    return [(each.arg, kind, default and ast.unparse(default)) for each, kind, default in pairs]


def actual(found: Any) -> list[tuple[str, str, str | None]]:
    kinds: dict[Any, str] = {inspect.Parameter.KEYWORD_ONLY: "keyword", inspect.Parameter.VAR_KEYWORD: "keywords"}
    result: list[tuple[str, str, str | None]] = []
    for parameter in inspect.signature(found).parameters.values():
        if parameter.name in {"self", "event"} and parameter.default is parameter.empty:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        if parameter.default is parameter.empty:
            shown = None
        elif isinstance(default, equitie_data.AuditAction):
            shown = f"AuditAction.{default.name}"
        else:
            shown = getattr(default, "__qualname__", None) or repr(default)
        result.append((parameter.name, kinds.get(parameter.kind, "plain"), shown))
    return result


# --- the table of retries -----------------------------------------------------------------------------------------


def test_the_table_of_retries_is_what_the_code_decides() -> None:
    rows = tables(read("docs/explanation/exactly-once.md"), "call", "phase", "failure", "then", "because", "how often")
    states = sorted(set().union(*(set(value) for name, value in vars(retry).items() if name.endswith("_STATES"))))
    failures = [*({"sqlstate": state} for state in states), {"sqlstate": "25006"}, {"sqlstate": "23505"}]
    failures += [{"sqlstate": None, "connection_lost": True}, {"sqlstate": "0A000", "stale_plan": True}]
    failures += [{"sqlstate": "42501", "in_prologue": True}, {"sqlstate": "42501"}]
    failures += [{"sqlstate": "42501", "in_prologue": True, "on_fresh_connection": True}]
    failures += [{"sqlstate": "58030", "connection_lost": True}]
    unused = list(rows)
    for call in ("read", "write"):
        for phase in (retry.Phase.STATEMENT, retry.Phase.COMMIT):
            for on_replica in (False, True) if call == "read" else (False,):
                for failure in failures:
                    given = retry.Failure(kind=call, phase=phase, on_replica=on_replica, **failure)
                    row = next(row for row in rows if covers(row, given))
                    decision = retry.decide(given)
                    assert row[3:] == [decision.action.value, decision.reason, how_often(decision)], f"{given}\n{row}"
                    if row in unused:
                        unused.remove(row)
    assert not unused, "these rows never apply"


def how_often(decision: retry.Decision) -> str:
    if decision.action in (retry.Action.RAISE, retry.Action.RESOLVE):
        return "-"
    if decision.until_deadline:
        return "until the deadline"
    times = {None: "attempts", 2: "twice", retry.UNTIL_FRESH: "until a new connection"}
    return times[decision.limit]


def covers(row: list[str], failure: retry.Failure) -> bool:
    """Whether the row of the table speaks of this failure; the first that does counts."""
    call, phase, what = row[:3]
    if call not in ("any", failure.kind) or phase not in ("any", failure.phase.value):
        return False
    if what == "anything else":
        return True
    if what.endswith("on a replica") and not failure.on_replica:
        return False
    if "in the prologue" in what and not failure.in_prologue:
        return False
    if "on a new connection" in what and not failure.on_fresh_connection:
        return False
    said_nothing = failure.connection_lost and failure.sqlstate is None
    return (
        (failure.sqlstate is not None and failure.sqlstate in re.findall(r"`(\w{5})`", f"`{what}` {what}"))
        or ("no answer" in what and said_nothing)
        or ("connection lost" in what and failure.connection_lost)
        or ("cached plan" in what and failure.stale_plan)
        or ("another `08...`" in what and failure.connection_lost and str(failure.sqlstate).startswith("08"))
    )


# --- who may do what ----------------------------------------------------------------------------------------------

PRIVILEGES = """
SELECT concat_ws(', ',
  nullif(array_to_string(ARRAY(
    SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) AS p
    WHERE has_table_privilege(%(role)s, %(table)s, p)
  ), ', '), ''),
  nullif(array_to_string(ARRAY(
    SELECT p || ' of some columns' FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS p
    WHERE has_any_column_privilege(%(role)s, %(table)s, p) AND NOT has_table_privilege(%(role)s, %(table)s, p)
  ), ', '), '')
)
"""
RELATIONS = """
SELECT n.nspname || '.' || c.relname
FROM pg_catalog.pg_class AS c
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm', 'v') AND n.nspname IN ('public', 'equitie_private', 'equitie_migrations')
"""
FUNCTIONS = """
SELECT p.oid::regprocedure::text, r
FROM pg_catalog.pg_proc AS p, unnest(%s::text[]) AS r
WHERE
  p.pronamespace::regnamespace::text IN ('public', 'equitie_private')
  AND has_function_privilege(r, p.oid, 'EXECUTE')
"""


def test_the_matrix_of_privileges_is_the_databases(
    documented_server: EmbeddedServer, template: DatabaseTemplate
) -> None:
    page = read("docs/reference/database.md")
    tested = {**dict.fromkeys(DATABASE_ROLES), "login role": "equitie_test_app"}
    roles = {name: real or name for name, real in tested.items()}
    with (
        template.copy() as dbname,
        # Every name is printed with its schema, those of public too.
        psycopg.connect(documented_server.dsn(dbname), options="-c search_path=") as owner,
    ):
        described = {row[0]: row[1:] for row in tables(page, "relation", *roles)}
        assert set(described) == {row[0] for row in owner.execute(RELATIONS)}
        for table, cells in described.items():
            for role, cell in zip(roles.values(), cells, strict=True):
                found = owner.execute(PRIVILEGES, {"role": role, "table": table}).fetchone()
                assert found == ("" if cell == "-" else cell,), f"{role} on {table}"
        granted: dict[str, set[str]] = {}
        names = {real: name for name, real in roles.items()}
        for function, role in owner.execute(FUNCTIONS, [list(roles.values())]):
            granted.setdefault(function, set()).add(names[role])
        assert {row[0]: set(row[1].split(", ")) for row in tables(page, "function", "may be called by")} == granted


def test_the_dashboard_is_described_as_it_is() -> None:
    shown = next(block for block in blocks_of(ROOT / "docs/reference/dashboard.md") if block.language == "json")
    found = equitie_data.PerformanceMonitor().get_dashboard_data()
    assert keys(json.loads(shown.text)) == keys(found)


def keys(value: Any) -> Any:
    return {name: keys(each) for name, each in value.items()} if isinstance(value, dict) and value else None
