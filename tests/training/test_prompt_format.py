"""prompt_format: its rules, what it writes, and that it is served as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest

from runtime.engines.transformers import load
from runtime.errors import RowError, UserError
from runtime.prompts.chat import render
from runtime.prompts.format import PromptFormat
from runtime.prompts.style import Style, find_style, plain_format, save_style, training_style
from runtime.prompts.template import read_template
from runtime.spec import Batch, CallOptions, Message, ModelSpec

LLAMA3 = {
    "system": "<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>",
    "user": "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>",
    "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n{instruction}<|eot_id|>",
    "bos": "<|begin_of_text|>",
    "system_in_user": False,
    "trailing_assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "default_system_message": "",
}
MISTRAL = {
    "system": "{instruction} + ",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": " {instruction}</s>",
    "bos": "<s>",
    "system_in_user": "True",
    "trailing_assistant": "",
    "default_system_message": "",
}
VERBATIM = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}", "bos": ""}
PLAIN = {
    "system": "S:{instruction}\n",
    "user": "U:{instruction}\n",
    "assistant": "A:{instruction}\n",
    "trailing_assistant": "A:",
}


def parsed(said: dict[str, Any]) -> PromptFormat:
    return PromptFormat.parse(json.dumps(said))


def turns(*said: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in said)


def text(said: dict[str, Any], *messages: tuple[str, str], to_answer: bool = False) -> str:
    return "".join(piece.text for piece in parsed(said).write(turns(*messages), to_answer=to_answer))


def test_the_documents_llama_example_is_written_exactly() -> None:
    """The three messages of the document become its text."""
    said = (
        ("system", "You are a helpful assistant"),
        ("user", "What's the value of 1+1?"),
        ("assistant", "The value is 2"),
    )
    assert text(LLAMA3, *said) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat's the value of 1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nThe value is 2<|eot_id|>"
    )


def test_the_verbatim_format_takes_an_empty_user_turn() -> None:
    """The document's Llama Guard row: all in the system message, nothing in the user's, braces and all."""
    task = "<|begin_of_text|>[INST] Task: '{{ role }}' {unsafe} {0} {instruction} [/INST]"
    pieces = parsed(VERBATIM).write(turns(("system", task), ("user", ""), ("assistant", "safe")), to_answer=False)
    assert pieces == ((task, False), ("safe", True))


def test_the_system_message_stands_in_the_first_user_turn_only() -> None:
    """With system_in_user, formatted by `system`; later turns have nothing there."""
    said = (("user", "one"), ("assistant", "1"), ("user", "two"), ("system", "be brief"))
    assert text(MISTRAL, *said, to_answer=True) == "<s>[INST] be brief + one [/INST] 1</s>[INST] two [/INST]"
    assert text(MISTRAL, ("user", "one"), to_answer=True) == "<s>[INST] one [/INST]"


@pytest.mark.parametrize(
    ("default", "messages", "expected"),
    [
        ("", [("user", "q")], "U:q\n"),
        ("be kind", [("user", "q")], "S:be kind\nU:q\n"),
        ("be kind", [("system", "be brief"), ("user", "q")], "S:be brief\nU:q\n"),
        ("be kind", [("system", ""), ("user", "q")], "U:q\n"),
        ("", [("user", "q"), ("assistant", "a"), ("system", "late")], "S:late\nU:q\nA:a\n"),
        ("", [("user", "  q\n"), ("assistant", " a ")], "U:q\nA:a\n"),
    ],
)
def test_one_system_message_in_front(default: str, messages: list[tuple[str, str]], expected: str) -> None:
    """Moved to the front; the default counts when there is none; an empty one is left out; contents are stripped."""
    assert text(PLAIN | {"default_system_message": default}, *messages) == expected


@pytest.mark.parametrize("content", ["{", "}", "{instruction}", "{system}", "{0.__class__}", "{{x}}", "\\{n}", "%s"])
def test_braces_in_what_is_said_stay(content: str) -> None:
    """Nothing of a message is taken for a place of the format."""
    said = (("system", content), ("user", content), ("assistant", content))
    assert text(PLAIN, *said) == f"S:{content}\nU:{content}\nA:{content}\n"
    assert text(MISTRAL, *said[:2]) == f"<s>[INST] {content} + {content} [/INST]"


def test_bos_stands_once() -> None:
    """Not again when the first message brings it."""
    said = VERBATIM | {"bos": "<s>"}
    assert text(said, ("user", "<s>q")) == text(said, ("user", "q")) == "<s>q"


@pytest.mark.parametrize(
    ("said", "key", "hint"),
    [
        ({"user": "{instruction}", "assistant": "{instruction}"}, '"system"', "Add"),
        (PLAIN | {"usr": "x"}, '"usr"', '"user"'),
        (PLAIN | {"system": "S"}, '"system"', "{instruction}"),
        (PLAIN | {"user": "U"}, '"user"', "{instruction}"),
        (PLAIN | {"assistant": "A"}, '"assistant"', "{instruction}"),
        (PLAIN | {"assistant": "{instruction}{instruction}"}, '"assistant"', "one"),
        (PLAIN | {"user": None}, '"user"', "string"),
        (PLAIN | {"bos": 1}, '"bos"', "string"),
        (PLAIN | {"system_in_user": True}, '"user"', "{system}"),
        (PLAIN | {"user": "{system}{instruction}"}, '"user"', "system_in_user"),
        (PLAIN | {"user": "{instrction}{instruction}"}, '"user"', "{instruction}"),
        (PLAIN | {"system_in_user": "maybe"}, '"system_in_user"', "true"),
        (PLAIN | {"system_in_user": 1}, '"system_in_user"', "true"),
        (PLAIN | {"system": "{instruction}" + "x" * 200_000}, '"system"', "100,000"),
    ],
)
def test_a_broken_rule_names_its_key(said: dict[str, Any], key: str, hint: str) -> None:
    """One error each, with the key and what to write."""
    with pytest.raises(UserError) as caught:
        parsed(said)
    assert caught.value.code == "prompt_format"
    assert key in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("said", ["", "{", "[]", '"x"', "[" * 100_000])
def test_what_is_no_object_is_refused(said: str) -> None:
    """Whatever else JSON, or no JSON, holds."""
    with pytest.raises(UserError) as caught:
        PromptFormat.parse(said)
    assert caught.value.code == "prompt_format"


@pytest.mark.parametrize(
    "messages",
    [
        [("system", "a"), ("system", "b"), ("user", "q")],
        [("tool", "a")],
        [("", "a")],
    ],
)
def test_a_conversation_that_does_not_fit_is_a_row_error(messages: list[tuple[str, str]]) -> None:
    """Two system messages, unknown roles."""
    with pytest.raises(RowError) as caught:
        text(PLAIN, *messages)
    assert caught.value.code == "prompt_bad"


def test_a_system_message_without_a_user_turn_is_a_row_error() -> None:
    """With system_in_user there is no place for it."""
    with pytest.raises(RowError):
        text(MISTRAL, ("system", "x"), ("assistant", "y"))


def test_a_format_whose_prompts_end_elsewhere_cannot_be_trained() -> None:
    """trailing_assistant must be what `assistant` begins with; for serving alone it may be anything."""
    odd = parsed(PLAIN | {"trailing_assistant": "Answer:"})
    with pytest.raises(UserError) as caught:
        odd.require_trainable()
    assert '"trailing_assistant"' in caught.value.message
    parsed(PLAIN).require_trainable()
    parsed(MISTRAL).require_trainable()


def test_a_format_is_saved_and_found_again(tmp_path: Path) -> None:
    """The trained model's folder says how it is asked; what a statement says wins."""
    style = Style(parsed(MISTRAL))
    save_style(tmp_path, style)
    assert find_style(tmp_path) == style
    assert find_style(tmp_path, prompt_format=json.dumps(PLAIN)) == Style(parsed(PLAIN))
    assert find_style(tmp_path, chat_template="{{ messages }}") == Style(chat_template="{{ messages }}")
    with pytest.raises(UserError):
        find_style(tmp_path, json.dumps(PLAIN), "{{ messages }}")
    (tmp_path / "prompt_format.json").write_text('{"user": "x"}')
    with pytest.raises(UserError) as caught:
        find_style(tmp_path)
    assert caught.value.code == "prompt_format"


