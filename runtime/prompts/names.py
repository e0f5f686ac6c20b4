"""Chat templates by name, and the one that a checkpoint without its own was made for.

Alone because the forms are those of model families, as their makers document them: one jinja file each in `named/`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import read_object
from runtime.errors import UserError

AUTO = "auto"
_FOLDER = Path(__file__).with_name("named")
_ALIASES = {"yi": "chatml", "qwen2": "qwen", "llama-2": "llama2", "llama-3": "llama3", "mixtral": "mistral"}
_MARKS = {
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>"),
    "deepseek-coder": ("<|EOT|>",),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "mistral": ("[INST]", "[/INST]"),
}
"""Tokens that only a model of the family has, the surest first."""
_LLAMA2_VOCABULARY = (32_000, 32_016)  # CodeLlama's
_OWN = ("prompt_format.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates")


@cache
def names() -> tuple[str, ...]:
    """The named templates, sorted."""
    return tuple(sorted({*(file.stem for file in _FOLDER.glob("*.jinja")), *_ALIASES}))


def named(name: str) -> str | None:
    """The jinja text of a name, whatever its case; None when it is none."""
    word = _ALIASES.get(name.lower(), name.lower())
    return (_FOLDER / f"{word}.jinja").read_text(encoding="utf-8") if word in names() else None


def automatic(folder: Path) -> str:
    """The jinja text for the checkpoint in `folder`; '' when it has a way of its own to write conversations.

    Raises:
        UserError: chat_template: nothing tells which family it is of.
    """
    said = _object(folder / "tokenizer_config.json")
    if said.get("chat_template") or any((folder / name).exists() for name in _OWN):
        return ""
    family = _family(_object(folder / "config.json"), _tokens(folder, said))
    if family is None:
        raise UserError(
            f'"{folder}" has no chat template, and nothing tells which one it was trained with.',
            code="chat_template",
            hint=f"Name it, chat_template= one of {', '.join(names())}; or leave it out for plain texts.",
        )
    text = named(family)
    assert text
    return text


def _family(config: dict[str, Any], tokens: set[str]) -> str | None:
    kind = str(config.get("model_type", ""))
    for family, marks in _MARKS.items():
        if tokens.issuperset(marks):
            return "qwen" if family == "chatml" and kind.startswith("qwen") else family
    if kind in ("mistral", "mixtral"):
        return "mistral"
    return "llama2" if kind == "llama" and config.get("vocab_size") in _LLAMA2_VOCABULARY else None


def _tokens(folder: Path, said: dict[str, Any]) -> set[str]:
    """The tokens that a tokenizer has beside those it learned."""
    added = said.get("added_tokens_decoder")
    listed = _object(folder / "tokenizer.json").get("added_tokens")
    entries = [*(added.values() if isinstance(added, dict) else ()), *(listed if isinstance(listed, list) else ())]
    return {str(entry.get("content")) for entry in entries if isinstance(entry, dict)}


def _object(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
