"""What a transaction id proves, and what it does not."""

from __future__ import annotations

import attrs
import pytest

from equitie_data.commit import Incarnation, Outcome, judge

BEFORE = Incarnation("7300000000000000000", "1", "2026-01-01 00:00:00+00", "2026-01-01 00:00:01+00")


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("committed", Outcome.COMMITTED),
        ("aborted", Outcome.ABORTED),
        ("in progress", None),
        ("in the future", None),
        (None, Outcome.UNKNOWN),
    ],
)
def test_within_one_incarnation_the_server_is_believed(status: str | None, outcome: Outcome | None) -> None:
    assert judge(BEFORE, BEFORE, status) is outcome  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [field.name for field in attrs.fields(Incarnation)])
def test_a_reused_id_is_never_taken_for_a_commit(changed: str) -> None:
    now = attrs.evolve(BEFORE, **{changed: "another"})
    assert judge(BEFORE, now, "committed") is Outcome.UNKNOWN
    assert judge(BEFORE, now, None) is Outcome.UNKNOWN
    assert judge(BEFORE, now, "in progress") is None  # the fence may not have finished
    for status in ("aborted", "in the future"):
        assert judge(BEFORE, now, status) is Outcome.ABORTED  # type: ignore[arg-type]
