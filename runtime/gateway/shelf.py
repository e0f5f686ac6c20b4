"""Shelves: open calls in the order of their texts, so that equal beginnings meet on the same worker.

An engine that keeps what it has read of earlier prompts answers sooner when the next one begins alike (rows in
lexicographic order: Liu et al., "Optimizing LLM Queries in Relational Data Analytics Workloads", MLSys 2025). Here
each worker has a stretch of that order: it works upwards through it and then goes back to the lower end. Who has
nothing left takes over half of the longest stretch. The stretches stay when the calls have gone, so that a beginning
which comes again in a later chunk goes to the worker that knows it.
Not thread-safe; the gateway holds its lock around every call.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from operator import itemgetter
from typing import TypeAlias

from runtime.gateway.call import Call
from runtime.spec import CallOptions

_Entry: TypeAlias = tuple[str, int, Call]  # text, number of arrival, call
_Place: TypeAlias = tuple[str, int] | tuple[()]  # of the entry with this text and number; () is before all

_ENTRY_TEXT = itemgetter(0)
_EMPTY_SHELVES = 32  # of which the workers' starts are remembered
_SORT_AT = 1 / 4  # arrivals are sorted in when they are this share of what is sorted
_PATIENCE = 2  # times as many calls are taken as were waiting, then the oldest one is
_STRETCHES = 8  # for each worker; when there are more, they are dealt out anew


class Shelves:
    """One shelf for each set of options, served in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[CallOptions, Shelf] = OrderedDict()  # next one first
        self._empty: OrderedDict[CallOptions, Shelf] = OrderedDict()  # the longest empty first
        self._queued = 0

    def __len__(self) -> int:
        return self._queued

    def put(self, options: CallOptions, calls: list[Call]) -> None:
        """Add calls, all with these options."""
        shelf = self._waiting.get(options)
        if shelf is None:
            shelf = self._waiting[options] = self._empty.pop(options, Shelf())
        shelf.put(calls)
        self._queued += len(calls)

    def take(self, worker: int, rows: int, max_chars: int, full: bool) -> list[Call]:
        """A batch for `worker` from the shelf whose turn it is; [] when nothing is left."""
        batch: list[Call] = []
        while self._waiting and not batch:
            options, shelf = self._waiting.popitem(last=False)
            before = len(shelf)
            batch = shelf.take(worker, rows, max_chars, full)
            self._queued -= before - len(shelf)
            (self._waiting if shelf else self._empty)[options] = shelf
        while len(self._empty) > _EMPTY_SHELVES:
            self._empty.popitem(last=False)
        return batch


