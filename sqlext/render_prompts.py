"""`action="render"`: what the rows of a table, or a literal conversation, become for one or more checkpoints."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime.errors import ErrorInfo, RowError, UserError
from runtime.prompts.preview import Preview, writer
from runtime.prompts.template import read_template
from runtime.spec import Prompt
from runtime.training.rows import Form, find_form, read_turns
from sqlext.options import Resolved
from sqlext.statements import Run
from udfs.signatures import quote

if TYPE_CHECKING:
    from sqlext.connection import Connection

SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "row": pa.int64(),
        "text": pa.string(),
        "tokens": pa.int64(),
        "undeclared": pa.list_(pa.string()),
        "error": pa.string(),
    }
)


ROWS_AT_ONCE = 2048
_EXAMPLE = """messages='[{"role": "user", "content": "Hi"}]'"""


def render(run: Run, said: Resolved, connection: Connection) -> pa.Table:
    """One row for each checkpoint and row of the table: its text, its tokens, or why there is none.

    Raises:
        UserError: no checkpoint or nothing to render is named, a checkpoint has no tokenizer, the table has none of
            the known forms, or the format or the template is wrong.
    """
    paths = _paths(run, said.values)
    prompts = list(_prompts(run, said.values, connection))
    how = {
        "prompt_format": str(said.values.get("prompt_format") or ""),
        "chat_template": read_template(str(said.values["chat_template"])) if "chat_template" in said.values else "",
    }
    to_answer = bool(said.values.get("add_generation_prompt", True))
    rows: list[dict[str, Any]] = []
    for path in paths:
        connection.check_stopped()
        made = writer(path, **how)
        for number, preview in enumerate(made.previews(prompts, add_generation_prompt=to_answer), 1):
            rows.append({"path": path, "row": number, "undeclared": made.undeclared, **_cells(preview)})
    return pa.Table.from_pylist(rows, SCHEMA)


def _cells(preview: Preview) -> dict[str, Any]:
    return {"text": preview.text, "tokens": preview.tokens, "error": str(preview.error) if preview.error else None}


def _paths(run: Run, values: Mapping[str, Any]) -> list[str]:
    paths = [path for path in (run.path, values.get("localModelDir"), *values.get("paths", ())) if path]
    if not paths:
        raise UserError(
            "The statement names no checkpoint.",
            code="checkpoint_missing",
            hint='Write the path between the backquotes: LLM.`/path`, or several in paths="/a,/b".',
        )
    return list(dict.fromkeys(map(str, paths)))


def _prompts(run: Run, values: Mapping[str, Any], connection: Connection) -> Iterator[Prompt | ErrorInfo]:
    table = str(values.get("inputTable") or ("" if run.input_table.lower() == "command" else run.input_table))
    literal = values.get("messages")
    if bool(table) == bool(literal):
        raise UserError(
            "The statement gives both a table and messages." if table else "The statement gives nothing to render.",
            code="input_table",
            hint=f"Write RUN mytable AS LLM.…, or RUN command AS LLM.… AND {_EXAMPLE}.",
        )
    if literal:
        yield _literal(str(literal))
        return
    source = f"FROM {'.'.join(quote(part) for part in table.split('.'))}"
    with connection.own_sql() as execute:
        columns = [column[0] for column in execute(f"{source} LIMIT 0").description]
        prompt = _prompt_column(columns)
        form = None if prompt else find_form(columns)
        read = (
            list(dict.fromkeys(form.columns.values())) if form else [str(prompt)]
        )  # a table has others, and large ones
        found = execute(f"SELECT {', '.join(map(quote, read))} {source}")
        while rows := found.fetchmany(ROWS_AT_ONCE):
            connection.check_stopped()
            for values_of_row in rows:
                row = dict(zip(read, values_of_row, strict=True))
                yield _read(form or _form_of_prompt(row), row)


def _literal(messages: str) -> Prompt:
    """A conversation as it stands in the statement, where `\\n` in quotes has become a line break already."""
    try:
        said = _read(Form("messages", {"messages": "messages"}), {"messages": json.loads(messages, strict=False)})
    except (ValueError, RecursionError):
        said = ErrorInfo("option_value", "messages is no JSON.")
    if not isinstance(said, ErrorInfo):
        return said
    raise UserError(said.message, code="option_value", hint=said.hint or f"Write {_EXAMPLE}.")


def _prompt_column(columns: Collection[str]) -> str | None:
    return next((column for column in columns if column.lower() == "prompt"), None)


def _form_of_prompt(row: Mapping[str, Any]) -> Form:
    """A prompt is a text, or a list of messages as the functions of a deployed model take it."""
    column = str(_prompt_column(row.keys()))
    is_list = isinstance(row[column], list)
    return Form("messages", {"messages": column}) if is_list else Form("text", {"text": column})


def _read(form: Form, row: Mapping[str, Any]) -> Prompt | ErrorInfo:
    try:
        return read_turns(form, row)
    except RowError as error:
        return error.info
