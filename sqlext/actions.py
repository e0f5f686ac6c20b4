"""What our own statements do, one function each; the result is a table or None."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime import cluster, engines
from runtime.engines import choice
from runtime.errors import UserError, did_you_mean
from sqlext import cache, explain, jobs, models, options, repartition, retry, sources, tables
from sqlext.benchmark import benchmark
from sqlext.convert import convert, merge
from sqlext.deploy import infer
from sqlext.imports import import_checkpoints, imports
from sqlext.inspect import inspect
from sqlext.option_table import REPARTITION
from sqlext.render_prompts import render
from sqlext.statements import ExplainLlm, Llm, Load, Run, Save, Setup, SetVariable, Sql, Statement

if TYPE_CHECKING:
    from sqlext.connection import Connection

DIALECTS = ("duckdb", "spark")


def carry_out(
    statement: Statement, connection: Connection, parameters: Any = None, frame: FrameType | None = None
) -> pa.Table | None:
    """Do what a statement of ours says.

    Args:
        parameters: values for the placeholders of a query in it.
        frame: where DuckDB looks for variables that hold data frames.

    Raises:
        SqlextError: it cannot be done; nothing was changed.
    """
    try:
        if isinstance(statement, ExplainLlm):
            return explain.explained(statement, connection, parameters, frame)
        return _carried_out(statement, connection)
    except UserError as error:
        error.place = error.place or statement.place
        raise


def _carried_out(statement: Statement, connection: Connection) -> pa.Table | None:
    match statement:
        case SetVariable():
            _set_variable(statement, connection)
        case Load():
            sources.load(statement, connection)
        case Save():
            sources.save(statement, connection)
        case Setup():
            _setup(statement, connection)
        case Run():
            return _run(statement, connection)
        case Llm():
            return _llm(statement, connection)
        case ExplainLlm() | Sql():
            raise AssertionError("neither changes anything here")
    return None


def _set_variable(statement: SetVariable, connection: Connection) -> None:
    session = connection.session
    if statement.name.lower() == "dialect":
        set_dialect(connection, statement.value)
    elif statement.kind == "sql":
        with connection.own_sql() as execute:
            rows = execute(statement.value).fetchall()  # all: a result half read keeps the connection busy
        session.variables[statement.name] = str(rows[0][0]) if rows and rows[0][0] is not None else ""
    elif statement.kind == "text" or statement.name not in session.variables:
        session.variables[statement.name] = statement.value


def set_dialect(connection: Connection, word: str) -> None:
    """Choose the dialect of the SQL that follows.

    Raises:
        UserError: there is no such dialect.
    """
    if word.lower() not in DIALECTS:
        near = did_you_mean(word, DIALECTS)
        raise UserError(
            f'The dialect "{word}" is not known.',
            code="option_value",
            hint=f'Did you mean "{near}"?' if near else f"Known: {', '.join(DIALECTS)}.",
        )
    connection.session.dialect = word.lower()


def _setup(statement: Setup, connection: Connection) -> None:
    session = connection.session
    resolved = options.resolve(statement.settings, "setup")
    options.require_available(statement.settings, "setup")
    if (engine := str(resolved.values.get("infer_backend", choice.AUTO))) != choice.AUTO:
        engines.require(engine)
    base = options.defaults(statement.preset) if statement.preset else session.settings
    session.change_settings({**base, **resolved.values})
    for notice in resolved.notices:
        session.notify(notice)


def _run(statement: Run, connection: Connection) -> pa.Table:
    if statement.algorithm == REPARTITION:
        return repartition.repartition(statement, connection)
    action = next((str(o.value) for o in statement.options if o.key.lower() == "action"), options.DEFAULT_ACTION)
    known = options.action(action, statement)
    said = options.resolve(statement.options, known.name)  # a misspelt option is the likelier mistake
    carry = _ACTIONS.get(known.name)
    if carry is None:
        raise _not_available(f'The action "{known.name}"')
    options.require_available(statement.options, known.name)
    for notice in said.notices:
        connection.session.notify(notice)
    if known.name not in _TAKE_TABLES and statement.input_table.lower() != "command":
        raise UserError(
            f"{known.name} takes no table, and {statement.input_table} would not be read.",
            code="input_table",
            hint="Write RUN command AS LLM.",
        )
    table = carry(statement, said, connection)
    if statement.result:
        sources.keep(connection.raw, statement.result, table)
    return table


def _infer(statement: Run, said: options.Resolved, connection: Connection) -> pa.Table:
    def progress(event: cluster.DeployProgress) -> None:
        connection.check_stopped()
        connection.session.on_deploy(event)

    return infer(statement, said, connection.session, progress)


def _finetune(statement: Run, said: options.Resolved, connection: Connection) -> pa.Table:
    from sqlext.finetune import finetune  # with it come templates and jobs, which most sessions do not need

    return finetune(statement, said, connection)


_ACTIONS: dict[str, Callable[[Run, options.Resolved, Connection], pa.Table]] = {
    "infer": _infer,
    "finetune": _finetune,
    "convert": convert,
    "merge": merge,
    "benchmark": benchmark,
    "inspect": inspect,
    "render": render,
    "import": import_checkpoints,
}
"""What each action of ``RUN … AS LLM.`` does with its statement and its checked options."""

_TAKE_TABLES = ("finetune", "render", "benchmark")


def _llm(statement: Llm, connection: Connection) -> pa.Table:
    verb = _VERBS.get(statement.verb)
    if verb is None:
        raise _not_available(f"!llm {statement.verb}")
    return verb(connection, *statement.args)


def _usage(connection: Connection) -> pa.Table:
    return tables.calls(connection.session).drop_columns(["query", "cut"])  # `llm_calls` has them; a box is narrow


def _help(_: Connection, word: str | None = None) -> pa.Table:
    rows = options.help_rows(word)
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(options.HELP_COLUMNS)})


_VERBS: dict[str, Callable[..., pa.Table]] = {
    "models": models.models,
    "status": models.status,
    "model exists": models.exists,
    "model remove": models.remove,
    "jobs": jobs.jobs,
    "jobs remove": jobs.remove,
    "job": jobs.job,
    "logs": jobs.logs,
    "wait": jobs.wait,
    "cancel": jobs.cancel,
    "resume": jobs.resume,
    "usage": _usage,
    "retry": retry.ask_again,
    "cache": cache.cache,
    "cache clear": cache.clear,
    "cache prune": cache.prune,
    "imports": imports,
    "help": _help,
}


def _not_available(what: str) -> UserError:
    actions = " and ".join(action.name for action in options.ACTIONS if action.available)
    return UserError(
        f"{what} is not available in this version.",
        code="not_available",
        hint=f"Available: the action {actions}, and !llm setup, {', '.join(_VERBS)}.",
    )
