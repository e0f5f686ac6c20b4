"""action="render": what a model would read for each row, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest

import sqlext
from runtime.errors import UserError
from runtime.prompts.preview import undeclared_variables, writer

TURNS = [
    {"role": "system", "content": "This is a system prompt."},
    {"role": "user", "content": "This is a user prompt."},
    {"role": "assistant", "content": "This is a response."},
    {"role": "user", "content": "This is a follow up"},
]


@pytest.fixture
def con() -> Iterator[sqlext.Connection]:
    """A connection without a cluster: none is needed."""
    with sqlext.connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.language_model(tmp_path_factory.mktemp("render") / "chat")


def rendered(con: sqlext.Connection, statement: str) -> list[dict[str, object]]:
    return con.execute(statement).arrow().to_pylist()


def test_text_and_tokens_are_those_of_transformers(con, chat):
    """A literal conversation: character by character and token by token what apply_chat_template makes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat)
    for said, ask in (("", True), (' AND add_generation_prompt="false"', False)):
        (row,) = rendered(
            con, f"RUN command AS LLM.`{chat}` WHERE action='render' AND messages='{json.dumps(TURNS)}'{said}"
        )
        assert row["text"] == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=ask)
        ids = tokenizer.apply_chat_template(TURNS, add_generation_prompt=ask, return_dict=True)["input_ids"]
        assert row["tokens"] == len(ids)
        assert (row["row"], row["undeclared"], row["error"]) == (1, [], None)


def test_tokens_are_those_that_a_deployed_model_counts(chat):
    """The engine's own count of each prompt, an empty one too."""
    from runtime.engines import loader
    from runtime.spec import Batch, CallOptions, ModelSpec

    engine = loader("transformers")(ModelSpec("m", "transformers", str(chat)))
    prompts = ["hi", "a list holds values", ""]
    counted = engine.count_tokens(Batch(0, CallOptions(), prompts))
    assert [each.tokens for each in writer(str(chat)).previews(prompts)] == counted


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("SELECT [{'role': 'user', 'content': 'hi'}] AS messages", "<|user|>hi<|end|>"),
        ("""SELECT '[{"role": "user", "content": "hi"}]' AS messages""", "<|user|>hi<|end|>"),
        (
            "SELECT 'ask' AS instruction, 'this' AS input, 'so' AS output",
            "<|user|>ask\nthis<|end|><|assistant|>so<|end|>",
        ),
        ("SELECT [{'human': 'hi', 'assistant': 'ho'}] AS conversation", "<|user|>hi<|end|><|assistant|>ho<|end|>"),
        ("SELECT 'hi' AS prompt, 7 AS other", "<|user|>hi<|end|>"),
        ("SELECT [{'role': 'user', 'content': 'hi'}] AS prompt", "<|user|>hi<|end|>"),
        ("SELECT 'hi' AS text", "<|user|>hi<|end|>"),
    ],
)
def test_every_form_of_table_is_read(con, chat, query, first):
    """Messages, Alpaca, MOSS and plain prompts, as the input table or by name."""
    con.execute(f"CREATE TABLE my_rows AS {query}")
    (row,) = rendered(con, f'RUN my_rows AS LLM.`{chat}` WHERE action="render"')
    assert row["text"] == f"{first}<|assistant|>"
    assert rendered(con, f'RUN command AS LLM.`{chat}` WHERE action="render" AND inputTable="main.my_rows"') == [row]


def test_a_bad_row_is_an_error_beside_the_good_ones(con, chat):
    """A role that the template refuses, a NULL and a list that is none: each its own row's error, without its text."""
    con.execute(
        """CREATE TABLE my_rows AS SELECT unnest(['[{"role": "user", "content": "hi"}]',
        '[{"role": "tool", "content": "secret"}]', NULL, 'secret'])::VARCHAR AS messages"""
    )
    rows = rendered(con, f'RUN my_rows AS LLM.`{chat}` WHERE action="render"')
    assert [row["row"] for row in rows] == [1, 2, 3, 4]
    assert [row["error"] and row["error"].split(":")[0] for row in rows] == [
        None,
        "template_failed",
        "row_null",
        "row_type",
    ]
    assert "unknown role" in rows[1]["error"]
    assert "secret" not in str(rows)


def test_several_checkpoints_at_once(con, chat, tmp_path):
    """Each under its own template; a checkpoint without one writes the plain contents, and needs no weights."""
    plain = tmp_path / "plain"
    models.text_tokenizer(None).save_pretrained(plain)
    broken = tmp_path / "broken"
    models.text_tokenizer("{% for m in messages %}\n{{ m.content }").save_pretrained(broken)
    rows = rendered(
        con,
        f"""RUN command AS LLM.`{chat}` WHERE action="render" AND paths="{plain},{broken}"
        AND messages='[{{"role": "user", "content": "hi"}}]'""",
    )
    assert [row["path"] for row in rows] == [str(chat), str(plain), str(broken)]
    assert [row["text"] for row in rows] == ["<|user|>hi<|end|><|assistant|>", "hi", None]
    assert "line 2" in rows[2]["error"]


