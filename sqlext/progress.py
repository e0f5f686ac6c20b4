"""What is going on, on stderr: a model that loads, rows that are answered.

On a terminal one line that keeps changing and goes away; elsewhere a plain line now and then.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.status import Status
from rich.text import Text

from sqlext.progress_lines import rows_line

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
        self._jobs = JobBar(self._console)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sqlext-progress", daemon=True)

    def __enter__(self) -> Progress:
        session = self._connection.session
        session.on_deploy = self._deploy
        session.on_job = self._jobs.show
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
            self._jobs.show("")
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


class JobBar:
    """How far a job is that is waited for. It draws only when it is told, so that it works at the end of Python too,
    where no thread can be started."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._plain_due = 0.0

    def __enter__(self) -> JobBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Show `text` in place of what was shown; '' clears it."""
        if not text:
            if self._live:
                self._live.stop()
                self._live = None
        elif self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
        elif time.monotonic() >= self._plain_due:
            self._plain_due = time.monotonic() + PLAIN_S
            self._console.print(f"… {text}", markup=False, highlight=False)
