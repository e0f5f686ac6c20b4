"""What may be asked of an answer's type, and what a query gets when a model keeps to it or does not."""

from __future__ import annotations

import datetime
import decimal
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedPool

from runtime import schema
from runtime.engines import Engine, loader
from runtime.errors import Fatal, SqlextError, UserError
from runtime.gateway import Gateway, Statement
from runtime.spec import Answers, Batch, EngineInfo, ModelSpec, Task
from udfs.context import VARIABLE, StatementTable
from udfs.register import FunctionCatalog
from udfs.typed import schema_from, type_of_schema

TYPED = EngineInfo("scripted", Task.GENERATE, schemas=True)


class Says(ScriptedPool):
    """A model that answers with its prompt, as an engine would that does not hold to the schema; 'cut:' cuts it."""

    def __init__(self) -> None:
        super().__init__()
        self.info = TYPED
        self.schemas: list[str | None] = []

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        self.batches.append((worker, list(batch.prompts)))
        self.schemas.append(batch.options.schema)
        texts = [prompt.removeprefix("cut:") for prompt in batch.prompts]
        reasons = ["length" if prompt.startswith("cut:") else "stop" for prompt in batch.prompts]
        yield Answers(range(len(texts)), texts, reasons, [1] * len(texts), [2] * len(texts), 1.0)


class Tiny(ScriptedPool):
    """A real model without training, in this process."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(max_batch_rows=2048)
        self.info = engine.info
        self._engine = engine

    def run(self, worker: int, batch: Batch) -> Iterator[Answers]:
        self.batches.append((worker, list(batch.prompts)))
        yield from self._engine.run(batch, threading.Event())


class Database:
    """A database with the functions chat, behind which is `pool`, and free, which knows no schemas."""

    def __init__(self, pool: ScriptedPool) -> None:
        self.raw = duckdb.connect()
        self.statements = StatementTable()
        self.functions = FunctionCatalog(self.raw.cursor(), self.statements)
        self.pool = pool
        self.functions.put("chat", Gateway(pool))
        self.functions.put("free", Gateway(ScriptedPool()))
        self.functions.catch_up(self.raw, 0)
        self.statement = Statement(0)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a query in a statement of its own; the error that stopped it, if one of ours did."""
        self.statement = Statement(self.statements.new_id())
        self.raw.execute(f"SET VARIABLE {VARIABLE} = '{self.statements.add(self.statement)}'")
        try:
            return self.raw.execute(query).fetchall()
        except duckdb.Error:
            if self.statement.failure:
                raise self.statement.failure from None
            raise

    def one(self, expression: str) -> Any:
        return self.rows(f"SELECT {expression}")[0][0]

    def said(self, answer: str, as_type: str) -> Any:
        """What becomes of a model's answer."""
        return self.one(f"chat_as({_sql(answer)}, {_sql(as_type)})")

    @property
    def codes(self) -> list[str]:
        return [row.code for row in self.statement.failed_rows]

    def close(self) -> None:
        gateways = self.functions.gateways().values()
        self.functions.close()
        for gateway in gateways:
            gateway.close()
        self.functions._admin.close()
        self.raw.close()


def _sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@pytest.fixture
def db() -> Iterator[Database]:
    database = Database(Says())
    yield database
    database.close()


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Engine:
    return loader("transformers")(
        ModelSpec("m", "transformers", str(checkpoints["chat"]), options=(("max_num_seqs", 512),))
    )


@pytest.fixture
def tiny(engine: Engine) -> Iterator[Database]:
    database = Database(Tiny(engine))
    yield database
    database.close()


# -- what a real model answers -----------------------------------------------------------------------------------


