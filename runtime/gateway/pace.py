"""The pace of one model's calls: when a failed row is tried again, and when nothing is sent at all.

The only retry loop of the program: engines and their libraries try once. Three rules, each a small machine:

- a row whose failure may pass is tried again after a random delay that doubles (full jitter), or as long as the
  provider asks; at most `attempts` times, and not after its deadline, which counts neither the wait that the provider
  asks for nor the time in the queue; «too many» is no attempt of the row while other rows are answered;
- a provider that says «too many» slows everything down: all wait as long as it asks, then fewer rows are in flight,
  and every answer allows a little more again (additive increase, multiplicative decrease); where nothing at all is
  answered between as many such waves as failures would open the breaker, the statement stops;
- failures in a row, without one success between them, open a breaker: nothing is sent for a while, then single rows
  try; when these fail too, the statement stops instead of writing an error into every row. A row that was sent before
  the last success says nothing about the provider: at the end of a table only the bad rows are left over.

Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts and waiting times, in seconds."""

    attempts: int = 5
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    longest_retry_after_s: float = 300.0
    row_deadline_s: float = 120.0
    failures_in_a_row: int = 20
    pause_s: float = 30.0
    trials: int = 3

    def delay(self, attempt: int, retry_after_s: float) -> float:
        """Seconds to wait after the `attempt`-th failure (from 1)."""
        most = min(self.longest_delay_s, self.first_delay_s * 2.0 ** min(attempt, 60))
        return max(retry_after_s, random.uniform(self.first_delay_s, most))


class Pace:
    """How much may be sent now.

    Args:
        policy: attempts and waiting times.
        clock: monotonic seconds.
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self.policy = policy
        self.resume_at = 0.0  # nothing is sent before
        self._clock = clock
        self._failures = 0  # in a row
        self._answered_at = -math.inf
        self._trials: int | None = None  # left while the breaker is open; None: it is closed
        self._room: float | None = None  # rows in flight that the provider bears; None: no bound is known
        self._slowdowns = 0  # in a row

    def room(self, in_flight: int) -> int | None:
        """Rows that may be sent now, None for any number."""
        if self._clock() < self.resume_at:
            return 0
        if self._trials is not None:
            return max(0, 1 - in_flight)
        return None if self._room is None else max(0, int(self._room) - in_flight)

    def answered(self, rows: int) -> None:
        """Rows came back with an answer, or with an error of their own: the provider is well."""
        self._answered_at = self._clock()
        self._failures = 0
        self._trials = None
        self._slowdowns = 0
        if self._room is not None:
            self._room += rows / self._room

    def answered_since(self, then: float) -> bool:
        """Whether any row has come back with an answer after the monotonic time `then`."""
        return self._answered_at > then

    def slow_down(self, retry_after_s: float, in_flight: int) -> bool:
        """The provider says that it is too much, and for how long to wait (0: it does not say).

        True when it is time to stop.
        """
        now = self._clock()
        if now < self.resume_at:  # of the same wave
            self.resume_at = max(self.resume_at, now + retry_after_s)
            return False
        self._slowdowns += 1
        self._room = max(1.0, in_flight / 2)
        self.resume_at = now + (retry_after_s or self.policy.delay(self._slowdowns, 0.0))
        if self._slowdowns < self.policy.failures_in_a_row:
            return False
        self._slowdowns, self.resume_at = 0, 0.0
        return True

    def failed(self, since: float, in_flight: int) -> bool:
        """A row, first sent at `since`, failed in a way that may pass; True when it is time to stop."""
        now = self._clock()
        if self._trials is not None:
            if now >= self.resume_at and in_flight <= 1:  # others were sent before the breaker opened
                self._trials -= 1
                self.resume_at = now + self.policy.delay(1, 0.0)
            if self._trials <= 0:
                self._trials, self._failures, self.resume_at = None, 0, 0.0
                return True
        elif not self.answered_since(since):
            self._failures += 1
            if self._failures >= self.policy.failures_in_a_row:
                self._trials = self.policy.trials
                self.resume_at = now + self.policy.pause_s
        return False
