"""Whatever is typed, the language answers with a statement or with one kind of error, at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import Place, SqlSyntaxError
from sqlext.parser import parse, trailing_name
from sqlext.script import Chunk, split
from sqlext.statements import Option, Run, Scalar, Setup

from .cases import DUCKDB_SETTINGS, VARIABLES, read

SOUP = [
    *["run", "RUN", "train", "predict", "load", "save", "set", "explain", "llm", "!llm", "!byzerllm", "setup", "models", "model", "exists", "as", "into", "where", "options"],
    *["and", "overwrite", "append", "partition", "by", "command", "LLM", "TableRepartition", "json", "t", "a.b", "action", "udfName", "true", "false", "null", "select", "from"],
    *["LLM.``", "json.`x`", "`a b`", "'it''s'", '"x"', "'''", "'''b'''", "$$", "$$d$$", "$t$", "${n}", "${", "}", "--", "\n", "\r\n"],
    *["/*", "*/", ";", "=", "==", ":=", ",", ".", "(", ")", "!", "\\", "'", '"', "`", "$", "1", "-1", "1e5", "9" * 5000, "1.2.3"],
    *[" ", "\t", "\ufeff", "\x00", "é", "🦆", "\u2028", "\ud800", "E'", "e'\\'", "k='v'", "#", "@", "%", "{", "[", "sk-123456789"],
]  # fmt: skip
FILES = [text for name in ("statements.txt", "errors.txt", "duckdb.txt") for text, _ in read(name)]


def read_all(text: str) -> SqlSyntaxError | None:
    try:
        for chunk in split(text, duckdb_settings=DUCKDB_SETTINGS):
            parse(chunk, VARIABLES, duckdb_settings=DUCKDB_SETTINGS)
            trailing_name(chunk.text)
    except SqlSyntaxError as error:
        return error
    return None


def seconds(text: str) -> float:
    start = time.thread_time()
    read_all(text)
    return time.thread_time() - start


def check(text: str) -> None:
    """Only a SqlSyntaxError with a place inside the text may come, within 50 ms of processor time."""
    start = time.thread_time()
    failure = read_all(text)
    if time.thread_time() - start > 0.05:  # a garbage collection may have fallen into it: measure again
        assert min(seconds(text) for _ in range(3)) < 0.05, text
    if failure:
        assert failure.place
        assert 1 <= failure.place.line <= text.count("\n") + text.count("\r") + 1
        assert 1 <= failure.place.column <= len(text) + 1
        assert str(failure)


def soup(chance: random.Random) -> str:
    separator = chance.choice(["", " ", " "])
    return separator.join(chance.choices(SOUP, k=chance.randint(1, 25)))


def mutated(chance: random.Random) -> str:
    """Two or three statements of the case files with a few characters cut, doubled, exchanged or inserted."""
    text = ";\n".join(chance.choices(FILES, k=chance.randint(1, 3)))
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(text) + 1)
        to = min(len(text), at + chance.randint(0, 6))
        text = text[:at] + chance.choice(["", text[at:to] * 2, text[at:to][::-1], chance.choice(SOUP)]) + text[to:]
    return text


@pytest.mark.parametrize(("make", "count"), [(soup, 20_000), (mutated, 10_000)])
def test_nothing_but_a_syntax_error_comes_of_garbage(make: Callable[[random.Random], str], count: int) -> None:
    """20,000 heaps of tokens and 10,000 damaged scripts, the same ones each time."""
    chance = random.Random(20261121)
    for _ in range(count):
        check(make(chance))


def quoted(value: Scalar, how: str) -> str:
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else repr(value)
    if how == "$":
        return f"$q${value}$q$"
    first, rest = value[:1].replace(how, f"\\{how}"), value[1:].replace("\\", "\\\\").replace(how, how * 2)
    return how + (first if first != "\\" else "\\\\") + rest + how  # a doubled quote at the start would open a block


KEYS = st.text(
    st.characters(codec="utf-8", exclude_characters="${}", exclude_categories=("Cs",)), min_size=1, max_size=12
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="$"), max_size=40)
VALUES = st.one_of(
    TEXTS, st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
PLACE = Place(1, 1)


def backquoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


@settings(max_examples=1000, deadline=None)
@given(
    table=KEYS,
    path=TEXTS,
    options=st.lists(
        st.tuples(KEYS, VALUES, st.sampled_from("'\"$")), max_size=5, unique_by=lambda it: it[0].lower()
    ),
    result=st.none() | KEYS,
    gap=st.sampled_from([" ", "\n", " -- it's ; \n", " /* ; ' */ "]),
)
def test_what_a_run_says_is_what_is_read(
    table: str, path: str, options: list[tuple[str, Scalar, str]], result: str | None, gap: str
) -> None:
    """Any table, path, keys, values and result come back as they were written."""
    clauses = [f"{backquoted(key)}={quoted(value, how)}" for key, value, how in options]
    words = ["run", backquoted(table), "as", f"LLM.{backquoted(path)}"]
    if clauses:
        words += ["where", f"{gap}and ".join(clauses)]
    if result is not None:
        words += ["as", backquoted(result)]
    (chunk,) = split(gap.join(words) + ";")
    run = parse(chunk, {})
    assert isinstance(run, Run)
    assert (run.input_table, run.path, run.result) == (table, path, result)
    assert [(it.key, it.value) for it in run.options] == [(key, value) for key, value, _ in options]


@settings(max_examples=1000, deadline=None)
@given(
    preset=st.sampled_from([None, "single", "sft", "sfft", "data", "retrieval"]),
    settings_=st.lists(
        st.tuples(st.from_regex(r"[a-z_.]{1,12}", fullmatch=True), TEXTS),
        min_size=1,
        max_size=4,
        unique_by=lambda it: it[0],
    ),
    how=st.sampled_from("'\"$"),
)
def test_what_a_setup_says_is_what_is_read(preset: str | None, settings_: list[tuple[str, str]], how: str) -> None:
    """Any preset and settings come back as they were written, values without the blanks around them."""
    words = [
        "!llm setup",
        *([preset] if preset else []),
        *(quoted(f"{key}={value}", how) for key, value in settings_),
    ]
    (chunk,) = split(" ".join(words) + ";")
    setup = parse(chunk, {})
    assert isinstance(setup, Setup)
    assert setup.preset == preset
    assert [(it.key, it.value) for it in setup.settings] == [(key, value.strip()) for key, value in settings_]


def test_a_chunk_made_by_hand_is_checked_too() -> None:
    """The parser does not rely on the splitter for strings without an end."""
    with pytest.raises(SqlSyntaxError, match="no end"):
        parse(Chunk("run t as LLM.`` where a='x", PLACE), {})


def test_options_show_where_they_stand() -> None:
    """An option's place is that of its key."""
    (chunk,) = split("run t as LLM.``\nwhere a='1'\n  and b=2")
    run = parse(chunk, {})
    assert isinstance(run, Run)
    assert run.options[1] == Option("b", 2, Place(3, 7, "  and b=2"))