def test_a_model_without_a_style_is_trained_with_plain_lines() -> None:
    """Its prompts end where its answers begin, and an answer ends with the end token."""
    tokenizer = models.text_tokenizer(None)
    plain = plain_format(tokenizer)
    plain.require_trainable()
    assert training_style(tokenizer, Style()) == Style(plain)
    assert training_style(models.text_tokenizer(), Style()) == Style()
    written = plain.write(turns(("user", "q"), ("assistant", "a")), to_answer=False)
    assert written == (("<s>", False), ("q\n", False), ("a<|end|>\n", True))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("{% for x in %}", "chat_template"),
        ("{% nonsense %}", "chat_template"),
        ("", "chat_template"),
        ("x" * (1 << 21), "chat_template"),
        ("file:/nowhere/x.jinja", "chat_template"),
        ("file:/etc/passwd", "chat_template"),
        ("{% if x %}" * 500, "chat_template"),
    ],
)
def test_a_template_that_cannot_be_used_is_found_at_once(said: str, code: str) -> None:
    """Before any model is loaded."""
    with pytest.raises(UserError) as caught:
        read_template(said)
    assert caught.value.code == code


def test_a_template_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`file:` and a .jinja file, inside the roots."""
    file = tmp_path / "x.jinja"
    file.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert read_template(f"file:{file}") == file.read_text()
    monkeypatch.setenv("SQLEXT_ROOTS", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError) as caught:
        read_template(f"file:{file}")
    assert caught.value.code == "checkpoint_outside_roots"


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}", "template_failed"),
        ("{% set x = messages.append(1) %}", "template_failed"),
        ("{{ raise_exception('no') }}", "template_failed"),
        ("{% for i in range(100000) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}", "template_too_large"),
        ("{% for i in range(1000000) %}x{% endfor %}", "template_failed"),
    ],
)
def test_a_hostile_template_is_a_row_error(template: str, code: str) -> None:
    """It reaches nothing outside, changes nothing, and does not write without end."""
    with pytest.raises(RowError) as caught:
        render(models.text_tokenizer(), "q", None, Style(chat_template=template))
    assert caught.value.code == code


def test_the_engine_asks_with_the_format_of_the_model(tmp_path: Path) -> None:
    """An option wins over the folder's prompt_format.json, that over the tokenizer's template; bos stands once."""
    folder = models.language_model(tmp_path / "model")
    save_style(folder, Style(parsed(PLAIN | {"bos": "<s>"})))
    said = {
        "U:q\nA:": {},
        "<s>[INST] q [/INST]": {"prompt_format": json.dumps(MISTRAL)},
        "T q": {"chat_template": "T {{ messages[0].content }}"},
    }
    for expected, options in said.items():
        engine = load(ModelSpec("m", "transformers", str(folder), options=tuple(options.items())))
        tokenizer = engine._wording.tokenizer
        read, _ = engine._wording.read(Batch(0, CallOptions(), ["q"]))
        ids = read[0].ids
        assert tokenizer.decode(ids) == ("<s>" if expected.startswith("U") else "") + expected
        assert ids.count(tokenizer.bos_token_id) == (not expected.startswith("T"))


def test_an_answer_is_what_was_said() -> None:
    """What the format puts around an answer is not part of it."""
    assert parsed(MISTRAL).content(" The value is 2") == "The value is 2"
    assert parsed(PLAIN).content("yes\n") == "yes"
    assert parsed(PLAIN | {"trailing_assistant": ""}).content("A:yes\n") == "yes"
    assert parsed(PLAIN | {"assistant": "A:{instruction} [END]"}).content("yes [END]") == "yes"
    assert parsed(PLAIN).content("") == ""


def test_an_answer_ends_with_the_formats_mark(tmp_path: Path) -> None:
    """A special token behind {instruction} ends answers, though the model's own end token is another one."""
    folder = models.language_model(tmp_path / "model")
    said = json.dumps(PLAIN | {"assistant": "A:{instruction}<|user|>"})
    engine = load(ModelSpec("m", "transformers", str(folder), options=(("prompt_format", said),)))
    ids = engine._tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    assert engine._model.generation_config.eos_token_id == ids
