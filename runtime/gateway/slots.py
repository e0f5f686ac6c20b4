"""Which worker takes the next batch: free slots and the balance policy.

Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

from runtime.errors import UserError, did_you_mean

POLICIES = ("lru", "round_robin", "prefix")


class Slots:
    """Batches in flight per worker.

    Args:
        workers: number of workers.
        running: batches a worker runs at once; one more may wait in its queue, so that it is never idle.
        policy: 'lru' gives a batch to the least loaded worker, the one longest without work first;
            'round_robin' goes around the workers in turn; 'prefix' chooses as 'lru', and the queue finds the rows
            that suit the worker.
    """

    def __init__(self, workers: int, running: int, policy: str) -> None:
        if policy not in POLICIES:
            near = did_you_mean(policy, POLICIES)
            raise UserError(
                f'load_balance "{policy}" is not known.',
                code="option_value",
                hint=f"Did you mean {near}?" if near else f"Known: {', '.join(POLICIES)}.",
            )
        self._running = running
        self._policy = policy
        self._load = [0] * workers
        self._last_used = [0] * workers
        self._clock = 0
        self._alone: set[int] = set()

    @property
    def total(self) -> int:
        """Batches that can be in flight at once."""
        return len(self._load) * (self._running + 1)

    def choose(self, empty: bool = False) -> int | None:
        """The worker that would take the next batch, or None when all have enough.

        Args:
            empty: only a worker with nothing at all in flight.
        """
        most = 0 if empty else self._running
        free = [worker for worker, load in enumerate(self._load) if load <= most and worker not in self._alone]
        if not free:
            return None
        if self._policy == "round_robin":
            workers = len(self._load)
            return min(free, key=lambda worker: (not self.idle(worker), (worker - self._clock) % workers))
        return min(free, key=lambda worker: (self._load[worker], self._last_used[worker]))

    def idle(self, worker: int) -> bool:
        """Whether the worker would start on a batch at once."""
        return self._load[worker] < self._running

    def occupy(self, worker: int, alone: bool = False) -> None:
        """A batch goes to `worker`; `alone` keeps others away until it has ended."""
        self._load[worker] += 1
        if alone:
            self._alone.add(worker)
        if self._policy == "round_robin":
            self._clock = worker + 1
        else:
            self._clock += 1
            self._last_used[worker] = self._clock

    def release(self, worker: int) -> None:
        """A batch of `worker` has ended."""
        self._load[worker] -= 1
        self._alone.discard(worker)
