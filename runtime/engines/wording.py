"""From the prompts of a batch to token ids, and from the ids of an answer to its text.

Alone because every engine that generates must count, refuse, cut and end alike, whatever computes the tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from runtime.errors import ErrorInfo, RowError
from runtime.prompts.chat import AS_IT_IS, Rendered, fit_answer, has_template, render
from runtime.prompts.encoding import Encoder
from runtime.prompts.style import Style
from runtime.spec import Batch


class Read(NamedTuple):
    """A prompt as the model reads it: its token ids, and how many new ones it may have."""

    ids: list[int]
    limit: int


class Wording:
    """A tokenizer and the way conversations are written for its model. Thread-safe.

    Args:
        tokenizer: of transformers, with or without a chat template.
        style: how conversations are written, where not as the checkpoint says.
        max_model_len: tokens of prompt and answer together; None: no limit.
    """

    def __init__(self, tokenizer: Any, style: Style = AS_IT_IS, max_model_len: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.max_model_len = max_model_len
        self._encoder = Encoder(tokenizer) if tokenizer.is_fast else None
        self._tokenizing = threading.Lock()  # a fast tokenizer must not be called by two threads at once

    @property
    def end_token(self) -> int | None:
        """The special token with which a turn of the assistant ends; None when there is none."""
        return self._encoder.end_token(self.style) if self._encoder else None

    @property
    def has_template(self) -> bool:
        """Whether conversations go through a prompt_format or a chat template."""
        return bool(self.style.prompt_format) or has_template(self.tokenizer, self.style)

    def read(self, batch: Batch) -> tuple[dict[int, Read], dict[int, ErrorInfo]]:
        """Each row that can be asked, by index, tokenised at once; the errors of the others."""
        rendered: dict[int, Rendered] = {}
        errors: dict[int, ErrorInfo] = {}
        for index, prompt in enumerate(batch.prompts):
            try:
                rendered[index] = render(self.tokenizer, prompt, batch.options.system, self.style)
            except RowError as error:
                errors[index] = error.info
        read: dict[int, Read] = {}
        for index, ids in zip(rendered, self._token_ids(list(rendered.values())), strict=True):
            try:
                read[index] = Read(ids, fit_answer(len(ids), batch.options.max_tokens, self.max_model_len))
            except RowError as error:
                errors[index] = error.info
        return read, errors

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each prompt with all that the chat template adds; 0 for one that cannot be asked."""
        read, _ = self.read(batch)
        return [len(read[index].ids) if index in read else 0 for index in range(len(batch.prompts))]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """The texts of token ids, without special tokens."""
        with self._tokenizing:
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def stopped(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the newest token of an answer completed a stop text."""
        reach = max(len(text.encode()) for text in stop) + 4  # tokens a stop text can span, and some before it
        tail = self.decode([list(ids[-reach:])])[0]
        return any(text in tail for text in stop)

    def answers(self, ids: list[list[int]], ends: Collection[int], stop: Sequence[str]) -> list[str]:
        """What was said in answers of these ids: up to the token or the first stop text that ended each."""
        said = [each[:-1] if each and each[-1] in ends else each for each in ids]
        return [self._content(cut(text, stop)) for text in self.decode(said)]

    def _content(self, text: str) -> str:
        """What was said in a text that the model wrote."""
        return self.style.prompt_format.content(text) if self.style.prompt_format else text

    def _token_ids(self, rendered: list[Rendered]) -> list[list[int]]:
        """Token ids of each text. An empty one becomes the token that starts a text, as a model needs one to read."""
        if not rendered:
            return []
        with self._tokenizing:
            if self._encoder:
                ids = [each.ids for each in self._encoder.encode(rendered)]
            else:
                ids = self.tokenizer(
                    [each.text for each in rendered],
                    add_special_tokens=rendered[0].add_special_tokens,
                    return_attention_mask=False,
                    verbose=False,
                )["input_ids"]
        return [each or [self._first_token()] for each in ids]

    def _first_token(self) -> int:
        tokenizer = self.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return first if first is not None else 0


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text."""
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(ends)] if ends else text
