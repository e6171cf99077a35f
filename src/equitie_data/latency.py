"""A latency distribution in integer log buckets: quantiles within 1 %, and two of them add up.

Bucket `i` counts the durations in `(GAMMA ** (i - 1), GAMMA ** i]` microseconds, the mapping of DDSketch (Masson, Rim
and Lee, VLDB 2019). A quantile answers with the value in the bucket's middle, at most `RELATIVE_ERROR` away from the
true one. Because a bucket's number means the same everywhere, distributions of several processes and minutes merge by
plain addition, in Python as in SQL over `(bucket int, calls bigint)`.
"""

from __future__ import annotations

from math import ceil, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["GAMMA", "LARGEST_BUCKET", "RELATIVE_ERROR", "LatencySketch", "bucket_of", "seconds_of"]

GAMMA = 1.02
"""The ratio of two neighbouring bucket limits."""

RELATIVE_ERROR = (GAMMA - 1) / (GAMMA + 1)
"""How far a quantile may lie from the true value, as a share of it, from 1 µs to 11 days."""

LARGEST_BUCKET = 1396
"""Everything longer than 11 days is counted here, so a sketch never has more than 1,397 buckets."""

_BUCKETS_PER_E = 1 / log(GAMMA)
_MIDDLE = 2 / (1 + GAMMA) / 1e6


def bucket_of(seconds: float) -> int:
    """The number of the bucket that counts a duration.

    Args:
        seconds: the duration; 1 µs and less, zero and negative ones (a clock set back) all fall into bucket 0.
    """
    microseconds = seconds * 1e6
    if microseconds <= 1:
        return 0
    if microseconds >= 1e12:
        return LARGEST_BUCKET
    return ceil(log(microseconds) * _BUCKETS_PER_E)


def seconds_of(bucket: int) -> float:
    """The duration, in seconds, that stands for every one in the bucket."""
    return float(GAMMA**bucket * _MIDDLE)


class LatencySketch:
    """A mergeable distribution of durations.

    It takes no lock: whoever shares one between threads holds theirs.
    """

    __slots__ = ("buckets",)

    def __init__(self, buckets: Mapping[int, int] | None = None) -> None:
        self.buckets: dict[int, int] = dict(buckets or {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatencySketch) and self.buckets == other.buckets

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # it changes

    def __repr__(self) -> str:
        return f"LatencySketch({self.buckets!r})"

    @property
    def count(self) -> int:
        """How many durations were added."""
        return sum(self.buckets.values())

    def add(self, seconds: float) -> None:
        """Count one duration, in seconds."""
        bucket = bucket_of(seconds)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    def merge(self, other: LatencySketch) -> None:
        """Add everything another sketch counted."""
        buckets = self.buckets
        for bucket, calls in other.buckets.items():
            buckets[bucket] = buckets.get(bucket, 0) + calls

    def quantile(self, fraction: float) -> float | None:
        """The duration below or at which this share of all durations lies.

        The nearest rank, as SQL's `percentile_disc`: never a value between two that occurred.

        Args:
            fraction: 0.0 to 1.0; 0.95 for the 95th percentile.

        Returns:
            Seconds, within `RELATIVE_ERROR` of the true value; None when nothing was added.

        Raises:
            ValueError: the fraction is not between 0 and 1.
        """
        return self.quantiles([fraction])[0]

    def quantiles(self, fractions: Iterable[float]) -> list[float | None]:
        """Several quantiles in one pass, in the order they were asked for."""
        wanted = list(fractions)
        if not all(0 <= fraction <= 1 for fraction in wanted):
            raise ValueError(f"A quantile is a fraction between 0 and 1, not one of {wanted}.")
        count = self.count
        if count == 0:
            return [None] * len(wanted)
        answers: list[float | None] = [None] * len(wanted)
        by_rank = sorted(range(len(wanted)), key=wanted.__getitem__)
        passed, position = 0, 0
        for bucket in sorted(self.buckets):
            passed += self.buckets[bucket]
            while position < len(by_rank) and passed >= max(1, ceil(wanted[by_rank[position]] * count)):
                answers[by_rank[position]] = seconds_of(bucket)
                position += 1
        return answers

    def to_json(self) -> dict[str, int]:
        """The buckets as a JSON object: bucket number to count."""
        return {str(bucket): calls for bucket, calls in sorted(self.buckets.items())}

    @classmethod
    def from_json(cls, buckets: Mapping[str, int]) -> LatencySketch:
        """The sketch that `to_json` wrote."""
        return cls({int(bucket): int(calls) for bucket, calls in buckets.items()})
