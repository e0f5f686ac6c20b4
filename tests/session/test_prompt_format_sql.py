"""prompt_format and chat_template in SQL: they decide what a deployed model reads, and are checked by the statement."""

from __future__ import annotations

import json

import pytest

from runtime.errors import UserError

PLAIN = {"system": "S:{instruction}\n", "user": "U:{instruction}\n", "assistant": "A:{instruction}<|end|>\n"}


def infer(con, folder, name, **options):
    said = "".join(f" AND {key}='''{value}'''" for key, value in options.items())
    con.execute(f'RUN command AS LLM.`{folder}` WHERE action="infer" AND udfName="{name}"{said}')


def prompt_tokens(con, name):
    return con.execute(f"SELECT r.prompt_tokens, r.cached FROM (SELECT {name}_row('good morning') AS r)").fetchone()


def test_what_is_said_decides_what_is_read(con, checkpoints, tmp_path):
    """The format, or a template from a file: two prompts, and no answer is taken for the other's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["chat"])
    template = tmp_path / "shout.jinja"
    template.write_text("SHOUT {{ messages[-1].content }}")
    said = {
        "formatted": ({"prompt_format": json.dumps(PLAIN)}, "U:good morning\n"),
        "shouted": ({"chat_template": f"file:{template}"}, "SHOUT good morning"),
    }
    for name, (options, text) in said.items():
        infer(con, checkpoints["chat"], name, **options)
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert prompt_tokens(con, name) == (tokens, False)


@pytest.mark.parametrize(
    ("model", "options", "code"),
    [
        ("chat", {"prompt_format": '{"user": "x"}'}, "prompt_format"),
        ("chat", {"prompt_format": json.dumps(PLAIN), "chat_template": "{{ messages }}"}, "option_value"),
        ("chat", {"chat_template": "{% if %}"}, "chat_template"),
        ("chat", {"chat_template": "file:/nowhere.jinja"}, "chat_template"),
        ("encoder", {"prompt_format": json.dumps(PLAIN)}, "option_unknown"),
        ("classifier", {"chat_template": "{{ messages }}"}, "option_unknown"),
    ],
)
def test_what_is_wrong_is_found_before_a_model_is_loaded(con, checkpoints, model, options, code):
    """One error at the statement; nothing is registered."""
    with pytest.raises(UserError) as caught:
        infer(con, checkpoints[model], "chat", **options)
    assert caught.value.code == code
    assert caught.value.place is not None
    assert con.execute("SELECT count(*) FROM duckdb_functions() WHERE function_name = 'chat'").fetchone() == (0,)
