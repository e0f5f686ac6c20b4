"""The queue of one gateway: open calls in, well-formed batches out.

Fair and efficient at once: sheaves (the open calls of one `ask`) are served in the order they came, and inside a
sheaf long prompts come first, so that rows of similar length share a batch. Small sheaves with the same options are
put together. Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

import math
from collections import deque

from runtime.gateway.call import Call
from runtime.spec import CallOptions


class CallQueue:
    """Open calls waiting for a worker.

    Args:
        max_rows: most rows of a batch.
        max_chars: most characters of a batch's prompts; a single longer prompt is a batch of its own.
        workers: the work of a short queue is spread over this many.
    """

    def __init__(self, max_rows: int, max_chars: int, workers: int) -> None:
        self.max_rows = max_rows
        self._max_chars = max_chars
        self._workers = workers
        self._sheaves: deque[tuple[CallOptions, list[Call]]] = deque()
        self._again: deque[list[Call]] = deque()
        self._queued = 0

    def __len__(self) -> int:
        return self._queued + sum(map(len, self._again))

    def put(self, options: CallOptions, calls: list[Call]) -> None:
        """Add the calls of one `ask`."""
        calls.reverse()  # taken from the end: longest first, equally long ones in the order they came
        calls.sort(key=_size)
        self._sheaves.append((options, calls))
        self._queued += len(calls)

    @property
    def again(self) -> bool:
        """Whether the next batch is one that was lost."""
        return bool(self._again)

    def put_back(self, calls: list[Call]) -> None:
        """Calls that lost their batch: they come out next, in two halves, and no others with them."""
        half = (len(calls) + 1) // 2
        for part in (calls[half:], calls[:half]):
            if part:
                self._again.appendleft(part)

    def take(self, full_only: bool) -> list[Call]:
        """The next batch, all of one set of options; [] when there is none.

        Args:
            full_only: give nothing but a full batch: the asking worker is still busy, and a partial batch would do
                better on another one.
        """
        while self._again:
            calls = [call for call in self._again.popleft() if call.wanted]
            if len(calls) > self.max_rows:  # the bound has shrunk since
                self._again.appendleft(calls[self.max_rows :])
            if calls:
                return calls[: self.max_rows]
        self._drop_unwanted()
        if not self._sheaves or (full_only and self._queued < self.max_rows):
            return []
        rows = min(self.max_rows, math.ceil(self._queued / self._workers))
        options = self._sheaves[0][0]
        batch: list[Call] = []
        chars = 0
        skipped: list[tuple[CallOptions, list[Call]]] = []
        while self._sheaves and len(batch) < rows and chars < self._max_chars:
            sheaf_options, calls = sheaf = self._sheaves.popleft()
            if sheaf_options is not options and sheaf_options != options:
                skipped.append(sheaf)
                continue
            while calls and len(batch) < rows:
                if batch and chars + calls[-1].size > self._max_chars:
                    chars = self._max_chars
                    break
                call = calls.pop()
                self._queued -= 1
                if call.wanted:
                    batch.append(call)
                    chars += call.size
            if calls:
                self._sheaves.appendleft(sheaf)
                break
        self._sheaves.extendleft(reversed(skipped))
        return batch

    def _drop_unwanted(self) -> None:
        while self._sheaves:
            calls = self._sheaves[0][1]
            while calls and not calls[-1].wanted:
                calls.pop()
                self._queued -= 1
            if calls:
                return
            self._sheaves.popleft()


def _size(call: Call) -> int:
    return call.size
