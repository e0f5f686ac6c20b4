"""What a model says of itself, how it is written to by name, and what it gives back when it is idle."""

from __future__ import annotations

import json
import time

import duckdb
import pytest

from runtime.errors import UserError


def test_a_model_says_what_it_is(con, deploy, checkpoints):
    """llm_meta for every kind of model, also as columns; Byzer's request with `meta` says the same."""
    deploy(checkpoints["chat"], "chat")
    deploy(checkpoints["encoder"], "embed")
    chat = con.execute("SELECT llm_meta('CHAT')").fetchone()[0]
    assert chat | {"path": ""} == {
        "model": "chat",
        "model_deploy_type": "proprietary",
        "backend": chat["backend"],
        "task": "generate",
        "architectures": ["LlamaForCausalLM"],
        "max_model_len": 512,
        "dimension": None,
        "support_stream": True,
        "support_chat_template": True,
        "support_schema": True,
        "device": "cpu",
        "dtype": "float32",
        "workers": 1,
        "path": "",
    }
    columns = con.execute("SELECT unnest(llm_meta('embed'))").arrow().to_pylist()[0]
    assert (columns["task"], columns["dimension"], columns["support_stream"]) == ("embed", 32, False)
    asked = con.execute("SELECT llm_result(chat(llm_param(map {'meta': 'true'})))").fetchone()[0]
    assert json.loads(asked) == chat
    assert con.execute("SELECT coalesce(sum(calls), 0) FROM llm_calls").fetchone() == (0,)
    with pytest.raises(duckdb.Error, match='Did you mean "chat"'):
        con.execute("SELECT llm_meta('chatt')").fetchall()


def test_an_idle_model_is_unloaded_and_answers_all_the_same(con, deploy, checkpoints):
    """`!llm status` says so; the next call takes longer and is no error."""
    deploy(checkpoints["chat"], "chat", "idle_timeout=1")
    first = con.execute("SELECT chat('good morning', max_tokens := 5)").fetchone()
    begun = time.monotonic()
    while "unloaded" not in [row["state"] for row in con.execute('!llm status "chat"').arrow().to_pylist()]:
        assert time.monotonic() < begun + 60
        time.sleep(0.1)
    assert con.execute("!llm model exists 'chat'").fetchone() == (True,)
    again = con.execute("SELECT chat('good morning', max_tokens := 5, cache := 'off')").fetchone()
    assert again == first
    assert con.execute("SELECT count(*) FROM llm_errors").fetchone() == (0,)


def test_a_template_by_name_decides_what_is_read(con, deploy, checkpoints):
    """render shows it, and the model reads as many tokens."""
    question = json.dumps([{"role": "user", "content": "good morning"}])
    texts = {}
    for name in ("chatml", "mistral"):
        [row] = (
            con.execute(
                f"RUN command AS LLM.`{checkpoints['chat']}` WHERE action='render' AND chat_template='{name}' "
                f"AND messages='''{question}'''"
            )
            .arrow()
            .to_pylist()
        )
        texts[name] = row["text"]
        deploy(checkpoints["chat"], name, chat_template=name)
        read = con.execute(f"SELECT r.prompt_tokens FROM (SELECT {name}_row('good morning', max_tokens := 1) AS r)")
        assert read.fetchone() == (row["tokens"],)
    assert texts["chatml"] == "<|im_start|>user\ngood morning<|im_end|>\n<|im_start|>assistant\n"
    assert texts["mistral"] == "<s>[INST] good morning [/INST]"


def test_auto_is_the_checkpoints_own_template(con, checkpoints):
    """And a name that is none is told, with the nearest."""
    said = f"RUN command AS LLM.`{checkpoints['chat']}` WHERE action='render' AND messages='''{{}}'''"
    question = '[{"role": "user", "content": "Hi"}]'
    [row] = con.execute(said.format(question) + " AND chat_template='auto'").arrow().to_pylist()
    assert row["text"] == "<|user|>Hi<|end|><|assistant|>"
    with pytest.raises(UserError, match='Did you mean "llama3"'):
        con.execute(said.format(question) + " AND chat_template='lama3'")
