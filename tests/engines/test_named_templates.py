"""Chat templates by name: each writes what its family's makers document, in serving and in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import text_tokenizer
from transformers import PreTrainedTokenizerFast

from runtime.errors import RowError, UserError
from runtime.prompts.chat import render, render_examples
from runtime.prompts.encoding import Encoder
from runtime.prompts.names import automatic, named, names
from runtime.prompts.style import Style, find_style
from runtime.prompts.template import read_template
from runtime.spec import Message

SYSTEM, USER, ANSWER = Message("system", "S"), Message("user", "U"), Message("assistant", "A")
WRITTEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A <|end|><s>[INST] U [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nU [/INST] A<|end|>[INST] U [/INST]",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n",
    "deepseek": "<s>S<｜User｜>U<｜Assistant｜>A<|end|><｜User｜>U<｜Assistant｜>",
    "deepseek-coder": "<s>S\n### Instruction:\nU\n### Response:\nA\n<|EOT|>\n### Instruction:\nU\n### Response:\n",
}
WRITTEN["qwen"] = WRITTEN["yi"] = WRITTEN["chatml"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One whose texts begin with <s> and end with <|end|>."""
    return text_tokenizer(None)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_what_is_written(tokenizer, name):
    """System message, two questions and an answer, ready for the next one."""
    style = find_style("", chat_template=read_template(name.upper()))
    assert render(tokenizer, (SYSTEM, USER, ANSWER, USER), None, style).text == WRITTEN[name]


@pytest.mark.parametrize("name", names())
def test_it_can_be_trained_with(tokenizer, name):
    """What is learned begins where a prompt of serving ends, and is the answer with its end."""
    style = Style(chat_template=named(name) or "")
    [example] = render_examples(tokenizer, (SYSTEM, USER, ANSWER), style)
    [(start, end)] = example.answers
    assert example.text[:start] == render(tokenizer, (SYSTEM, USER), None, style).text
    assert example.text[start:end].strip().startswith("A")
    assert end == len(example.text)


def test_qwen_has_a_system_message_of_its_own(tokenizer):
    """Where the conversation has none."""
    text = render(tokenizer, (USER,), None, Style(chat_template=named("qwen") or "")).text
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nU")


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_turns_that_do_not_alternate_are_refused(tokenizer, name):
    """By the families whose form cannot hold them."""
    with pytest.raises(RowError, match="must alternate"):
        render(tokenizer, (USER, USER), None, Style(chat_template=named(name) or ""))


@pytest.mark.parametrize(
    ("name", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("deepseek-coder", "<|EOT|>")]
)
def test_the_token_that_ends_a_turn_follows_from_the_template(name, end):
    """Whatever the tokenizer calls its end token."""
    tokenizer = text_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    found = Encoder(tokenizer).end_token(Style(chat_template=named(name) or ""))
    assert found == tokenizer.convert_tokens_to_ids(end) != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("config", "tokens", "name"),
    [
        ({"model_type": "qwen2"}, ["<|im_start|>", "<|im_end|>"], "qwen"),
        ({"model_type": "llama"}, ["<|im_start|>", "<|im_end|>"], "chatml"),
        ({"model_type": "llama"}, ["<|start_header_id|>", "<|eot_id|>"], "llama3"),
        ({"model_type": "llama"}, ["<|EOT|>"], "deepseek-coder"),
        ({"model_type": "llama", "vocab_size": 32000}, [], "llama2"),
        ({"model_type": "mistral", "vocab_size": 32000}, [], "mistral"),
        ({"model_type": "gemma2"}, ["<start_of_turn>", "<end_of_turn>"], "gemma"),
    ],
)
def test_auto_finds_the_family_by_its_tokens_and_its_kind(tmp_path, config, tokens, name):
    """For a checkpoint without a template of its own; one that has any keeps it."""
    _write(tmp_path / "config.json", config)
    _write(tmp_path / "tokenizer.json", {"added_tokens": [{"content": token} for token in tokens]})
    assert automatic(tmp_path) == named(name)
    assert find_style(tmp_path, chat_template="auto") == Style(chat_template=named(name) or "")
    _write(tmp_path / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert automatic(tmp_path) == ""
    assert find_style(tmp_path, chat_template="auto") == Style()


def test_auto_does_not_guess(tmp_path):
    """A checkpoint that nothing tells of is an error that names the templates."""
    _write(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(UserError, match="chatml, deepseek"):
        automatic(tmp_path)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