def test_ten_thousand_answers_of_a_model_that_knows_nothing_have_the_type(tiny: Database):
    """Not one of 10,000 rows of an untrained model is NULL, an error or of another type."""
    kind = "STRUCT(a ENUM('x', 'y'), b TINYINT, c BOOLEAN)"
    tiny.rows(
        f"CREATE TABLE answers AS SELECT chat_as('row ' || i, {_sql(kind)}, temperature := 1, seed := 1) AS x "
        "FROM range(10000) r(i)"
    )
    assert tiny.codes == []
    [(name, rows, whole, kinds)] = tiny.rows(
        "SELECT any_value(typeof(x)), count(*), count(*) FILTER (x.a IS NOT NULL AND x.b BETWEEN -128 AND 127 "
        "AND x.c IS NOT NULL), count(DISTINCT x) FROM answers"
    )
    assert (name, rows, whole) == (tiny.rows(f"SELECT typeof(NULL::{kind})")[0][0], 10000, 10000)
    assert kinds > 100


@pytest.mark.parametrize(
    "kind",
    [
        *("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"),
        *("HUGEINT", "UHUGEINT", "DECIMAL(4,0)", "DECIMAL(3,3)", "DECIMAL(38,10)", "UUID", "INTERVAL"),
        *("DATE", "TIME", "TIMETZ", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMPTZ"),
        *("ENUM('a', 'b''c \"d\" é')", "INTEGER[2]", "STRUCT(x DATE[1], y STRUCT(z ENUM('q')))"),
        *("MAP(ENUM('k', 'l'), BOOLEAN)", """STRUCT("a ""b" BOOLEAN, "é'{" UTINYINT)"""),
    ],
)
def test_every_type_comes_back_from_a_real_model(tiny: Database, kind: str):
    """A sampled answer of an untrained model is a value of the type that was asked for."""
    query = f"SELECT chat_as('q' || i, {_sql(kind)}, temperature := 1, seed := 3) AS x FROM range(24) r(i)"
    rows = tiny.rows(f"SELECT x IS NOT NULL, typeof(x) = (SELECT typeof(NULL::{kind})) FROM ({query})")
    assert tiny.codes == []
    assert rows == [(True, True)] * 24


def test_schemas_differ_from_row_to_row_and_from_call_to_call(tiny: Database):
    """Rows with different lists, a typed call and a free one in one query: each answer keeps to its own."""
    rows = tiny.rows(
        "SELECT n, chat('x', schema := ['a' || n, 'b' || n]), chat_as('x', 'DATE'), chat('x', max_tokens := 4) "
        "FROM range(40) r(n)"
    )
    assert all(choice in (f"a{n}", f"b{n}") for n, choice, _, _ in rows)
    assert all(isinstance(day, datetime.date) for _, _, day, _ in rows)
    assert not tiny.codes


# -- what becomes of an answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer", "value"),
    [
        ("STRUCT(label VARCHAR, score DOUBLE)", '{"label":"a","score":1e3}', {"label": "a", "score": 1000.0}),
        ("VARCHAR", '"it\'s \\"q\\" \\n \\u00e9 🦆"', 'it\'s "q" \n é 🦆'),
        ("INTEGER[]", "[1,2]", [1, 2]),
        ("INTEGER[]", "[]", []),
        ("VARCHAR[2]", '["a","b"]', ("a", "b")),
        ("MAP(VARCHAR, DOUBLE)", '{"a":1.5,"b c":2}', {"a": 1.5, "b c": 2.0}),
        ("MAP(INTEGER, BOOLEAN)", '{"-7":true}', {-7: True}),
        ("MAP(DATE, VARCHAR)", '{"2024-02-29":"leap"}', {datetime.date(2024, 2, 29): "leap"}),
        ("DECIMAL(5,2)", '"-999.99"', decimal.Decimal("-999.99")),
        ("DECIMAL(38,2)", f'"{"9" * 36}.99"', decimal.Decimal("9" * 36 + ".99")),
        ("HUGEINT", f'"{"9" * 38}"', int("9" * 38)),
        ("BIGINT", "9000000000000000000", 9 * 10**18),
        ("TINYINT", "-128", -128),
        ("FLOAT", "1.5", 1.5),
        ("DATE", '"0099-12-31"', datetime.date(99, 12, 31)),
        ("TIMESTAMP", '"2024-01-02T03:04:05"', datetime.datetime(2024, 1, 2, 3, 4, 5)),
        ("UUID", f'"{uuid.UUID(int=7)}"', uuid.UUID(int=7)),
        ("JSON", '{"any":[1,{"x":null}]}', '{"any":[1,{"x":null}]}'),
        ("STRUCT(j JSON, n ENUM('a'))", '{"j":[1],"n":"a"}', {"j": "[1]", "n": "a"}),
    ],
)
def test_answers_become_values(db: Database, kind: str, answer: str, value: object):
    """An answer that fits is a value of the column's type."""
    assert db.said(answer, kind) == value
    assert db.codes == []


