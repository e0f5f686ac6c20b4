"""Python's garbage collector while rows are asked: it looks less often.

A row makes a handful of objects that live until it is answered, and are freed by their last reference. The collector
counts them as they are made, and at its usual threshold of 700 a quarter of the time went into looking at them again
and again in vain. While anyone asks, the thresholds of the process are raised; after that they are as they were.
"""

from __future__ import annotations

import gc
import threading

THRESHOLDS = (50_000, 20, 100)


class _Relaxed:
    """A block of code in which the collector looks less often; many may run at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._usual = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._usual = gc.get_threshold()
                if 0 < self._usual[0] < THRESHOLDS[0]:  # 0: the user has switched it off
                    gc.set_threshold(*THRESHOLDS)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                gc.set_threshold(*self._usual)


relaxed = _Relaxed()
"""`with relaxed:` around what makes many short-lived objects."""
