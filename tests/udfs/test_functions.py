"""What a person may write around a model function in DuckDB SQL, on a scripted model that answers in capitals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pytest
from scripted import ScriptedPool

from runtime.errors import Fatal, RowError, UserError
from runtime.gateway import Gateway, Statement
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, Task
from udfs.context import VARIABLE, StatementTable
from udfs.register import FunctionCatalog


class Echo(ScriptedPool):
    """Answers with what it was asked, so that a test sees what reached the model; 'bad' fails."""

    def run(self, worker, batch: Batch):
        self.batches.append((worker, list(batch.prompts)))
        self.options = batch.options
        shown = [
            prompt.upper() if isinstance(prompt, str) else "|".join(f"{m.role}:{m.content}" for m in prompt)
            for prompt in batch.prompts
        ]
        errors = {
            row: RowError("This row is bad.", code="bad_row").info for row, text in enumerate(shown) if text == "BAD"
        }
        count = len(shown)
        yield Answers(range(count), shown, ["stop"] * count, [3] * count, [4] * count, 1.5, errors)


class Vectors(ScriptedPool):
    """An embedding model of dimension 3: (length, 1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "embed"
        self.info = EngineInfo("scripted", Task.EMBED, dimension=3)

    def run(self, worker, batch: Batch):
        vectors = np.array([[len(p), 1, 0] for p in batch.prompts], np.float32)
        count = len(vectors)
        yield Answers(range(count), vectors, ["stop"] * count, [1] * count, [0] * count, 1.0)


class Labels(ScriptedPool):
    """A classifier that calls long texts long."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "clf"
        self.info = EngineInfo("scripted", Task.CLASSIFY)

    def run(self, worker, batch: Batch):
        answers = [("long", 0.9) if len(p) > 3 else ("short", 0.8) for p in batch.prompts]
        count = len(answers)
        yield Answers(range(count), answers, ["stop"] * count, [1] * count, [0] * count, 1.0)


class Database:
    """A database with the functions chat, embed and clf."""

    def __init__(self) -> None:
        self.raw = duckdb.connect()
        self.statements = StatementTable()
        self.functions = FunctionCatalog(self.raw.cursor(), self.statements)
        self.pool = Echo()
        self.put("chat", self.pool)
        self.put("embed", Vectors())
        self.put("clf", Labels())
        self.functions.catch_up(self.raw, 0)

    def put(self, name: str, pool: ScriptedPool) -> None:
        replaced = self.functions.put(name, Gateway(pool))
        if replaced:
            replaced.close()

    def rows(self, query: str, statement: Statement | None = None) -> list[tuple]:
        statement = statement or Statement(self.statements.new_id())
        self.raw.execute(f"SET VARIABLE {VARIABLE} = '{self.statements.add(statement)}'")
        return self.raw.execute(query).fetchall()

    def one(self, expression: str, statement: Statement | None = None):
        return self.rows(f"SELECT {expression}", statement)[0][0]

    def close(self) -> None:
        gateways = self.functions.gateways().values()
        self.functions.close()
        for gateway in gateways:
            gateway.close()
        self.functions._admin.close()
        self.raw.close()


@pytest.fixture
def db() -> Iterator[Database]:
    database = Database()
    yield database
    database.close()


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("chat('hi')", "HI"),
        ("chat(42)", "42"),
        ("chat(DATE '2026-01-02')", "2026-01-02"),
        ("chat(1.50)", "1.50"),
        ("chat(true)", "TRUE"),
        ("chat(['a', 'b'])", "[A, B]"),
        ("chat(NULL)", None),
        ("chat('')", ""),
        ("chat('it''s $$ -- no comment')", "IT'S $$ -- NO COMMENT"),
        ("chat([{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'u'}])", "system:S|user:u"),
        ("chat([{'content': 'u', 'role': 'user'}])", "user:u"),
        ("chat({'role': 'user', 'content': 'u'})", "{'ROLE': USER, 'CONTENT': U}"),
        ("""chat('[{"role":"user","content":"a text, not messages"}]')[1:3]""", '[{"'),
        ("chat(chat('a') || chat('b'))", "AB"),
        ("CASE WHEN true THEN 'no call' ELSE chat('x') END", "no call"),
        ("coalesce(chat(NULL), chat('b'))", "B"),
        ("list_transform(['a', 'b'], lambda x: chat(x))", ["A", "B"]),
        ("clf('a')", {"label": "short", "score": 0.8}),
        ("clf('abcd').label", "long"),
        ("clf(NULL)", None),
        ("typeof(embed('abc'))", "FLOAT[3]"),
        ("embed('abc')", (3.0, 1.0, 0.0)),
        ("embed(NULL)", None),
        ("array_cosine_similarity(embed('abc'), embed('xyz'))", 1.0),
        ("typeof(clf('a'))", 'STRUCT("label" VARCHAR, score DOUBLE)'),
    ],
)
def test_expressions(db: Database, expression: str, answer: object):
    """One call each: casts, NULLs, message lists, nesting, and the types of the answers."""
    assert db.one(expression) == answer


def test_chat_row_shows_everything(db: Database):
    """The _row form tells output, tokens, time, model and whether a call was saved."""
    first, second = (row[0] for row in db.rows("SELECT chat_row('a') FROM range(2)"))
    assert first == {
        "output": "A",
        "error": None,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached": False,
        "latency_ms": 1.5,
        "model": "chat",
    }
    assert second["output"] == "A"
    assert db.one("chat_row(NULL)") is None
    assert db.one("embed_row('ab').output") == (2.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [
        ("system := 'be brief'", "system", "be brief"),
        ("temperature := 0", "temperature", None),  # greedy, as what is not said
        ("temperature := 0.7, seed := 3", "temperature", 0.7),
        ("max_tokens := 5", "max_tokens", 5),
        ("top_p := 0.5", "top_p", 0.5),
        ("top_k := 4", "top_k", 4),
        ("stop := 'x'", "stop", ("x",)),
        ("stop := ['x', 'y']", "stop", ("x", "y")),
        ("seed := 12", "seed", 12),
    ],
)
def test_named_options_reach_the_model(db: Database, call: str, field: str, value: object):
    """Each named option of a call arrives as it was said."""
    db.one(f"chat('q', {call})")
    assert getattr(db.pool.options, field) == value


def test_options_may_come_from_columns(db: Database):
    """A column may say the option, also one that is called like it; rows with equal options share a batch."""
    rows = db.rows(
        "SELECT chat(prompt, system := system) FROM (VALUES ('a','s'), ('b','s'), ('c',NULL)) t(prompt, system)"
    )
    assert rows == [("A",), ("B",), ("C",)]
    assert sorted(len(prompts) for _, prompts in db.pool.batches) == [1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("temperature := -1", "temperature must be a number, at least 0"),
        ("temperature := 'hot'", "temperature must be a number"),
        ("max_tokens := 0", "max_tokens must be a whole number, at least 1"),
        ("max_tokens := 1.5", "max_tokens must be a whole number"),
        ("top_p := 1.5", "top_p must be a number, from 0 to 1"),
        ("stop := ''", "stop must be a text or a list of texts"),
        ("seed := -4", "seed must be a whole number"),
        ("system := 5", "system must be a text"),
        ("max_tokens := 'inf'", "max_tokens must be a whole number"),
    ],
)
def test_a_wrong_option_value_is_said_clearly(db: Database, call: str, message: str):
    """A value of the wrong type or out of range stops the statement, with the option's name and range."""
    statement = Statement(db.statements.new_id())
    with pytest.raises(duckdb.Error, match=message):
        db.one(f"chat('q', {call})", statement)
    assert isinstance(statement.failure, UserError)


def test_an_unknown_option_lists_the_known_ones(db: Database):
    """A misspelt option name is an error of DuckDB's that shows the signature."""
    with pytest.raises(duckdb.BinderException, match="temperature := NULL"):
        db.one("chat('q', temprature := 1)")


def test_a_greedy_call_runs_once_and_a_sampled_one_for_every_row(db: Database):
    """Equal deterministic calls are one; temperature above 0 without a seed draws for each row."""
    db.rows("SELECT chat('q') FROM range(100)")
    assert len(db.pool.prompts) == 1
    db.rows("SELECT chat('q', temperature := 1) FROM range(100)")
    assert len(db.pool.prompts) == 101
    db.rows("SELECT chat('q', temperature := 1, seed := 5) FROM range(100)")
    assert len(db.pool.prompts) == 102


def test_a_sampled_default_is_sampled_too(db: Database):
    """A model deployed with a temperature draws for every row without saying so in the call."""
    pool = Echo(defaults=CallOptions(temperature=0.5))
    db.put("chat", pool)
    db.functions.catch_up(db.raw, 1)
    db.rows("SELECT chat('q') FROM range(10)")
    assert len(pool.prompts) == 10
    db.rows("SELECT chat('q', temperature := 0) FROM range(10)")
    assert len(pool.prompts) == 11


@pytest.mark.parametrize(
    ("on_error", "value"), [("record", None), ("null", None), ("fail", 'A row failed in "chat": This row is bad.')]
)
def test_a_bad_row_is_treated_as_on_error_says(db: Database, on_error: str, value: str | None):
    """record lists the row and gives NULL, null gives NULL, fail stops the statement with the cause."""
    statement = Statement(db.statements.new_id(), on_error=on_error)
    query = "SELECT chat(p) FROM (VALUES ('a'), ('bad'), ('c')) t(p)"
    if value:
        with pytest.raises(duckdb.Error, match="This row is bad"):
            db.rows(query, statement)
        assert isinstance(statement.failure, Fatal)
    else:
        assert db.rows(query, statement) == [("A",), (None,), ("C",)]
        assert statement.failed == 1
    codes = [(row.model, row.code) for row in statement.failed_rows]
    assert codes == ([("chat", "bad_row")] if on_error == "record" else [])
    assert db.rows("SELECT chat_row(p).error FROM (VALUES ('a'), ('bad')) t(p)") == [
        (None,),
        ("bad_row: This row is bad.",),
    ]


def test_a_list_of_messages_that_is_wrong_is_an_error_of_its_row(db: Database):
    """An unknown role spoils one row, not the query."""
    rows = db.rows(
        "SELECT chat_row([{'role': r, 'content': 'x'}]) FROM (VALUES ('user'), ('king')) t(r)",
    )
    assert rows[0][0]["output"] == "user:x"
    assert rows[1][0]["output"] is None
    assert "role" in rows[1][0]["error"]


SHAPES = [
    "SELECT chat(p) FROM t",
    "FROM t SELECT chat(p)",
    "SELECT upper(p) FROM t WHERE chat(p) = upper(p)",
    "SELECT a FROM (SELECT chat(p) AS a FROM t) WHERE a LIKE '%'",
    "WITH c AS (SELECT chat(p) AS a FROM t) SELECT a FROM c",
    "WITH c AS MATERIALIZED (SELECT p FROM t) SELECT chat(p) FROM c",
    "SELECT a.x FROM (SELECT chat(p) AS x, n FROM t) a JOIN t b USING (n)",
    "SELECT chat(a.p) FROM t a LEFT JOIN t b ON a.n = b.n + 100",
    "SELECT (SELECT chat(b.p) FROM t b WHERE b.n = a.n) FROM t a",
    "SELECT max(chat(p)) FROM t GROUP BY p",
    "SELECT chat(max(p)) FROM t GROUP BY n",
    "SELECT first_value(chat(p)) OVER (PARTITION BY n) FROM t",
    "SELECT chat(p) FROM t UNION SELECT chat(p) FROM t",
    "SELECT chat(p) FROM t QUALIFY row_number() OVER (PARTITION BY n) = 1",
    "SELECT unnest([chat(p)]) FROM t",
    "SELECT chat(p) FROM t ORDER BY chat(p) DESC",
    "SELECT chat(p) FROM t WHERE p IN (SELECT lower(chat(p)) FROM t)",
    "SELECT s.x FROM (SELECT {'x': chat(p)} AS s FROM t)",
    "SELECT DISTINCT chat(p) FROM t",
    "SELECT a.x FROM t, LATERAL (SELECT chat(t.p) AS x) a",
    "SELECT CASE WHEN n >= 0 THEN chat(p) END FROM t",
    "SELECT array_agg(chat(p))[1] FROM t GROUP BY n",
    "SELECT chat(p) FROM t TABLESAMPLE 100%",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_query_shapes(db: Database, shape: str):
    """Functions work wherever an expression may stand, and no distinct input is asked twice."""
    db.raw.execute("CREATE TABLE t AS SELECT 'p' || i AS p, i AS n FROM range(20) r(i)")
    assert sorted(row[0] for row in db.rows(shape)) == sorted(f"P{i}" for i in range(20))
    assert sorted(db.pool.prompts) == sorted(f"p{i}" for i in range(20))


WRITES = [
    "CREATE TABLE out AS SELECT chat(p) AS a FROM t",
    "CREATE TABLE out (a VARCHAR); INSERT INTO out SELECT chat(p) FROM t",
    "CREATE TABLE out AS SELECT p AS a FROM t; UPDATE out SET a = chat(a)",
    "CREATE VIEW out AS SELECT chat(p) AS a FROM t",
    "CREATE TABLE out AS SELECT p AS a FROM t WHERE false; "
    "MERGE INTO out USING (SELECT chat(p) AS a FROM t) s ON out.a = s.a WHEN NOT MATCHED THEN INSERT VALUES (s.a)",
    "CREATE MACRO shout(x) AS chat(x); CREATE TABLE out AS SELECT shout(p) AS a FROM t",
    "COPY (SELECT chat(p) AS a FROM t) TO '{folder}/o.parquet'; CREATE TABLE out AS FROM '{folder}/o.parquet'",
    "PREPARE q AS SELECT chat(p || $1) FROM t; CREATE TABLE out AS SELECT chat(p) AS a FROM t; EXECUTE q('')",
]


@pytest.mark.parametrize("script", WRITES)
def test_statements_that_write(db: Database, script: str, tmp_path):
    """CTAS, INSERT, UPDATE, MERGE, COPY, views, macros and prepared statements carry the answers."""
    db.raw.execute("CREATE TABLE t AS SELECT 'p' || i AS p FROM range(20) r(i)")
    for statement in script.format(folder=tmp_path).split("; "):
        db.rows(statement)
    assert sorted(db.rows("FROM out")) == sorted((f"P{i}",) for i in range(20))
    assert len(db.pool.prompts) == 20


def test_limit_asks_only_what_it_shows(db: Database):
    """LIMIT 5 over a table of 5,000 makes five calls."""
    assert len(db.rows("SELECT chat(i) FROM range(5000) r(i) LIMIT 5")) == 5
    assert len(db.pool.prompts) == 5


def test_every_cursor_has_the_function(db: Database):
    """A cursor that is not ours and has no macros calls the function by its plain form; threads do not disturb."""
    db.raw.execute("CREATE TABLE t AS SELECT 'p' || i AS p FROM range(3000) r(i)")

    def run(number: int) -> int:
        with db.raw.cursor() as cursor:
            return cursor.execute("SELECT count(DISTINCT chat(p)) FROM t").fetchone()[0]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == [3000] * 4
    assert len(db.pool.prompts) == 3000


def test_a_redeployed_model_takes_over_in_the_middle_of_a_query(db: Database):
    """A query that runs while its model is exchanged gets every answer, from one or the other."""
    exchanged: list[bool] = []

    def script(batch: Batch) -> None:
        if not exchanged:
            exchanged.append(True)
            with ThreadPoolExecutor(1) as thread:
                new = Gateway(ScriptedPool())
                thread.submit(db.functions.put, "chat", new).result()

    old = Gateway(ScriptedPool(script))
    db.functions.put("chat", old).close()
    rows = db.rows("SELECT chat('p' || i) FROM range(10000) r(i)")
    assert sorted(rows) == sorted((f"P{i}",) for i in range(10000))
    old.close()


def test_a_model_of_another_kind_takes_over(db: Database):
    """The same name may become an embedding model; a cursor sees it at its next statement."""
    db.put("chat", Vectors())
    db.functions.catch_up(db.raw, 1)
    assert db.one("chat('abc')") == (3.0, 1.0, 0.0)


def test_a_removed_model_is_said_on_every_cursor(db: Database):
    """After removal a call says that there is no model, on our cursors and on others; deploying again mends it."""
    db.functions.remove("chat").close()
    for cursor in (db.raw, db.raw.cursor()):
        with pytest.raises(duckdb.Error, match='no model behind "chat"'):
            cursor.execute("SELECT chat('x')")
    db.put("chat", Echo())
    for cursor in (db.raw, db.raw.cursor()):
        assert cursor.execute("SELECT chat('x')").fetchone() == ("X",)


def test_removing_a_model_under_a_running_query_ends_it_with_an_error(db: Database):
    """The query that loses its model ends with one error; the process lives."""
    begun = threading.Event()
    pool = ScriptedPool(lambda _: begun.set(), max_batch_rows=100)
    db.put("chat", pool)

    def run() -> None:
        with db.raw.cursor() as cursor:
            cursor.execute("SELECT sum(length(chat('p' || i))) FROM range(3000000) r(i)").fetchall()

    with ThreadPoolExecutor(1) as threads:
        query = threads.submit(run)
        assert begun.wait(10)
        db.functions.remove("chat").close()
        with pytest.raises(duckdb.Error, match="no model behind"):
            query.result(timeout=30)


def test_new_defaults_reach_queries_that_run(db: Database):
    """Deploying with other generation defaults is no reason for a running query to fail."""
    exchanged: list[bool] = []

    def script(batch: Batch) -> None:
        if not exchanged:
            exchanged.append(True)
            gateway = Gateway(ScriptedPool(defaults=CallOptions(max_tokens=3)))
            with ThreadPoolExecutor(1) as thread:
                thread.submit(db.functions.put, "chat", gateway).result()

    old = Gateway(ScriptedPool(script))
    db.functions.put("chat", old).close()
    assert len(db.rows("SELECT chat('p' || i) FROM range(10000) r(i)")) == 10000
    old.close()


def test_two_sessions_share_a_database():
    """A second session on the same database has functions of its own under the same names."""
    one = Database()
    statements = StatementTable()
    other = FunctionCatalog(one.raw.cursor(), statements)
    other.put("chat", Gateway(ScriptedPool()))
    cursor = one.raw.cursor()
    other.catch_up(cursor, 0)
    assert cursor.execute("SELECT chat('a'), llm_prompt('{0}', ['x'])").fetchone() == ("A", "x")
    for gateway in other.gateways().values():
        gateway.close()
    cursor.close()
    other._admin.close()
    assert one.one("chat('b')") == "B"
    one.close()


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("chat_row([{'role': 'user', 'content': 'x'}, NULL])", "bad_messages"),
        ("chat_row([{'role': 'user', 'content': NULL}])", "bad_messages"),
        ("chat_row(llm_param(MAP {'question': 'no instruction'}))", "bad_request"),
        ("chat_row(llm_param({'instruction': 'q', 'history': 'x'}))", "bad_request"),
        ("chat_row(llm_param({'instruction': 'q', 'history': 5}))", "bad_request"),
    ],
)
def test_odd_prompts_are_errors_of_their_row(db: Database, call: str, code: str):
    """What cannot be a prompt spoils one row, with a code."""
    assert db.one(f"{call}.error").startswith(code)