@pytest.mark.parametrize(
    ("kind", "answer", "code"),
    [
        ("DATE", '"2023-02-29"', "answer_unfit"),
        ("DATE", '"2024-02-31"', "answer_unfit"),
        ("TIME", '"24:00:00"', "answer_unfit"),
        ("TINYINT", "128", "answer_unfit"),
        ("UINTEGER", "-1", "answer_unfit"),
        ("BIGINT", "9223372036854775808", "answer_unfit"),
        ("FLOAT", "1e39", "answer_unfit"),
        ("DOUBLE", "1e999", "answer_unfit"),
        ("DOUBLE", "NaN", "answer_unfit"),
        ("DECIMAL(3,1)", '"100.0"', "answer_unfit"),
        ("ENUM('a')", '"b"', "answer_unfit"),
        ("INTEGER[2]", "[1]", "answer_unfit"),
        ("STRUCT(a INTEGER)", "{}", "answer_unfit"),
        ("STRUCT(a INTEGER)", '{"a":1,"b":2}', "answer_unfit"),
        ("STRUCT(a INTEGER)", '{"a":"x"}', "answer_unfit"),
        ("STRUCT(a INTEGER)", '{"a":null}', "answer_unfit"),
        ("MAP(VARCHAR, INTEGER)", '{"a":1,"a":2}', "answer_unfit"),
        ("VARCHAR", '"\\ud800"', "answer_unfit"),
        ("VARCHAR", "Sure! Here it is:", "answer_unfit"),
        ("JSON", "[" * 100_000, "answer_unfit"),
        ("STRUCT(a VARCHAR)", 'cut:{"a":"half of', "answer_cut"),
        ("INTEGER", "cut:12", "answer_cut"),
        ("VARCHAR", 'cut:"ab', "answer_cut"),
    ],
)
def test_what_does_not_fit_is_an_error_of_its_row(db: Database, kind: str, answer: str, code: str):
    """Never a half value or a silent NULL: the row is NULL and listed, with its code, and shows nothing of the answer."""
    assert db.said(answer, kind) is None
    [failed] = db.statement.failed_rows
    assert failed.code == code
    assert answer[-8:] not in failed.message


def test_an_answer_that_ends_with_its_last_token_is_whole(db: Database):
    """What is complete where the limit of tokens cuts it is taken, unless more digits might follow."""
    assert db.said('cut:{"a":1}', "STRUCT(a INTEGER)") == {"a": 1}


def test_null_makes_no_call(db: Database):
    """NULL in, NULL of the type out."""
    assert db.rows("SELECT typeof(chat_as(NULL, 'DATE')), chat_as(nullif(i, 0), 'DATE') FROM range(1) r(i)") == [
        ("DATE", None)
    ]
    assert db.pool.prompts == []


# -- how a type is said ------------------------------------------------------------------------------------------


def test_a_type_of_the_users_is_opened(db: Database):
    """CREATE TYPE makes names that an answer can have, alone and inside others."""
    db.rows("CREATE TYPE mood AS ENUM ('sad', 'happy')")
    db.rows("CREATE TYPE person AS STRUCT(name VARCHAR, mood mood)")
    assert db.said('{"name":"Ann","mood":"happy"}', "person") == {"name": "Ann", "mood": "happy"}
    assert db.one("chat('\"sad\"', schema := 'mood')") == "sad"
    assert db.rows("SELECT typeof(chat_as('\"sad\"', 'mood'))") == [("ENUM('sad', 'happy')",)]


