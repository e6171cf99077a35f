"""Who is acting, in which transaction, and what their next read must see.

All of it lives in context variables: every thread and every asyncio task has its own, so two requests served at once
can never write each other's identity. Nothing here touches a database; the pool reads the actor and applies it
in the prologue of every transaction.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from ipaddress import ip_address as parse_ip_address
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import UUID

import attrs

from equitie_data.errors import ConfigurationError, NoActorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from psycopg import Connection

__all__ = [
    "Actor",
    "WalPosition",
    "acting_as",
    "as_service",
    "bind",
    "current_actor",
    "current_transaction",
    "resume_session",
    "session_token",
]

_TEXT_LIMIT = 1_000  # characters; longer header values are cut, so that a client cannot bloat the audit log
# Control characters, line separators and marks that turn the direction of writing: none of them belongs into a name or
# a header, and a reader's log, terminal or spreadsheet would obey them.
_STEERING = re.compile("[\x01-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def _text(value: object) -> str | None:
    """Cut to size, and drop what PostgreSQL cannot store (NUL, halves of surrogate pairs); one line it becomes, too."""
    if value is None:
        return None
    text = str(value)[:_TEXT_LIMIT].replace("\x00", "").encode("utf-8", "ignore").decode()
    return text if text.isascii() and text.isprintable() else _STEERING.sub("\ufffd", text)


def _address(value: object) -> str | None:
    if value is None or value == "":
        return None
    try:
        return str(parse_ip_address(str(value).strip()))
    except ValueError:
        pass
    # Not within the handler: Python's message, which an error's context would carry along, quotes the value.
    raise ConfigurationError(
        "ip_address is not an IPv4 or IPv6 address: pass the client's address alone, without port or proxy list."
    )


def _uuid(value: object) -> UUID:
    if isinstance(value, UUID):
        return value
    try:
        return UUID(str(value))
    except ValueError:
        raise ConfigurationError(
            "user_id is not a UUID: pass the id of the user that the application has authenticated."
        ) from None


@attrs.frozen(kw_only=True)
class Actor:
    """On whose behalf statements run; row-level security, the audit trail and metrics all read it.

    Attributes:
        kind: ``"user"`` (under row-level security) or ``"service"`` (the application itself).
        user_id: The authenticated user; ``None`` for the service.
        reason: Why the service acts; ``None`` for a user.
        tenant_id: The tenant the request belongs to.
        ip_address: The client's address, canonical form.
        user_agent: The client's user agent, at most 1,000 characters.
        session_id: The web session.
        request_id: The request, so that everything it changed can be found together.
    """

    kind: Literal["user", "service"]
    user_id: UUID | None = None
    reason: str | None = attrs.field(default=None, converter=_text)
    tenant_id: str | None = attrs.field(default=None, converter=_text)
    ip_address: str | None = attrs.field(default=None, converter=_address)
    user_agent: str | None = attrs.field(default=None, converter=_text, repr=False)
    session_id: str | None = attrs.field(default=None, converter=_text, repr=False)
    request_id: str | None = attrs.field(default=None, converter=_text)
    # The settings every transaction carries, rendered once per actor and not once per statement.
    claims: str = attrs.field(init=False, repr=False, eq=False)
    context: str = attrs.field(init=False, repr=False, eq=False)
    user_text: str = attrs.field(init=False, repr=False, eq=False)
    claims_bytes: bytes = attrs.field(init=False, repr=False, eq=False)
    context_bytes: bytes = attrs.field(init=False, repr=False, eq=False)

    @claims.default
    def _render_claims(self) -> str:
        return "" if self.user_id is None else json.dumps({"sub": str(self.user_id), "role": "authenticated"})

    @context.default
    def _render_context(self) -> str:
        facts = {
            "actor": self.kind,
            "user_id": None if self.user_id is None else str(self.user_id),
            "reason": self.reason,
            "tenant_id": self.tenant_id,
            "ip_address": self.ip_address,
            "user_agent": self.user_agent,
            "session_id": self.session_id,
            "request_id": self.request_id,
        }
        return json.dumps({key: value for key, value in facts.items() if value is not None})

    @user_text.default
    def _render_user(self) -> str:
        return "" if self.user_id is None else str(self.user_id)

    @classmethod
    def from_jwt(
        cls,
        token: str,
        *,
        audience: str | Sequence[str],
        key: object = None,
        jwks: Any = None,
        algorithms: Sequence[str] | None = None,
        issuer: str | Sequence[str] | None = None,
        leeway: float = 10.0,
        **request: str | None,
    ) -> Actor:
        """Return the user of a JSON web token, once it is verified; needs the extra ``jwt``.

        Args:
            token: The token alone, without ``Bearer``.
            audience: Whom it must have been issued for.
            key: The shared secret, or the issuer's public key.
            jwks: Instead of ``key``, the issuer's public keys: a JSON web key set or a `jwt.PyJWKClient`.
            algorithms: Those that are allowed, of the key's own kind.
            issuer: Who must have issued it.
            leeway: Seconds that two clocks may differ.
            request: ``ip_address``, ``user_agent``, ``session_id``, ``request_id``, ``tenant_id``, as in `acting_as`.

        Raises:
            InvalidTokenError: The token does not hold; answer 401.
            ConfigurationError: The arguments would not protect anything, or the extra is not installed.
            UnavailableError: The key set could not be fetched.
        """
        try:
            integration = import_module("equitie_data.integrations.jwt")
        except ModuleNotFoundError:
            raise ConfigurationError(
                "Actor.from_jwt needs PyJWT: install it with `pip install 'equitie-data[jwt]'`."
            ) from None
        actor: Actor = integration.actor_from_jwt(
            token,
            audience=audience,
            key=key,
            jwks=jwks,
            algorithms=algorithms,
            issuer=issuer,
            leeway=leeway,
            **request,
        )
        return actor

    @claims_bytes.default
    def _encode_claims(self) -> bytes:
        return self.claims.encode()

    @context_bytes.default
    def _encode_context(self) -> bytes:
        return self.context.encode()


@attrs.frozen(order=True)
class WalPosition:
    """A place in the write-ahead log: what a node has replayed up to here, it shows.

    Attributes:
        timeline: Counts the promotions; the same offset on another timeline can be another history.
        lsn: The offset, in bytes.
        system: The cluster's identifier: another cluster's log has nothing to do with it. 0 when not known.
    """

    timeline: int
    lsn: int
    system: int = 0

    def __str__(self) -> str:
        return f"{self.system:X}-{self.timeline:X}-{self.lsn:X}"

    @classmethod
    def parse(cls, text: str) -> WalPosition:
        """Read what ``str()`` has written.

        Raises:
            ConfigurationError: It is something else.
        """
        try:
            system, timeline, lsn = (int(part, 16) for part in text.split("-"))
        except ValueError:
            raise ConfigurationError("The session token is not one that session_token() has made.") from None
        return cls(timeline, lsn, system)

    @staticmethod
    def parse_lsn(text: str) -> int:
        """Return the offset PostgreSQL writes as ``16/B374D848``."""
        high, low = text.split("/")
        return (int(high, 16) << 32) | int(low, 16)


class Transaction(Protocol):
    """The write in progress, as subscribers see it (see `current_transaction`)."""

    @property
    def connection(self) -> Connection[Any]:
        """The connection the operation runs on."""

    @property
    def local(self) -> dict[Any, Any]:
        """State of this attempt alone: gone with a rollback, fresh at a retry."""

    def before_commit(self, action: Callable[[Connection[Any]], None]) -> None:
        """Run ``action`` on the same connection just before COMMIT; an error of it rolls back."""


actor_variable: ContextVar[Actor | None] = ContextVar("equitie_data.actor", default=None)
transaction_variable: ContextVar[Transaction | None] = ContextVar("equitie_data.transaction", default=None)
# One for each cluster written to.
position_variable: ContextVar[tuple[WalPosition, ...]] = ContextVar("equitie_data.position", default=())


def current_actor() -> Actor:
    """Return who is acting in this thread or task.

    Raises:
        NoActorError: Nobody is.
    """
    actor = actor_variable.get()
    if actor is None:
        raise NoActorError
    return actor


def current_transaction() -> Transaction | None:
    """Return the write whose operation is running in this thread or task, if there is one."""
    return transaction_variable.get()


def session_token() -> str | None:
    """Return what a later read must see to have read this context's writes; ``None`` before the first one.

    Put it into the web session or a cookie, and hand it to `resume_session` in the next request, wherever that runs.
    It holds no secret.
    """
    return ".".join(map(str, position_variable.get())) or None


def resume_session(token: str | None) -> None:
    """Have this context's reads see everything up to a `session_token`, whoever made it.

    Args:
        token: ``None`` and older tokens than the context's own change nothing.

    Raises:
        ConfigurationError: The token is not one.
    """
    if token:
        remember_position(tuple(map(WalPosition.parse, token.split("."))))


def remember_position(positions: WalPosition | tuple[WalPosition, ...]) -> None:
    """Have this context's reads see everything up to a position, or to one in each of several clusters."""
    latest = {position.system: position for position in position_variable.get()}
    for position in positions if isinstance(positions, tuple) else (positions,):
        known = latest.get(position.system)
        if known is None or position > known:
            latest[position.system] = position
    position_variable.set(tuple(latest.values()))


