"""Passwords from a callable: asked for by every connection of every kind, never shown by any of them."""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from equitie_data import ConfigurationError, Database, UnavailableError, as_service
from equitie_data.aio import AsyncDatabase
from equitie_data.connect import connect
from equitie_data.credentials import Endpoint, with_password
from equitie_data.settings import Replica, Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def split(dsn: str) -> tuple[str, str]:
    """Take the password out of a connection string."""
    parts = conninfo_to_dict(dsn)
    password = str(parts.pop("password"))
    return make_conninfo("", **parts), password


class Vault:
    """Knows the password of the day, and who asked."""

    def __init__(self, password: str) -> None:
        self.password = password
        self.asked: list[tuple[str, Endpoint]] = []
        self.error: Exception | None = None

    def __call__(self, endpoint: Endpoint) -> str:
        self.asked.append((threading.current_thread().name, endpoint))
        if self.error is not None:
            raise self.error
        return self.password


def test_every_connection_asks_and_says_where_it_goes(app_dsn: str) -> None:
    dsn, password = split(app_dsn)
    vault = Vault(password)
    with Database(Settings(dsn=dsn, password=vault, min_size=1, max_size=2)) as database, as_service("a test"):
        assert database.execute_read("SELECT 1") == [(1,)]
    parts = conninfo_to_dict(app_dsn)
    endpoints = {endpoint for _, endpoint in vault.asked}
    assert endpoints == {Endpoint(*(str(parts[name]) for name in ("host", "port", "user", "dbname")))}
    assert len(vault.asked) >= 3  # the first look, the probe, the pool


def test_a_password_that_was_changed_is_asked_for_again(app_dsn: str, owner_dsn: str) -> None:
    dsn, password = split(app_dsn)
    user = sql.Identifier(str(conninfo_to_dict(dsn)["user"]))
    vault = Vault(password)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        try:
            with Database(Settings(dsn=dsn, password=vault, min_size=1, max_size=1)) as database, as_service("a test"):
                first = database.execute_read("SELECT pg_backend_pid()")[0][0]
                vault.password = "rotated-" + password
                owner.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(user, vault.password))
                owner.execute("SELECT pg_terminate_backend(%s, 5000)", [first])
                assert database.execute_read("SELECT pg_backend_pid()")[0][0] != first
        finally:
            owner.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(user, password))


def shown(error: BaseException | None) -> str:
    """Everything an error says, and every error that hangs on it."""
    texts: list[str] = []
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        texts += [str(each), repr(each), *map(str, each.args), *traceback.format_exception(each)]
        waiting += [each.__cause__, each.__context__]
    return "\n".join(texts)


def test_what_the_callable_raises_is_named_and_not_quoted(app_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    dsn, password = split(app_dsn)
    vault = Vault(password)
    vault.error = RuntimeError(f"token {password} expired")
    with caplog.at_level(logging.DEBUG), pytest.raises(UnavailableError) as caught:
        Database(Settings(dsn=dsn, password=vault)).open()
    assert str(caught.value).endswith("the callable that knows the password raised RuntimeError.")
    assert password not in shown(caught.value) + caplog.text


def test_a_callable_that_fails_later_fails_the_call_and_not_the_pool(
    app_dsn: str, owner_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    dsn, password = split(app_dsn)
    vault = Vault(password)
    settings = Settings(dsn=dsn, password=vault, min_size=1, max_size=1, call_timeout=3.0, checkout_timeout=0.5)
    with (
        caplog.at_level(logging.DEBUG),
        Database(settings) as database,
        as_service("a test"),
        psycopg.connect(owner_dsn, autocommit=True) as owner,
    ):
        database.execute_read("SELECT 1")
        vault.error = RuntimeError(f"token {password} expired")
        owner.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'equitie_test_app'")
        with pytest.raises(UnavailableError) as caught:
            database.execute_read("SELECT 1")
        vault.error = None
        assert database.execute_read("SELECT 1", timeout=30) == [(1,)]
    assert password not in shown(caught.value) + caplog.text


@pytest.mark.parametrize("answer", [None, "", b"bytes", 7])
def test_an_answer_that_is_no_password_is_refused(app_dsn: str, answer: Any) -> None:
    dsn, _ = split(app_dsn)
    with pytest.raises(ConfigurationError, match="password"):
        connect(with_password(dsn, lambda _: answer))


def test_a_coroutine_function_is_refused_where_nothing_awaits_it(app_dsn: str) -> None:
    dsn, password = split(app_dsn)

    async def ask(_: Endpoint) -> str:
        return password

    with pytest.raises(ConfigurationError, match="only AsyncDatabase"):
        Database(Settings(dsn=dsn, password=ask)).open()


@pytest.mark.parametrize("kind", ["plain", "awaited"])
def test_asyncio_asks_in_its_loop_whatever_thread_needs_the_password(app_dsn: str, kind: str) -> None:
    dsn, password = split(app_dsn)
    loops: list[object] = []

    async def awaited(_: Endpoint) -> str:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return password

    ask: Callable[[Endpoint], str | Awaitable[str]] = awaited if kind == "awaited" else (lambda _: password)

    async def main() -> object:
        async with AsyncDatabase(Settings(dsn=dsn, password=ask, min_size=1, max_size=2)) as database:
            with as_service("a test"):
                assert await database.execute_read("SELECT 1") == [(1,)]
            assert database.settings.password is ask
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    if kind == "awaited":
        assert len(loops) >= 3
        assert set(loops) == {loop}


def test_asyncio_says_so_when_the_awaited_password_is_not_to_be_had(app_dsn: str) -> None:
    dsn, password = split(app_dsn)

    async def ask(_: Endpoint) -> str:
        raise RuntimeError(f"token {password} expired")

    async def main() -> None:
        async with AsyncDatabase(Settings(dsn=dsn, password=ask)):
            raise AssertionError

    with pytest.raises(UnavailableError) as caught:
        asyncio.run(main())
    assert "raised RuntimeError" in str(caught.value)
    assert password not in shown(caught.value)


def test_a_password_of_the_settings_is_used_and_masked(app_dsn: str) -> None:
    dsn, password = split(app_dsn)
    settings = Settings.from_env({"DATABASE_URL": dsn, "EQUITIE_PASSWORD": password})
    assert settings.password == password
    assert password not in repr(settings)
    with Database(settings) as database, as_service("a test"):
        assert database.execute_read("SELECT 1") == [(1,)]


def test_two_passwords_are_one_too_many(app_dsn: str) -> None:
    for changes in ({"dsn": app_dsn}, {"dsn": split(app_dsn)[0], "replicas": [Replica(app_dsn)]}):
        with pytest.raises(ConfigurationError, match="choose one") as caught:
            Settings(password="x", **changes)  # type: ignore[arg-type]
        assert split(app_dsn)[1] not in shown(caught.value)


@pytest.mark.parametrize("wrong", ["", 3, b"x"])
def test_settings_refuse_what_is_no_password(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="password must be text"):
        Settings(dsn="host=x", password=wrong)
