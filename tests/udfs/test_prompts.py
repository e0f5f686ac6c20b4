"""What `prompt(template, columns)` makes of rows, in a real DuckDB."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from udfs.context import StatementTable
from udfs.prompts import PromptOrders, Template, best_order
from udfs.register import FunctionCatalog

REVIEWS = """
    CREATE TABLE reviews AS
    SELECT 'review no ' || i || ' says that it is ' || repeat('rather ', i % 7) || 'good' AS review,
           'A product of kind ' || (i * 7919 % 25) || ', ' || repeat('described at length ', 10) AS product,
           i // 25 % 5 + 1 AS stars
    FROM range(6000) t(i)
"""


class Database:
    """A database with `prompt`, and its orders."""

    def __init__(self, orders: PromptOrders | None = None) -> None:
        self.raw = duckdb.connect()
        self.orders = orders or PromptOrders()
        self.admin = self.raw.cursor()
        self.functions = FunctionCatalog(self.admin, StatementTable(), self.orders)
        self.functions.catch_up(self.raw, 0)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self.raw.cursor()
        self.functions.catch_up(cursor, 0)
        return cursor

    def column(self, query: str) -> list:
        return [row[0] for row in self.raw.execute(query).fetchall()]

    def one(self, template: str, columns: str):
        template = template.replace("'", "''")
        return self.column(f"SELECT prompt('{template}', {columns})")[0]

    def close(self) -> None:
        self.functions.close()
        self.admin.close()
        self.raw.close()


@pytest.fixture
def db() -> Iterator[Database]:
    database = Database()
    yield database
    database.close()


def shared(prompts: list[str]) -> int:
    """Characters that each prompt has in common with the one before it in sorted order."""
    return sum(
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        for one, other in itertools.pairwise(sorted(prompts))
    )


@pytest.mark.parametrize(
    ("template", "columns", "answer"),
    [
        ("Is {product} good? {review}", "{'product': 'tea', 'review': 'yes'}", "Is tea good? yes"),
        ("{a}{a}{b}", "{'a': 1, 'b': 2}", "112"),
        ("{A} { b}", "{'a': 1, ' b': 2}", "1 2"),
        ("no field", "{'a': 1}", "no field"),
        ("", "{'a': 1}", ""),
        ("{*}", "{'a': 1, 'b': 'x'}", "a: 1\nb: x"),
        ("{b}: {*}!", "{'a': 1, 'b': 'x', 'c': 'y'}", "x: a: 1\nc: y!"),
        ("{a}{*}", "{'a': 1}", "1"),
        ('Answer {{"label": "{a}"}}', "{'a': 1}", 'Answer {"label": "1"}'),
        ("{{a}} {{{a}}}", "{'a': 1}", "{a} {1}"),
        ("{a}|{b}", "{'a': NULL, 'b': 'x'}", "|x"),
        ("{*}", "{'a': NULL, 'b': 'x', 'c': ''}", "b: x\nc: "),
        ("{*}", "{'a': NULL}", ""),
        ("{a}", "{'a': '{b} {*} {{ }} \"it''s\" \\n {'}", '{b} {*} {{ }} "it\'s" \\n {'),
        ("{a}", "{'a': 'x' || chr(0) || 'y' || chr(10) || 'é😀漢'}", "x\0y\né😀漢"),
        ("{größe}", "{'größe': 5}", "5"),
        (
            "{a} {b} {c}",
            "{'a': 1.50, 'b': 0.1::FLOAT, 'c': 12345678901234567890123}",
            "1.50 0.1 12345678901234567890123",
        ),
        (
            "{a} {b}",
            "{'a': DATE '2026-01-02', 'b': TIMESTAMP '2026-01-02 03:04:05'}",
            "2026-01-02 2026-01-02 03:04:05",
        ),
        ("{a} {b}", "{'a': true, 'b': 'nan'::DOUBLE}", "true nan"),
        ("{a}", "{'a': [1, 2], 'b': 3}", "[1,2]"),
        ("{a}", "{'a': {'x': 'it''s \"so\"', 'y': [NULL, 1.5]}}", '{"x":"it\'s \\"so\\"","y":[null,1.5]}'),
        ("{a} {b}", "{'a': '[1, 2', 'b': '{\"x\": 1}'}", '[1, 2 {"x": 1}'),
        ("{*}", "MAP {'a': 1, 'b': 2}", "a: 1\nb: 2"),
        ("{b} {a}", """'{"a": [1,  2], "b" : "x"}'::JSON""", "x [1,2]"),
        ("{a}", "NULL::STRUCT(a INTEGER)", None),
    ],
)
def test_a_prompt_is_the_template_with_its_fields(db: Database, template: str, columns: str, answer: str | None):
    """Named fields, all others as lines, braces, NULLs, and values exactly as they are."""
    assert db.one(template, columns) == answer


def test_the_columns_may_be_a_whole_row(db: Database):
    """A table's alias stands for all its columns; NULL rows and NULL templates are NULL."""
    db.raw.execute("CREATE TABLE t AS SELECT i AS a, 'x' || i AS b FROM range(3) r(i)")
    assert db.column("SELECT prompt('{b}-{a}', t) FROM t ORDER BY a") == ["x0-0", "x1-1", "x2-2"]
    assert db.column("SELECT prompt(CASE WHEN a = 1 THEN NULL ELSE '{a}' END, t) FROM t ORDER BY a") == [
        "0",
        None,
        "2",
    ]
    found = db.column("SELECT prompt('{a}', CASE WHEN a = 1 THEN NULL ELSE t END) FROM t ORDER BY a")
    assert found == ["0", None, "2"]
    assert db.column("SELECT prompt(b || ' {a}', t) FROM t ORDER BY a") == ["x0 0", "x1 1", "x2 2"]


