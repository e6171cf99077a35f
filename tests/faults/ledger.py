"""Money moved from account to account under fire, and the books compared with what every caller was told.

A transfer writes its own id in its transaction, and nothing in the schema keeps an id from being there twice: what
the library promises is not helped by a constraint.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from uuid import UUID, uuid4

import attrs
import psycopg

from equitie_data import as_service
from equitie_data.errors import CommitOutcomeUnknown, ResultLostError

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg import Connection
    from tests.faults.tasks import InTasks
    from typing_extensions import Self

    from equitie_data import Database

ACCOUNTS = 10
BALANCE = 1_000
SESSIONS = 8

Told: TypeAlias = Literal["acknowledged", "refused", "unknown"]
DiskIsFull: TypeAlias = Literal["never", "at a statement", "at commit"]

_SCHEMA = f"""
DROP SCHEMA IF EXISTS ledger CASCADE;
CREATE SCHEMA ledger;
CREATE TABLE ledger.accounts (account_id int PRIMARY KEY, balance bigint NOT NULL);
CREATE TABLE ledger.sessions (session_id int PRIMARY KEY, value bigint NOT NULL);
CREATE TABLE ledger.transfers (
    transfer_id uuid NOT NULL, source int NOT NULL, target int NOT NULL, amount bigint NOT NULL, session_id int NOT NULL
);
CREATE TABLE ledger.disk (is_full text NOT NULL);
INSERT INTO ledger.accounts SELECT generate_series(1, {ACCOUNTS}), {BALANCE};
INSERT INTO ledger.sessions SELECT generate_series(1, {SESSIONS}), 0;
INSERT INTO ledger.disk VALUES ('never');
CREATE FUNCTION ledger.write_to_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_ARGV[0] = (SELECT is_full FROM ledger.disk) THEN
        RAISE EXCEPTION USING ERRCODE = '53100', MESSAGE = 'could not extend file: No space left on device';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER full_at_a_statement AFTER INSERT ON ledger.transfers
    FOR EACH ROW EXECUTE FUNCTION ledger.write_to_disk('at a statement');
CREATE CONSTRAINT TRIGGER full_at_commit AFTER INSERT ON ledger.transfers DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION ledger.write_to_disk('at commit');
GRANT USAGE ON SCHEMA ledger TO service_role;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ledger TO service_role;
"""

COUNT_UP = "UPDATE ledger.sessions SET value = value + 1 WHERE session_id = %s RETURNING value"
CHANGE_BALANCE = "UPDATE ledger.accounts SET balance = balance + %s WHERE account_id = %s"
RECORD = "INSERT INTO ledger.transfers (transfer_id, source, target, amount, session_id) VALUES (%s, %s, %s, %s, %s)"
READ_SESSION = "SELECT value FROM ledger.sessions WHERE session_id = %s"
TRANSFER = """
WITH moved AS (
    UPDATE ledger.accounts
    SET balance = balance + CASE account_id WHEN %(source)s THEN -%(amount)s ELSE %(amount)s END
    WHERE account_id IN (%(source)s, %(target)s)
), recorded AS (
    INSERT INTO ledger.transfers (transfer_id, source, target, amount, session_id)
    VALUES (%(transfer_id)s, %(source)s, %(target)s, %(amount)s, %(session_id)s)
)
UPDATE ledger.sessions SET value = value + 1 WHERE session_id = %(session_id)s RETURNING value
"""


@attrs.define
class Transfer:
    """One call, what it would do, and what its caller was told of it.

    Attributes:
        as_statement: Whether it is made as one SQL statement, or as a callable.
        key: Its idempotency key.
        told: The last thing its caller was told.
        reason: With which words.
    """

    session_id: int
    source: int
    target: int
    amount: int
    as_statement: bool = False
    key: str | None = None
    transfer_id: UUID = attrs.field(factory=uuid4)
    told: Told = "refused"
    reason: str = "never tried"

    def make(self, database: Database | InTasks, *, timeout: float, retry: bool = True) -> int:
        """Run it, note what was said, and return the session's counter after it."""
        self.told, self.reason = "unknown", "still running"
        try:
            options: dict[str, Any] = {"idempotency_key": self.key, "timeout": timeout, "retry": retry}
            if self.as_statement:
                value = database.execute_write(TRANSFER, attrs.asdict(self), name="transfer", **options)[0][0]
            else:
                value = database.execute_write(self.operation, name="transfer", **options)
        except CommitOutcomeUnknown as error:
            self.told, self.reason = "unknown", str(error)
            raise
        except ResultLostError as error:
            self.told, self.reason = "acknowledged", str(error)
            raise
        except psycopg.Error as error:
            self.told, self.reason = "refused", f"{type(error).__name__}: {error}"
            raise
        self.told, self.reason = "acknowledged", ""
        return int(value)

    def operation(self, connection: Connection[Any]) -> int:
        """Do it, statement by statement."""
        row = connection.execute(COUNT_UP, [self.session_id]).fetchone()
        connection.execute(CHANGE_BALANCE, [-self.amount, self.source])
        connection.execute(CHANGE_BALANCE, [self.amount, self.target])
        connection.execute(RECORD, [self.transfer_id, self.source, self.target, self.amount, self.session_id])
        assert row is not None
        return int(row[0])


