"""What conversations become for a checkpoint, to be looked at: text, exact tokens, and what its template lacks.

Alone because it needs a tokenizer and no model. The texts are made by the same `render` as those that are sent to a
deployed model; what a template refuses is the error of that row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import list_files, open_folder
from runtime.checkpoints.inspect import TOKENIZERS
from runtime.checkpoints.model_config import refuse_remote_code
from runtime.errors import ErrorInfo, RowError, UserError
from runtime.prompts.chat import Rendered, has_template, render
from runtime.prompts.style import Style, find_style
from runtime.prompts.template import check_template, environment
from runtime.secrets import first_line
from runtime.spec import Prompt

# What transformers gives a template beside the tokenizer's special tokens.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")


@dataclass(frozen=True, slots=True)
class Preview:
    """One row: its text and the tokens of it as the model reads it, or why there is none."""

    text: str | None = None
    tokens: int | None = None
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """A checkpoint's tokenizer and the way it writes conversations.

    Attributes:
        undeclared: names its template reads that nobody gives it; there they stand for nothing.
        broken: why its template cannot be used at all.
    """

    tokenizer: Any
    style: Style
    undeclared: tuple[str, ...] = ()
    broken: ErrorInfo | None = None

    def previews(
        self, prompts: Sequence[Prompt | ErrorInfo], *, add_generation_prompt: bool = True
    ) -> Iterator[Preview]:
        """Each prompt as this checkpoint reads it; one that could not be read keeps its error."""
        for prompt in prompts:
            if isinstance(prompt, ErrorInfo):
                yield Preview(error=prompt)
            elif self.broken:
                yield Preview(error=self.broken)
            else:
                yield self._preview(prompt, add_generation_prompt)

    def _preview(self, prompt: Prompt, to_answer: bool) -> Preview:
        try:
            rendered = render(self.tokenizer, prompt, None, self.style, to_answer=to_answer)
        except RowError as error:
            return Preview(error=error.info)
        return Preview(rendered.text, self._count(rendered))

    def _count(self, rendered: Rendered) -> int:
        read: Mapping[str, Any] = self.tokenizer(
            rendered.text, add_special_tokens=rendered.add_special_tokens, return_attention_mask=False, verbose=False
        )
        return len(read["input_ids"])


def writer(path: str, *, prompt_format: str = "", chat_template: str = "") -> Writer:
    """The writer for the checkpoint in the folder `path`; its weights need not be there.

    Args:
        prompt_format: JSON object that replaces the checkpoint's template; '' = not said.
        chat_template: jinja text that replaces it; '' = not said.

    Raises:
        UserError: the folder holds no tokenizer that can be loaded, or the format or the template is wrong.
    """
    folder = open_folder(path)
    names = list_files(folder)  # first: what is not the checkpoint's own is not read
    style = find_style(folder, prompt_format, chat_template)
    tokenizer = _tokenizer(folder, set(names))
    if not has_template(tokenizer, style):
        return Writer(tokenizer, style)
    template = style.chat_template or _default(tokenizer.chat_template)
    try:
        check_template(template)
    except UserError as error:
        return Writer(tokenizer, style, broken=error.info)
    return Writer(tokenizer, style, undeclared_variables(template, tokenizer.special_tokens_map))


def undeclared_variables(template: str, special_tokens: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that a template reads and that neither jinja nor transformers gives it, sorted."""
    from jinja2 import meta

    language = environment()
    read = meta.find_undeclared_variables(language.parse(template))
    return tuple(sorted(read - {*GIVEN, *special_tokens, *language.globals}))


def _default(template: Any) -> str:
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def _tokenizer(folder: Path, names: set[str]) -> Any:
    """The tokenizer in a folder: nothing from a hub, no code of its own."""
    if not any(names.issuperset(kind) for kind in TOKENIZERS):
        raise UserError(
            f'"{folder}" holds no tokenizer.',
            code="checkpoint_no_tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json from the model it was trained from.",
        )
    refuse_remote_code(folder, [name for name in names if name.endswith(".json")])
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a library's own errors, of many kinds
        raise UserError(
            f'The tokenizer in "{folder}" did not load ({first_line(error)}).',
            code="tokenizer_not_loaded",
            hint="Save it again with save_pretrained() of the installed transformers.",
        ) from None