def test_an_unknown_name_is_an_error_with_the_nearest_field(db: Database):
    """It names fields and never a value."""
    with pytest.raises(duckdb.InvalidInputException, match=r'"prodct"(.|\n)*Did you mean \{product\}') as caught:
        db.one("{prodct}", "{'product': 'secret tea'}")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="character 8") as error:
        Template.read('Answer {"label": 1}', ("a", "b"))
    assert (error.value.code, error.value.hint) == (
        "prompt_field",
        "Fields: a, b. Braces that are text are written {{ and }}.",
    )
    assert "label" not in str(error.value)


@pytest.mark.parametrize("template", ["{", "}", "a { b", "{{}", "{a}}", "{a{b}}"])
def test_a_single_brace_is_an_error(template: str):
    """What was meant cannot be guessed."""
    with pytest.raises(UserError) as caught:
        Template.read(template, ("a", "b"))
    assert caught.value.code == "prompt_template"


def test_what_repeats_goes_to_the_front(db: Database):
    """The long field that few products share leads, the review of each row ends."""
    db.raw.execute(REVIEWS)
    chosen = db.column("SELECT prompt('Is it good?\n{*}', r) FROM reviews r")
    given_order = db.column(
        "SELECT prompt('Is it good?\nreview: {review}\nproduct: {product}\nstars: {stars}', r) FROM reviews r"
    )
    assert [line.split(":")[0] for line in chosen[0].split("\n")[1:]] == ["product", "stars", "review"]
    assert sorted(map(len, chosen)) == sorted(map(len, given_order))
    assert shared(chosen) > 5 * shared(given_order)


def test_equal_rows_give_equal_prompts_for_ever(db: Database):
    """In every chunk, thread and statement, also when other rows would suggest another order by then."""
    db.raw.execute(REVIEWS)
    query = "SELECT review, prompt('{*}', {'review': review, 'product': product, 'stars': stars}) FROM reviews"
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(lambda _: dict(db.cursor().execute(query).fetchall()), range(8))
    assert all(other == first for other in others)
    swapped = "SELECT prompt('{*}', {'review': product, 'product': review, 'stars': stars}) FROM reviews"
    assert all(text.startswith("product: review no") for text in db.column(swapped))
    lone = dict(db.raw.execute(f"{query} WHERE review LIKE 'review no 77 %'").fetchall())
    assert lone == {review: first[review] for review in lone}


