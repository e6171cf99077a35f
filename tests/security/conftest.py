from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from tests.security.world import World

from equitie_data import Database

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def world(owner_dsn: str, app_dsn: str) -> Iterator[World]:
    with psycopg.connect(owner_dsn, autocommit=True) as owner, Database(app_dsn) as database:
        yield World(owner, database)
