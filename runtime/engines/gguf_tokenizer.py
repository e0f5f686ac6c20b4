"""The tokenizer inside a GGUF file, with what is asked of a tokenizer of transformers.

Alone because a GGUF file may come without the files of its checkpoint: then llama.cpp's own tokenizer and the file's
chat template are all there is.
"""

from __future__ import annotations

from typing import Any

TEMPLATE = "tokenizer.chat_template"


class GgufTokenizer:
    """Args:
    llama: a loaded `llama_cpp.Llama`.
    """

    is_fast = False

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self.chat_template: str | None = llama.metadata.get(TEMPLATE)
        self.bos_token_id: int | None = _id(llama.token_bos())
        self.eos_token_id: int | None = _id(llama.token_eos())
        self._names = {
            name: self._text(number)
            for name, number in (("bos_token", self.bos_token_id), ("eos_token", self.eos_token_id))
        }
        self.all_special_tokens = [text for text in self._names.values() if text]

    def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
        """Token ids of each text; special tokens in a text that a template wrote are read as such."""
        ids = [
            self._llama.tokenize(text.encode(), add_bos=add_special_tokens, special=not add_special_tokens)
            for text in texts
        ]
        return {"input_ids": ids}

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, chat_template: str | None, add_generation_prompt: bool, **_: Any
    ) -> str:
        """The text of a conversation, by transformers' own sandbox."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _indices = render_jinja_template(
            [turns],
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **self._names,
        )
        return str(texts[0])

    def batch_decode(self, ids: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """The texts of token ids."""
        return [
            self._llama.detokenize(each, special=not skip_special_tokens).decode("utf-8", errors="replace")
            for each in ids
        ]

    def convert_tokens_to_ids(self, text: str) -> int | None:
        """The id of a token that is one of the special ones."""
        ids = self._llama.tokenize(text.encode(), add_bos=False, special=True)
        return int(ids[0]) if len(ids) == 1 else None

    def _text(self, number: int | None) -> str:
        return "" if number is None else self._llama.detokenize([number], special=True).decode(errors="replace")


def _id(number: int) -> int | None:
    return number if number >= 0 else None
