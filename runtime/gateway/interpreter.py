"""Python's interpreter while rows are asked: its garbage collector looks less often, its threads change more often.

A row makes a handful of objects that live until it is answered, and are freed by their last reference. The collector
counts them as they are made, and at its usual threshold of 700 a quarter of the time went into looking at them again
and again in vain. And a thread that carries answers needs the interpreter for moments only, but waits 5 ms for each
beside a query that computes. Both are settings of the whole process: while anyone asks they are changed, after that
they are as they were.
"""

from __future__ import annotations

import gc
import sys
import threading

THRESHOLDS = (50_000, 20, 100)
SWITCH_S = 0.001


class _Busy:
    """A block of code with these settings; many may run at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._usual = gc.get_threshold(), sys.getswitchinterval()

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                thresholds, interval = self._usual = gc.get_threshold(), sys.getswitchinterval()
                if 0 < thresholds[0] < THRESHOLDS[0]:  # 0: the user has switched it off
                    gc.set_threshold(*THRESHOLDS)
                sys.setswitchinterval(min(interval, SWITCH_S))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                thresholds, interval = self._usual
                gc.set_threshold(*thresholds)
                sys.setswitchinterval(interval)


busy = _Busy()
"""`with busy:` around what asks, and what carries answers."""
