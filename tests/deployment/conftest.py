"""Databases as they are deployed: on Supabase, and by an owner who may not give BYPASSRLS."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

import attrs
import psycopg
import pytest
from psycopg import sql
from tests.deployment.supabase import supabase_project

from equitie_data import migrate
from equitie_data.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deployment.supabase import SupabaseProject

BACKEND = "equitie_backend"


@attrs.frozen
class Deployment:
    """A migrated database and the logins of it.

    Attributes:
        owner_dsn: Who migrated.
        app_dsn: The application's login role.
        admin_dsn: The superuser, to look at what the others may not see.
        before: What was there before our migrations, if anybody wrote it down.
        project: The imitation of Supabase, if it is one.
    """

    owner_dsn: str
    app_dsn: str
    admin_dsn: str
    before: list[tuple[str, ...]]
    project: SupabaseProject | None = None


def deploy(owner_dsn: str) -> str:
    """Migrate as the owner, make a login role as the guide says, and return its DSN."""
    password = secrets.token_urlsafe(12)
    migrate.migrate(owner_dsn)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(
            sql.SQL("CREATE ROLE {} LOGIN NOINHERIT PASSWORD {}").format(sql.Identifier(BACKEND), sql.Literal(password))
        )
    migrate.grant(owner_dsn, BACKEND)
    return psycopg.conninfo.make_conninfo(owner_dsn, user=BACKEND, password=password)


@contextlib.contextmanager
def on_supabase(bin_dir: Path) -> Iterator[Deployment]:
    with supabase_project(bin_dir) as project:
        before = project.fingerprint()
        app_dsn = deploy(project.postgres_dsn)
        yield Deployment(project.postgres_dsn, app_dsn, project.admin_dsn, before, project)


@contextlib.contextmanager
def by_plain_owner(bin_dir: Path) -> Iterator[Deployment]:
    password = secrets.token_urlsafe(12)
    with EmbeddedServer(bin_dir=bin_dir) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as superuser:
            superuser.execute(sql.SQL("CREATE ROLE plain LOGIN CREATEROLE PASSWORD {}").format(sql.Literal(password)))
            superuser.execute("CREATE DATABASE owned OWNER plain")
        owner_dsn = server.dsn("owned", "plain", password)
        yield Deployment(owner_dsn, deploy(owner_dsn), server.dsn("owned"), [])


@pytest.fixture(scope="module")
def supabase(server: EmbeddedServer) -> Iterator[Deployment]:
    """A migrated imitation of a Supabase project."""
    with on_supabase(server.bin_dir) as deployed:
        yield deployed


@pytest.fixture(scope="module", params=[on_supabase, by_plain_owner], ids=["supabase", "plain-owner"])
def deployment(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[Deployment]:
    """Each kind of deployment in turn."""
    with request.param(server.bin_dir) as deployed:
        yield deployed
