"""Settings: presets, the environment, refusals, masking."""

from __future__ import annotations

import string

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.errors import ConfigurationError
from equitie_data.settings import PRESETS, Replica, Settings, masked_dsn

DSN = "postgresql://app:s3cret@db.example:5432/equitie"


@pytest.mark.parametrize(
    ("environment", "sizes"), [("development", (1, 5)), ("staging", (3, 10)), ("production", (10, 50))]
)
def test_presets_choose_the_pool_size(environment: str, sizes: tuple[int, int]) -> None:
    settings = Settings.from_env({"DATABASE_URL": DSN, "EQUITIE_ENV": environment})
    assert (settings.min_size, settings.max_size) == sizes == PRESETS[environment]


def test_times_default_to_what_the_platform_asks_for() -> None:
    settings = Settings(dsn=DSN)
    assert (settings.checkout_timeout, settings.max_idle) == (30.0, 10.0)
    assert (settings.statement_timeout, settings.health_check_interval) == (60.0, 30.0)


def test_a_small_max_size_alone_shrinks_the_preset_minimum() -> None:
    settings = Settings(dsn=DSN, environment="production", max_size=4)
    assert (settings.min_size, settings.max_size) == (4, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_size": 8, "max_size": 5}, r"max_size \(5\) is below min_size \(8\)"),
        ({"environment": "prodution"}, "did you mean production"),
        ({"max_size": 0}, "max_size must be a whole number from 1"),
        ({"max_size": True}, "max_size must be a whole number"),
        ({"checkout_timeout": -1.0}, "checkout_timeout must be a number of seconds above 0"),
        ({"checkout_timeout": float("inf")}, "checkout_timeout must be"),
        ({"statement_timeout": float("nan")}, "statement_timeout must be"),
        ({"retry_pause": 2.0, "retry_pause_limit": 1.0}, "retry_pause_limit .* is below retry_pause"),
        ({"default_actor": "root"}, 'default_actor can only be "service"'),
        ({"replicas": [DSN, DSN]}, "same replica twice"),
        ({"dsn": ""}, "dsn is empty"),
        ({"dsn": "postgresql://app:s3cret@[::/x"}, "dsn is not a PostgreSQL connection string"),
    ],
)
def test_wrong_and_contradictory_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Settings(**{"dsn": DSN, **values})  # type: ignore[arg-type]
    assert "s3cret" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Settings(dsn=DSN).max_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EQUITIE_MAX_SIZ", "EQUITIE_MAX_SIZE"),
        ("EQUITIE_STATEMENT_TIMOUT", "EQUITIE_STATEMENT_TIMEOUT"),
        ("EQUITIE_PGBIN", "EQUITIE_PG_BIN"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_right_one(name: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name} is not a setting; did you mean {meant}\?"):
        Settings.from_env({"DATABASE_URL": DSN, name: "1"})


def test_every_attribute_has_a_variable_and_the_variable_sets_it() -> None:
    settings = Settings.from_env(
        {
            "DATABASE_URL": DSN,
            "EQUITIE_MAX_SIZE": "7",
            "EQUITIE_STATEMENT_TIMEOUT": "2.5",
            "ENABLE_AUDIT_LOGGING": "false",
            "ENABLE_PERFORMANCE_MONITORING": "0",
            "EQUITIE_DEFAULT_ACTOR": "service",
            "READ_REPLICA_URLS": "eu=postgresql://r1/x, postgresql://r2,r3/x",
            "EQUITIE_APPLICATION_NAME": "",
        }
    )
    assert (settings.max_size, settings.statement_timeout) == (7, 2.5)
    assert not settings.enable_audit_logging
    assert not settings.enable_performance_monitoring
    assert settings.default_actor == "service"
    assert settings.replicas == (Replica("postgresql://r1/x", "eu"), Replica("postgresql://r2,r3/x"))
    assert settings.application_name == "equitie_data"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EQUITIE_MAX_SIZE", "many", "EQUITIE_MAX_SIZE must be a whole number"),
        ("EQUITIE_MAX_IDLE", "10s", "EQUITIE_MAX_IDLE must be a number of seconds"),
        ("ENABLE_AUDIT_LOGGING", "maybe", "ENABLE_AUDIT_LOGGING must be true or false"),
        ("READ_REPLICA_URLS", "postgresql://u:s3cret@[/x", "READ_REPLICA_URLS holds something that is not"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Settings.from_env({"DATABASE_URL": DSN, variable: value})
    assert "s3cret" not in str(caught.value)


def test_a_missing_dsn_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL is not set"):
        Settings.from_env({})
    with pytest.raises(ConfigurationError, match="cannot be derived from the Supabase URL"):
        Settings.from_env({"NEXT_PUBLIC_SUPABASE_URL": "https://x.example"})


@given(st.text(alphabet=string.ascii_letters + string.digits + "@:/% &=?#", min_size=8))
def test_no_representation_holds_a_password(password: str) -> None:
    from psycopg.conninfo import make_conninfo

    dsn = make_conninfo("host=db dbname=x user=app", password=f"<{password}>")
    settings = Settings(dsn=dsn, replicas=(dsn.replace("host=db", "host=r"),))
    for text in (repr(settings), masked_dsn(dsn)):
        assert f"<{password}>" not in text
        assert "***" in text