@pytest.mark.parametrize(
    ("said", "answer", "shown"),
    [
        ("'STRUCT(a INTEGER)'", '{"a":1}', '{"a":1}'),
        ("""'{"type":"object","properties":{"a":{"type":"integer"}}}'""", '{"a":1}', '{"a":1}'),
        ("{'type': 'array', 'items': {'type': 'boolean'}}", "[true]", "[true]"),
        ("['yes', 'it''s \"no\"', NULL]", '"it\'s \\"no\\""', 'it\'s "no"'),
        ("[1, 2, 30]", "30", "30"),
        ("[DATE '2024-01-01']", '"2024-01-01"', "2024-01-01"),
        ("(SELECT list(code ORDER BY code) FROM dim)", '"b"', "b"),
        ("'DATE'", '"2024-01-01"', "2024-01-01"),
        ("'VARCHAR'", '"a text"', "a text"),
        ("'ENUM(''a'')'", '"a"', "a"),
    ],
)
def test_schema_takes_a_type_a_json_schema_or_a_list(db: Database, said: str, answer: str, shown: str):
    """The answer is VARCHAR: a text as it is, anything else as JSON; the same in the _row form."""
    db.rows("CREATE TABLE dim AS SELECT unnest(['a', 'b']) AS code")
    assert db.one(f"chat({_sql(answer)}, schema := {said})") == shown
    assert db.one(f"chat_row({_sql(answer)}, schema := {said}).output") == shown
    assert db.one(f"chat({_sql('no ' + answer)}, schema := {said})") is None
    assert db.codes == ["answer_unfit"]
    assert db.one(f"chat_row({_sql('no ' + answer)}, schema := {said}).error").startswith("answer_unfit: ")


def test_a_request_of_byzers_may_carry_a_schema(db: Database):
    """llm_param's map is a call like any other."""
    answer = db.one("""chat(llm_param(MAP {'instruction': '"b"', 'schema': '["a", "b"]'}))""")
    assert json.loads(answer)[0]["predict"] == "b"


def test_the_schema_is_part_of_what_decides_an_answer(db: Database):
    """Equal prompts with different schemas are different calls; with the same one they are one."""
    db.rows("SELECT chat_as('1', 'INTEGER'), chat_as('1', 'TINYINT'), chat_as('1', 'INTEGER') FROM range(50)")
    db.rows("SELECT chat('\"a\"', schema := ['a', 'b'])")
    db.rows("SELECT chat('\"a\"', schema := ['b', NULL, 'a', 'b'])")
    assert db.pool.prompts == ["1", "1", '"a"']
    assert len(set(db.pool.schemas)) == 3


def test_typed_answers_stand_wherever_an_expression_does(db: Database):
    """Views, macros, prepared statements, CREATE TABLE AS, WHERE, and a field of the answer."""
    db.rows("CREATE VIEW v AS SELECT chat_as(i::VARCHAR, 'TINYINT') AS n FROM range(3) r(i)")
    assert db.rows("SELECT sum(n) FROM v") == [(3,)]
    db.rows("CREATE MACRO twice(x) AS 2 * chat_as(x, 'INTEGER')")
    assert db.one("twice('21')") == 42
    db.rows("PREPARE p AS SELECT chat_as('7', $1)")
    assert db.rows("EXECUTE p('UTINYINT')") == [(7,)]
    db.rows("CREATE TABLE t AS SELECT chat_as('{\"a\":' || i || '}', 'STRUCT(a INTEGER)') AS x FROM range(3) r(i)")
    assert db.rows("SELECT x.a FROM t WHERE chat_as(x.a::VARCHAR, 'INTEGER') > 0 ORDER BY ALL") == [(1,), (2,)]


