"""Spark SQL as DuckDB's."""

from __future__ import annotations

import duckdb
import pytest

from runtime.errors import Place, UserError
from sqlext.dialects import from_spark


@pytest.mark.parametrize(
    ("spark", "row"),
    [
        ('select "it\'s"', ("it's",)),
        ('select map("a", 1, "b", 2)["b"]', (2,)),
        ('select array("x", "y")', (["x", "y"],)),
        ("select `a` from (select 1 as `a`)", (1,)),
        ('select date_format(date "2026-11-21", "yyyy-MM")', ("2026-11",)),
        ('select named_struct("a", 1).a', (1,)),
        ("select size(array(1, 2, 3))", (3,)),
        ('select concat_ws("-", "a", "b")', ("a-b",)),
    ],
)
def test_a_spark_query_gives_in_duckdb_what_it_gives_in_spark(spark: str, row: tuple[object, ...]) -> None:
    """Strings, maps, arrays and functions of Spark's are DuckDB's after the translation."""
    assert duckdb.connect().execute(from_spark(spark)).fetchone() == row


def test_functions_of_the_user_keep_their_names() -> None:
    """A model function is called as it was named, in its case."""
    assert from_spark("select llama2_Chat(llm_param(map('k', 'v')), MyOther(a)) from t").startswith(
        "SELECT llama2_Chat(llm_param(MAP(['k'], ['v'])), MyOther(a))"
    )


@pytest.mark.parametrize(
    ("spark", "place"),
    [
        ("select a fro (m", (5, 23)),
        ("select a\nfrom t where (", (6, 14)),
        ("select 'open", (5, 10)),
        ("select 1; select 2", (5, 10)),
    ],
)
def test_what_is_no_spark_sql_is_an_error_with_its_place(spark: str, place: tuple[int, int]) -> None:
    """The place is that of the script, not of the statement."""
    with pytest.raises(UserError) as caught:
        from_spark(spark, Place(5, 10))
    assert caught.value.place is not None
    assert (caught.value.place.line, caught.value.place.column) == place
    assert caught.value.hint


def test_a_trailing_name_of_byzers_is_kept() -> None:
    """It is not Spark's, and who runs the query reads it afterwards."""
    assert from_spark('select "x" as q\nas `q 1`') == "SELECT 'x' AS q AS \"q 1\""
    assert from_spark("select a from t as q1") == "SELECT a FROM t AS q1"


@pytest.mark.parametrize(
    "sql", ["set threads=4", "create macro f(a := 1) as a", "show tables", "copy t to 'x.csv'", "pivot t on a", ""]
)
def test_only_queries_are_translated(sql: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is no query is DuckDB's in any dialect, and nothing is warned about."""
    assert from_spark(sql) == sql
    assert not caplog.records


def test_tables_and_views_made_of_spark_queries_are_translated() -> None:
    """CREATE and INSERT hold queries."""
    assert (
        from_spark('create or replace temp view v as select "x"')
        == "CREATE OR REPLACE TEMPORARY VIEW v AS SELECT 'x'"
    )
    assert from_spark('insert into t select "x"') == "INSERT INTO t SELECT 'x'"
