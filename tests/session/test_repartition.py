"""``RUN t AS TableRepartition.``: the same rows, and where each goes when a training keeps its partitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sqlext
from runtime.errors import UserError
from sqlext import repartition


@pytest.fixture
def con() -> Iterator[sqlext.Connection]:
    with sqlext.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT i, i % 5 AS f, 'text ' || i AS text FROM range(20) r(i)")
        yield connection


@pytest.fixture
def parts(con: sqlext.Connection, tmp_path: Path) -> Callable[..., list[list[int]]]:
    """parts(WHERE …): the numbers in each partition's file."""

    def make(where: str, table: str = "t") -> list[list[int]]:
        con.execute(f"RUN {table} AS TableRepartition.`` WHERE {where} AS t2")
        with con.own_sql() as execute:
            how = repartition.partitioning_of(execute, con, "t2")
            assert how
            repartition.write_parts(execute, "t2", tmp_path, how)
        files = sorted(tmp_path.glob("*"))
        assert [file.name for file in files] == [
            f"data-{part:05}-of-{how.count:05}.jsonl" for part in range(how.count)
        ]
        return [[json.loads(line)["i"] for line in file.open()] for file in files]

    return make


def test_the_new_table_has_the_same_rows_and_columns(con: sqlext.Connection) -> None:
    """And the answer tells how it is dealt out."""
    told = con.execute('RUN t AS TableRepartition.`` WHERE partitionNum="12" AND partitionCols="F" AS t2').fetchall()
    assert told == [("t2", 12, "hash", "f")]
    assert con.execute("FROM t2 ORDER BY i").fetchall() == con.execute("FROM t ORDER BY i").fetchall()


def test_rows_are_dealt_out_in_turn(parts: Callable[..., list[list[int]]]) -> None:
    """Without columns each partition gets the next row; none differs by more than one."""
    assert parts('partitionNum="3"') == [list(range(start, 20, 3)) for start in range(3)]


def test_equal_values_stay_together_and_parts_stay_even(parts: Callable[..., list[list[int]]]) -> None:
    """As many values as partitions leave none empty, as files of the document's pretraining must."""
    dealt = parts('partitionNum="5" AND partitionCols="f"')
    assert sorted({i % 5 for i in part} == {part[0] % 5} for part in dealt) == [True] * 5
    assert [len(part) for part in dealt] == [4] * 5


def test_a_large_value_is_balanced_by_small_ones(
    con: sqlext.Connection, parts: Callable[..., list[list[int]]]
) -> None:
    """A new value goes to the partition that has the fewest rows."""
    con.execute("CREATE TABLE u AS SELECT i, CASE WHEN i < 6 THEN 0 ELSE i END AS f FROM range(12) r(i)")
    assert [len(part) for part in parts('partitionNum="2" AND partitionCols="f"', "u")] == [6, 6]


def test_nulls_and_several_columns_are_values_too(
    con: sqlext.Connection, parts: Callable[..., list[list[int]]]
) -> None:
    """NULL is one value; the columns themselves are written as they were."""
    con.execute("CREATE TABLE u AS SELECT i, nullif(i % 2, 0) AS a, i % 3 AS b FROM range(12) r(i)")
    dealt = parts('partitionNum="6" AND partitionCols="a,b"', "u")
    assert sorted(map(tuple, dealt)) == [(i, i + 6) for i in range(6)]


@pytest.mark.parametrize(
    ("where", "dealt"),
    [
        ('partitionType="range"', [[*range(7)], [*range(7, 14)], [*range(14, 20)]]),
        ('shuffle="false"', [[*range(7)], [*range(7, 14)], [*range(14, 20)]]),
        ('partitionType="range" AND partitionCols="f,i"', [[0, 5, 10, 15, 1, 6, 11], [16, 2, 7, 12, 17, 3, 8], [13, 18, 4, 9, 14, 19]]),
    ],
)  # fmt: skip
def test_range_cuts_equal_parts(parts: Callable[..., list[list[int]]], where: str, dealt: list[list[int]]) -> None:
    """In the table's order, or sorted by the columns."""
    assert parts(f'partitionNum="3" AND {where}') == dealt


def test_an_empty_partition_is_an_error(parts: Callable[..., list[list[int]]]) -> None:
    """A rank without rows cannot train: told with what there is."""
    with pytest.raises(
        UserError, match="2 of the 7 partitions are empty: t2 has 20 rows with 5 different values of f"
    ):
        parts('partitionNum="7" AND partitionCols="f"')


def test_another_table_of_that_name_has_no_partitioning(con: sqlext.Connection) -> None:
    """What was said of a view does not hold for what replaces it."""
    con.execute('RUN t AS TableRepartition.`` WHERE partitionNum="2" AS t2')
    con.execute("CREATE OR REPLACE TEMP VIEW t2 AS SELECT 1 AS i")
    with con.own_sql() as execute:
        assert repartition.partitioning_of(execute, con, "t2") is None


def test_a_table_may_keep_its_name(con: sqlext.Connection) -> None:
    """Then it is a copy, as a view cannot read itself."""
    con.execute('RUN t AS TableRepartition.`` WHERE partitionNum="2" AS T')
    assert con.execute("SELECT count(*), sum(i) FROM t").fetchone() == (20, 190)
    with con.own_sql() as execute:
        how = repartition.partitioning_of(execute, con, "t")
    assert how is not None
    assert how.count == 2


def test_a_result_that_was_only_named_is_found(con: sqlext.Connection) -> None:
    """`SELECT … FROM x AS t;` names a result, as in the document; a RUN makes it when it needs it."""
    con.execute('SELECT text, i FROM t AS named; RUN named AS TableRepartition.`` WHERE partitionNum="2" AS t2')
    assert con.execute("SELECT count(*) FROM t2").fetchone() == (20,)


@pytest.mark.parametrize(
    ("statement", "code", "hint"),
    [
        ("RUN t AS TableRepartition.`` AS t2", "option_missing", 'Add partitionNum="2".'),
        ('RUN t AS TableRepartition.`` WHERE partitionNum="2"', "input_table", None),
        ('RUN command AS TableRepartition.`` WHERE partitionNum="2" AS t2', "input_table", None),
        ('RUN tt AS TableRepartition.`` WHERE partitionNum="2" AS t2', "table_unknown", 'Did you mean "t"?'),
        ('RUN t AS TableRepartition.`` WHERE partitionNum="0" AS t2', "option_value", "1 or more."),
        ('RUN t AS TableRepartition.`` WHERE partitionNumber="2" AS t2', "option_unknown", 'Did you mean "partitionNum"?'),
        ('RUN t AS TableRepartition.`` WHERE partitionNum="2" AND partitionCols="txt" AS t2', "column_unknown", 'Did you mean "text"?'),
        ('RUN t AS TableRepartition.`` WHERE partitionNum="2" AND partitionCols="f" AND shuffle="false" AS t2', "option_value", "Leave one of them out."),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_place(
    con: sqlext.Connection, statement: str, code: str, hint: str | None
) -> None:
    """What, where, and the nearest right word; nothing is made."""
    with pytest.raises(UserError) as caught:
        con.execute(statement)
    assert caught.value.code == code
    assert caught.value.place is not None
    if hint:
        assert caught.value.hint == hint
    assert con.execute("SELECT count(*) FROM duckdb_views() WHERE view_name = 't2'").fetchone() == (0,)
