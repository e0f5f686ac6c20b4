"""Finished calls kept in memory, so that equal questions cost nothing while they are remembered.

Bounded by bytes: the oldest leave first. Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

from collections import deque

from runtime.gateway.call import Call
from runtime.spec import CallOptions, Prompt

OVERHEAD_BYTES = 400  # the Python objects of a call, beside its texts


class CallMemory:
    """Open and finished calls by their options and prompt.

    Args:
        max_bytes: bound on the finished ones.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lanes: dict[CallOptions, dict[Prompt, Call]] = {}
        self._finished: deque[tuple[Call, int]] = deque()
        self._bytes = 0

    def lane(self, options: CallOptions) -> dict[Prompt, Call]:
        """The calls with these options, by prompt; add new ones to it."""
        return self._lanes.setdefault(options, {})

    def finished(self, call: Call) -> None:
        """`call` has an outcome worth keeping; make room for it."""
        output = call.outcome.output if call.outcome else None
        size = call.size + OVERHEAD_BYTES + (getattr(output, "nbytes", None) or len(output or ""))
        self._finished.append((call, size))
        self._bytes += size
        while self._bytes > self._max_bytes:
            oldest, freed = self._finished.popleft()
            self._bytes -= freed
            self.forget(oldest)

    def forget(self, call: Call) -> None:
        """Drop `call`, if it is still the one remembered for its prompt."""
        lane = self._lanes.get(call.options)
        if lane is not None and lane.get(call.prompt) is call:
            del lane[call.prompt]
            if not lane:
                del self._lanes[call.options]
