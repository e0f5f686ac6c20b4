"""The parser: one chunk of a script into one statement.

It stands alone because it needs nothing but text: no DuckDB, no option table, no files. Statements of DuckDB's pass
verbatim; a bad statement of ours is a `SqlSyntaxError` at the word that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import cast, get_args

from runtime.errors import Place, SqlSyntaxError, did_you_mean
from sqlext.lexemes import Kind, significant
from sqlext.reader import Reader, add_option, either
from sqlext.script import Chunk, Head, head, substitute
from sqlext.statements import (
    Algorithm,
    ExplainLlm,
    Llm,
    Load,
    Option,
    Run,
    RunVerb,
    Save,
    SaveMode,
    Setup,
    SetVariable,
    Sql,
    Statement,
    VariableKind,
)

__all__ = ["LLM_VERBS", "PRESET_NAMES", "parse", "trailing_name"]

PRESET_NAMES = ("single", "sft", "sfft", "data", "retrieval")

LLM_VERBS: Mapping[str, tuple[int, int]] = {
    "models": (0, 0),
    "status": (0, 1),
    "model exists": (1, 1),
    "model remove": (1, 1),
    "jobs": (0, 0),
    "jobs remove": (1, 1),
    "job": (1, 1),
    "logs": (1, 2),
    "wait": (1, 1),
    "cancel": (1, 1),
    "resume": (1, 1),
    "usage": (0, 0),
    "retry": (0, 1),
    "cache": (0, 0),
    "cache clear": (0, 1),
    "cache prune": (1, 1),
    "imports": (0, 1),
    "help": (0, 1),
}
"""The `!llm` forms beside setup, with the least and the most arguments of each."""

_TWO_WORDS = frozenset(verb.split()[0] for verb in LLM_VERBS if " " in verb)
_ARGUMENTS = {"cache prune": ("an age", "30d")}  # what is expected, where it is not a name, and an example

_RUN = 'Write RUN command AS LLM.`path` WHERE action="…" AND key="value" AS result;'
_LOAD = "LOAD json.`path` AS name;"
_ORDER = "AS name is the last part: WHERE stands before it, and a ; ends the statement."
_SAVE = "SAVE overwrite t AS parquet.`path`;"


def parse(chunk: Chunk, variables: Mapping[str, str], *, duckdb_settings: Container[str] = ()) -> Statement:
    """The statement that `chunk` holds.

    Args:
        variables: what `${name}` stands for; replaced in the text of SQL, and in values, paths and table names of
            our statements after these have been told apart, so that a value cannot change a statement's shape.
        duckdb_settings: lower-case names whose `SET name='…'` is DuckDB's; the same as for `split`.

    Raises:
        SqlSyntaxError: a statement of ours does not parse.
    """
    whose = head(chunk.text, 0, duckdb_settings)
    if whose == "sql":
        return Sql(substitute(chunk.text, variables), chunk.place)
    if whose == "explain":
        return _explain(chunk, variables)
    return _PARSERS[whose](Reader(chunk, variables), chunk.place)


def trailing_name(text: str) -> tuple[str, str] | None:
    """A query that ends in ` AS name`, without that tail, and the name; None when it does not.

    It only proposes: in `SELECT 1 AS x` the tail is a column's alias. Who asks lets DuckDB parse both.
    """
    found = list(significant(text, ours=False))
    if len(found) < 4:
        return None
    first, before, tail, name = (found[i] for i in (0, -3, -2, -1))
    if text[first.start : first.end].upper() not in ("SELECT", "WITH", "FROM"):
        return None
    if text[tail.start : tail.end].upper() != "AS" or name.kind not in (Kind.WORD, Kind.BACK, Kind.DOUBLE):
        return None
    raw = text[name.start : name.end]
    if name.kind is not Kind.WORD:
        raw = raw[1:-1].replace(raw[0] * 2, raw[0])
    return text[: before.end], raw


def _explain(chunk: Chunk, variables: Mapping[str, str]) -> ExplainLlm:
    _, llm, *query = islice(significant(chunk.text, ours=False), 3)
    if not query:
        place = chunk.place_at(llm.end)
        raise SqlSyntaxError("Expected a query after EXPLAIN LLM.", hint="Write EXPLAIN LLM SELECT …;", place=place)
    return ExplainLlm(substitute(chunk.text[query[0].start :], variables), chunk.place)


def _run(reader: Reader, place: Place) -> Run:
    verb = cast(RunVerb, reader.raw(reader.take()).lower())
    table = reader.name("the input table or the word command", _RUN)
    reader.expect("AS", "INTO", hint=_RUN)
    there = reader.place
    word, path = reader.target("LLM.`path`, or LLM.`` when there is no path.")
    algorithm = _choice(word, get_args(Algorithm))
    if algorithm is None:
        near = did_you_mean(word, get_args(Algorithm))
        hint = f"Did you mean {near}?" if near else f"Write {either(get_args(Algorithm))}."
        raise SqlSyntaxError("RUN has no such algorithm.", hint=hint, place=there)
    options = reader.options("AS")
    result = reader.name("the result's name", _RUN) if reader.accept("AS") else None
    if result is None:
        _end(reader, options, "AS")
    reader.end(hint=_ORDER)
    return Run(verb, table, cast(Algorithm, algorithm), path, options, result, place)


def _load(reader: Reader, place: Place) -> Load:
    reader.take()
    form, path = reader.target(_LOAD)
    options = reader.options("AS")
    if not reader.sees("AS"):
        words = ("AS", "AND" if options else "WHERE")
        reader.fail(f"Expected {either(words)}", words, f"Name the table: {_LOAD}")
    reader.take()
    table = reader.name("the table's name", f"Write {_LOAD}")
    reader.end(hint=_ORDER)
    return Load(form, path, options, table, place)


def _save(reader: Reader, place: Place) -> Save:
    reader.take()
    mode = "errorIfExists"
    there = reader.place
    words = [reader.name("a table", f"Write {_SAVE}")]
    while reader.present is not None and not reader.sees("AS"):
        found = _choice(words[-1], get_args(SaveMode))
        if found is None:
            near = did_you_mean(words[-1], (*get_args(SaveMode), "AS"))
            hint = f"Did you mean {near}?" if near else f"Modes are {either(get_args(SaveMode))}."
            raise SqlSyntaxError("SAVE has no such mode.", hint=hint, place=there)
        mode = found
        there = reader.place
        words.append(reader.name("a table", f"Write {_SAVE}"))
    reader.expect("AS", hint=f"Write {_SAVE}")
    form, path = reader.target("AS parquet.`path`;")
    options = reader.options("PARTITION", "PARTITIONBY")
    partition = _partition(reader)
    _end(reader, options, *(() if partition else ("PARTITION BY",)))
    return Save(cast(SaveMode, mode), words[-1], form, path, options, partition, place)


def _partition(reader: Reader) -> tuple[str, ...]:
    if reader.accept("PARTITION"):
        reader.expect("BY")
    elif not reader.accept("PARTITIONBY"):
        return ()
    names = [reader.name("a column")]
    while reader.accept(","):
        names.append(reader.name("a column"))
    return tuple(names)


def _set(reader: Reader, place: Place) -> SetVariable:
    reader.take()
    name = reader.name("the variable's name")
    reader.expect("=")
    value = reader.filled(reader.typed(reader.take()))
    kind = "text"
    options = reader.options()
    for option in options:
        key = option.key.lower()
        if key == "type":
            kind = _variable_kind(option)
        elif key not in ("scope", "mode"):  # Byzer's; here a variable always lives in the session
            near = did_you_mean(key, ("type", "scope", "mode"))
            hint = f"Did you mean {near}?" if near else 'SET takes type="…" only.'
            raise SqlSyntaxError("SET has no such option.", hint=hint, place=option.place)
    _end(reader, options)
    return SetVariable(name, value, cast(VariableKind, kind), place)


def _variable_kind(option: Option) -> str:
    kind = _choice(str(option.value), get_args(VariableKind))
    if kind is None:
        hint = f"Types are {either(get_args(VariableKind))}."
        raise SqlSyntaxError("A variable has no such type.", hint=hint, place=option.place)
    return kind


def _end(reader: Reader, options: tuple[Option, ...], *others: str) -> None:
    """Nothing may follow but `others`, and WHERE or AND according to the options there are."""
    if options:
        reader.end("AND", *others, hint='Put AND between options: a="1" AND b="2".')
    else:
        reader.end("WHERE", *others)


def _choice(word: str, choices: tuple[str, ...]) -> str | None:
    """`word` as it is spelled in `choices`, whatever its case."""
    return {choice.lower(): choice for choice in choices}.get(word.lower())


@dataclass(frozen=True, slots=True)
class _Word:
    """One argument of a command: `text` has its quotes off and its variables not yet replaced."""

    text: str
    place: Place


def _llm(reader: Reader, place: Place) -> Setup | Llm:
    reader.take()
    if not reader.accept("LLM", "BYZERLLM"):
        reader.fail("Expected llm after !", ("llm", "byzerllm"), "Commands begin with !llm: type !llm help;")
    words = _words(reader)
    if not words:
        reader.fail("Expected a command after !llm", hint="Type !llm help; to see all.")
    if words[0].text.lower() == "setup":
        return _setup(reader, words[1:], place)
    length = 2 if words[0].text.lower() in _TWO_WORDS else 1
    verb = " ".join(word.text.lower() for word in words[:length])
    if verb not in LLM_VERBS:
        near = did_you_mean(verb, (*LLM_VERBS, "setup"))
        hint = f"Did you mean !llm {near}?" if near else "Type !llm help; to see all."
        raise SqlSyntaxError("There is no such command.", hint=hint, place=words[0].place)
    args = words[length:]
    least, most = LLM_VERBS[verb]
    if len(args) < least:
        what, example = _ARGUMENTS.get(verb, ("a name", "name"))
        reader.fail(f"Expected {what} after !llm {verb}", hint=f'Write !llm {verb} "{example}";')
    if len(args) > most:
        takes = ("no arguments", "one argument", "two arguments")[most]
        hint = "Is a ; missing before this?"
        raise SqlSyntaxError(f"!llm {verb} takes {takes}.", hint=hint, place=args[most].place)
    return Llm(verb, tuple(reader.filled(word.text) for word in args), place)


def _setup(reader: Reader, words: list[_Word], place: Place) -> Setup:
    preset = None
    if words and (preset := _choice(words[0].text, PRESET_NAMES)):
        words = words[1:]
    elif not words:
        reader.fail("Expected a preset or key=value", hint=f"Presets are {either(PRESET_NAMES)}.")
    settings: dict[str, Option] = {}
    for word in words:
        key, equals, value = word.text.partition("=")
        if not (equals and key.strip()):
            near = did_you_mean(word.text, PRESET_NAMES)
            hint = f"Did you mean !llm setup {near}?" if near else 'Write !llm setup "key=value";'
            raise SqlSyntaxError("Expected key=value.", hint=hint, place=word.place)
        add_option(settings, Option(key.strip(), reader.filled(value).strip(), word.place))
    return Setup(preset, tuple(settings.values()), place)


def _words(reader: Reader) -> list[_Word]:
    """The rest of a command as arguments: what stands without a blank between, or around `=`, is one."""
    words: list[_Word] = []
    behind, glue = -1, False
    while (lexeme := reader.present) is not None:
        place, equals = reader.place, reader.sees("=")
        text = reader.typed(reader.take())
        if words and (lexeme.start == behind or equals or glue):
            words[-1] = _Word(words[-1].text + text, words[-1].place)
        else:
            words.append(_Word(text, place))
        behind, glue = lexeme.end, equals
    return words


_PARSERS: Mapping[Head, Callable[[Reader, Place], Statement]] = {
    "llm": _llm,
    "run": _run,
    "load": _load,
    "save": _save,
    "set": _set,
}
