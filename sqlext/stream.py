"""`con.stream`: one answer, piece by piece, while the model writes it.

Alone because it turns a query around: DuckDB waits inside the model function, on a thread of ours, while the caller
takes what comes. The query itself runs as any other does, through the same functions and the same gateway.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from runtime.errors import UserError
from runtime.gateway import Listener
from runtime.gateway import Statement as RunningStatement
from sqlext import script, statements
from sqlext.dialects import from_spark
from sqlext.interrupt import call_from
from sqlext.parser import parse
from sqlext.query_tree import Node, function_of, parsed, runner
from udfs.signatures import sql_type

if TYPE_CHECKING:
    from sqlext.connection import Connection

_Item: TypeAlias = "Piece | BaseException | None"
_END = None


class Piece(str):
    """The next part of an answer.

    Attributes:
        anew: the answer begins again with this piece, and what came before it does not count: the worker that wrote
            it was lost, and another one writes something else.
    """

    anew: bool

    def __new__(cls, text: str, anew: bool = False) -> Piece:
        """A piece with this text."""
        piece = super().__new__(cls, text)
        piece.anew = anew
        return piece


class Stream:
    """An iterator of the pieces of one answer; joined, they are the answer. Made by `Connection.stream`.

    Closing it before its end, or the connection's next statement, cancels the query. May be used with `with`.

    Attributes:
        statement: what the query used: `usage` has tokens and calls, once it is over.
    """

    def __init__(self, connection: Connection, statement: RunningStatement, work: Callable[[], object]) -> None:
        self.statement = statement
        self._connection = connection
        self._pieces: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._over = False
        statement.listener = Listener(lambda text, anew: self._pieces.put(Piece(text, anew)))
        self._thread = threading.Thread(target=_run, args=(work, self._pieces), name="sqlext-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        """The next piece; waits for it.

        Raises:
            SqlextError, duckdb.Error: as `Connection.execute`, after the pieces that came before. A row's own failure
                is raised too: there is no NULL that could stand for it.
        """
        if self._over:
            raise StopIteration
        try:
            item = self._pieces.get()
        except KeyboardInterrupt:
            self.close()
            raise
        if isinstance(item, Piece):
            return item
        self._end()
        if item is not _END:
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stop the query, unless it is over; returns when it has ended."""
        if not self._over:
            self._connection.interrupt()
            self._end()

    def _end(self) -> None:
        self._over = True
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(work: Callable[[], object], pieces: queue.SimpleQueue[_Item]) -> None:
    try:
        work()
        pieces.put(_END)
    except BaseException as error:
        pieces.put(error)


def streamable(text: str, connection: Connection, frame: FrameType | None) -> str:
    """The one query in `text`, ready for DuckDB.

    Raises:
        UserError: stream_query: it is not one query, or its one column is not the answer of a model that writes text.
        duckdb.Error: DuckDB cannot parse it.
    """
    session = connection.session
    chunks = script.split(text, duckdb_settings=session.duckdb_settings)
    said = [parse(chunk, session.variables, duckdb_settings=session.duckdb_settings) for chunk in chunks]
    if len(said) != 1 or not isinstance(said[0], statements.Sql):
        raise _refusal("it is not one query")
    query = from_spark(said[0].text, said[0].place) if session.dialect == "spark" else said[0].text
    if not connection.parses(query):
        connection.raw.extract_statements(query)  # raises DuckDB's own error
    tree = parsed(runner(connection.raw, frame), query)
    items = tree.get("select_list", []) if tree and tree.get("type") == "SELECT_NODE" else []
    name = _model_of(items[0]) if len(items) == 1 else ""
    gateway = session.functions.gateways().get(name)
    if gateway is None:
        raise _refusal("its one column is not the answer of a model")
    if sql_type(gateway.info) != "VARCHAR":
        raise _refusal(f"{name} writes no text")
    return query


def _model_of(item: Node) -> str:
    return function_of(item) if item.get("class") == "FUNCTION" else ""


def _refusal(why: str) -> UserError:
    return UserError(
        f"This cannot be followed while it is written: {why}.",
        code="stream_query",
        hint="Write con.stream(\"SELECT chat('…')\"): one query, whose one column is the call of a model.",
    )


def run_query(connection: Connection, query: str, parameters: Any, frame: FrameType | None) -> None:
    """Run the query for real on the connection.

    Raises:
        UserError: stream_rows, it has more than one row.
    """
    rows = call_from(frame, connection.raw.execute, query, parameters).fetchmany(2)
    if len(rows) > 1:
        raise UserError(
            "Only one answer can be followed while it is written, and this query has several rows.",
            code="stream_rows",
            hint="Ask for one row, for example with LIMIT 1; or run the query as usual.",
        )
