"""Whether a model answers as another one does: the largest difference of their logits on real texts.

Alone because it is the only part of converting that loads models: one after the other, never two at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from runtime.checkpoints.folder import read_object
from runtime.checkpoints.skeleton import MAX_CAUSE_CHARS
from runtime.checkpoints.tensors import Stored
from runtime.errors import UserError

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asks why.",
    "SELECT name, price FROM goods WHERE price > 100 ORDER BY name;",
    "Grüße aus Köln: 3,14 ist fast π, und 你好 heißt hallo.",
)
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def largest_difference(first: Callable[[], Any], second: Callable[[], Any], folder: Path) -> float:
    """The largest difference of the two models' logits, or hidden states where there are none.

    Args:
        first, second: each loads a model.
        folder: whose tokenizer turns the texts into ids.

    Raises:
        UserError: check_failed.
    """
    try:
        ids = _ids(folder)
        expected = _outputs(first(), ids)
        found = _outputs(second(), ids)
    except Exception as error:  # of transformers, which may not know the model or find no tokenizer
        cause = next(iter(str(error).splitlines()), "")[:MAX_CAUSE_CHARS]
        raise UserError(
            f"The result is there, but its logits could not be compared: {type(error).__name__}: {cause}",
            code="check_failed",
            hint="Leave check out: only models that the installed transformers loads, with a tokenizer, compare.",
        ) from None
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


def saved(folder: Path, dtype: torch.dtype, *, pickled: bool = False, gguf_file: str | None = None) -> Any:
    """The model in a folder, in evaluation mode on the CPU."""
    kind = _kind(folder) if gguf_file is None else transformers.AutoModelForCausalLM
    more = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": not pickled}
    return kind.from_pretrained(folder, dtype=dtype, **more, **_LOCAL).eval()


def of_tensors(folder: Path, tensors: dict[str, Stored], dtype: torch.dtype) -> Any:
    """The model of the folder's config.json with these weights."""
    config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    model = _kind(folder)._from_config(config, dtype=dtype)  # with the buffers that no checkpoint holds
    model.load_state_dict({name: tensor.load().to(dtype) for name, tensor in tensors.items()}, strict=False)
    return model.eval()


def _kind(folder: Path) -> Any:
    return getattr(transformers, read_object(folder / "config.json")["architectures"][0])


@torch.inference_mode()
def _outputs(model: Any, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(each)[0].float() for each in ids]


def _ids(folder: Path) -> list[torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    return [torch.tensor([tokenizer(text)["input_ids"][:256]]) for text in TEXTS]