@pytest.mark.parametrize(
    ("call", "answer"),
    [("chat([{'a': 1}])", "[{'A': 1}]"), ("chat(llm_param(NULL))", None), ("chat({'content': 1})", "{'CONTENT': 1}")],
)
def test_odd_values_are_texts(db: Database, call: str, answer: str | None):
    """A list or struct that is no list of messages is cast to text like any value; a NULL request is NULL."""
    assert db.one(call) == answer


def test_two_databases_know_nothing_of_each_other():
    """The same name in two databases is two functions."""
    one, other = Database(), Database()
    other.functions.remove("chat").close()
    assert one.one("chat('a')") == "A"
    one.close()
    other.close()


def test_a_million_rows_pass_in_constant_memory(db: Database):
    """Rows go through in chunks; what is remembered is bounded."""
    pool = ScriptedPool(max_batch_rows=2048)
    replaced = db.functions.put("chat", Gateway(pool, memory_bytes=1_000_000))
    replaced.close()
    rows = db.rows("SELECT count(chat(i)), min(length(chat(i))) FROM range(200000) r(i)")
    assert rows == [(200_000, 1)]
    assert len(db.functions.gateways()["chat"]._known) < 5000


BYZER = [
    ("chat(llm_param(MAP {'instruction': 'q'}))", "Q"),
    (
        "chat(llm_param(MAP {'instruction': 'q', 'system_msg': 'S', 'user_role': 'User', 'assistant_role': 'AI'}))",
        "S\nUSER:Q\nAI:",
    ),
    ("chat(llm_param({'instruction': 'q', 'max_length': 7}))", "Q"),
    ("chat('plain')", "PLAIN"),
]


