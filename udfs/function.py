"""A model function: the DuckDB side of one deployed model.

It turns a chunk of columns into one question to the gateway and the outcomes into a column of the function's type.
The gateway behind it can be exchanged while queries run, which is how a redeployed model takes over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias

import pyarrow as pa

from runtime.errors import ErrorInfo, Fatal, RowError, SqlextError
from runtime.gateway import Gateway, GatewayClosed, Outcome, Statement
from runtime.spec import CallOptions, Prompt
from udfs import arguments
from udfs.context import StatementTable
from udfs.requests import Request, response
from udfs.signatures import output_column, row_column

_Columns: TypeAlias = tuple[pa.ChunkedArray, ...]
EMPTY = Outcome(None)  # of a NULL row: neither asked nor failed


class ModelFunction:
    """The functions `name` and `name_row` of one model.

    Args:
        name: for errors, when there is no model.
        statements: finds the statement that a chunk belongs to.

    Attributes:
        gateway: where its questions go; assign to exchange it, None when there is no model.
    """

    def __init__(self, name: str, statements: StatementTable) -> None:
        self.gateway: Gateway | None = None
        self._name = name
        self._statements = statements

    def value(self, *columns: pa.ChunkedArray) -> pa.Array:
        """The answers as the function's type; failed rows as the statement's `on_error` says."""
        return self._noting(columns, self._value)

    def plain(self, prompts: pa.ChunkedArray) -> pa.Array:
        """The answers to texts alone, with the model's defaults."""
        nothing = pa.chunked_array([pa.nulls(len(prompts), pa.string())])
        return self.value(nothing, prompts, nothing, nothing, nothing)

    def row(self, *columns: pa.ChunkedArray) -> pa.Array:
        """The answers as STRUCTs that show output, error, tokens and time; never fails a query for a row."""
        return self._noting(columns, self._row)

    def _noting(self, columns: _Columns, answer: Callable[[Statement, _Columns], pa.Array]) -> pa.Array:
        """DuckDB keeps only the text of an exception: leave the error on the statement, whose other threads stop."""
        statement = self._statements.find(_first(columns[0]))
        try:
            return answer(statement, columns)
        except SqlextError as error:
            statement.fail(error)
            raise

    def _value(self, statement: Statement, columns: _Columns) -> pa.Array:
        chunk = _Chunk(columns)
        gateway, outcomes, _ = self._ask(chunk, statement)
        for index, outcome in enumerate(outcomes):
            if outcome.error:
                _treat_failure(gateway.name, chunk.texts[index] or "", outcome.error, statement)
        return output_column(gateway.info, [chunk.shown(index, outcome) for index, outcome in enumerate(outcomes)])

    def _row(self, statement: Statement, columns: _Columns) -> pa.Array:
        chunk = _Chunk(columns)
        gateway, outcomes, reused = self._ask(chunk, statement)
        shown = [chunk.shown(index, outcome) for index, outcome in enumerate(outcomes)]
        asked = [text is not None for text in chunk.texts]
        return row_column(gateway.info, gateway.name, shown, outcomes, reused, asked)

    def _ask(self, chunk: _Chunk, statement: Statement) -> tuple[Gateway, list[Outcome], list[bool]]:
        while True:
            gateway = self.gateway
            if gateway is None:
                raise Fatal(
                    f'There is no model behind "{self._name}" any more.',
                    code="model_removed",
                    hint="It was removed, or deployed anew as another kind of model.",
                )
            try:
                return gateway, *chunk.ask(gateway, statement)
            except GatewayClosed:
                if self.gateway is gateway:
                    self.gateway = None


class _Chunk:
    """The columns of one call: (statement, prompt, what the prompt is, options, draw)."""

    def __init__(self, columns: _Columns) -> None:
        _, prompts, kinds, options, _ = columns
        self.texts: list[str | None] = prompts.to_pylist()
        self._kind = _first(kinds) or arguments.TEXT
        self._options = options.to_pylist()
        self._requests: dict[int, Request] = {}
        if self._kind == arguments.REQUEST:
            self.texts = [arguments.request_text(text) for text in self.texts]

    def ask(self, gateway: Gateway, statement: Statement) -> tuple[list[Outcome], list[bool]]:
        """Ask for every row that is not NULL, all at once."""
        outcomes = [EMPTY] * len(self.texts)
        reused = [False] * len(self.texts)
        groups: dict[CallOptions, tuple[list[int], list[Prompt]]] = {}
        for index, text in enumerate(self.texts):
            if text is None:
                continue
            try:
                prompt, options = self._question(index, text, gateway.info.chat_template)
            except RowError as error:
                outcomes[index] = Outcome(None, error.info)
                statement.add(gateway.name, rows=1, errors=1)
                continue
            rows, prompts = groups.setdefault(options, ([], []))
            rows.append(index)
            prompts.append(prompt)
        answers = gateway.ask_all([(options, prompts) for options, (_, prompts) in groups.items()], statement)
        for asked, (rows, _) in zip(answers, groups.values(), strict=True):
            for index, outcome, was_reused in zip(rows, asked.outcomes, asked.reused, strict=True):
                outcomes[index] = outcome
                reused[index] = was_reused
        return outcomes, reused

    def shown(self, index: int, outcome: Outcome) -> Any:
        """The output of a row; in Byzer's form when the row was a request for text."""
        if index in self._requests and isinstance(outcome.output, str):
            return response(outcome, self._requests[index])
        return outcome.output

    def _question(self, index: int, text: str, chat_template: bool) -> tuple[Prompt, CallOptions]:
        options = arguments.to_options(self._options[index])
        if self._kind == arguments.MESSAGES:
            return arguments.to_messages(text), options
        if self._kind == arguments.REQUEST:
            request = self._requests[index] = Request.from_json(text)
            said = arguments.options_from(dict(request.options))
            return request.prompt(chat_template), options.over(said)
        return text, options


def _first(column: pa.ChunkedArray) -> str | None:
    value: str | None = column[0].as_py() if len(column) else None
    return value


def _treat_failure(model: str, text: str, error: ErrorInfo, statement: Statement) -> None:
    if statement.on_error == "fail":
        raise Fatal(
            f'A row failed in "{model}": {error.message}',
            code=error.code,
            hint='on_error is «fail»; with `!llm setup "on_error=record"` the row is listed and the rest goes on.',
        )
    if statement.on_error == "record":
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        statement.record(model, key, error)