class Shelf:
    """The calls of one set of options, and which worker works where."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []  # sorted
        self._arrived: list[_Entry] = []  # not yet sorted in
        self._numbers = itertools.count()
        self._stretches: list[tuple[_Place, int]] = []  # where they start, ascending, and whose they are
        self._remembered: list[tuple[_Place, int]] = []  # those that stay when the shelf is empty
        self._reached: dict[int, _Place] = {}  # the last call that each worker took
        self._most = 0  # calls that were here at once since it was last empty
        self._patience = 0  # calls that may be taken before it is the oldest one's turn

    def __len__(self) -> int:
        return len(self._entries) + len(self._arrived)

    def put(self, calls: list[Call]) -> None:
        """Add calls."""
        if not self:
            self._patience = _PATIENCE * len(calls)
        self._arrived += zip(map(_text, calls), self._numbers, calls)  # noqa: B905 - the numbers do not end
        self._most = max(self._most, len(self))

    def take(self, worker: int, rows: int, max_chars: int, full: bool) -> list[Call]:
        """The next neighbours in the worker's stretch; [] only when no wanted call is left.

        Args:
            full: take over a part of another stretch also to fill the batch up, not only to have one at all.
        """
        batch = _Batch(rows, max_chars)
        if len(self._arrived) >= _SORT_AT * len(self._entries):
            self._sort_in()
        if self._patience < 0 and self._entries:
            self._pick(self._oldest(), len(self._entries), batch)
            self._patience = _PATIENCE * max(len(self), 8 * rows)
        while not batch.full:
            at, end = self._next(worker)
            if at < end:
                self._reached[worker] = self._pick(at, end, batch)
            elif (batch.calls and not full) or not (self._sort_in() or self._take_over(worker)):
                break
        if not self:
            self._stretches, self._most = self._remembered.copy(), 0
        return batch.calls

    def _sort_in(self) -> bool:
        """Merge what has arrived; False when nothing has."""
        if not self._arrived:
            return False
        self._entries += self._arrived
        self._entries.sort(key=_ENTRY_TEXT)  # a merge; equal texts stay in the order in which they came
        self._arrived = []
        return True

    def _pick(self, at: int, end: int, batch: _Batch) -> _Place:
        """Move calls from `at` upwards into the batch and drop unwanted ones; returns the place of the last."""
        stop = at
        for _, _, call in self._entries[at : min(end, at + batch.rows)]:
            if call.wanted and not batch.add(call):
                break
            stop += 1
        place = self._entries[max(at, stop - 1)][:2]
        del self._entries[at:stop]
        self._patience -= stop - at
        return place

    def _oldest(self) -> int:
        """Index of the call that waits longest: arrivals before it may not pass it for ever."""
        return min(range(len(self._entries)), key=lambda index: self._entries[index][1])

    # -- who works where --------------------------------------------------------------------------------------

    def _next(self, worker: int) -> tuple[int, int]:
        """Where the worker goes on, upwards from the last call that it took: (0, 0) when it has none left."""
        at = self._position(worker)
        own = [self._edges(number) for number, (_, owner) in enumerate(self._stretches) if owner == worker]
        above = [(max(low, at), high) for low, high in own]
        return next(((low, high) for low, high in above + own if low < high), (0, 0))

    def _position(self, worker: int) -> int:
        return bisect_left(self._entries, self._reached.get(worker, ()))

    def _edges(self, number: int) -> tuple[int, int]:
        """Where the calls of a stretch begin and end."""
        starts = self._stretches[number : number + 2]
        low = bisect_left(self._entries, starts[0][0]) if number else 0
        high = bisect_left(self._entries, starts[1][0]) if len(starts) > 1 else len(self._entries)
        return low, high

    def _take_over(self, worker: int) -> bool:
        """Give the worker half of the longest stretch, the half where its owner does not stand.

        At the end of the work what is taken over is small; then it is not remembered, or the last rows of each chunk
        would decide where the next one's go. False when no call is left.
        """
        if not self._entries:
            return False
        workers = len({owner for _, owner in self._stretches})
        if not workers or len(self._stretches) > _STRETCHES * workers:
            self._stretches, self._remembered = [((), worker)], [((), worker)]
            return True
        edges = [self._edges(number) for number in range(len(self._stretches))]
        number, (low, high) = max(enumerate(edges), key=lambda found: found[1][1] - found[1][0])
        start, owner = self._stretches[number]
        cut = self._cut(low, high)
        owner_is_above = low < cut <= self._position(owner) < high
        below, above = (worker, owner) if owner_is_above else (owner, worker)
        self._stretches[number : number + 1] = [(start, below), (self._entries[cut][:2], above)]
        if (high - low) * 2 * workers >= self._most:
            self._remembered = self._stretches.copy()
        return True

    def _cut(self, low: int, high: int) -> int:
        """Where to halve a stretch: between the neighbours in its middle part that have least in common.

        In sorted order these have the same beginning in common as the two ends of the part.
        """
        quarter, middle = (high - low) // 4, (low + high) // 2
        first, last = low + quarter, high - 1 - quarter
        common = _common(self._entries[first][0], self._entries[last][0])

        def beginning(entry: _Entry) -> str:
            return entry[0][: common + 1]

        here = beginning(self._entries[middle])
        cuts = [bisect(self._entries, here, first, last + 1, key=beginning) for bisect in (bisect_left, bisect_right)]
        return min((cut for cut in cuts if first < cut <= last), key=lambda cut: abs(cut - middle), default=middle)


class _Batch:
    """A batch that is being filled: room for `rows` more calls."""

    __slots__ = ("_chars", "calls", "rows")

    def __init__(self, rows: int, chars: int) -> None:
        self.calls: list[Call] = []
        self.rows = rows
        self._chars = chars

    @property
    def full(self) -> bool:
        return self.rows <= 0

    def add(self, call: Call) -> bool:
        """Add a call if it fits; a single one always does. What does not fit makes the batch full."""
        if self.calls and call.size > self._chars:
            self.rows = 0
            return False
        self.calls.append(call)
        self.rows -= 1
        self._chars -= call.size
        return True


def _text(call: Call) -> str:
    prompt = call.prompt
    return prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)


def _common(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
