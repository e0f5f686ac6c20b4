"""The splitter: where statements begin and end."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import duckdb
import pytest

from runtime.errors import SqlSyntaxError
from sqlext.parser import parse
from sqlext.script import split, substitute
from sqlext.statements import Sql

from .cases import FOLDER

DUCKDB = (FOLDER / "duckdb.txt").read_text(encoding="utf-8").rstrip("\n").split("\n===\n")


def texts(script: str) -> list[str]:
    return [chunk.text for chunk in split(script)]


@pytest.fixture(scope="module")
def con() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


@pytest.fixture(scope="module")
def settings(con: duckdb.DuckDBPyConnection) -> frozenset[str]:
    return frozenset(name.lower() for (name,) in con.execute("SELECT name FROM duckdb_settings()").fetchall())


@pytest.mark.parametrize("text", DUCKDB)
def test_a_statement_of_duckdbs_stays_whole_and_verbatim(
    text: str, con: duckdb.DuckDBPyConnection, settings: frozenset[str]
) -> None:
    """DuckDB sees one statement there, so do we, and it is handed on to the letter."""
    assert len(con.extract_statements(text)) == 1
    (chunk,) = split(text, duckdb_settings=settings)
    statement = parse(chunk, {"x": "not used"}, duckdb_settings=settings)
    assert isinstance(statement, Sql)
    assert statement.text == text


@pytest.mark.parametrize("seed", range(10))
def test_a_script_splits_where_duckdb_splits_it(
    seed: int, con: duckdb.DuckDBPyConnection, settings: frozenset[str]
) -> None:
    """In any order, with comments and empty statements between, the statements are those DuckDB finds."""
    chance = random.Random(seed)
    statements = chance.sample(DUCKDB, len(DUCKDB))
    script = "".join(
        text + chance.choice([";", " ;\n", ";;", "; -- it's;\n", ";/* ' ; /* \" */ */"]) for text in statements
    )
    found = con.extract_statements(script)
    assert [chunk.text for chunk in split(script, duckdb_settings=settings)] == statements
    assert [it.query.strip().startswith(text) for it, text in zip(found, statements, strict=True)] == [True] * len(
        found
    )


def test_the_corpus_is_large_enough() -> None:
    """At least 200 statements of DuckDB's are compared."""
    assert len(set(DUCKDB)) == len(DUCKDB) >= 200


def test_comments_and_blanks_around_a_statement_are_not_part_of_it() -> None:
    """A chunk begins and ends with code, and keeps the comments inside."""
    script = "\n -- a\n/* b */ select 1 -- c\n + 1 -- d\n ; /* e */ ; \ufeff select 2 -- f"
    assert texts(script) == ["select 1 -- c\n + 1", "select 2"]


@pytest.mark.parametrize("script", ["", " ", ";", " ; ;\n", "-- only\n", "/* only */;", "\ufeff"])
def test_a_script_without_statements_has_none(script: str) -> None:
    """Blanks, comments and semicolons are no statements."""
    assert texts(script) == []


def test_places_count_lines_and_columns_from_one() -> None:
    """A chunk's place is that of its first character, with the line's text and the file's name."""
    first, second, third = split("select 1;\r\n  select 2;\r select 3", "job.sql")
    assert (first.place.line, first.place.column, first.place.source) == (1, 1, "select 1;")
    assert (second.place.line, second.place.column, second.place.source) == (2, 3, "  select 2;")
    assert str(third.place) == "job.sql: line 3, column 2"


def test_a_chunk_knows_the_places_inside_it() -> None:
    """An offset in a chunk is a place of the file, on the first line and on later ones."""
    _, chunk = split("select 1; select 2,\n  3")
    assert (chunk.place_at(7).line, chunk.place_at(7).column) == (1, 18)
    at_three = chunk.place_at(chunk.text.index("3"))
    assert (at_three.line, at_three.column, at_three.source) == (2, 3, "  3")


def test_a_chunk_knows_whether_a_semicolon_ended_it() -> None:
    """A prompt asks for more lines as long as the last chunk is open."""
    assert [chunk.closed for chunk in split("select 1; select 2")] == [True, False]
    assert [chunk.closed for chunk in split("select 1;")] == [True]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("set x='''a ; 'b' ''';select 1", ["set x='''a ; 'b' '''", "select 1"]),
        ("set x='''it''s''';select 1", ["set x='''it''s'''", "select 1"]),
        ("select '''it''s''';select 1", ["select '''it''s'''", "select 1"]),
        ("select ''';''';select 1", ["select ''';'''", "select 1"]),
        ("select '''a';select 1", ["select '''a'", "select 1"]),
        ("run t as LLM.`` where a='''x'; -- ''';select '''a'", ["run t as LLM.`` where a='''x'; -- '''", "select '''a'"]),
        ("!llm logs '''a;b''';select 1", ["!llm logs '''a;b'''", "select 1"]),
        ("explain llm select '''a';select 1", ["explain llm select '''a'", "select 1"]),
        (r"run t as LLM.`` where a='\';';select '\';select 1", [r"run t as LLM.`` where a='\';'", r"select '\'", "select 1"]),
    ],
)  # fmt: skip
def test_three_quotes_open_a_block_only_in_statements_of_ours(script: str, expected: list[str]) -> None:
    """In DuckDB's statements `'''` is a quote inside a string, and a backslash is a backslash."""
    assert texts(script) == expected


def test_a_setting_of_duckdbs_is_read_as_duckdb_reads_it() -> None:
    """`SET` of a name that DuckDB knows has no escapes and no blocks."""
    script = r"set temp_directory='C:\tmp\'; set x='\';'"
    chunks = split(script, duckdb_settings={"temp_directory"})
    assert [chunk.text for chunk in chunks] == [r"set temp_directory='C:\tmp\'", r"set x='\';'"]


def test_variables_are_replaced_once_and_unknown_ones_stay() -> None:
    """A value that holds `${…}` itself is not looked at again."""
    assert substitute("${a} ${ b } ${c} $a {a}", {"a": "${b}", "b": "2"}) == "${b} 2 ${c} $a {a}"


def test_an_error_on_a_line_with_a_key_does_not_show_the_line() -> None:
    """Of a script with a secret in it, errors show the place without the text."""
    with pytest.raises(SqlSyntaxError) as caught:
        split("create secret s (type s3, secret 'hidden', key_id 'open")
    assert caught.value.place is not None
    assert caught.value.place.column == 51
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "repeated",
    ["select 1;", "select 1;\n", "'", '"', "''' ", "/*", "/**/", "$$ ", "$a$", "((", "\\", "`` ", "-", "!llm x y\n"],
)
def test_splitting_takes_time_in_proportion_to_the_text(repeated: str) -> None:
    """A large script, also a hostile one, is split in a moment."""
    start = time.perf_counter()
    for head in ("select ", "set x='", "run t as LLM.`` where a="):
        with suppress(SqlSyntaxError):
            split(head + repeated * (200_000 // len(repeated)))
    assert time.perf_counter() - start < 10