# -- what is wrong with a type -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("chat_as('x', 'BLOB')", "schema_type"),
        ("chat_as('x', 'STRUCT(a INTEGER, b BIT[])')", "schema_type"),
        ("chat_as('x', 'MAP(DOUBLE, INTEGER)')", "schema_type"),
        ("chat_as('x', 'UNION(a INTEGER, b VARCHAR)')", "schema_type"),
        ("chat_as('x', NULL)", "schema_type"),
        ("chat_as('x', '{\"type\":')", "schema_invalid"),
        ("chat_as('x', '{\"type\": \"strng\"}')", "schema_invalid"),
        ("chat('x', schema := 'NO_SUCH_TYPE')", "schema_type"),
        ("chat('x', schema := 'INTEGER); DROP TABLE t; --')", "schema_type"),
        ("chat('x', schema := [])", "schema_empty"),
        ("chat('x', schema := [NULL])", "schema_empty"),
        ("chat('x', schema := (SELECT list(i) FROM range(0) r(i) HAVING count(*) >= 0))", None),
        ("chat('x', schema := [['a']])", "schema_invalid"),
        ("chat('x', schema := 5)", "schema_invalid"),
        ("""chat('x', schema := '{"enum": []}')""", "schema_empty"),
        ("""chat('x', schema := '{"$ref": "http://localhost/x.json"}')""", "schema_invalid"),
        ("""chat('x', schema := '{"$ref": "#/$defs/none"}')""", "schema_invalid"),
        ("""chat('x', schema := '{"type": "string", "pattern": "("}')""", "schema_invalid"),
        ("chat('x', schema := repeat('[', 100000))", "schema_invalid"),
        ("free('x', schema := 'DATE')", "schema_unsupported"),
        ("free_as('x', 'DATE')", "schema_unsupported"),
    ],
)
def test_a_wrong_type_stops_the_statement_before_any_call(db: Database, expression: str, code: str | None):
    """What cannot be an answer is one clear error, not one for each row."""
    if code is None:  # an aggregate over no rows is NULL: no schema is said
        assert db.one(expression) == "x"
        return
    with pytest.raises(SqlextError) as caught:
        db.rows(f"SELECT {expression} FROM range(3)")
    assert caught.value.code == code
    assert isinstance(caught.value, Fatal if code == "schema_unsupported" else UserError)
    assert caught.value.hint
    assert db.pool.prompts == []


def test_types_that_duckdb_does_not_know_are_its_own_error(db: Database):
    """chat_as gives the expression its type as DuckDB plans it, so DuckDB says what it does not know."""
    with pytest.raises(duckdb.CatalogException, match="NO_SUCH_TYPE"):
        db.rows("SELECT chat_as('x', 'NO_SUCH_TYPE')")
    with pytest.raises(duckdb.BinderException, match="constant"):
        db.rows("SELECT chat_as('x', i::VARCHAR) FROM range(2) r(i)")


# -- JSON schemas ------------------------------------------------------------------------------------------------

NODE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"items": {"$ref": "#/$defs/node"}, "type": "array"},
            },
            "required": ["name", "children"],
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "integer"}, "BIGINT"),
        ({"type": ["number", "null"]}, "DOUBLE"),
        ({"type": "string", "format": "date"}, "DATE"),
        ({"type": "string", "format": "uuid"}, "UUID"),
        ({"type": "string", "format": "email"}, "VARCHAR"),
        ({"enum": ["a", "b'c", None]}, "ENUM('a', 'b''c')"),
        ({"const": True}, "BOOLEAN"),
        ({"enum": [1, "a"]}, "JSON"),
        ({"type": "array", "items": {"type": "boolean"}}, "BOOLEAN[]"),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}, "BIGINT[3]"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "MAP(VARCHAR, DOUBLE)"),
        ({"type": "object", "properties": {'a "b': {"anyOf": [{"type": "string"}, {"type": "null"}]}}}, None),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, "JSON"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "JSON"),
        ({}, "JSON"),
        (NODE, 'STRUCT("name" VARCHAR, children JSON[])'),
    ],
)
def test_a_json_schema_gives_the_column_its_type(db: Database, schema: dict[str, Any], kind: str | None):
    """The type is as narrow as SQL can say it, else JSON."""
    expected = kind or 'STRUCT("a ""b" VARCHAR)'
    found = db.rows(f"SELECT typeof(chat_as('null', {_sql(json.dumps(schema))}))")[0][0]
    assert found == db.rows(f"SELECT typeof(NULL::{expected})")[0][0]


