"""How a query on models is run: once ahead for its calls, then for real; or only to count them.

DuckDB hands a function 2,048 rows at a time, fewer after a filter, and waits for the answers before it goes on. So a
query is first run with functions that note what they are asked and answer NULL: the workers get the calls of all rows
at once, and in the real run the answers are there. What this costs is time; what it asks is the same (see `probe`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Any, TypeAlias

import duckdb

from runtime.gateway import Mode, Statement
from sqlext import probe
from sqlext.conditions import models_last
from sqlext.countable import Countable, query_in
from sqlext.interrupt import call_from
from sqlext.session import Session

Guard: TypeAlias = Callable[[Callable[[], Any]], Any]
"""Runs work on DuckDB so that Ctrl-C stops it, and raises the cause of its failure."""

MAX_PASSES = 4  # runs of a query for its calls alone
THROUGH_ROWS = 2048  # of a result that nobody reads, at a time


class Runs:
    """The runs of one cursor's queries.

    Args:
        raw: DuckDB's cursor.
        session: whose model functions are called.
        guard: see `Guard`.
        check_stopped: raises when the user has stopped the statement.
    """

    def __init__(
        self, raw: duckdb.DuckDBPyConnection, session: Session, guard: Guard, check_stopped: Callable[[], None]
    ) -> None:
        self._raw = raw
        self._session = session
        self._guard = guard
        self._check_stopped = check_stopped

    def execute(self, running: Statement, query: str, parameters: Any = None, frame: FrameType | None = None) -> Any:
        """Run a statement of DuckDB's for real, ahead of that for its calls where it pays; as DuckDB's `execute`.

        Args:
            frame: where DuckDB looks for variables that hold data frames.

        Raises:
            duckdb.Error: DuckDB's own error.
            SqlextError: the statement cannot go on.
        """

        def execute(text: str) -> Any:
            return self._guard(lambda: call_from(frame, self._raw.execute, text, parameters))

        if not self._session.functions.gateways():
            return execute(query)
        edited = self._models_last(query)
        self._run_ahead(running, query, edited, parameters, frame)
        try:
            return execute(edited)
        except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
            if edited == query:
                raise
            try:
                return execute(query)  # nothing was done yet, and the place of the error is that in the user's text
            except duckdb.TransactionException:
                raise error from None

    def count(self, running: Statement, text: str, parameters: Any, frame: FrameType | None) -> Countable:
        """Run the query inside `text` only to count its calls, into `running.explained`.

        Raises:
            UserError: the statement holds no query that can be run for this.
            duckdb.Error: DuckDB's own error of the query.
        """
        running.mode = Mode.EXPLAIN
        is_model = self._session.functions.is_model_function
        found: Countable = self._guard(lambda: query_in(self._raw, text, is_model, frame))
        running.explained.clear()  # planning evaluates constant calls, and so does the run
        self._run_through(self._models_last(found.query), parameters, frame)
        return found

    def _run_ahead(
        self, running: Statement, query: str, edited: str, parameters: Any, frame: FrameType | None
    ) -> None:
        """A call whose argument is another's answer is only known in the next run, which waits for the first."""
        gateways = self._session.functions.gateways().values()
        is_model = self._session.functions.is_model_function

        def plan() -> probe.Probe | None:
            running.passes += 1
            found: probe.Probe | None = self._guard(lambda: probe.plan(self._raw, query, parameters, is_model, frame))
            return found

        def asked() -> int:
            return sum(gateway.asked_ahead(running)[0] for gateway in gateways)

        running.mode = Mode.AHEAD
        try:
            # Planning has asked constant calls; a plan with their answers may be worth more than one with NULL.
            ahead = plan() or (plan() if asked() else None)
            if ahead is None:
                return
            running.nested = ahead.calls > 1
            text = edited if ahead.query == query else self._models_last(ahead.query)
            before = -1
            while before < (found := asked()):
                before = found
                self._run_through(text, parameters, frame)
                for gateway in gateways:
                    gateway.pass_over()
                if ahead.calls < 2 or running.passes >= MAX_PASSES:
                    return
                running.passes += 1
        except duckdb.Error:
            pass  # a query that fails on NULL, or at all: the real run tells
        finally:
            running.mode = Mode.REAL
            for gateway in gateways:
                gateway.pass_over()

    def _run_through(self, query: str, parameters: Any, frame: FrameType | None) -> None:
        """Run a query and drop its rows as they come; a relation streams them, the reader of a result holds all."""

        def run() -> None:
            relation = call_from(frame, functools.partial(self._raw.sql, query, params=parameters))
            with closing(relation.to_arrow_reader(THROUGH_ROWS)) as reader:
                try:
                    for _ in reader:
                        self._check_stopped()
                except OSError as error:  # Arrow keeps only the text of DuckDB's error
                    raise duckdb.Error(str(error)) from None

        self._guard(run)

    def _models_last(self, query: str) -> str:
        edited: str = self._guard(lambda: models_last(self._raw, query, self._session.functions.is_model_function))
        return edited
