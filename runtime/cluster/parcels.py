"""Parcels: pieces of a batch that are finished close together travel together.

An item of a Ray stream costs about a millisecond whatever it holds, and an engine may finish rows one by one. A timer
is needed, as the engine may be silent for long after a piece: so the engine runs on one thread and its pieces are
gathered on another.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeAlias

from runtime.spec import Answers, Delta

Parcel: TypeAlias = tuple[Answers | Delta, ...]

_END = None


def parcels(pieces: Callable[[], Iterable[Answers | Delta]], threads: Executor, wait_s: float) -> Iterator[Parcel]:
    """What `pieces()` yields, run on one of `threads`, in parcels at most `wait_s` late.

    Pieces that are there when the last one comes leave with it at once. An exception of `pieces` is raised here,
    after everything that came before it.
    """
    box: queue.SimpleQueue[Answers | Delta | BaseException | None] = queue.SimpleQueue()

    def produce() -> None:
        try:
            for piece in pieces():
                box.put(piece)
            box.put(_END)
        except BaseException as error:  # SystemExit too: it must not end the worker
            box.put(error)

    threads.submit(produce)
    gathered: list[Answers | Delta] = []
    due = 0.0
    while True:
        try:
            item = box.get(timeout=max(0.0, due - time.monotonic()) if gathered else None)
        except queue.Empty:
            yield tuple(gathered)
            gathered.clear()
            continue
        if isinstance(item, Answers | Delta):
            due = due if gathered else time.monotonic() + wait_s
            gathered.append(item)
            continue
        if gathered:
            yield tuple(gathered)
        if item is not _END:
            raise item
        return
