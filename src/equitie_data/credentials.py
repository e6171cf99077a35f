"""Passwords that are asked for anew with every connection: rotating credentials, IAM tokens, a vault."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
from psycopg.conninfo import conninfo_to_dict

from equitie_data.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Self

    Password: TypeAlias = str | Callable[["Endpoint"], str | Awaitable[str]]

__all__ = ["AskingDsn", "Endpoint", "ask_password", "ask_password_async", "in_loop", "with_password"]


@attrs.frozen
class Endpoint:
    """Where a connection is about to be made to, for whoever knows the password.

    Attributes:
        host: The host of the connection string; several are separated by commas, as they stand there.
        port: Its port; ``None`` for the default.
        user: Who logs in.
        dbname: The database.
    """

    host: str | None
    port: str | None
    user: str | None
    dbname: str | None

    @classmethod
    def of(cls, dsn: str) -> Self:
        """Read a connection string."""
        parts = conninfo_to_dict(dsn)
        values = [parts.get(name) for name in ("host", "port", "user", "dbname")]
        return cls(*(None if value is None else str(value) for value in values))

    def __str__(self) -> str:
        return f"{self.user or ''}@{self.host or 'the local socket'}"


class AskingDsn(str):
    """A connection string without a password, which knows whom to ask for one."""

    __slots__ = ("password",)
    password: Password


def with_password(dsn: str, password: Password | None) -> str:
    """Return a connection string for which `equitie_data.connect.connect` asks for the password.

    Args:
        dsn: The connection string.
        password: The password, or what returns it; ``None`` leaves the string as it is.
    """
    if password is None:
        return dsn
    asking = AskingDsn(dsn)
    asking.password = password
    return asking


def ask_password(dsn: str, password: Password) -> str:
    """Return the password for the next connection.

    Args:
        dsn: Where the connection goes.
        password: The password, or what returns it.

    Raises:
        UnavailableError: There is none now; what the callable raised is named by its class alone, because its text
            may hold the secret.
        ConfigurationError: The callable returned something else.
    """
    if isinstance(password, str):
        return password
    endpoint = Endpoint.of(dsn)
    try:
        answer: object = password(endpoint)
    except Exception as error:  # noqa: BLE001 - whatever it is, its text must not be passed on
        failure = type(error).__name__
    else:
        if inspect.iscoroutine(answer):
            answer.close()
        return _checked(answer)
    # Not within the handler: an error's context would carry the text along.
    raise _unobtainable(endpoint, failure)


async def ask_password_async(dsn: str, password: Password) -> str:
    """Return the password for the next connection, as `ask_password` does; the callable may return an awaitable."""
    if isinstance(password, str):
        return password
    endpoint = Endpoint.of(dsn)
    try:
        answer: object = password(endpoint)
        if inspect.isawaitable(answer):
            answer = await answer
    except Exception as error:  # noqa: BLE001 - as above
        failure = type(error).__name__
    else:
        return _checked(answer)
    raise _unobtainable(endpoint, failure)


def in_loop(password: Password | None, loop: asyncio.AbstractEventLoop, timeout: float) -> Password | None:
    """Return a callable that may also be called in other threads, which wait for the event loop's answer.

    Args:
        password: What may return an awaitable.
        loop: The event loop that the awaitable belongs to.
        timeout: Seconds a thread waits.
    """
    if password is None or isinstance(password, str):
        return password

    async def settle(answer: Awaitable[str]) -> str:
        return await answer

    def ask(endpoint: Endpoint) -> Any:
        answer = password(endpoint)
        if isinstance(answer, str) or not inspect.isawaitable(answer) or _runs_here(loop):
            return answer
        return asyncio.run_coroutine_threadsafe(settle(answer), loop).result(timeout)

    return ask


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _checked(answer: object) -> str:
    if isinstance(answer, str) and answer:
        return answer
    raise ConfigurationError(
        f"The password callable returned {type(answer).__name__ if answer != '' else 'an empty text'}: it must return "
        "the password as text; only AsyncDatabase takes one that has to be awaited."
    )


def _unobtainable(endpoint: Endpoint, failure: str) -> UnavailableError:
    return UnavailableError(f"Cannot connect to {endpoint}: the callable that knows the password raised {failure}.")
