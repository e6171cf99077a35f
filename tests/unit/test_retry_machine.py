"""The retry rules against a model of the truth: whatever fails however often, nothing is written twice.

The model knows for each attempt what the server did. The rules know only what a client can know.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from equitie_data.budget import RetryBudget
from equitie_data.retry import Action, Decision, Failure, Phase, decide

CONNECTION = ["08000", "08001", "08003", "08006", "57P01", "57P02", "57P05"]
AMBIGUOUS = ["40003", "08007"]
CONFLICTS = ["40001", "40P01"]
BUSY = ["57P03", "53300"]
DEFINITE = ["23505", "23503", "22012", "42601", "42501", "57014", "53100", "53200", "55P03", "25P03", "28P01", "3D000"]
OTHER = ["25006", "26000", "42P05", "0A000"]
STATES = st.sampled_from([None, *CONNECTION, *AMBIGUOUS, *CONFLICTS, *BUSY, *DEFINITE, *OTHER])


@st.composite
def failures(draw: st.DrawFn, kind: Literal["read", "write"] | None = None) -> Failure:
    """A failure as the executor can meet it."""
    chosen: Literal["read", "write"] = draw(st.sampled_from(["read", "write"])) if kind is None else kind
    state = draw(STATES)
    # A server that says nothing is a connection that is lost; one that says FATAL may not have hung up yet.
    lost = state is None or draw(st.booleans())
    return Failure(
        kind=chosen,
        phase=draw(st.sampled_from([Phase.STATEMENT, Phase.COMMIT] if chosen == "write" else [Phase.STATEMENT])),
        sqlstate=state,
        connection_lost=lost,
        on_replica=chosen == "read" and draw(st.booleans()),
        stale_plan=state == "0A000" and draw(st.booleans()),
        in_prologue=draw(st.booleans()),
    )


def may_have_committed(failure: Failure) -> bool:
    """Whether a server could have committed and a client then have seen this.

    From the protocol: COMMIT was sent, and the server did not answer with an error of the transaction. An error that
    says "unknown" says so of any statement; a failed prologue comes before everything.
    """
    if failure.kind == "read":
        return False
    if failure.sqlstate in AMBIGUOUS:
        return True
    if failure.phase is not Phase.COMMIT or failure.sqlstate in CONFLICTS:
        return False
    if failure.in_prologue and failure.sqlstate is not None and failure.sqlstate not in CONNECTION:
        return False
    return failure.sqlstate is None or failure.sqlstate in CONNECTION or failure.connection_lost


class Writes(RuleBasedStateMachine):
    """One write after the other, each with as many attempts as the rules allow."""

    def __init__(self) -> None:
        super().__init__()
        self.committed = 0
        self.in_doubt: bool | None = None
        """Whether the attempt that has to be resolved did commit."""
        self.told: list[str] = []
        self.over = False

    @precondition(lambda self: not self.over and self.in_doubt is None)
    @rule(failure=failures(kind="write"), did_commit=st.booleans())
    def attempt_fails(self, failure: Failure, did_commit: bool) -> None:
        did_commit = did_commit and may_have_committed(failure)
        decision = decide(failure)
        self.committed += did_commit
        if decision.action is Action.RESOLVE:
            self.in_doubt = did_commit
        elif decision.action is Action.RAISE:
            assert not did_commit, "the caller is told of an error as if nothing were written"
            self.finish("refused")
        else:
            assert not did_commit, "the write is run again although it is there"

    @precondition(lambda self: not self.over and self.in_doubt is None)
    @rule()
    def attempt_succeeds(self) -> None:
        self.committed += 1
        self.finish("acknowledged")

    @precondition(lambda self: self.in_doubt is not None)
    @rule(can_tell=st.booleans())
    def resolve(self, can_tell: bool) -> None:
        did_commit, self.in_doubt = self.in_doubt, None
        if not can_tell:
            self.finish("unknown")
        elif did_commit:
            self.finish("acknowledged")

    @precondition(lambda self: self.over)
    @rule()
    def next_write(self) -> None:
        self.committed, self.over = 0, False

    def finish(self, told: str) -> None:
        self.told.append(told)
        self.over = True

    @invariant()
    def nothing_is_written_twice(self) -> None:
        assert self.committed <= 1
        if self.over:
            assert self.committed == {"acknowledged": 1, "refused": 0}.get(self.told[-1], self.committed)


TestWrites = Writes.TestCase
TestWrites.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(max_examples=500)
@given(failure=failures())
def test_what_may_have_committed_is_resolved_and_nothing_else_is(failure: Failure) -> None:
    resolves = decide(failure).action is Action.RESOLVE
    assert resolves or not may_have_committed(failure)
    if failure.kind == "read":
        assert not resolves


@settings(max_examples=500)
@given(failure=failures())
def test_a_lost_connection_never_goes_back_to_the_pool(failure: Failure) -> None:
    decision = decide(failure)
    if failure.connection_lost and decision.action in (Action.RAISE, Action.FAIL_OVER, Action.RESOLVE):
        assert decision.discard


@settings(max_examples=500)
@given(failure=failures())
def test_an_error_of_the_caller_s_own_is_told_at_once(failure: Failure) -> None:
    """Repeating it would only repeat the error, and triple the time until it is heard of."""
    if failure.sqlstate in set(DEFINITE) - {"42501"} and not failure.connection_lost:
        assert decide(failure) == Decision(Action.RAISE, decide(failure).reason)


@settings(max_examples=500)
@given(failure=failures())
def test_a_conflict_on_a_replica_is_not_repeated_there(failure: Failure) -> None:
    if failure.on_replica and failure.sqlstate in CONFLICTS:
        assert decide(failure).action is Action.PRIMARY
    if not failure.on_replica:
        assert decide(failure).action is not Action.PRIMARY


@settings(max_examples=500)
@given(failure=failures())
def test_what_ends_only_with_the_deadline_is_an_outage(failure: Failure) -> None:
    """Anything else would keep a hopeless call alive for its whole deadline."""
    decision = decide(failure)
    if decision.until_deadline:
        outage = failure.sqlstate in {None, "25006", *CONNECTION, *BUSY} or failure.connection_lost
        assert outage or decision.action is Action.PRIMARY, "which is not asked twice"
    if failure.sqlstate in CONFLICTS and not failure.on_replica:
        assert not decision.until_deadline


class Budget(RuleBasedStateMachine):
    """The token bucket against exact arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 5
        self.budget = RetryBudget(capacity=float(self.capacity))
        self.tokens = Fraction(self.capacity)
        self.refused = 0

    @rule(times=st.integers(1, 15))
    def calls_succeed(self, times: int) -> None:
        for _ in range(times):
            self.budget.earn()
            self.tokens = min(self.tokens + Fraction(1, 10), Fraction(self.capacity))

    @rule()
    def a_retry_asks(self) -> None:
        # Ten tenths as floating-point numbers may be a hair less than one.
        granted = self.budget.spend()
        if abs(self.tokens - 1) > Fraction(1, 10**6):
            assert granted == (self.tokens > 1)
        if granted:
            self.tokens -= 1
        else:
            self.refused += 1

    @invariant()
    def refusals_are_counted(self) -> None:
        assert self.budget.refused == self.refused
        assert -Fraction(1, 10**6) <= self.tokens <= self.capacity


TestBudget = Budget.TestCase
TestBudget.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
