"""Many threads, few connections, random actors, and operations that do their worst to the session they run in."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import attrs
import psycopg

from equitie_data import acting_as, as_service
from equitie_data.errors import EquitieDataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data import Actor, Database

__all__ = ["IDENTITY", "KINDS", "TAMPERING", "Person", "Report", "Storm", "acting", "people"]

IDENTITY: Final = (
    "SELECT current_user::text, session_user::text, coalesce(current_setting('request.jwt.claims', true), ''),"
    " coalesce(current_setting('equitie.context', true), '')"
    # The older form of the claims, which Supabase's auth.uid() asks first, names nobody.
    " || coalesce(current_setting('request.jwt.claim.sub', true), '')"
    " || coalesce(current_setting('request.jwt.claim.role', true), '')"
)
ROLES: Final = {
    "viewer": "authenticated",
    "investor": "authenticated",
    "analyst": "equitie_staff",
    "manager": "equitie_staff",
    "auditor": "equitie_staff",
    "admin": "equitie_staff",
    "superadmin": "equitie_staff",
}
OTHER: Final = json.dumps({"sub": "00000000-0000-4000-8000-00000000dead", "role": "service_role"})

TAMPERING: Final = (
    "SET ROLE service_role",
    "SET ROLE equitie_staff",
    "SET ROLE anon",
    "RESET ROLE",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET ALL",
    "RESET SESSION AUTHORIZATION",
    f"SET SESSION \"request.jwt.claims\" = '{OTHER}'",
    f"SET SESSION \"equitie.context\" = '{OTHER}'",
    f"SELECT set_config('request.jwt.claims', '{OTHER}', false), set_config('role', 'service_role', false)",
    f"SELECT set_config('request.jwt.claims', '{OTHER}', true), set_config('equitie.context', '{OTHER}', false)",
    "SET SESSION \"request.jwt.claim.sub\" = '00000000-0000-4000-8000-00000000dead'",
    "SET SESSION \"request.jwt.claim.role\" = 'service_role'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET default_transaction_isolation = 'serializable'",
    "SET row_security = off",
    "SET search_path = pg_temp, public",
    "SET application_name = 'somebody else'",
)
"""What an operation may leave behind on its session."""

KINDS: Final = {
    "statement read": 620,
    "callable read": 120,
    "statement write": 90,
    "callable write": 60,
    "rows of one's own": 40,
    "server error": 20,
    "error of the operation": 20,
    "swallowed error": 5,
    "savepoint rolled back": 5,
    "tampering": 14,
    "tampering, then an error": 3,
    "cancelled": 2,
    "connection lost": 1,
}


@attrs.frozen
class Person:
    """A user and what the server must make of them.

    Attributes:
        user_id: Who; ``None`` for the service.
        database_role: The role their transactions run as.
        investor_id: The only investor they may see; ``None`` if they may see none, or all.
    """

    user_id: UUID | None
    database_role: str
    investor_id: int | None = None


@attrs.define
class Report:
    """What came of it.

    Attributes:
        kinds: How often each kind of operation ran.
        outcomes: How often each kind of error came of them.
        leaks: What was seen and what should have been, of calls that ran as somebody else.
    """

    kinds: Counter[str] = attrs.field(factory=Counter)
    outcomes: Counter[str] = attrs.field(factory=Counter)
    leaks: list[tuple[str, Any, Any]] = attrs.field(factory=list)

    @property
    def calls(self) -> int:
        """How many calls were made."""
        return sum(self.kinds.values())


def people(owner_dsn: str, count: int) -> list[Person]:
    """Make users of every role, investors most of all, and some whom the database does not know."""
    found = [Person(None, "service_role")] * (count // 10)
    with psycopg.connect(owner_dsn) as owner:
        for number in range(count):
            user_id = UUID(int=0x5AFE << 112 | 4 << 76 | 8 << 60 | number)
            role = list(ROLES)[number % 7] if number % 2 else "investor"
            if number % 20 == 0:
                found.append(Person(user_id, "authenticated"))  # nobody the database knows
                continue
            investor_id = None
            if role == "investor":
                row = owner.execute(
                    "INSERT INTO public.investors_clean (full_name) VALUES (%s) RETURNING investor_id",
                    [f"Investor {number}"],
                ).fetchone()
                assert row is not None
                investor_id = row[0]
            active = number % 15 != 0
            owner.execute(
                "INSERT INTO public.user_profiles (user_id, email, role, investor_id, is_active)"
                " VALUES (%s, %s, %s, %s, %s)",
                [user_id, f"{number}@example.com", role, investor_id, active],
            )
            found.append(Person(user_id, ROLES[role] if active else "anon", investor_id if active else None))
    return found


class Storm:
    """Calls of random actors from many threads, each of which looks who it runs as.

    Args:
        database: An open database.
        people: Who acts.
        login: The role it logs in as.
        seed: Where chance begins.
    """

    def __init__(self, database: Database, people: list[Person], login: str, seed: int) -> None:
        self._database = database
        self._people = people
        self._login = login
        self._seed = seed
        self.report = Report()
        self._lock = threading.Lock()

    def run(self, checkouts: int, threads: int = 8) -> Report:
        """Make so many calls, and return what came of them."""
        workers = [
            threading.Thread(target=self._work, args=(number, checkouts // threads), name=f"storm-{number}")
            for number in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return self.report

    def _work(self, number: int, checkouts: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        mine = Report()
        names, weights = list(KINDS), list(KINDS.values())
        for turn in range(checkouts):
            kind = chance.choices(names, weights)[0]
            person = chance.choice(self._people)
            mine.kinds[kind] += 1
            with acting(person, f"{number}-{turn}") as actor:
                expected = (person.database_role, self._login, actor.claims, actor.context)
                try:
                    self._call(kind, person, expected, chance, mine)
                except (psycopg.Error, EquitieDataError, ZeroDivisionError) as error:
                    mine.outcomes[type(error).__name__] += 1
        with self._lock:
            self.report.kinds += mine.kinds
            self.report.outcomes += mine.outcomes
            self.report.leaks += mine.leaks

    def _call(self, kind: str, person: Person, expected: Any, chance: random.Random, mine: Report) -> None:
        database = self._database

        def look(connection: psycopg.Connection[Any]) -> Any:
            seen = connection.execute(IDENTITY).fetchone()
            if seen != expected:
                mine.leaks.append((kind, seen, expected))
            return seen

        if kind == "statement read":
            seen = database.execute_read(IDENTITY)
            if seen != [expected]:
                mine.leaks.append((kind, seen, expected))
        elif kind == "statement write":
            seen = database.execute_write(IDENTITY)
            if seen != [expected]:
                mine.leaks.append((kind, seen, expected))
        elif kind == "callable read":
            database.execute_read(look)
        elif kind == "callable write":
            database.execute_write(look)
        elif kind == "rows of one's own":
            rows = database.execute_read("SELECT investor_id FROM public.investors_clean")
            if person.database_role == "authenticated" and rows != [(person.investor_id,)][: bool(person.investor_id)]:
                mine.leaks.append((kind, rows, person))
        elif kind == "cancelled":
            database.execute_read("SELECT pg_sleep(1)", timeout=0.002, retry=False)
        else:
            database.execute_write(_worst(kind, look, chance))


def _worst(kind: str, look: Any, chance: random.Random) -> Any:
    lost = False

    def operation(connection: psycopg.Connection[Any]) -> None:
        nonlocal lost
        look(connection)
        if kind == "server error":
            connection.execute("SELECT 1 / 0")
        elif kind == "error of the operation":
            raise ZeroDivisionError
        elif kind == "swallowed error":
            with contextlib.suppress(psycopg.Error):
                connection.execute("SELECT 1 / 0")
        elif kind == "savepoint rolled back":
            with contextlib.suppress(psycopg.Error), connection.transaction():
                connection.execute(chance.choice(TAMPERING))
                connection.execute("SELECT 1 / 0")
            look(connection)
        elif kind == "connection lost" and not lost:  # the library runs it again
            lost = True
            with contextlib.closing(socket.socket(fileno=os.dup(connection.fileno()))) as wire:
                wire.shutdown(socket.SHUT_RDWR)
            connection.execute("SELECT 1")
        elif kind.startswith("tampering"):
            connection.execute(chance.choice(TAMPERING))
            if "error" in kind:
                connection.execute("SELECT 1 / 0")

    return operation


@contextlib.contextmanager
def acting(person: Person, request_id: str) -> Iterator[Actor]:
    """Act as somebody, in a request that nobody else has."""
    if person.user_id is None:
        with as_service("a storm", request_id=request_id) as actor:
            yield actor
    else:
        with acting_as(person.user_id, request_id=request_id) as actor:
            yield actor
