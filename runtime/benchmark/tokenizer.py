"""The model's own tokenizer, for texts of exact lengths.

Alone because it is read from a checkpoint: a folder that says how its texts become tokens, and nothing else of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.benchmark.exact_text import ExactText
from runtime.errors import UserError


def exact_text(folder: str) -> ExactText:
    """Texts for the tokenizer of a checkpoint's folder, counted without special tokens and chat template.

    Raises:
        UserError: tokenizer_missing, there is none that can be read.
    """
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f'"{folder}" has no tokenizer that can be read: {type(error).__name__}.',
            code="tokenizer_missing",
            hint='Name a folder that has one: AND tokenizer="/path/of/the/checkpoint".',
        ) from None
    return ExactText(
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
    )
