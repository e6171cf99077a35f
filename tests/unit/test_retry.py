"""The verdict on every failure, as a table and as rules over all failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors

from equitie_data.retry import Action, Failure, Phase, decide

ALL_STATES = sorted(errors._sqlcodes)

failures = st.builds(
    Failure,
    kind=st.sampled_from(["read", "write"]),
    phase=st.sampled_from([Phase.STATEMENT, Phase.COMMIT]),
    sqlstate=st.none() | st.sampled_from(ALL_STATES),
    connection_lost=st.booleans(),
    on_replica=st.booleans(),
    stale_plan=st.booleans(),
)

READ, STATEMENT, COMMIT = 0, 1, 2
TABLE = {
    #            read               write, before COMMIT   write, at COMMIT
    None: (Action.FAIL_OVER, Action.FAIL_OVER, Action.RESOLVE),
    "08006": (Action.FAIL_OVER, Action.FAIL_OVER, Action.RESOLVE),
    "57P01": (Action.FAIL_OVER, Action.FAIL_OVER, Action.RESOLVE),
    "57P02": (Action.FAIL_OVER, Action.FAIL_OVER, Action.RESOLVE),
    "57P05": (Action.FAIL_OVER, Action.FAIL_OVER, Action.RESOLVE),
    "57P03": (Action.RETRY, Action.RETRY, Action.RAISE),
    "53300": (Action.RETRY, Action.RETRY, Action.RAISE),
    "40001": (Action.RETRY, Action.RETRY, Action.RETRY),
    "40P01": (Action.RETRY, Action.RETRY, Action.RETRY),
    "25006": (Action.RAISE, Action.RETRY, Action.RETRY),
    "26000": (Action.FAIL_OVER, Action.FAIL_OVER, Action.FAIL_OVER),
    "42P05": (Action.FAIL_OVER, Action.FAIL_OVER, Action.FAIL_OVER),
    "40003": (Action.FAIL_OVER, Action.RESOLVE, Action.RESOLVE),
    "08007": (Action.FAIL_OVER, Action.RESOLVE, Action.RESOLVE),
    "55P03": (Action.RAISE, Action.RAISE, Action.RAISE),
    "23505": (Action.RAISE, Action.RAISE, Action.RAISE),
    "57014": (Action.RAISE, Action.RAISE, Action.RAISE),
    "53100": (Action.RAISE, Action.RAISE, Action.RAISE),
    "28P01": (Action.RAISE, Action.RAISE, Action.RAISE),
    "42501": (Action.RAISE, Action.RAISE, Action.RAISE),
    "0A000": (Action.RAISE, Action.RAISE, Action.RAISE),
}


@pytest.mark.parametrize("state", TABLE)
def test_table(state: str | None) -> None:
    lost = state is None
    read = decide(Failure(kind="read", phase=Phase.STATEMENT, sqlstate=state, connection_lost=lost))
    write = decide(Failure(kind="write", phase=Phase.STATEMENT, sqlstate=state, connection_lost=lost))
    commit = decide(Failure(kind="write", phase=Phase.COMMIT, sqlstate=state, connection_lost=lost))
    assert (read.action, write.action, commit.action) == TABLE[state]


@given(failures)
def test_a_write_is_never_run_again_while_its_commit_may_stand(failure: Failure) -> None:
    if failure.kind == "write" and failure.phase is Phase.COMMIT:
        lost = failure.connection_lost and failure.sqlstate not in ("40001", "40P01")
        if failure.sqlstate is None or lost:
            assert decide(failure).action is Action.RESOLVE


@given(failures)
def test_a_lost_connection_never_goes_back_to_the_pool(failure: Failure) -> None:
    decision = decide(failure)
    if failure.connection_lost and failure.sqlstate not in ("40001", "40P01"):
        assert decision.discard


@given(failures)
def test_a_read_is_never_resolved_and_conflicts_leave_the_replica(failure: Failure) -> None:
    decision = decide(failure)
    if failure.kind == "read":
        assert decision.action is not Action.RESOLVE
    if failure.on_replica and failure.sqlstate in ("40001", "40P01"):
        assert decision.action is Action.PRIMARY


@given(failures)
def test_a_statement_timeout_and_a_refusal_are_never_retried(failure: Failure) -> None:
    if failure.sqlstate in ("57014", "23505", "42501", "28P01", "22P02") and not failure.stale_plan:
        assert decide(failure).action in (Action.RAISE, Action.RESOLVE)
        if not failure.connection_lost:
            assert decide(failure).action is Action.RAISE


def test_a_stale_plan_is_tried_once_more_on_another_connection() -> None:
    decision = decide(Failure(kind="read", phase=Phase.STATEMENT, sqlstate="0A000", stale_plan=True))
    assert (decision.action, decision.discard, decision.limit) == (Action.FAIL_OVER, True, 2)
