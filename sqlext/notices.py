"""What is worth saying when a statement has ended: rows that failed, answers that were cut.

Alone because it is told and not returned: a result never changes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runtime.gateway import Gateway, Statement
from runtime.spec import Task


def of(statement: Statement, models: Mapping[str, Gateway]) -> Iterator[str]:
    """The notices for a statement; `models` are those registered now, by name.

    Answers that end where the statement or the deployment said max_tokens are as they were asked for: no notice.
    """
    if statement.failed and statement.failed_rows:
        first = statement.failed_rows[0]
        again = " !llm retry; asks them again." if any(row.call for row in statement.failed_rows) else ""
        yield (
            f"{_counted(statement.failed, 'row')} failed, with NULL for an answer. "
            f"The first: {first.code}: {first.message}\n"
            f"hint: SELECT * FROM llm_errors; lists them.{again}"
        )
    for name, usage in statement.usage.items():
        if not usage.cut_unasked or name not in models:
            continue
        if models[name].info.task is Task.GENERATE:
            cut = _counted(usage.cut_unasked, "answer")
            yield f'{cut} of "{name}" cut off at the default length.\nhint: Say max_tokens := … for longer ones.'
        else:
            yield f'{_counted(usage.cut_unasked, "text")} longer than "{name}" reads; the rest was left out.'


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"
