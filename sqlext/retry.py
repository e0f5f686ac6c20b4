"""`!llm retry`: the failed rows of a statement, asked again.

Alone because the statement itself is not run again: its calls are, through the models that are registered now. Their
answers are kept, so that the statement, run again by whoever wrote it, costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa

from runtime.errors import ErrorInfo, UserError
from runtime.gateway import FailedCall, Gateway, GatewayClosed, Group, Statement, error_of
from runtime.spec import CallOptions, Prompt

if TYPE_CHECKING:
    from sqlext.connection import Connection

_LIST = "SELECT * FROM llm_errors; lists what failed."


def ask_again(connection: Connection, number: str | None = None) -> pa.Table:
    """Ask the failed calls of an ended statement again, by default of the latest that has any; one row per model.

    Rows that are answered now leave `llm_errors`; those that fail again stay, with the new error.

    Raises:
        UserError: there is no such statement, nothing to ask again, nowhere to keep answers, or a model is gone.
        Cancelled: Ctrl-C; what was answered is kept.
        SqlextError: a model cannot go on, or a budget is used up; what was answered is kept.
    """
    session = connection.session
    if session.settings["cache"] != "on":
        raise UserError(
            f"With cache={session.settings['cache']} the answers would not be kept.",
            code="retry_not_kept",
            hint='Write !llm setup "cache=on"; before it, or run the statement again.',
        )
    running = session.statements.running()
    failed = _statement([each for each in session.known_statements() if each not in running], number)
    gateways = session.functions.gateways()
    calls = _calls(failed, gateways)
    rows = []
    with connection.own_sql("!llm retry"):
        begun = connection.running
        assert begun is not None  # by own_sql
        for model, asked in calls.items():
            errors = _asked_again(gateways[model], asked, begun)
            failed.retried(model, errors)
            wrong = sum(1 for error in errors.values() if error)
            rows.append((failed.id, model, len(errors), len(errors) - wrong, wrong))
    if any(answered for _, _, _, answered, _ in rows):
        session.notify(
            f"hint: run the statement {failed.id} again: it does not ask anew for what is answered now."
            if any(wrong for *_, wrong in rows)
            else f"hint: run the statement {failed.id} again: its answers are all stored."
        )
    names = ("statement", "model", "asked", "answered", "failed")
    return pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))


def _statement(ended: list[Statement], number: str | None) -> Statement:
    """The statement whose calls are to be asked again.

    Raises:
        UserError: there is none.
    """
    if number is None:
        failed = [each for each in ended if any(row.call for row in each.failed_rows)]
        if not failed:
            raise UserError("No statement has failed calls to ask again.", code="retry_nothing", hint=_LIST)
        return max(failed, key=lambda each: each.id)
    found = next((each for each in ended if str(each.id) == number.strip()), None)
    if found is None:
        raise UserError(
            f'No statement "{number[:40]}" that called a model has ended.', code="retry_unknown", hint=_LIST
        )
    if not any(row.call for row in found.failed_rows):
        raise UserError(
            f"The statement {found.id} has no failed calls to ask again.", code="retry_nothing", hint=_LIST
        )
    return found


def _calls(failed: Statement, gateways: dict[str, Gateway]) -> dict[str, list[FailedCall]]:
    """The distinct calls to ask again, by model; not sampled ones, whose answers serve one row only.

    Raises:
        UserError: a model is not there any more, or all calls are sampled.
    """
    by_model: dict[str, dict[FailedCall, None]] = defaultdict(dict)
    for row in failed.failed_rows:
        if row.call:
            by_model[row.model][row.call] = None
    if gone := sorted(by_model.keys() - gateways.keys()):
        raise UserError(
            f'The model "{gone[0]}" is not registered any more.',
            code="model_removed",
            hint='Deploy it again with `RUN command AS LLM.` WHERE action="infer" …`.',
        )
    kept = {
        model: [call for call in calls if call.options.over(gateways[model].pool.spec.defaults).deterministic]
        for model, calls in by_model.items()
    }
    if not any(kept.values()):
        raise UserError(
            f"The failed calls of statement {failed.id} are sampled, and no answer of theirs can be kept.",
            code="retry_not_kept",
            hint="Run the statement again, with seed := … or temperature := 0 when answers are to be kept.",
        )
    return {model: calls for model, calls in kept.items() if calls}


def _asked_again(
    gateway: Gateway, calls: Iterable[FailedCall], statement: Statement
) -> dict[FailedCall, ErrorInfo | None]:
    """What became of each call: its error, or None when it was answered.

    Raises:
        UserError: the model was exchanged meanwhile.
    """
    groups: dict[CallOptions, list[Prompt]] = defaultdict(list)
    for call in calls:
        groups[call.options].append(call.prompt)
    asked = [Group(options, prompts) for options, prompts in groups.items()]
    try:
        outcomes = gateway.ask_all(asked, statement)
    except GatewayClosed:
        raise UserError(
            f'The model "{gateway.name}" was removed or deployed anew meanwhile.',
            code="model_changed",
            hint="When it is there, write !llm retry; again.",
        ) from None
    return {
        FailedCall(group.options, prompt): outcome and error_of(outcome)
        for group, found in zip(asked, outcomes, strict=True)
        for prompt, outcome in zip(group.prompts, found, strict=True)
    }