def position_in(system: int) -> WalPosition | None:
    """Return what this context's reads must see of a cluster."""
    return next((position for position in position_variable.get() if position.system == system), None)


@contextmanager
def _bound(actor: Actor) -> Iterator[Actor]:
    token = actor_variable.set(actor)
    try:
        yield actor
    finally:
        actor_variable.reset(token)


@contextmanager
def acting_as(
    user_id: UUID | str | Actor,
    *,
    ip_address: str | None = None,
    user_agent: str | None = None,
    session_id: str | None = None,
    request_id: str | None = None,
    tenant_id: str | None = None,
) -> Iterator[Actor]:
    """Run the block's statements as a user, under row-level security.

    Args:
        user_id: The user whom the application has already authenticated, or an `Actor` such as `Actor.from_jwt`
            returns; arguments that are given then refine it. Which rights the user has is looked up in the database at
            every transaction; nothing the client sends can raise them.
        ip_address: The client's address, for the audit trail.
        user_agent: The client's user agent, for the audit trail.
        session_id: The web session, for the audit trail.
        request_id: The request, for the audit trail.
        tenant_id: The tenant, for the audit trail.

    Raises:
        ConfigurationError: ``user_id`` is not a UUID, the actor no user's, or ``ip_address`` not an address.
    """
    request = {
        "ip_address": ip_address,
        "user_agent": user_agent,
        "session_id": session_id,
        "request_id": request_id,
        "tenant_id": tenant_id,
    }
    if isinstance(user_id, Actor):
        if user_id.user_id is None:
            raise ConfigurationError("acting_as takes a user's actor: the service acts under as_service(reason).")
        given: dict[str, Any] = {name: value for name, value in request.items() if value is not None}
        actor = attrs.evolve(user_id, **given) if given else user_id
    else:
        actor = Actor(kind="user", user_id=_uuid(user_id), **request)
    with _bound(actor):
        yield actor


