"""How conversations are written out for one model, found in one place for training, serving and render.

A model reads a conversation in the form that it was trained with. What was said in the statement counts first, then
the `prompt_format.json` that training left in the model's folder, then the tokenizer's own chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import read_object
from runtime.errors import UserError
from runtime.prompts import names
from runtime.prompts.format import PromptFormat
from runtime.prompts.template import MAX_TEMPLATE_BYTES, check_template

FORMAT_FILE = "prompt_format.json"
TEMPLATE_FILE = "chat_template.jinja"  # where transformers looks first


@dataclass(frozen=True, slots=True)
class Style:
    """At most one of the two.

    Attributes:
        chat_template: a jinja template that replaces the tokenizer's; '' = its own, or none.
    """

    prompt_format: PromptFormat | None = None
    chat_template: str = ""


def find_style(folder: Path | str, prompt_format: str = "", chat_template: str = "") -> Style:
    """The style for the model in `folder`.

    Args:
        folder: of the checkpoint; '' = none.
        prompt_format: JSON object as the user said it; '' = not said.
        chat_template: jinja text as the user said it, or 'auto': the checkpoint's own, or else that of its family;
            '' = not said.

    Raises:
        UserError: prompt_format, chat_template, option_value when both are given.
    """
    if prompt_format and chat_template:
        raise UserError(
            "prompt_format and chat_template are both given, and each replaces the other.",
            code="option_value",
            hint="Keep one of them.",
        )
    if prompt_format:
        return Style(PromptFormat.parse(prompt_format))
    if chat_template == names.AUTO:
        chat_template = names.automatic(Path(folder)) if folder else ""
    if chat_template:
        if len(chat_template) > MAX_TEMPLATE_BYTES:
            raise UserError("chat_template is too large.", code="chat_template", hint="Shorten it.")
        check_template(chat_template)
        return Style(chat_template=chat_template)
    file = Path(folder) / FORMAT_FILE
    return Style(PromptFormat.parse(json.dumps(read_object(file)))) if folder and file.exists() else Style()


def training_style(tokenizer: Any, style: Style) -> Style:
    """The style to train with: `style` made definite, so that the trained model can be served with just that.

    A model without any gets `plain_format`.

    Raises:
        UserError: prompt_format, when it cannot be trained.
    """
    if style.prompt_format:
        style.prompt_format.require_trainable()
        return style
    if style.chat_template or tokenizer.chat_template:
        return style
    return replace(style, prompt_format=plain_format(tokenizer))


def plain_format(tokenizer: Any) -> PromptFormat:
    """One line for each turn, without words for the roles; an answer ends with the tokenizer's end token."""
    return PromptFormat(
        system="{instruction}\n",
        user="{instruction}\n",
        assistant="{instruction}" + (tokenizer.eos_token or "") + "\n",
        bos=tokenizer.bos_token or "",
    )


def save_style(folder: Path, style: Style) -> None:
    """Leave in the folder of a trained model what it is to be served with."""
    if style.prompt_format:
        (folder / FORMAT_FILE).write_text(style.prompt_format.to_json(), encoding="utf-8")
    if style.chat_template:
        (folder / TEMPLATE_FILE).write_text(style.chat_template, encoding="utf-8")
