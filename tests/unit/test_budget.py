"""Retries cannot multiply a load that fails."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from equitie_data.budget import RetryBudget


@given(st.integers(1, 50), st.lists(st.booleans(), max_size=400))
def test_retries_never_exceed_the_capacity_and_a_tenth_of_the_successes(capacity: int, calls: list[bool]) -> None:
    budget, retries, successes = RetryBudget(capacity), 0, 0
    for succeeded in calls:
        if succeeded:
            budget.earn()
            successes += 1
        elif budget.spend():
            retries += 1
        assert retries <= capacity + successes / 10 + 1e-6
    assert budget.refused + retries == calls.count(False)


def test_many_threads_spend_every_token_once() -> None:
    budget = RetryBudget(1_000)
    with ThreadPoolExecutor(16) as threads:
        spent = sum(threads.map(lambda _: sum(budget.spend() for _ in range(100)), range(16)))
    assert (spent, budget.refused) == (1_000, 600)
