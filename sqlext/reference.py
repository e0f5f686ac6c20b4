"""The reference: REFERENCE.md, made from the option table.

It stands alone so that the page cannot say anything else than the program does: `python -m sqlext.reference` writes
it, `--check` tells whether it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sqlext.option_table import ACTIONS, PRESETS, REPARTITION, SETUP, TABLE
from sqlext.options import HELP_COLUMNS, help_rows

PAGE = Path(__file__).with_name("REFERENCE.md")

STATEMENTS = (
    ("!llm setup preset;", f"Reset the settings to the defaults of a kind of work: {', '.join(PRESETS)}."),
    ('!llm setup "key=value" …;', "Change settings for the RUNs that follow. `!byzerllm` is the same command."),
    ("!llm models; !llm status [name];", "Deployed models and how they run."),
    ("!llm model exists name; !llm model remove name;", "One row with a boolean; undeploy."),
    (
        "!llm jobs; !llm job id;",
        "Training jobs, and all that is known of one; `llm_jobs` and `llm_job_metrics` are tables.",
    ),
    (
        "!llm logs id [lines]; !llm wait id;",
        "The end of a job's log; wait until it is over. An id may be cut short, or the job's name.",
    ),
    (
        "!llm cancel id; !llm resume id;",
        "Stop a job after its next step, whose checkpoint is kept; let one go on from its last whole checkpoint.",
    ),
    ("!llm jobs remove id;", "Delete a job that is over, with its folder, checkpoints and model."),
    ("!llm usage;", "Calls, tokens and seconds of each model and statement; the table `llm_calls` adds the query."),
    (
        "!llm retry [statement];",
        "Ask the failed rows of a statement again, by default of the latest; `llm_errors` lists them.",
    ),
    ("!llm cache;", "What is stored of each model's answers; the table `llm_results` holds them."),
    (
        "!llm cache clear [name]; !llm cache prune age;",
        "Forget the stored answers of a model or of all; those older than 30m, 12h, 30d or 4w.",
    ),
    ("!llm imports [store];", "Models of the model store, and imports that have not ended well."),
    ("!llm help [word];", "These tables: all, of an action, or of an option."),
    (
        'RUN table AS LLM.`path` WHERE action="…" AND key="value" AS result;',
        "Do what the action says; `command` stands for no table. TRAIN and PREDICT mean the same.",
    ),
    (
        'RUN table AS TableRepartition.`` WHERE partitionNum="n" AS result;',
        "Deal a table's rows out in parts, one for each rank of a training with keepPartitionNum.",
    ),
    ('LOAD format.`path` WHERE key="value" AS table;', "Read files as a table."),
    (
        'SAVE mode table AS format.`path` WHERE key="value" PARTITION BY column;',
        "Write a table to files; mode is overwrite, append, errorIfExists or ignore.",
    ),
    (
        "SET name='value' WHERE type=\"text\";",
        "A variable, used as ${name}; type defaultParam sets only an unset one, sql runs the value as a query. "
        "A name that DuckDB has a setting for is DuckDB's.",
    ),
    (
        "EXPLAIN LLM query;",
        "What a query would ask of models: rows, calls, what is stored, exact prompt tokens, estimated seconds, and "
        "whether the budget allows it. No model is called.",
    ),
    ("SELECT … AS name;", "A query that also binds its result to a name."),
)

_INTRO = """# Reference

Made by `python -m sqlext.reference` from the option table; do not edit it here.

Every other statement is DuckDB's and reaches it as typed; only conditions on a model's answer are put so that they
are evaluated last. Keywords and option names are read without regard to case, option names also without regard to
underscores (`udfName` and `udf_name` are one). Values are quoted (`'…'`, `"…"`, `'''…'''`, `$$…$$`) or bare
numbers, true and false. In `'…'` and `"…"` a quote is doubled or written `\\'`; `\\n`, `\\t` and `\\\\` mean what
they mean elsewhere. `OPTIONS` is the same as `WHERE`. Comments may stand anywhere.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRO, "## Statements\n", _table(("statement", "does"), ((_code(a), b) for a, b in STATEMENTS))]
    parts += ["## Settings\n", 'Set with `!llm setup "key=value";`.\n', _options(SETUP)]
    for action in ACTIONS:
        note = "" if action.available else " Not yet available."
        parts += [f'## action="{action.name}"\n', f"{action.doc}{note}\n", _options(action.name)]
    parts += ["## TableRepartition\n", _options(REPARTITION)]
    ignored = {spec.name: spec.ignored for spec in TABLE if spec.ignored}
    parts += [
        "## Old keys\n",
        "Scripts of Byzer's may hold keys that have no meaning here. They are accepted with a notice.\n",
        _table(("key", "why it has no meaning"), ((_code(name), why) for name, why in ignored.items())),
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with `--check` compare it; the exit status."""
    fresh = page()
    if "--check" not in arguments:
        PAGE.write_text(fresh, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == fresh:
        return 0
    print(f"{PAGE.name} is stale. hint: run python -m sqlext.reference", file=sys.stderr)
    return 1


def _options(scope: str) -> str:
    rows = (
        (_code(name), aliases and _code(aliases), kind, default, allowed, meaning)
        for _, name, aliases, kind, default, allowed, meaning in help_rows(scope)
    )
    return _table(HELP_COLUMNS[1:], rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
