"""What a training begins with, checked from files alone: base model, other weights, adapter, tokenizer, length.

It stands alone because it needs neither torch nor transformers: the statement asks it before a row is written, and
every rank asks it again. What is still behind an address is checked when it has been fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from runtime.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from runtime.checkpoints.folder import open_folder, read_object
from runtime.checkpoints.inspect import TOKENIZERS, Checkpoint, inspect
from runtime.checkpoints.weights import check_file, check_weights
from runtime.errors import UserError
from runtime.spec import Task
from runtime.training.own_weights import is_address
from runtime.training.parameters import of_group, recipe, with_defaults
from runtime.training.plan import TrainingPlan


def check_beginning(plan: TrainingPlan) -> Checkpoint | None:
    """Check all that the plan begins with.

    Returns:
        What its model folder holds; None when the parameters alone give the architecture, or it is not fetched yet.

    Raises:
        UserError: something is missing, may not be loaded, or does not fit together.
    """
    base = base_checkpoint(plan)
    if _is_here(plan.weights):
        weights_folder(plan.weights)
    if _is_here(plan.adapter):
        adapter_folder(plan.adapter)
    if path := plan.parameters.get("tokenizer_path"):
        tokenizer_folder(str(path))
    if plan.model and (shape := of_group(plan.parameters, "model")):
        raise UserError(
            f"{next(iter(shape))} shapes a new model, and this one has the shape of {plan.model}.",
            code="option_value",
            hint="Leave it out, or leave the model's path out.",
        )
    if plan.quantization and recipe(plan) != "lora":
        raise UserError(
            "Quantized weights cannot be trained themselves.",
            code="option_value",
            hint="Leave the quantization out, or train with LoRA: sft without full.",
        )
    longest = longest_sequence(with_defaults(plan), base)
    said = plan.parameters.get("max_seq_length")
    if longest and isinstance(said, int) and said > longest:
        raise UserError(
            f"max_seq_length={said} is more than the model reads, {longest} tokens.",
            code="option_value",
            hint=f"Set it to {longest} or less.",
        )
    return base


def base_checkpoint(plan: TrainingPlan) -> Checkpoint | None:
    """What the plan's model folder holds; it needs no weights when others take their place.

    Raises:
        UserError: it is no language model that may be loaded.
    """
    return inspect(plan.model, Task.GENERATE, needs_weights=not plan.weights) if _is_here(plan.model) else None


def longest_sequence(parameters: Mapping[str, Any], base: Checkpoint | None) -> int | None:
    """Tokens that the model can read; None when nothing says it.

    Args:
        parameters: of the plan, with defaults.
    """
    return base.max_model_len if base else parameters.get("max_position_embeddings")


def weights_folder(path: str) -> Path:
    """A folder of weights that may be loaded; nothing else need be in it.

    Raises:
        UserError: those of `open_folder` and `check_weights`.
    """
    folder = open_folder(path)
    check_weights(folder, tuple(sorted(file.name for file in folder.iterdir() if file.is_file())))
    return folder


def tokenizer_folder(path: str) -> Path:
    """The folder of a tokenizer, given it or a tokenizer file in it.

    Raises:
        UserError: checkpoint_no_tokenizer, and those of `open_folder`.
    """
    folder = open_folder(str(Path(path).parent) if Path(path).expanduser().is_file() else path)
    names = {file.name for file in folder.iterdir()}
    if not any(names.issuperset(kind) for kind in TOKENIZERS):
        raise UserError(
            f'"{path}" holds no tokenizer.',
            code="checkpoint_no_tokenizer",
            hint="Give the folder that holds tokenizer.json or tokenizer.model.",
        )
    return folder


def adapter_folder(path: str) -> Path:
    """The folder of a LoRA adapter that may be loaded.

    Raises:
        UserError: checkpoint_adapter, checkpoint_pickled, checkpoint_corrupt, and those of `open_folder`.
    """
    folder = open_folder(path)
    names = {file.name for file in folder.iterdir()}
    if ADAPTER_CONFIG not in names:
        raise UserError(
            f'"{folder}" holds no {ADAPTER_CONFIG}, so it is no LoRA adapter that can be trained on.',
            code="checkpoint_adapter",
            hint="Give the folder that a LoRA training wrote: …/finetune_model/final.",
        )
    config = read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):
        raise UserError(
            f'"{folder}" is no plain LoRA adapter.',
            code="checkpoint_adapter",
            hint="Only LoRA (with DoRA and rsLoRA) adapters are trained on.",
        )
    if ADAPTER_WEIGHTS not in names:
        raise UserError(
            f'"{folder}" holds no {ADAPTER_WEIGHTS}; pickled weights are not loaded.',
            code="checkpoint_pickled",
            hint="Save the adapter again with save_pretrained() of peft, which writes safetensors.",
        )
    check_file(folder / ADAPTER_WEIGHTS)
    return folder


def _is_here(path: str) -> bool:
    return bool(path) and not is_address(path)
