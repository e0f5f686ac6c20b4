"""The queue of one gateway: open calls in, well-formed batches out.

Fair and efficient at once: sheaves (the open calls of one `ask`) are served in the order they came, and inside a
sheaf long prompts come first, so that rows of similar length share a batch. Small sheaves with the same options are
put together. Where equal beginnings shall meet, they decide instead, see `shelf`.
Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

import math
from collections import deque

from runtime.gateway.call import Call
from runtime.gateway.shelf import Shelves
from runtime.spec import CallOptions

CRUMBS = 32  # of so many a full batch would be made; a batch costs an engine something whatever its size


class CallQueue:
    """Open calls waiting for a worker.

    Args:
        max_rows: most rows of a batch.
        max_chars: most characters of a batch's prompts; a single longer prompt is a batch of its own.
        workers: the work of a short queue is spread over this many.
        by_prefix: rows with equal beginnings go to the same worker, one after the other.
    """

    def __init__(self, max_rows: int, max_chars: int, workers: int, by_prefix: bool = False) -> None:
        self.max_rows = max_rows
        self._max_chars = max_chars
        self._workers = workers
        self._sheaves: deque[tuple[CallOptions, list[Call]]] = deque()
        self._again: deque[list[Call]] = deque()
        self._queued = 0
        self._shelves = Shelves() if by_prefix else None

    def __len__(self) -> int:
        return self._queued + len(self._shelves or ()) + sum(map(len, self._again))

    def put(self, options: CallOptions, calls: list[Call]) -> None:
        """Add the calls of one `ask`."""
        if self._shelves is not None:
            self._shelves.put(options, calls)
            return
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

    def take(self, full_only: bool, worker: int = 0) -> list[Call]:
        """The next batch, all of one set of options; [] when there is none.

        Args:
            full_only: give nothing but a full batch: the asking worker is still busy, and a partial batch would do
                better on another one.
            worker: who is going to work on it; matters only where equal beginnings meet.
        """
        while self._again:
            calls = [call for call in self._again.popleft() if call.wanted]
            if len(calls) > self.max_rows:  # the bound has shrunk since
                self._again.appendleft(calls[self.max_rows :])
            if calls:
                return calls[: self.max_rows]
        if self._shelves is not None:
            return self._take_neighbours(self._shelves, full_only, worker)
        self._drop_unwanted()
        if not self._sheaves or (full_only and self._queued < self.max_rows):
            return []
        rows = self._rows(self._queued, full_only)
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

    def _rows(self, waiting: int, full_only: bool) -> int:
        """Rows of the next batch: all that fit while there is plenty, then fair shares, but not crumbs."""
        if full_only:
            return self.max_rows
        return min(self.max_rows, max(math.ceil(waiting / self._workers), self.max_rows // CRUMBS))

    def _take_neighbours(self, shelves: Shelves, full_only: bool, worker: int) -> list[Call]:
        # What a busy worker takes ahead may come from another's stretch: only when there is plenty for everyone.
        if full_only and len(shelves) < self.max_rows * self._workers:
            return []
        rows = self._rows(len(shelves), full_only)
        return shelves.take(worker, rows, self._max_chars, full_only)

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