def test_a_json_schemas_own_rules_hold(db: Database):
    """What a SQL type cannot say is held to as well, and properties that were left out are NULL."""
    said = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 5}, "b": {"type": "string"}},
        "required": ["a"],
    }
    assert db.said('{"a":5}', json.dumps(said)) == {"a": 5, "b": None}
    assert db.said('{"a":4}', json.dumps(said)) is None
    assert db.codes == ["answer_unfit"]
    assert db.said('{"name":"x","children":[{"name":"y","children":[]}]}', json.dumps(NODE)) == {
        "name": "x",
        "children": ['{"name":"y","children":[]}'],
    }


def test_days_are_those_that_exist():
    """The pattern of a date takes every day of the years 1 to 9999, and no other."""
    year = st.one_of(st.integers(0, 9999), st.sampled_from([0, 4, 100, 400, 1900, 2000, 2023, 2024, 9996]))

    @settings(max_examples=400, deadline=None)
    @given(year, st.integers(0, 13), st.integers(0, 32))
    def check(year: int, month: int, day: int) -> None:
        try:
            exists = bool(datetime.date(year, month, day))
        except ValueError:
            exists = False
        text = json.dumps(f"{year:04}-{month:02}-{day:02}")
        assert (schema.unfit(schema_from("DATE"), text, "stop") is None) == exists

    check()


def test_what_fits_a_type_can_be_cast_to_it():
    """Whatever JSON the schema of a type allows, DuckDB makes a value of it: none is lost on the way."""
    kinds = [
        "TINYINT",
        "UBIGINT",
        "HUGEINT",
        "DECIMAL(5,2)",
        "DECIMAL(38,38)",
        "DATE",
        "TIMESTAMPTZ",
        "FLOAT",
        "DOUBLE",
    ]
    kinds += ["MAP(INTEGER, DATE)", "MAP(ENUM('a', 'b'), UUID)", "STRUCT(a INTEGER[], b ENUM('x'))", "INTEGER[2]"]
    numbers = st.one_of(st.integers(-(10**40), 10**40), st.floats(allow_nan=False), st.integers(-200, 200))
    texts = st.one_of(
        st.sampled_from(
            ["x", "a", "2024-02-29", "2024-02-30", "1.5", "-0.0", "00", "-0", "7", str(10**38), "9" * 38]
        ),
        st.datetimes().map(lambda at: at.isoformat(timespec="seconds") + "+14:59"),
        st.uuids().map(str),
        st.text(max_size=5),
    )
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, texts),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
        max_leaves=5,
    )
    with duckdb.connect() as con:

        @settings(max_examples=600, deadline=None)
        @given(st.sampled_from(kinds), values)
        def check(kind: str, value: Any) -> None:
            text = json.dumps(value)
            if schema.unfit(schema_from(kind), text, "stop") is None:
                found = con.execute(f"SELECT from_json_strict(?, {_sql(json.dumps(kind))})", [text]).fetchone()
                assert found != (None,), (kind, text)

        check()


def test_schemas_of_types_are_read_back_as_types():
    """A schema made of a type gives that type again, where it is one that JSON schemas can say."""
    for kind in (
        "BIGINT",
        "VARCHAR",
        "DOUBLE",
        "BOOLEAN",
        "DATE",
        "UUID",
        "BIGINT[]",
        "DOUBLE[4]",
        "MAP(VARCHAR, DATE)",
    ):
        assert type_of_schema(json.loads(schema_from(kind))) == kind
