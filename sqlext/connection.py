"""A DuckDB connection that also speaks the language.

Every statement passes `execute`: ours are carried out here, all others are DuckDB's.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import duckdb
import pyarrow as pa

from runtime.errors import Cancelled, SqlextError
from runtime.gateway import Statement as RunningStatement
from sqlext import actions, countable, jobs, notices, script, sources, statements, tables
from sqlext.dialects import from_spark
from sqlext.interrupt import Interruptible, callers_frame
from sqlext.named_results import NamedResults
from sqlext.parser import parse
from sqlext.repartition import Partitioning
from sqlext.runs import Runs
from sqlext.session import Session
from sqlext.stream import Stream, run_query, streamable
from udfs.context import VARIABLE
from udfs.signatures import quote

_OWN_RESULT = "sqlext_own_result"  # on a cursor that no user's table can be seen on

_open: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """DuckDB does not survive the end of Python with results half read and functions registered."""
    for connection in list(_open):
        with suppress(Exception):
            connection.close()


# Methods of DuckDB's that read the last result: a part of it, or all, which ends the statement.
_PART_READERS = ("fetchone", "fetchmany", "fetch_df_chunk", "to_arrow_reader")
_WHOLE_READERS = ("fetchall", "df", "fetchdf", "fetch_df", "fetchnumpy", "pl", "torch", "tf", "to_arrow_table")


def connect(database: str | os.PathLike[str] = ":memory:", **options: Any) -> Connection:
    """Open a database with the language on top.

    Args:
        database: a file or ':memory:', as for `duckdb.connect`.
        options: passed to `duckdb.connect` (``read_only``, ``config``).
    """
    raw = duckdb.connect(os.fspath(database), **options)
    return Connection(raw, Session(raw), owns_session=True)


def attach(raw: duckdb.DuckDBPyConnection) -> Connection:
    """Put the language on top of an existing DuckDB connection: `raw` itself is used, and stays open at `close`."""
    return Connection(raw, Session(raw), owns_session=True, owns_raw=False)


class Connection:
    """A cursor of one database: DuckDB's methods, and statements of ours.

    Used from one thread at a time; `cursor()` gives another one for another thread.

    Attributes:
        raw: DuckDB's own connection.
        session: what all cursors of the database share.
        running: the statement whose result is being made or read.
        has_rows: the last statement answered with rows; a bare count of changed rows does not count.
        partitionings: what TableRepartition said of tables, by their lower-case names.
    """

    def __init__(
        self,
        raw: duckdb.DuckDBPyConnection,
        session: Session,
        *,
        owns_session: bool = False,
        owns_raw: bool = True,
    ) -> None:
        self.raw = raw
        self.session = session
        self.running: RunningStatement | None = None
        self.has_rows = False
        self._owns_session = owns_session
        self._owns_raw = owns_raw
        self._stopped = threading.Event()
        self._functions_seen = 0
        self._stream: Stream | None = None
        self._result: Any = raw
        self._own_results = raw.cursor()
        self._named_results = NamedResults()
        self.partitionings: dict[str, Partitioning] = {}
        self._interruptible = Interruptible(self.interrupt)
        self._runs = Runs(raw, session, self._guarded, self.check_stopped)
        tables.register(raw, session)
        if owns_raw and not hasattr(sys, "ps1"):
            # DuckDB would draw its own bar on stdout, which is data wherever nobody sits at a prompt.
            raw.execute("SET enable_progress_bar_print = false")
        _open.add(self)

    # -- running -------------------------------------------------------------------------------------------

    def execute(self, text: str, parameters: Any = None) -> Connection:
        """Run a script; the last statement's result is ready to be fetched.

        Args:
            text: one or more statements.
            parameters: values for the last statement's placeholders, as for DuckDB.

        Raises:
            SqlextError: a statement of ours is wrong or failed, or a model call stopped the query.
            duckdb.Error: DuckDB's own error of any other statement.
        """
        for _ in self.run(text, parameters=parameters):
            pass
        return self

    def run(self, text: str, *, file: str | None = None, parameters: Any = None) -> Iterator[statements.Statement]:
        """Run a script statement by statement; after each, its result is ready to be fetched.

        Args:
            file: name of the script, for errors.
        """
        frame = callers_frame()
        settings = self.session.duckdb_settings
        chunks = script.split(text, file, duckdb_settings=settings)
        for chunk in chunks:
            statement = parse(chunk, self.session.variables, duckdb_settings=settings)
            self._finish()
            self._stopped.clear()
            try:
                given = parameters if chunk is chunks[-1] else None
                if isinstance(statement, statements.Sql):
                    self._execute_sql(statement, given, frame)
                else:
                    work = functools.partial(actions.carry_out, statement, self, given, frame)
                    self._show(self._interruptible.run(work))
            except duckdb.Error as error:
                error.add_note(f"in the statement at {chunk.place}")
                raise
            yield statement

    def sql(self, text: str, params: Any = None) -> duckdb.DuckDBPyRelation | None:
        """Run a script and give its last result as a relation, or None when it has no rows.

        The rows are computed once, however often the relation is read.
        """
        for _ in self.run(text, parameters=params):
            pass
        return self.raw.from_arrow(self.arrow()) if self.has_rows else None

    query = sql

    def stream(self, text: str, parameters: Any = None) -> Stream:
        """Run a query whose one row and column is a model's answer, and give it piece by piece as it is written.

        Args:
            text: such as ``SELECT chat('…')``.
            parameters: values for its placeholders, as for DuckDB.

        Raises:
            UserError: stream_query, stream_rows: the query is another one.
            SqlextError, duckdb.Error: as `execute`; also while the pieces are read.
        """
        frame = callers_frame()
        self._finish()
        self._stopped.clear()
        query = streamable(text, self, frame)
        running = self._begin(text)
        self._result, self.has_rows = None, False

        def work() -> None:
            try:
                self._guarded(lambda: run_query(self, query, parameters, frame))
            finally:
                self._end_statement()

        self._stream = Stream(self, running, work)
        return self._stream

    def executemany(self, text: str, parameters: Sequence[Any]) -> Connection:
        """Run one statement for each set of parameters."""
        for values in parameters:
            self.execute(text, values)
        return self

    def cursor(self) -> Connection:
        """Another cursor of the same database and session, for another thread."""
        return Connection(self.raw.cursor(), self.session)

    def interrupt(self) -> None:
        """Stop what runs on this connection; may be called from any thread."""
        self._stopped.set()
        if self.running:
            self.running.cancel()
        self.raw.interrupt()

    def check_stopped(self) -> None:
        """For work of ours that takes long.

        Raises:
            Cancelled: `interrupt` was called since the statement began.
        """
        if self._stopped.is_set():
            raise Cancelled("The statement was cancelled.")

    def rollback(self) -> Connection:
        """Roll the transaction back, and with it macros that were made inside it: they are made again."""
        self.raw.rollback()
        self._functions_seen = 0
        return self

    def close(self, *, stop_jobs: bool = False) -> None:
        """Close this cursor; the connection that `connect` or `attach` made also ends the session.

        It waits for training jobs that would end with this process, because Ray was started here.

        Args:
            stop_jobs: cancel them instead.
        """
        if self not in _open:
            return
        try:
            if self._owns_session and self.session.own_jobs:
                self._end_jobs(stop_jobs)
        finally:
            self._close()

    def wait_at_exit(self) -> None:
        """At the end of Python, close before what was registered until now: before Ray is left."""
        atexit.unregister(_close_all)
        atexit.register(_close_all)

    def _end_jobs(self, stop: bool) -> None:
        from sqlext.progress import JobBar  # rich is not needed before

        self._finish()
        self._stopped.clear()
        try:
            with JobBar() as bar:
                self.session.on_job = bar.show
                jobs.stop(self) if stop else jobs.finish(self)
        except SqlextError as error:
            self.session.notify(f"A training job has failed: {error}")

    def _close(self) -> None:
        _open.discard(self)
        self._finish()
        self._interruptible.close()
        if self._owns_session:
            self.session.close()
        self._result = None
        self._own_results.close()
        if self._owns_raw:
            self.raw.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | Cancelled)
        if kind and not stopped and self.session.own_jobs:
            self.session.notify("An error has ended the script; its training goes on until it is over or Ctrl-C.")
        self.close(stop_jobs=stopped)

    # -- results -------------------------------------------------------------------------------------------

    @property
    def description(self) -> Any:
        """Columns of the last result, as DB-API says; None when there is none."""
        return self._result.description if self._result is not None else None

    def arrow(self) -> pa.Table:
        """The last result as an Arrow table."""
        with warnings.catch_warnings():
            # DuckDB suggests a relation instead, which would run the query again each time it is read.
            warnings.filterwarnings("ignore", message="Arrow output on a DB-API result", category=UserWarning)
            table: pa.Table = self._read("to_arrow_table")
        return table

    fetch_arrow_table = to_arrow_table = arrow

    def __getattr__(self, name: str) -> Any:
        if name in _PART_READERS or name in _WHOLE_READERS:
            return functools.partial(self._read, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.raw, name)

    def _read(self, name: str, *arguments: Any, **named: Any) -> Any:
        if self._result is None:
            raise duckdb.InvalidInputException("There is no result: the last statement answers with none.")
        reader = getattr(self._result, name)
        rows = self._guarded(lambda: reader(*arguments, **named))
        if name in _WHOLE_READERS or (name in ("fetchone", "fetchmany") and not rows):
            self._finish()
        return rows

    def _show(self, table: pa.Table | None) -> None:
        self.has_rows = table is not None
        if table is None:
            self._result = None
            return
        # On a cursor of its own: an unread result would keep `raw` busy.
        self._own_results.execute("SELECT 1").fetchall()
        self._own_results.register(_OWN_RESULT, table)
        self._result = self._own_results.execute(f"FROM {_OWN_RESULT}")

    # -- DuckDB's statements -------------------------------------------------------------------------------

    def _execute_sql(self, statement: statements.Sql, parameters: Any, frame: FrameType | None) -> None:
        text = from_spark(statement.text, statement.place) if self.session.dialect == "spark" else statement.text
        query, name = self._named_results.take(text, self.parses)
        self._begin(text)
        self._result = self.raw
        try:
            self._named_results.run(
                lambda: self._run_query(query, parameters, frame),
                self._make_named,
            )
            if name:
                sources.put_staged(self._execute_guarded, name)
                self.raw.execute(f"FROM {quote(name)}")
        except BaseException:
            self._finish()
            raise
        streams = bool(name) or self._answers_with_rows(query)
        names = [column[0] for column in self.raw.description or ()]
        self.has_rows = streams or names not in ([], ["Count"], ["Success"])
        if not streams:
            self._finish()
        if text.lower().startswith(("rollback", "abort")):  # with it went macros made inside the transaction
            self._functions_seen = 0

    @contextmanager
    def own_sql(self, text: str = "") -> Iterator[Callable[[str], Any]]:
        """For statements of ours that run SQL: gives an `execute` under which all holds that holds for queries."""
        self._begin(text)
        try:
            yield self._execute_guarded
        finally:
            self._finish()

    def count_calls(
        self, text: str, parameters: Any, frame: FrameType | None
    ) -> tuple[RunningStatement, countable.Countable]:
        """Run the query inside `text` to count its model calls: no model is called, its rows are dropped.

        Raises:
            UserError: the statement holds no query that can be run for this.
            duckdb.Error: DuckDB's own error of the query.
        """
        running = self._begin(text)
        try:
            return running, self._runs.count(running, text, parameters, frame)
        finally:
            self._finish()

    def _execute_guarded(self, text: str) -> Any:
        return self._named_results.run(lambda: self._run_query(text), self._make_named)

    def _make_named(self, name: str, query: str) -> None:
        sources.put_table(self._execute_guarded, name, query)

    def _run_query(self, query: str, parameters: Any = None, frame: FrameType | None = None) -> Any:
        assert self.running is not None
        return self._runs.execute(self.running, query, parameters, frame)

    def _begin(self, text: str = "") -> RunningStatement:
        """Before a statement: this cursor's macros are those of the session, and chunks will find the statement."""
        self.running = running = self.session.new_statement(text)
        key = self.session.statements.add(running)
        with suppress(duckdb.TransactionException):  # in an aborted transaction only ROLLBACK is of use
            self._functions_seen = self.session.functions.catch_up(self.raw, self._functions_seen)
            self.raw.execute(f"SET VARIABLE {VARIABLE} = '{key}'")
        return running

    def _finish(self) -> None:
        """What ran before is over: its stream, if it was one, and the statement."""
        stream, self._stream = self._stream, None
        if stream:
            stream.close()
        self._end_statement()

    def _end_statement(self) -> None:
        """The statement has ended: keep its figures and tell what went wrong in it."""
        running, self.running = self.running, None
        if running is None:
            return
        self.session.ended(running)
        for notice in notices.of(running, self.session.functions.gateways()):
            self.session.notify(notice)

    def parses(self, text: str) -> bool:
        """Whether DuckDB can read a text."""
        try:
            self.raw.extract_statements(text)
        except duckdb.Error:
            return False
        return True

    def _answers_with_rows(self, text: str) -> bool:
        """Whether rows come while they are read; other statements are done when `execute` returns."""
        expected = self.raw.extract_statements(text)[-1].expected_result_type
        return list(expected) == [duckdb.ExpectedResultType.QUERY_RESULT]

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Run `work` on DuckDB so that Ctrl-C stops it, and give the cause of a failure instead of DuckDB's text."""
        running = self.running
        try:
            return self._interruptible.run(work)
        except duckdb.Error:
            if running and running.failure:
                raise running.failure from None
            if running and running.cancelled:
                raise Cancelled("The statement was cancelled.") from None
            raise
