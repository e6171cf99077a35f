"""Settings: frozen, checked when they are made, read from the environment only when asked."""

from __future__ import annotations

import difflib
import os
import re
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import attrs
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from equitie_data.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from equitie_data.credentials import Password

__all__ = ["PRESETS", "Replica", "Settings", "masked_dsn"]

Environment: TypeAlias = Literal["development", "staging", "production"]

PRESETS: Final[dict[str, tuple[int, int]]] = {
    "development": (1, 5),
    "staging": (3, 10),
    "production": (10, 50),
}
"""Fewest and most connections per node, by environment."""

_SECRETS: Final = frozenset({"password", "sslpassword", "passfile", "sslkey", "oauth_client_secret"})
_REPLICA_SEPARATOR: Final = re.compile(r",(?=\s*(?:[A-Za-z0-9_-]+=)?postgres(?:ql)?://)")
_REGION: Final = re.compile(r"(?P<region>[A-Za-z0-9_-]+)=(?P<dsn>postgres(?:ql)?://.*)", re.DOTALL)
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


def masked_dsn(dsn: str) -> str:
    """Return the DSN with its secrets replaced by ``***``."""
    try:
        parts = conninfo_to_dict(dsn)
    except ProgrammingError:
        return "***"
    return make_conninfo("", **{key: "***" if key in _SECRETS else value for key, value in parts.items()})


