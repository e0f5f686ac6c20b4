"""A model without its numbers: which tensors an architecture has, their shapes, and which of them are one.

Alone because transformers is needed for it: the class that config.json names is built on torch's meta device, where
nothing takes memory, whatever the size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from runtime.checkpoints.tensors import Stored
from runtime.errors import SqlextError, UserError
from runtime.secrets import first_line


def skeleton(folder: Path, **changes: Any) -> Any:
    """The model of the folder's config.json on the meta device.

    Args:
        changes: fields of the configuration to set differently.

    Raises:
        UserError: checkpoint_unsupported.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name, value in changes.items():
            setattr(config, name, value)
        kind = getattr(transformers, str((config.architectures or [""])[0]), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise UserError(
                f'"{folder}/config.json" names no architecture that the installed transformers knows.',
                code="checkpoint_unsupported",
                hint='It needs, for example, "architectures": ["LlamaForCausalLM"].',
            )
        with torch.device("meta"):
            return kind(config)
    except SqlextError:
        raise
    except Exception as error:
        raise UserError(
            f'"{folder}/config.json" does not describe a model ({first_line(error)}).',
            code="checkpoint_unsupported",
            hint="Give the folder of the model that was trained, with its config.json.",
        ) from None


def tied(model: Any) -> dict[str, str]:
    """Names of weights that are another one, and which: the output embeddings that are the input embeddings."""
    config = model.config.get_text_config()
    return dict(model.all_tied_weights_keys) if getattr(config, "tie_word_embeddings", False) else {}


def weights_of(model: Any, found: Mapping[str, Stored], where: Path) -> dict[str, Stored]:
    """The model's weights out of what a training has saved, under their own names and in their own order.

    A prefix that wrappers put before all names is found and left out; what is no weight of the model is too.

    Raises:
        UserError: checkpoint_mismatch, weights_missing, checkpoint_adapter.
    """
    state = model.state_dict()
    prefix = _prefix(state, found)
    if prefix is None or any(".lora_" in name for name in found):
        raise _not_of(model, found, where)
    same = tied(model)
    weights: dict[str, Stored] = {}
    for name, wanted in state.items():
        stored = found.get(prefix + name)
        if stored is None and name not in same:
            raise UserError(
                f'"{where}" lacks the weight {name} of {type(model).__name__}.',
                code="weights_missing",
                hint="Give modelNameOrPath of the model that was trained; a file may also be missing.",
            )
        if stored is None or name in same:
            continue
        if stored.shape != tuple(wanted.shape):
            raise UserError(
                f'The weight {name} in "{where}" has the shape {list(stored.shape)}, and the model of '
                f"modelNameOrPath has {list(wanted.shape)}.",
                code="checkpoint_mismatch",
                hint="Give modelNameOrPath of the model that was trained; with added tokens, its new vocab_size.",
            )
        weights[name] = stored
    return weights


def _prefix(state: Iterable[str], found: Iterable[str]) -> str | None:
    """What stands before the model's names in `found`: the prefix under which most of them are there."""
    names, known = set(found), list(state)
    probe = max(known, key=len)
    prefixes = {name.removesuffix(probe) for name in names if name == probe or name.endswith(f".{probe}")}
    return max(prefixes, key=lambda prefix: sum(prefix + name in names for name in known), default=None)


def _not_of(model: Any, found: Mapping[str, Stored], where: Path) -> UserError:
    if any(".lora_" in name for name in found):
        return UserError(
            f'"{where}" is the checkpoint of a LoRA training, not of a whole model.',
            code="checkpoint_adapter",
            hint='Merge the adapter that the training has saved: action="merge", adapterNameOrPath="…/final".',
        )
    return UserError(
        f'"{where}" holds no weights of {type(model).__name__}.',
        code="checkpoint_mismatch",
        hint="Give modelNameOrPath of the model that was trained.",
    )