def test_few_rows_decide_nothing(db: Database):
    """They say little of repetition: their fields stand as they are given, in all chunks of their statement."""
    db.raw.execute(REVIEWS)
    assert db.column("SELECT prompt('{*}', r) FROM reviews r LIMIT 15")[0].startswith("review: ")
    assert db.column("SELECT prompt('{*}', r) FROM reviews r")[0].startswith("review: ")
    db.orders.new_statement()
    assert db.column("SELECT prompt('{*}', r) FROM reviews r")[0].startswith("product: ")


def test_an_order_is_remembered_by_other_processes():
    """The first decision counts, also for a process that meets other rows first or decides at the same time."""
    kept: dict[str, str] = {}
    columns = {"a": [str(n) for n in range(16)], "b": ["x"] * 16}
    assert PromptOrders(kept.get, kept.setdefault).order("{*}", columns, ("a", "b")) == ("b", "a")
    swapped = {"a": columns["b"], "b": columns["a"]}
    assert PromptOrders(kept.get, kept.setdefault).order("{*}", swapped, ("a", "b")) == ("b", "a")

    def late(key: str, order: str) -> None:  # another process was faster, between the look and this
        kept[key] = '["a", "b"]'

    kept.clear()
    assert PromptOrders(kept.get, late).order("{*}", columns, ("a", "b")) == ("a", "b")


@pytest.mark.parametrize("kept", ["[]", '["a"]', '["a", "a"]', '["a", "c"]'])
def test_a_remembered_order_of_other_fields_is_not_used(kept: str):
    """Whatever the map says, every field is in the prompt once."""
    orders = PromptOrders(lambda key: kept, lambda key, order: None)
    assert orders.order("{*}", {"a": ["1", "2"] * 8, "b": ["x", "x"] * 8}, ("a", "b")) == ("b", "a")


def test_orders_belong_to_their_template_and_fields():
    """Another template or other fields decide for themselves."""
    orders = PromptOrders()
    columns = {"a": ["1", "2"] * 8, "b": ["x", "x"] * 8, "c": ["y", "y"] * 8}
    assert orders.order("{*}", columns, ("a", "b")) == ("b", "a")
    assert orders.order("{*}", {**columns, "b": ["1", "2"] * 8, "a": ["x", "x"] * 8}, ("a", "b")) == ("b", "a")
    assert orders.order("{*}!", {**columns, "b": ["1", "2"] * 8, "a": ["x", "x"] * 8}, ("a", "b")) == ("a", "b")
    assert orders.order("{*}", columns, ("a", "b", "c")) == ("b", "c", "a")


def test_a_short_field_does_not_break_the_sharing_of_a_long_one():
    """A rating that repeats more often than a product, but is short, comes behind it; an id goes with its product."""
    chance = random.Random(1)
    products = [chance.randrange(100) for _ in range(2000)]
    columns = {
        "rating": [str(chance.randrange(5)) for _ in products],
        "review": [f"{number} " + "text " * 200 for number, _ in enumerate(products)],
        "description": [f"product {product} " * 40 for product in products],
        "id": [str(product) for product in products],
    }
    assert best_order(columns) == ("description", "id", "rating", "review")


@given(
    st.lists(
        st.tuples(*[st.sampled_from(["x", "y" * 9, None])] * 2, st.sampled_from("abcdef")), min_size=1, max_size=30
    )
)
def test_an_order_holds_every_field_once(rows):
    """Whatever the values, the order is a permutation, and the same for the same rows."""
    columns = dict(zip(("a", "b", "c"), map(list, zip(*rows, strict=True)), strict=True))
    assert sorted(best_order(columns)) == ["a", "b", "c"]
    assert best_order(columns) == best_order(columns)


@given(st.text(max_size=20), st.text(max_size=20))
def test_values_are_never_read_as_templates(one: str, other: str):
    """Braces in a value stay what they are."""
    template = Template.read("{a} and {{ {b}", ("a", "b"))
    assert next(iter(template.fill({"a": [one], "b": [other]}, ()))) == f"{one} and {{ {other}"