def _check_dsn(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{attribute.name} is empty: give a PostgreSQL connection string.")
    try:
        parts = conninfo_to_dict(value)
    except ProgrammingError:
        # libpq's own message quotes the string, password and all; hence not raised in here, where that message would
        # become the error's context.
        parts = None
    if parts is None:
        raise ConfigurationError(
            f"{attribute.name} is not a PostgreSQL connection string: write it as "
            "postgresql://user:password@host:5432/database, with special characters percent-encoded."
        )
    if not parts:
        raise ConfigurationError(f"{attribute.name} is empty: give a PostgreSQL connection string.")


def _positive(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigurationError(f"{attribute.name} must be a number of seconds above 0, not {value!r}.")


def _not_negative(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigurationError(f"{attribute.name} must be a number of seconds from 0 (no limit), not {value!r}.")


def _count(_: object, attribute: attrs.Attribute[Any], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{attribute.name} must be a whole number from 1, not {value!r}.")


def _environment(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if value not in PRESETS:
        raise ConfigurationError(
            f"{attribute.name} must be one of {', '.join(PRESETS)}{_nearest(str(value), PRESETS)}."
        )


def _check_password(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (callable(value) or (isinstance(value, str) and value)):
        raise ConfigurationError(f"{attribute.name} must be text, or a callable that returns it.")


def _pooler(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if value not in ("auto", "none", "transaction"):
        raise ConfigurationError(f'{attribute.name} must be "auto", "none" or "transaction", not {value!r}.')


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@attrs.frozen
class Replica:
    """A read replica.

    Attributes:
        dsn: Its connection string.
        region: Where it stands, if that was said.
    """

    dsn: str = attrs.field(repr=masked_dsn, validator=_check_dsn)
    region: str | None = None

    @classmethod
    def parse(cls, text: str) -> Replica:
        """Read ``postgresql://...`` or ``region=postgresql://...``."""
        match = _REGION.fullmatch(text.strip())
        return cls(match["dsn"], match["region"]) if match else cls(text.strip())


def _replicas(values: Any) -> tuple[Replica, ...]:
    return tuple(value if isinstance(value, Replica) else Replica.parse(value) for value in values)


def _preset_max_size(settings: Settings) -> int:
    return PRESETS.get(settings.environment, PRESETS["development"])[1]


def _preset_min_size(settings: Settings) -> int:
    preset = PRESETS.get(settings.environment, PRESETS["development"])[0]
    return min(preset, settings.max_size) if isinstance(settings.max_size, int) else preset


@attrs.frozen(kw_only=True)
class Settings:
    """Everything that can be set. All times are seconds, as floats.

    Attributes:
        dsn: The primary, as the application's login role.
        password: The password of every node, or a callable that is given an `equitie_data.credentials.Endpoint` and
            returns it. It is asked for every new connection; whoever wants to cache the answer does so in it. For
            `AsyncDatabase` it may return an awaitable. The connection strings then hold no password.
        environment: Chooses the pool's size; see `PRESETS`.
        replicas: Read replicas.
        max_size: Most connections per node; the environment's preset when left out.
        min_size: Fewest connections kept per node; the preset, or max_size where that is less, when left out.
        checkout_timeout: The longest wait for a connection (the platform's "connection timeout").
        connect_timeout: The longest one connection attempt may take.
        max_idle: Past it, a connection that the pool does not need is closed.
        max_lifetime: Past it, a connection is replaced.
        statement_timeout: The longest one statement may run on the server; 0 for no limit.
        idle_in_transaction_timeout: The longest an operation may leave its transaction idle; 0 for no limit.
        call_timeout: The deadline of one call over waiting for a connection and retries.
        health_check_interval: Between two probes of a node that is well.
        max_replica_lag: A replica further behind, in seconds, gets no reads.
        max_replica_lag_bytes: A replica further behind, in bytes of write-ahead log, gets no reads.
        region: Where this process runs; replicas of the same region are read first.
        read_attempts: Most attempts of a read.
        write_attempts: Most attempts of a write.
        retry_pause: The longest pause before the first retry; it doubles with every further one.
        retry_pause_limit: The longest pause before any retry.
        leak_threshold: A connection held longer is reported with its holder.
        service_role: The database role the service acts as; ``None`` for the login role itself, for databases
            without row-level security.
        pooler: ``"transaction"`` behind a pooler that gives every transaction another server connection, such as
            PgBouncer; ``"none"`` without one; ``"auto"`` finds out when the database is opened.
        default_actor: ``"service"`` lets statements run without `acting_as`, for applications that use no
            row-level security.
        application_name: Shown in ``pg_stat_activity``.
        enable_audit_logging: Whether `AuditLogger` writes the application's own events. The database's triggers
            record every data change either way.
        enable_performance_monitoring: Whether statements are measured.
    """

    dsn: str = attrs.field(repr=masked_dsn, validator=_check_dsn)
    password: Password | None = attrs.field(
        default=None, repr=lambda value: "None" if value is None else "***", validator=_check_password
    )
    environment: Environment = attrs.field(default="development", validator=_environment)
    replicas: tuple[Replica, ...] = attrs.field(default=(), converter=_replicas)
    max_size: int = attrs.field(default=attrs.Factory(_preset_max_size, takes_self=True), validator=_count)
    min_size: int = attrs.field(default=attrs.Factory(_preset_min_size, takes_self=True), validator=_count)
    checkout_timeout: float = attrs.field(default=30.0, validator=_positive)
    connect_timeout: float = attrs.field(default=5.0, validator=_positive)
    max_idle: float = attrs.field(default=10.0, validator=_positive)
    max_lifetime: float = attrs.field(default=1800.0, validator=_positive)
    statement_timeout: float = attrs.field(default=60.0, validator=_not_negative)
    idle_in_transaction_timeout: float = attrs.field(default=60.0, validator=_not_negative)
    call_timeout: float = attrs.field(default=30.0, validator=_positive)
    health_check_interval: float = attrs.field(default=30.0, validator=_positive)
    max_replica_lag: float = attrs.field(default=10.0, validator=_positive)
    max_replica_lag_bytes: int = attrs.field(default=16 * 2**20, validator=_count)
    region: str | None = None
    read_attempts: int = attrs.field(default=3, validator=_count)
    write_attempts: int = attrs.field(default=4, validator=_count)
    retry_pause: float = attrs.field(default=0.05, validator=_positive)
    retry_pause_limit: float = attrs.field(default=1.0, validator=_positive)
    leak_threshold: float = attrs.field(default=30.0, validator=_positive)
    service_role: str | None = "service_role"
    pooler: Literal["auto", "none", "transaction"] = attrs.field(default="auto", validator=_pooler)
    default_actor: Literal["service"] | None = attrs.field(default=None)
    application_name: str = "equitie_data"
    enable_audit_logging: bool = True
    enable_performance_monitoring: bool = True

    @default_actor.validator
    def _check_default_actor(self, _: attrs.Attribute[Any], value: object) -> None:
        if value not in (None, "service"):
            raise ConfigurationError(
                'default_actor can only be "service" (no row-level security), or left out so that every call '
                "must say who acts."
            )

    def __attrs_post_init__(self) -> None:
        if self.max_size < self.min_size:
            raise ConfigurationError(
                f"max_size ({self.max_size}) is below min_size ({self.min_size}): raise the one or lower the other."
            )
        if self.retry_pause_limit < self.retry_pause:
            raise ConfigurationError(
                f"retry_pause_limit ({self.retry_pause_limit}) is below retry_pause ({self.retry_pause})."
            )
        if self.password is not None and any(
            conninfo_to_dict(dsn).get("password") for dsn in (self.dsn, *(each.dsn for each in self.replicas))
        ):
            raise ConfigurationError("A connection string holds a password, and password is set too: choose one.")
        if len({replica.dsn for replica in self.replicas}) != len(self.replicas):
            raise ConfigurationError("replicas names the same replica twice: each connection string may stand once.")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read settings from environment variables.

        ``DATABASE_URL``, ``READ_REPLICA_URLS`` (separated by commas, each with an optional ``region=`` before it),
        ``EQUITIE_ENV``, ``ENABLE_AUDIT_LOGGING``, ``ENABLE_PERFORMANCE_MONITORING``, and ``EQUITIE_<NAME>`` for
        every other attribute, such as ``EQUITIE_MAX_SIZE``.

        Args:
            environ: The variables; those of the process when left out.
            overrides: Attributes that take precedence.

        Raises:
            ConfigurationError: A value is wrong, two contradict each other, a variable ``EQUITIE_...`` is not
                known, or ``DATABASE_URL`` is missing.
        """
        env = os.environ if environ is None else environ
        names = {variable: field for field, variable in _VARIABLES.items()}
        unknown = sorted(
            name for name in env if name.startswith("EQUITIE_") and name not in names and name not in _OTHER_VARIABLES
        )
        if unknown:
            hint = _nearest(unknown[0], [*names, *_OTHER_VARIABLES])
            raise ConfigurationError(f"The environment variable {unknown[0]} is not a setting{hint or '.'}")
        values: dict[str, Any] = {}
        for name, field in names.items():
            if env.get(name, "").strip():
                values[field] = _parse(name, field, env[name].strip())
        values.update(overrides)
        if "dsn" not in values:
            raise ConfigurationError(_missing_dsn(env))
        return cls(**values)

    def connection_parameters(self) -> dict[str, Any]:
        """Return what every connection of a pool is opened with."""
        parameters: dict[str, Any] = {
            "autocommit": True,
            "connect_timeout": max(round(self.connect_timeout), 2),  # libpq treats 1 as 2
            "tcp_user_timeout": 10_000,
            "keepalives_idle": 10,
            "application_name": self.application_name,
        }
        if self.pooler == "transaction":
            # The server connection is another one in every transaction: nothing may be left on it, and start-up
            # options would not reach it. The prologue sets the time limits instead.
            parameters["prepare_threshold"] = None
        else:
            parameters["options"] = (
                f"-c statement_timeout={round(self.statement_timeout * 1000)} "
                f"-c idle_in_transaction_session_timeout={round(self.idle_in_transaction_timeout * 1000)}"
            )
            if self.default_actor is not None and self.service_role is None:
                # The default actor's reads have no prologue that could make them read-only.
                parameters["options"] += " -c default_transaction_read_only=on"
        return parameters


_NAMED_VARIABLES: Final = {
    "dsn": "DATABASE_URL",
    "environment": "EQUITIE_ENV",
    "replicas": "READ_REPLICA_URLS",
    "enable_audit_logging": "ENABLE_AUDIT_LOGGING",
    "enable_performance_monitoring": "ENABLE_PERFORMANCE_MONITORING",
}
_VARIABLES: Final[dict[str, str]] = {
    field.name: _NAMED_VARIABLES.get(field.name, f"EQUITIE_{field.name.upper()}") for field in attrs.fields(Settings)
}
_OTHER_VARIABLES: Final = frozenset({"EQUITIE_PG_BIN"})
"""Known, but read elsewhere: the embedded server's binaries."""


def _parse(variable: str, field: str, text: str) -> Any:
    kind = cast("str", getattr(attrs.fields(Settings), field).type)
    if field == "service_role" and text.lower() == "none":
        return None
    try:
        if field == "replicas":
            return tuple(Replica.parse(part) for part in _REPLICA_SEPARATOR.split(text) if part.strip())
        if kind == "bool":
            if text.lower() not in _TRUE | _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        if kind in ("int", "float"):
            return int(text) if kind == "int" else float(text)
    except ConfigurationError:
        raise ConfigurationError(
            f"{variable} holds something that is not a PostgreSQL connection string: separate the replicas by "
            "commas and write each as postgresql://... or region=postgresql://..."
        ) from None
    except ValueError:
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number of seconds"}[kind]
        raise ConfigurationError(f"{variable} must be {wanted}, not {text!r}.") from None
    return text


def _missing_dsn(env: Mapping[str, str]) -> str:
    if "NEXT_PUBLIC_SUPABASE_URL" in env or "SUPABASE_SERVICE_ROLE_KEY" in env:
        return (
            "DATABASE_URL is not set, and a PostgreSQL connection string cannot be derived from the Supabase URL and "
            "key: copy it from the project's database settings."
        )
    return "DATABASE_URL is not set: give the PostgreSQL connection string of the application's login role."