@contextmanager
def as_service(
    reason: str,
    *,
    ip_address: str | None = None,
    user_agent: str | None = None,
    session_id: str | None = None,
    request_id: str | None = None,
    tenant_id: str | None = None,
) -> Iterator[Actor]:
    """Run the block's statements as the application itself, past row-level security.

    Args:
        reason: Why; it is written to the audit trail with every change.
        ip_address: As in `acting_as`; so are the other arguments.
        user_agent: As in `acting_as`.
        session_id: As in `acting_as`.
        request_id: As in `acting_as`.
        tenant_id: As in `acting_as`.

    Raises:
        ConfigurationError: ``reason`` is empty.
    """
    if not reason or not reason.strip():
        raise ConfigurationError("as_service needs a reason: say in a few words why the application itself acts.")
    with _bound(
        Actor(
            kind="service",
            reason=reason,
            ip_address=ip_address,
            user_agent=user_agent,
            session_id=session_id,
            request_id=request_id,
            tenant_id=tenant_id,
        )
    ) as actor:
        yield actor


def bind(
    *,
    user_id: UUID | str | None = None,
    ip_address: str | None = None,
    user_agent: str | None = None,
    session_id: str | None = None,
    request_id: str | None = None,
    tenant_id: str | None = None,
) -> Actor:
    """Set the actor of this context from here on, for frameworks whose middleware cannot hold a ``with`` block.

    The setting ends with the context (the thread, the task, the `contextvars.Context` a request runs in).
    Arguments left out keep the value of the actor that is acting already.

    Raises:
        ConfigurationError: An argument has the wrong form.
        NoActorError: There is neither a ``user_id`` nor an actor to refine.
    """
    given = {
        "ip_address": ip_address,
        "user_agent": user_agent,
        "session_id": session_id,
        "request_id": request_id,
        "tenant_id": tenant_id,
    }
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if user_id is None:
        actor = attrs.evolve(current_actor(), **changes)
    else:
        actor = Actor(kind="user", user_id=_uuid(user_id), **changes)
    actor_variable.set(actor)
    return actor