def test_a_template_of_the_users_own(con, chat, tmp_path):
    """In the statement or in a file; one that does not parse fails the statement."""
    file = tmp_path / "my.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    base = (
        f"""RUN command AS LLM.`{chat}` WHERE action="render" AND messages='[{{"role": "user", "content": "hi"}}]'"""
    )
    (row,) = rendered(con, f'{base} AND chat_template="file:{file}"')
    assert row["text"] == "[user] hi"
    with pytest.raises(UserError) as raised:
        con.execute(f'{base} AND chat_template="{{% for %}}"')
    assert raised.value.code == "chat_template"


def test_a_prompt_format_takes_the_place_of_the_template(chat):
    """The texts of each role, with and without what asks for an answer."""
    form = json.dumps({"system": "{instruction}\n", "user": "U:{instruction}\n", "assistant": "A:{instruction}\n"})
    made = writer(str(chat), prompt_format=form[:-1] + ', "trailing_assistant": "A:"}')
    assert [each.text for each in made.previews(["hi"])] == ["U:hi\nA:"]
    assert [each.text for each in made.previews(["hi"], add_generation_prompt=False)] == ["U:hi\n"]
    assert made.undeclared == ()


def test_a_prompt_format_in_the_statement(con, chat):
    """The same from SQL; together with a template it is refused."""
    form = '{"system": "{instruction}", "user": "U:{instruction};", "assistant": "{instruction}"}'
    base = f"RUN command AS LLM.`{chat}` WHERE action='render' AND prompt_format='{form}'"
    (row,) = rendered(con, f"""{base} AND messages='[{{"role": "user", "content": "hi"}}]'""")
    assert row["text"] == "U:hi;"
    with pytest.raises(UserError):
        con.execute(f"{base} AND chat_template='x' AND messages='[]'")


def test_only_what_nobody_gives_is_undeclared():
    """Names of transformers, special tokens, jinja's own and the template's own are declared."""
    template = (
        "{{ bos_token }}{% set n = namespace(x=1) %}{% for m in messages %}{{ m.content }}{{ n.x }}{% endfor %}"
        "{% if add_generation_prompt and tools and documents %}{{ raise_exception('x') }}{{ strftime_now('%d') }}{% endif %}"
        "{% generation %}{{ range(3) | list | tojson }}{% endgeneration %}{{ enable_thinking }}{{ eos_token }}"
    )
    assert undeclared_variables(template, {"bos_token": "<s>"}) == ("enable_thinking", "eos_token")
    assert undeclared_variables(models.CHAT_TEMPLATE, {}) == ()


def test_what_is_wrong_is_said(con, chat, tmp_path):
    """No checkpoint, nothing or too much to render, an unknown form, no tokenizer: one clear error each."""
    con.execute("CREATE TABLE odd AS SELECT 1 AS a")
    message = """messages='[{"role": "user", "content": "hi"}]'"""
    for statement, code in (
        (f'RUN command AS LLM.`` WHERE action="render" AND {message}', "checkpoint_missing"),
        (f'RUN command AS LLM.`{chat}` WHERE action="render"', "input_table"),
        (f'RUN odd AS LLM.`{chat}` WHERE action="render" AND {message}', "input_table"),
        (f'RUN odd AS LLM.`{chat}` WHERE action="render"', "training_columns"),
        (f"RUN command AS LLM.`{chat}` WHERE action=\"render\" AND messages='hi'", "option_value"),
        (f'RUN command AS LLM.`{tmp_path}` WHERE action="render" AND {message}', "checkpoint_no_tokenizer"),
    ):
        with pytest.raises(UserError) as raised:
            con.execute(statement)
        assert raised.value.code == code, statement
        assert raised.value.hint


def test_the_shell_shows_long_text_whole(chat):
    """Text of several lines stands below its name, uncut, with its line breaks."""
    text = "a long line of words " * 20
    said = json.dumps([{"role": "user", "content": f"first\n{text}"}])
    statement = f"RUN command AS LLM.`{chat}` WHERE action='render' AND messages='{said}'"
    command = str(Path(sys.executable).with_name("sqlext"))
    done = subprocess.run([command, "-c", statement], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[2] == "text        <|user|>first"
    assert lines[3].strip() == f"{text}<|end|><|assistant|>"
