"""Whether a model answers as another one does: the largest difference of their logits on real texts.

Alone because it is the only part of converting that loads models: one after the other, never two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from runtime.checkpoints.model_config import read_config
from runtime.checkpoints.skeleton import tied
from runtime.checkpoints.tensors import Stored
from runtime.errors import SqlextError, UserError
from runtime.secrets import first_line

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
        difference = float(torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max())
    except SqlextError:
        raise
    except Exception as error:  # of transformers, which may not know the model or find no tokenizer
        raise _failed(f"could not be compared ({first_line(error)})") from None
    if not math.isfinite(difference):
        raise _failed("are not all finite")
    return difference


def saved(path: Path, dtype: torch.dtype | str, *, pickled: bool | None = None) -> Any:
    """The model in a folder, or of a GGUF file, in evaluation mode on the CPU.

    Args:
        dtype: 'auto' for its own.
        pickled: whether its pickled weights are to be read; None for those that are there.
    """
    more: dict[str, Any]
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files:
        kind, more = transformers.AutoModelForCausalLM, {"gguf_file": files[0].name}
    else:
        unsafe = any(path.glob("*.bin")) if pickled is None else pickled
        kind, more = _kind(path), {"use_safetensors": not unsafe}
    folder = path.parent if path.is_file() else path
    return kind.from_pretrained(folder, dtype=dtype, **more, **_LOCAL).eval()


def of_tensors(folder: Path, tensors: Mapping[str, Stored], dtype: torch.dtype) -> Any:
    """The model of the folder's config.json with these weights, which are read into it piece by piece."""
    config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    with no_init_weights():
        model = _kind(folder)._from_config(config, dtype=dtype)  # with the buffers that no checkpoint holds
    for name, parameter in model.state_dict().items():
        if name in tensors:
            flat, at = parameter.view(-1), 0
            for piece in tensors[name].pieces():
                flat[at : at + piece.numel()] = piece
                at += piece.numel()
        elif name not in tied(model):
            raise _failed(f"need the weight {name}, which was not found")
    return model.eval()


def _failed(why: str) -> UserError:
    return UserError(
        f"Nothing was made: the logits of the result {why}.",
        code="check_failed",
        hint="Leave check out: only models that the installed transformers loads, with a tokenizer, compare.",
    )


def _kind(folder: Path) -> Any:
    return getattr(transformers, read_config(folder)["architectures"][0])


@torch.inference_mode()
def _outputs(model: Any, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(each)[0].float() for each in ids]


def _ids(folder: Path) -> list[torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    return [torch.tensor([tokenizer(text)["input_ids"][:256]]) for text in TEXTS]
