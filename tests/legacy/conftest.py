"""The platform's real state in a migrated database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.legacy.legacy_platform import build

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection of the owner."""
    with psycopg.connect(owner_dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def real_state(owner: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """The owner's connection to a database that also holds the old tables as they really are."""
    build(owner)
    return owner
