"""How many retries all calls of a process may make together."""

from __future__ import annotations

import threading

__all__ = ["RetryBudget"]


class RetryBudget:
    """Keeps retries from multiplying a load that the server cannot bear already: a token bucket.

    A success earns a tenth of a token and a retry costs one, so that when everything fails only one call in ten is
    repeated (Brooker, "Fixing retries with token buckets and circuit breakers").

    Args:
        capacity: Tokens at the start, and at most.
    """

    def __init__(self, capacity: float = 100.0) -> None:
        self._capacity = capacity
        self._tokens = capacity
        self._lock = threading.Lock()
        self.refused = 0
        """Retries that were not made for want of a token."""

    def earn(self) -> None:
        """Note a success. Unlocked: a lost tenth of a token harms nobody, and this is in every call's path."""
        if self._tokens < self._capacity:
            self._tokens = min(self._tokens + 0.1, self._capacity)

    def spend(self) -> bool:
        """Take a token for a retry; ``False`` if there is none."""
        with self._lock:
            if self._tokens < 1.0:
                self.refused += 1
                return False
            self._tokens -= 1.0
            return True