@attrs.define
class Discrepancies:
    """Where the books and the callers disagree; equal to a new one when they do not."""

    lost: list[Transfer] = attrs.field(factory=list)
    doubled: list[Transfer] = attrs.field(factory=list)
    refused_but_there: list[Transfer] = attrs.field(factory=list)
    out_of_nowhere: list[UUID] = attrs.field(factory=list)
    wrong_balances: dict[int, int] = attrs.field(factory=dict)
    wrong_counters: dict[int, int] = attrs.field(factory=dict)
    back_in_time: list[str] = attrs.field(factory=list)
    strange_errors: list[str] = attrs.field(factory=list)
    hung: list[str] = attrs.field(factory=list)


class Ledger:
    """The books, as their owner sees them.

    Args:
        owner_dsn: A migrated database, as its owner and around every proxy.
    """

    def __init__(self, owner_dsn: str) -> None:
        self.owner_dsn = owner_dsn
        self.ask(_SCHEMA)

    def ask(self, statement: str, params: Any = None) -> list[tuple[Any, ...]]:
        """Run a statement as the owner."""
        with psycopg.connect(self.owner_dsn, autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement, params)
            return [] if cursor.description is None else cursor.fetchall()

    def fill_disk(self, when: DiskIsFull) -> None:
        """Let every transfer from now on find the disk full, or no longer."""
        self.ask("UPDATE ledger.disk SET is_full = %s", [when])

    def times_there(self, transfer: Transfer) -> int:
        """Count how often a transfer is in the books."""
        row = self.ask("SELECT count(*) FROM ledger.transfers WHERE transfer_id = %s", [transfer.transfer_id])
        return int(row[0][0])

    def compare(self, transfers: list[Transfer]) -> Discrepancies:
        """Compare the books with what was told about every transfer ever made."""
        found = Discrepancies()
        booked = self.ask("SELECT transfer_id, source, target, amount, session_id FROM ledger.transfers")
        times = Counter(row[0] for row in booked)
        for transfer in transfers:
            there = times.pop(transfer.transfer_id, 0)
            if there > 1:
                found.doubled.append(transfer)
            elif there == 0 and transfer.told == "acknowledged":
                found.lost.append(transfer)
            elif there == 1 and transfer.told == "refused":
                found.refused_but_there.append(transfer)
        found.out_of_nowhere = list(times)
        balances = dict.fromkeys(range(1, ACCOUNTS + 1), BALANCE)
        counters = dict.fromkeys(range(1, SESSIONS + 1), 0)
        for _, source, target, amount, session_id in booked:
            balances[source] -= amount
            balances[target] += amount
            counters[session_id] += 1
        actual_balances = dict(self.ask("SELECT account_id, balance FROM ledger.accounts"))
        found.wrong_balances = {key: value for key, value in actual_balances.items() if value != balances[key]}
        actual_counters = dict(self.ask("SELECT session_id, value FROM ledger.sessions"))
        found.wrong_counters = {key: value for key, value in actual_counters.items() if value != counters[key]}
        return found


