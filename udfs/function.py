"""A model function: the DuckDB side of one deployed model.

It turns a chunk of columns into one question to the gateway and the outcomes into a column of the function's type.
The gateway behind it can be exchanged while queries run, which is how a redeployed model takes over.
"""

from __future__ import annotations

import hashlib
import json
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
from runtime.schema import is_text
from runtime.spec import Prompt
from udfs import arguments, meta
from udfs.arguments import Said
from udfs.context import StatementTable
from udfs.media import PIECE_BYTES, Media, from_base64, media_bytes
from udfs.requests import Request, response
from udfs.signatures import images_column, output_column, row_column

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

    def plain_pair(self, queries: pa.ChunkedArray, texts: pa.ChunkedArray) -> pa.Array:
        """As `plain`, for queries and texts."""
        nothing = pa.chunked_array([pa.nulls(len(texts), pa.string())])
        both = zip(queries.to_pylist(), texts.to_pylist(), strict=True)
        pairs = pa.chunked_array([[None if None in pair else json.dumps(pair) for pair in both]], pa.string())
        kinds = pa.chunked_array([pa.array([arguments.PAIR] * len(texts), pa.string())])
        return self.value(nothing, pairs, kinds, nothing, nothing)

    def plain_media(self, contents: pa.ChunkedArray) -> pa.Array:
        """As `plain`, for recordings."""
        nothing = pa.chunked_array([pa.nulls(len(contents), pa.string())])
        lists = [None if content is None else [content] for content in contents.to_pylist()]
        texts, types = (pa.chunked_array([pa.array([word] * len(lists), pa.string())]) for word in ("", "BLOB"))
        given = pa.chunked_array([pa.array(lists, pa.list_(pa.binary()))])
        return self.value(nothing, texts, nothing, nothing, nothing, given, types)

    def several(self, *columns: pa.ChunkedArray) -> pa.Array:
        """As `value` for calls that answer with several images: lists of them."""
        return self._noting(columns, self._several)

    def row(self, *columns: pa.ChunkedArray) -> pa.Array:
        """The answers as STRUCTs that show output, error, tokens and time; never fails a query for a row."""
        return self._noting(columns, self._row)

    def json(self, *columns: pa.ChunkedArray) -> pa.Array:
        """As `value` for answers with a schema: the JSON that `from_json` makes a value of."""
        return self._noting(columns, self._json)

    def _noting(self, columns: _Columns, answer: Callable[[Statement, _Columns], pa.Array]) -> pa.Array:
        """DuckDB keeps only the text of an exception: leave the error on the statement, whose other threads stop."""
        statement = self._statements.find(_first(columns[0]))
        try:
            return answer(statement, columns)
        except SqlextError as error:
            statement.fail(error)
            raise

    def _value(self, statement: Statement, columns: _Columns) -> pa.Array:
        gateway, chunk, outcomes = self._answered(statement, columns)
        return output_column(gateway.info, chunk.shown(outcomes, gateway))

    def _json(self, statement: Statement, columns: _Columns) -> pa.Array:
        gateway, _, outcomes = self._answered(statement, columns)
        return output_column(gateway.info, [outcome[0] if outcome else None for outcome in outcomes])

    def _several(self, statement: Statement, columns: _Columns) -> pa.Array:
        _, _, outcomes = self._answered(statement, columns)
        return images_column([outcome[0] if outcome else None for outcome in outcomes])

    def _answered(self, statement: Statement, columns: _Columns) -> tuple[Gateway, _Chunk, Asked]:
        """The outcomes, those of failed rows treated as the statement's `on_error` says."""
        chunk = _Chunk(columns, strict=True)
        gateway, outcomes = self._ask(chunk, statement)
        if statement.mode is Mode.REAL:
            for index, outcome in enumerate(outcomes):
                if outcome and (error := error_of(outcome)):
                    _treat_failure(gateway, chunk, index, error, statement)
        return gateway, chunk, outcomes

    def _row(self, statement: Statement, columns: _Columns) -> pa.Array:
        chunk = _Chunk(columns)
        gateway, outcomes = self._ask(chunk, statement)
        return row_column(gateway.info, gateway.name, chunk.shown(outcomes, gateway), outcomes, statement.id)

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
    """The columns of one call: (statement, prompt, what the prompt is, options, draw), and media where there are any.

    `strict`: where the statement's on_error is «fail», a row's failure ends it.
    """

    def __init__(self, columns: _Columns, *, strict: bool = False) -> None:
        self._strict = strict
        _, prompts, kinds, options, _, *media = columns
        self.texts: list[str | None] = prompts.to_pylist()
        self._media = Media.read(media)
        self._kind = _first(kinds) or arguments.TEXT
        self._options: list[str | None] = options.to_pylist() if options.null_count < len(options) else []
        self._requests: dict[int, Request] = {}
        self._schemas: dict[int, str] = {}  # by row, where a call says one
        if self._kind == arguments.REQUEST:
            self.texts = [arguments.request_text(text) for text in self.texts]
        if self._media:
            nulls = map(self._media.is_null, range(len(self.texts)))
            self.texts = [None if null else text for text, null in zip(self.texts, nulls, strict=True)]

    def ask(self, gateway: Gateway, statement: Statement) -> Asked:
        """Ask for every row that is not NULL, all at once; those with media in pieces that fit into memory."""
        if self._media:
            if statement.mode is Mode.AHEAD:  # their contents would wait in memory
                return [None] * len(self.texts)
            return self._ask_row_by_row(gateway, statement)
        if self._kind == arguments.TEXT and None not in self.texts and len(set(self._options)) <= 1:
            said = arguments.to_said(self._options[0] if self._options else None)
            texts = cast(list[Prompt], self.texts)
            if said.options.schema:
                self._schemas = dict.fromkeys(range(len(texts)), said.options.schema)
            return gateway.ask_all([Group(said.options, texts, said.cache, self._strict)], statement)[0]
        return self._ask_row_by_row(gateway, statement)

    def question(self, index: int, chat_template: bool) -> tuple[Prompt, Said]:
        """What row `index` asks; it is not NULL.

        Raises:
            RowError: it cannot be asked.
        """
        text = cast(str, self.texts[index])
        said = arguments.to_said(self._options[index] if self._options else None)
        media = self._media.contents(index) if self._media else ()
        prompt: Prompt = text
        if self._kind == arguments.MESSAGES:
            prompt = arguments.to_messages(text)
        elif self._kind == arguments.PAIR:
            prompt = arguments.to_pair(text)
        elif self._kind == arguments.REQUEST:
            request = self._requests[index] = Request.from_json(text)
            said = Said(said.options.over(arguments.options_from(dict(request.options))), said.cache)
            prompt = request.prompt(chat_template)
            media = media or ((from_base64(request.image),) if request.image else ())
        return arguments.with_media(prompt, media), said

    def digest(self, index: int) -> str:
        """A hash of what was written for row `index`."""
        made = hashlib.sha256((self.texts[index] or "").encode("utf-8", "surrogatepass"))
        for each in self._media.given(index) if self._media else ():
            made.update(each)
        return made.hexdigest()[:16]

    def failed_call(self, index: int, chat_template: bool) -> FailedCall | None:
        """What to ask again for a row that failed; None when it cannot be asked, or its answer would not be kept.

        None for rows with media too, whose contents would stay in memory.
        """
        if self._media:
            return None
        try:
            prompt, said = self.question(index, chat_template)
        except RowError:
            return None
        return FailedCall(said.options, prompt) if said.cache in (None, "on") else None

    def shown(self, outcomes: Asked, gateway: Gateway) -> list[Any]:
        """The outputs; texts without the quotes of JSON, and in Byzer's form where the row was a request for text."""
        outputs = [outcome[0] if outcome else None for outcome in outcomes]
        default = gateway.pool.spec.defaults.schema
        for index in range(len(outputs)) if default else self._schemas:
            schema = self._schemas.get(index) or cast(str, default)
            if isinstance(outputs[index], str) and is_text(schema):
                outputs[index] = json.loads(cast(str, outputs[index]))
        for index, request in self._requests.items():
            if isinstance(outputs[index], str):
                outcome = Outcome._make(cast(PlainOutcome, outcomes[index]))
                outputs[index] = response(outcome._replace(output=outputs[index]), request)
        return outputs

    def _ask_row_by_row(self, gateway: Gateway, statement: Statement) -> Asked:
        outcomes: Asked = [None] * len(self.texts)
        groups: dict[Said, tuple[list[int], list[Prompt]]] = {}
        held = 0
        for index, text in enumerate(self.texts):
            if text is None:
                continue
            if self._kind == arguments.REQUEST and meta.asked_for(text):
                self._requests[index] = Request("")
                outcomes[index] = Outcome(json.dumps(meta.meta(gateway)))
                continue
            try:
                prompt, said = self.question(index, gateway.info.chat_template)
            except RowError as error:
                outcomes[index] = Outcome(None, error=error.info)
                if statement.mode is Mode.REAL:
                    statement.add(gateway.name, rows=1, refused=1, errors=1)
                continue
            if said.options.schema:
                self._schemas[index] = said.options.schema
            rows, prompts = groups.setdefault(said, ([], []))
            rows.append(index)
            prompts.append(prompt)
            held += media_bytes(prompt)
            if held > PIECE_BYTES:
                self._ask_groups(gateway, statement, groups, outcomes)
                groups, held = {}, 0
        self._ask_groups(gateway, statement, groups, outcomes)
        return outcomes

    def _ask_groups(
        self,
        gateway: Gateway,
        statement: Statement,
        groups: dict[Said, tuple[list[int], list[Prompt]]],
        outcomes: Asked,
    ) -> None:
        """Ask for rows that are grouped by what their options say, and put in their outcomes."""
        asked = gateway.ask_all(
            [Group(said.options, prompts, said.cache, self._strict) for said, (_, prompts) in groups.items()],
            statement,
        )
        for found, (rows, _) in zip(asked, groups.values(), strict=True):
            for index, outcome in zip(rows, found, strict=True):
                outcomes[index] = outcome


def _first(column: pa.ChunkedArray) -> str | None:
    value: str | None = column[0].as_py() if len(column) else None
    return value


def _treat_failure(gateway: Gateway, chunk: _Chunk, index: int, error: ErrorInfo, statement: Statement) -> None:
    if statement.on_error == "fail" or statement.listener:
        raise row_failure(gateway.name, error, followed=statement.listener is not None)
    if statement.on_error == "record":
        statement.record(
            gateway.name, chunk.digest(index), error, chunk.failed_call(index, gateway.info.chat_template)
        )