@pytest.mark.parametrize(("call", "answer"), BYZER)
def test_byzer_requests(db: Database, call: str, answer: str):
    """What llm_param makes is a question; llm_result reads the answer, also of a plain call."""
    assert db.one(f"llm_result({call})") == answer.upper()
    assert db.one(f"llm_response_predict({call})") == answer.upper()


def test_byzer_response_form(db: Database):
    """A call with llm_param answers in Byzer's form, with its counts."""
    said = json.loads(db.one("chat(llm_param(MAP {'instruction': 'q', 'max_length': '7', 'generation.top_k': '3'}))"))
    assert said[0]["predict"] == "Q"
    assert said[0]["metadata"]["generated_tokens_count"] == 4
    assert (db.pool.options.max_tokens, db.pool.options.top_k) == (7, 3)
    assert db.one("llm_response_full(chat(llm_param(MAP {'instruction': 'q'})))") == "qQ"


def test_byzer_requests_use_the_chat_template(db: Database):
    """A model with a chat template gets turns instead of written-out roles."""
    pool = Echo()
    pool.info = EngineInfo("scripted", Task.GENERATE, chat_template=True)
    db.put("chat", pool)
    asked = "chat(llm_param(MAP {'instruction': 'q', 'system_msg': 'S', 'user_role': 'User'}))"
    assert db.one(f"llm_result({asked})") == "system:S|user:q"
    stacked = f"chat(llm_stack({asked}, llm_param(MAP {{'instruction': 'and?'}})))"
    assert db.one(f"llm_result({stacked})") == "user:q|assistant:system:S|user:q|user:and?"


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("llm_prompt('a {0} b {1} {0}', ['x', 'y'])", "a x b y x"),
        ("llm_prompt('{} and {}', ['x', 'y'])", "x and y"),
        ("llm_prompt('{0}', ['{1}', 'no'])", "{1}"),
        ("llm_prompt('{\"json\": {0}} {7}', [1])", '{"json": 1} {7}'),
        ("llm_prompt(NULL, ['x'])", None),
        ("list_transform(llm_split('aa. bb. cc', ['. '], 5), lambda x: x.content)", ["aa. ", "bb. ", "cc"]),
        ("list_transform(llm_split('abcdefg', ['.'], 3), lambda x: x.content)", ["abc", "def", "g"]),
        ("llm_split('', ['.'], 3)", []),
    ],
)
def test_byzer_text_helpers(db: Database, expression: str, answer: object):
    """llm_prompt fills in one pass; llm_split cuts behind separators and loses nothing."""
    assert db.one(expression) == answer