class Load:
    """Sessions that transfer money, each in a thread of its own, until the `with` block ends.

    A transfer with an idempotency key that was not acknowledged is made again, with the same key, until it is: that
    is what keys are for. One without a key is made once.

    Args:
        ledger: The books.
        database: Where the application writes, blocking or in tasks.
        keys: Whether half of the transfers bear an idempotency key.
        timeout: Seconds for each call.
        seed: Which transfers are made.
    """

    def __init__(
        self, ledger: Ledger, database: Database | InTasks, *, keys: bool = True, timeout: float = 20.0, seed: int = 0
    ) -> None:
        self.transfers: list[Transfer] = []
        self.failed_reads = 0
        self._ledger = ledger
        self._database = database
        self._keys = keys
        self._timeout = timeout
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._back_in_time: list[str] = []
        self._strange_errors: list[str] = []
        self._threads = [
            threading.Thread(
                target=self._guard, args=(session_id, random.Random(seed + session_id)), name=f"session {session_id}"
            )
            for session_id in range(1, SESSIONS + 1)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.daemon = True
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        # Each session may still be in a call, then make its last keyed transfer good, then read.
        deadline = time.monotonic() + 3 * self._timeout
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def told(self, what: Told) -> list[Transfer]:
        """Return the transfers whose callers were told so in the end."""
        return [transfer for transfer in self.transfers if transfer.told == what]

    def await_acknowledged(self, count: int, seconds: float = 30.0) -> None:
        """Wait until so many more transfers have been acknowledged, so that faults strike a working system."""
        wanted = len(self.told("acknowledged")) + count
        deadline = time.monotonic() + seconds
        while len(self.told("acknowledged")) < wanted:
            assert time.monotonic() < deadline, f"{count} more transfers were not acknowledged in {seconds:g} s"
            time.sleep(0.005)

    def compare(self) -> Discrepancies:
        """Compare the books with what the sessions were told and saw; call it after the `with` block."""
        found = self._ledger.compare(self.transfers)
        found.back_in_time = self._back_in_time
        found.strange_errors = self._strange_errors
        found.hung = [thread.name for thread in self._threads if thread.is_alive()]
        return found

    def _guard(self, session_id: int, rng: random.Random) -> None:
        try:
            with as_service(f"session {session_id}"):
                self._work(session_id, rng)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the comparison reports it
            self._strange_errors.append(f"session {session_id}: {error!r}")

    def _work(self, session_id: int, rng: random.Random) -> None:
        seen = 0
        while not self._stopping.is_set():
            source, target = rng.sample(range(1, ACCOUNTS + 1), 2)
            transfer = Transfer(session_id, source, target, rng.randint(1, 20), as_statement=rng.random() < 0.5)
            if self._keys and rng.random() < 0.5:
                transfer.key = str(transfer.transfer_id)
            with self._lock:
                self.transfers.append(transfer)
            value = self._make(transfer)
            if value is not None:
                if value <= seen:
                    self._back_in_time.append(f"session {session_id} wrote {value} after {seen}")
                seen = max(seen, value)
            seen = self._read(session_id, seen)

    def _make(self, transfer: Transfer) -> int | None:
        # One attempt after the end of the faults: it has to succeed then.
        while True:
            last = self._stopping.is_set()
            try:
                return transfer.make(self._database, timeout=self._timeout)
            except (psycopg.Error, CommitOutcomeUnknown, ResultLostError):
                if transfer.key is None or last or transfer.told == "acknowledged":
                    return None

    def _read(self, session_id: int, seen: int) -> int:
        try:
            value = int(self._database.execute_read(READ_SESSION, [session_id], timeout=self._timeout)[0][0])
        except psycopg.Error:
            with self._lock:
                self.failed_reads += 1
            return seen
        if value < seen:
            self._back_in_time.append(f"session {session_id} read {value} after {seen}")
        return max(seen, value)
