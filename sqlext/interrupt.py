"""Ctrl-C during a query.

In the main thread Python sees a signal only when DuckDB returns, which may be hours later. So a query that the main
thread asks for runs in another thread, and the main thread waits where a signal reaches it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interruptible:
    """Runs work so that Ctrl-C stops it at once.

    Args:
        stop: called at Ctrl-C; must make the running work end soon.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlext-query")

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work`.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; `work` has ended by then.
        """
        if threading.current_thread() is not threading.main_thread():
            return work()
        future: Future[T] = self._thread.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            self._stop()
            future.exception()  # until the work has ended, the connection belongs to it
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def callers_frame() -> FrameType | None:
    """The innermost frame outside this package: where DuckDB looks up names of data frames."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == "sqlext":
        frame = frame.f_back
    return frame


def call_from(frame: FrameType | None, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` as if from `frame`, so that DuckDB finds the variables there, also from another thread."""
    if frame is None:
        return function(*arguments)
    names = {**frame.f_locals, "__sqlext_call": (function, arguments)}
    result: T = eval("__sqlext_call[0](*__sqlext_call[1])", frame.f_globals, names)
    return result
