from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.latency import (
    GAMMA,
    LARGEST_BUCKET,
    RELATIVE_ERROR,
    LatencySketch,
    bucket_of,
    seconds_of,
)

durations = st.floats(min_value=1.01e-6, max_value=9e5, allow_nan=False)


def sketch_of(values: list[float]) -> LatencySketch:
    sketch = LatencySketch()
    for value in values:
        sketch.add(value)
    return sketch


@given(durations)
def test_a_bucket_stands_for_its_durations_within_one_percent(seconds: float) -> None:
    assert abs(seconds_of(bucket_of(seconds)) - seconds) <= seconds * RELATIVE_ERROR * (1 + 1e-9)
    assert RELATIVE_ERROR < 0.01


@given(st.lists(durations, min_size=1, max_size=200), st.floats(min_value=0, max_value=1))
def test_a_quantile_is_the_nearest_rank_within_one_percent(values: list[float], fraction: float) -> None:
    true = sorted(values)[max(1, math.ceil(fraction * len(values))) - 1]
    answer = sketch_of(values).quantile(fraction)
    assert answer is not None
    assert abs(answer - true) <= true * RELATIVE_ERROR * (1 + 1e-9)


@given(st.lists(durations), st.lists(durations))
def test_merging_is_adding_everything_to_one(left: list[float], right: list[float]) -> None:
    merged = sketch_of(left)
    merged.merge(sketch_of(right))
    assert merged == sketch_of(left + right)
    assert merged.count == len(left) + len(right)


@given(st.lists(durations))
def test_json_brings_the_same_sketch_back(values: list[float]) -> None:
    sketch = sketch_of(values)
    assert LatencySketch.from_json(json.loads(json.dumps(sketch.to_json()))) == sketch


@given(st.floats(allow_nan=False))
def test_no_duration_whatever_leaves_the_range_of_buckets(seconds: float) -> None:
    assert 0 <= bucket_of(seconds) <= LARGEST_BUCKET


def test_the_buckets_limits_are_powers_of_gamma() -> None:
    assert bucket_of(1e-6) == 0
    assert bucket_of(1.0001e-6) == 1
    assert bucket_of(GAMMA * 1e-6 * 1.0001) == 2
    assert bucket_of(0.0) == bucket_of(-3.0) == 0
    assert bucket_of(1e9) == LARGEST_BUCKET == bucket_of(0.9999999e6)


@given(st.lists(durations, min_size=1), st.lists(st.floats(min_value=0, max_value=1), max_size=5))
def test_several_quantiles_at_once_are_the_same_as_one_by_one(values: list[float], fractions: list[float]) -> None:
    sketch = sketch_of(values)
    assert sketch.quantiles(fractions) == [sketch.quantile(fraction) for fraction in fractions]


def test_an_empty_sketch_has_no_quantiles() -> None:
    assert LatencySketch().quantile(0.5) is None
    assert LatencySketch().count == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        sketch_of([1.0]).quantile(fraction)
