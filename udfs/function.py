"""A model function: the DuckDB side of one deployed model.

It turns a chunk of columns into one question to the gateway and the outcomes into a column of the function's type.
The gateway behind it can be exchanged while queries run, which is how a redeployed model takes over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import pyarrow as pa

from runtime.errors import ErrorInfo, Fatal, RowError, SqlextError
from runtime.gateway import (
    Asked,
    FailedCall,
    Gateway,
    GatewayClosed,
    Group,
    Mode,
    Outcome,
    PlainOutcome,
    Statement,
    error_of,
    row_failure,
)
from runtime.spec import Prompt
from udfs import arguments
from udfs.arguments import Said
from udfs.context import StatementTable
from udfs.requests import Request, response
from udfs.signatures import output_column, row_column

_Columns: TypeAlias = tuple[pa.ChunkedArray, ...]


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
        chunk = _Chunk(columns, strict=True)
        gateway, outcomes = self._ask(chunk, statement)
        if statement.mode is Mode.REAL:
            for index, outcome in enumerate(outcomes):
                if outcome and (error := error_of(outcome)):
                    _treat_failure(gateway, chunk, index, error, statement)
        return output_column(gateway.info, chunk.shown(outcomes))

    def _row(self, statement: Statement, columns: _Columns) -> pa.Array:
        chunk = _Chunk(columns)
        gateway, outcomes = self._ask(chunk, statement)
        return row_column(gateway.info, gateway.name, chunk.shown(outcomes), outcomes, statement.id)

    def _ask(self, chunk: _Chunk, statement: Statement) -> tuple[Gateway, Asked]:
        while True:
            gateway = self.gateway
            if gateway is None:
                raise Fatal(
                    f'There is no model behind "{self._name}" any more.',
                    code="model_removed",
                    hint="It was removed, or deployed anew as another kind of model.",
                )
            try:
                return gateway, chunk.ask(gateway, statement)
            except GatewayClosed:
                if self.gateway is gateway:
                    self.gateway = None


class _Chunk:
    """The columns of one call: (statement, prompt, what the prompt is, options, draw).

    `strict`: where the statement's on_error is «fail», a row's failure ends it.
    """

    def __init__(self, columns: _Columns, *, strict: bool = False) -> None:
        self._strict = strict
        _, prompts, kinds, options, _ = columns
        self.texts: list[str | None] = prompts.to_pylist()
        self._kind = _first(kinds) or arguments.TEXT
        self._options: list[str | None] = options.to_pylist() if options.null_count < len(options) else []
        self._requests: dict[int, Request] = {}
        if self._kind == arguments.REQUEST:
            self.texts = [arguments.request_text(text) for text in self.texts]

    def ask(self, gateway: Gateway, statement: Statement) -> Asked:
        """Ask for every row that is not NULL, all at once."""
        if self._kind == arguments.TEXT and None not in self.texts and len(set(self._options)) <= 1:
            said = arguments.to_said(self._options[0] if self._options else None)
            texts = cast(list[Prompt], self.texts)
            return gateway.ask_all([Group(said.options, texts, said.cache, self._strict)], statement)[0]
        return self._ask_row_by_row(gateway, statement)

    def question(self, index: int, chat_template: bool) -> tuple[Prompt, Said]:
        """What row `index` asks; it is not NULL.

        Raises:
            RowError: it cannot be asked.
        """
        text = cast(str, self.texts[index])
        said = arguments.to_said(self._options[index] if self._options else None)
        if self._kind == arguments.MESSAGES:
            return arguments.to_messages(text), said
        if self._kind == arguments.REQUEST:
            request = self._requests[index] = Request.from_json(text)
            asked = arguments.options_from(dict(request.options))
            return request.prompt(chat_template), Said(said.options.over(asked), said.cache)
        return text, said

    def failed_call(self, index: int, chat_template: bool) -> FailedCall | None:
        """What to ask again for a row that failed; None when it cannot be asked, or its answer would not be kept."""
        try:
            prompt, said = self.question(index, chat_template)
        except RowError:
            return None
        return FailedCall(said.options, prompt) if said.cache in (None, "on") else None

    def shown(self, outcomes: Asked) -> list[Any]:
        """The outputs; in Byzer's form where the row was a request for text."""
        outputs = [outcome[0] if outcome else None for outcome in outcomes]
        for index, request in self._requests.items():
            if isinstance(outputs[index], str):
                outputs[index] = response(Outcome._make(cast(PlainOutcome, outcomes[index])), request)
        return outputs

    def _ask_row_by_row(self, gateway: Gateway, statement: Statement) -> Asked:
        outcomes: Asked = [None] * len(self.texts)
        groups: dict[Said, tuple[list[int], list[Prompt]]] = {}
        for index, text in enumerate(self.texts):
            if text is None:
                continue
            try:
                prompt, said = self.question(index, gateway.info.chat_template)
            except RowError as error:
                outcomes[index] = Outcome(None, error=error.info)
                if statement.mode is Mode.REAL:
                    statement.add(gateway.name, rows=1, refused=1, errors=1)
                continue
            rows, prompts = groups.setdefault(said, ([], []))
            rows.append(index)
            prompts.append(prompt)
        asked = gateway.ask_all(
            [Group(said.options, prompts, said.cache, self._strict) for said, (_, prompts) in groups.items()],
            statement,
        )
        for found, (rows, _) in zip(asked, groups.values(), strict=True):
            for index, outcome in zip(rows, found, strict=True):
                outcomes[index] = outcome
        return outcomes


def _first(column: pa.ChunkedArray) -> str | None:
    value: str | None = column[0].as_py() if len(column) else None
    return value


def _treat_failure(gateway: Gateway, chunk: _Chunk, index: int, error: ErrorInfo, statement: Statement) -> None:
    if statement.on_error == "fail":
        raise row_failure(gateway.name, error)
    if statement.on_error == "record":
        key = hashlib.sha256((chunk.texts[index] or "").encode("utf-8", "surrogatepass")).hexdigest()[:16]
        statement.record(gateway.name, key, error, chunk.failed_call(index, gateway.info.chat_template))
