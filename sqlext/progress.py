"""What is going on, on stderr: a model that loads, rows that are answered.

On a terminal one line that keeps changing and goes away; elsewhere a plain line now and then.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from runtime.cluster.deployments import DeployProgress
    from sqlext.connection import Connection

TICK_S = 0.2
PLAIN_S = 5.0  # between two lines where there is no terminal
QUIET_S = 0.5  # a statement that is done sooner shows nothing


class Progress:
    """Watches a connection while the `with` block runs."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._deploying = ""
        self._plain_due = 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sqlext-progress", daemon=True)

    def __enter__(self) -> Progress:
        session = self._connection.session
        session.on_deploy = self._deploy
        session.notify = self._notify
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.pause()

    def pause(self) -> None:
        """Clear the line: something else is about to be printed."""
        with self._lock:
            self._deploying = ""
            if self._status:
                self._status.stop()
                self._status = None

    def _notify(self, text: str) -> None:
        self.pause()
        self._console.print(text, style="yellow", markup=False, highlight=False)

    def _deploy(self, event: DeployProgress) -> None:
        text = f"{event.phase} {event.model}: {event.workers_ready} of {event.workers} workers"
        self._deploying = f"{text} · {event.seconds:.0f} s"
        if event.workers_ready == event.workers and event.phase == "loading":
            self.pause()

    def _watch(self) -> None:
        while not self._over.wait(TICK_S):
            text = self._deploying or self._rows()
            if text:
                self._tell(text)

    def _rows(self) -> str:
        running = self._connection.running
        if running is None or not running.answered:
            return ""
        seconds = time.monotonic() - running.started
        if seconds < QUIET_S:
            return ""
        gateways = self._connection.session.functions.gateways().values()
        ahead = [gateway.asked_ahead(running) for gateway in gateways]
        still_open = sum(open_calls for _, open_calls in ahead)
        return rows_line(running.answered, still_open, running.tokens, seconds)

    def _tell(self, text: str) -> None:
        with self._lock:
            if self._console.is_terminal:
                if self._status is None:
                    self._status = self._console.status(text)
                    self._status.start()
                self._status.update(text)
            elif time.monotonic() >= self._plain_due:
                self._plain_due = time.monotonic() + PLAIN_S
                self._console.print(f"… {text}", markup=False, highlight=False)


def rows_line(answered: int, still_open: int, tokens: int, seconds: float) -> str:
    """How far a statement is.

    Args:
        answered: calls that have their answers.
        still_open: calls that are known to be wanted too; 0 when nothing is known of what is to come.
        tokens: of prompts and answers so far.
        seconds: since the statement began.
    """
    known = f" of {answered + still_open:,}" if still_open else ""
    parts = [f"{answered:,}{known} answers", f"{answered / seconds:,.0f} rows/s", f"{tokens / seconds:,.0f} tokens/s"]
    if still_open:
        parts.append(f"{_duration(still_open * seconds / answered)} left")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    """Short, for people: 9 s, 4 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
