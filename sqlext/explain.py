"""`EXPLAIN LLM query`: what a query would ask of models, and what that would take; no model is called.

Alone because it estimates: rows, distinct calls and prompt tokens are counted exactly by running the query without
answers, what the answers will be is taken from earlier calls of the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from runtime.gateway import Budgets, Explained, Gateway
from runtime.gateway.store import Measured
from runtime.spec import Task
from sqlext.dialects import from_spark
from sqlext.parser import trailing_name
from sqlext.statements import ExplainLlm

if TYPE_CHECKING:
    from sqlext.connection import Connection
    from udfs.register import FunctionCatalog

_TEXT, _INT = pa.string(), pa.int64()
_EXPLAINED = pa.schema(
    {
        "model": _TEXT,
        "rows": _INT,
        "distinct": _INT,
        "stored": _INT,
        "calls": _INT,
        "prompt_tokens": _INT,
        "output_tokens": _INT,
        "seconds": pa.float64(),
        "budget": _TEXT,
        "notes": _TEXT,
    }
)
_DEPENDS = "answers that are not known yet may decide about more calls"
_STOPS = "at most: a LIMIT may be reached earlier"


def explained(
    statement: ExplainLlm, connection: Connection, parameters: Any = None, frame: FrameType | None = None
) -> pa.Table:
    """One row for each model that the query calls; none when it calls no model.

    Args:
        parameters: values for the query's placeholders.
        frame: where DuckDB looks for variables that hold data frames.

    Raises:
        UserError: the statement cannot be run just to be counted.
        duckdb.Error: DuckDB's own error of the query.
    """
    session = connection.session
    text = from_spark(statement.query, statement.place) if session.dialect == "spark" else statement.query
    counted, query = connection.count_calls(_without_name(text, connection), parameters, frame)
    models = session.functions.gateways()
    called = dict.fromkeys(sorted(_models(query.names, session.functions))) | dict.fromkeys(counted.explained)
    found = {model: counted.explained.get(model, Explained()) for model in called if model in models}
    if not found:
        session.notify("The query calls no model.")
    figures = [_figures(each, models[model], _measured(connection, models[model])) for model, each in found.items()]
    budget = _budget(counted.budgets, figures)
    unknown = any(each["calls"] for each in figures)
    notes = [note for note, holds in ((_DEPENDS, query.depends), (_STOPS, query.stops)) if holds and unknown]
    said = {"budget": budget, "notes": "; ".join(notes) or None}
    rows = [{"model": model, **each, **said} for model, each in zip(found, figures, strict=True)]
    return pa.Table.from_pylist(rows, _EXPLAINED)


def _without_name(text: str, connection: Connection) -> str:
    """The query without Byzer's trailing ` AS name`, where DuckDB cannot mean anything by it."""
    tail = trailing_name(text)
    return tail[0] if tail and not connection.parses(text) else text


def _models(names: Iterable[str], functions: FunctionCatalog) -> set[str]:
    return {model for name in names if (model := functions.model_of(name))}


def _measured(connection: Connection, gateway: Gateway) -> Measured | None:
    """What calls to this very model took so far; None when there were none."""
    fingerprint = gateway.pool.spec.fingerprint
    store = connection.session.stored() if fingerprint else None
    found = store.measured(fingerprint) if store else None
    return found if found and found.calls else None


def _figures(explained: Explained, gateway: Gateway, measured: Measured | None) -> dict[str, Any]:
    calls = explained.calls
    generates = gateway.info.task is Task.GENERATE and calls > 0
    most = explained.max_answer_tokens if generates else 0
    output: int | None = 0
    if generates:
        output = round(measured.completion_tokens * calls / measured.calls) if measured else None
    seconds: float | None = 0.0
    if calls:
        seconds = measured.seconds * calls / measured.calls if measured else None
    return {
        "rows": explained.rows,
        "distinct": explained.distinct,
        "stored": explained.stored,
        "calls": calls,
        "prompt_tokens": explained.prompt_tokens,
        "output_tokens": output if output is None or most is None else min(output, most),
        "most_output_tokens": most,
        "seconds": None if seconds is None else float(f"{seconds:.3g}"),
    }


def _budget(budgets: Budgets, figures: Sequence[dict[str, Any]]) -> str:
    """'within', the setting that would be exceeded, or 'unknown'; answers count as estimated, or at their longest."""
    answers = [
        each["most_output_tokens"] if each["output_tokens"] is None else each["output_tokens"] for each in figures
    ]
    tokens = [each["prompt_tokens"] for each in figures] + answers
    exceeded = budgets.exceeded_by(sum(each["calls"] for each in figures), sum(known or 0 for known in tokens))
    return exceeded or ("unknown" if budgets.counts_tokens and None in tokens else "within")
