"""What every engine on torch does around its model: options, device, number type, and errors in plain words.

Alone so that an unknown option, a missing GPU or a folder that does not load reads the same for every engine.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from runtime.checkpoints.inspect import Checkpoint
from runtime.checkpoints.tensors import DTYPES
from runtime.errors import DeployError, OutOfMemory, SqlextError, UserError, did_you_mean
from runtime.spec import ModelSpec, Value

MAX_CAUSE_CHARS = 300
_SIZE = r"[\d.]+ [KMGT]?i?B(?:ytes)?"  # as torch writes it, such as 20.00 MiB


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs and in which number type, with a note for each choice that was not asked for."""

    device: torch.device
    device_map: str | None
    dtype: torch.dtype
    notes: tuple[str, ...]

    @property
    def dtype_name(self) -> str:
        """'float32', 'bfloat16', …"""
        return str(self.dtype).removeprefix("torch.")


def engine_options(spec: ModelSpec, known: tuple[str, ...], shown: tuple[str, ...] = ()) -> dict[str, Value]:
    """The engine's options of a deployment.

    Args:
        shown: those that the error's hint lists, where `known` is long.

    Raises:
        UserError: option_unknown, with the nearest known one.
    """
    for name, _ in spec.options:
        if name not in known:
            near = did_you_mean(name, known)
            raise UserError(
                f'The engine "{spec.engine}" has no option "{name}".',
                code="option_unknown",
                hint=(f'Did you mean "{near}"? ' if near else "")
                + (f"Among others it has: {', '.join(shown)}." if shown else f"It has: {', '.join(known)}."),
            )
    return dict(spec.options)


def whole_number(options: dict[str, Value], name: str) -> int | None:
    """A positive whole number among the options, or None when it is not said.

    Raises:
        UserError: option_value.
    """
    value = options.get(name)
    if value is None:
        return None
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(
            f'{name}="{value}" is no positive whole number.', code="option_value", hint=f'For example {name}="512".'
        )
    return number


def place(checkpoint: Checkpoint, dtype: Value | None) -> Placement:
    """CUDA when the process sees a GPU, all of them for a model; the checkpoint's own number type unless told.

    Raises:
        UserError: option_value for an unknown type.
    """
    transformers_logging.set_verbosity_error()  # what matters comes as an error or a note
    transformers_logging.disable_progress_bar()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    wanted = str(dtype or "auto").lower()
    notes: list[str] = []
    if wanted == "auto":
        wanted = checkpoint.dtype
        if wanted not in DTYPES:
            notes.append(f"float32: {wanted} weights are not computed with as they are")
        elif DTYPES[wanted] is torch.float16 and not gpus:
            notes.append("float32: float16 is slow on a CPU")
        if notes:
            wanted = "float32"
    if wanted not in DTYPES:
        near = did_you_mean(wanted, DTYPES)
        raise UserError(
            f'dtype="{dtype}" is no number type.',
            code="option_value",
            hint=(f'Did you mean "{near}"? ' if near else "") + "Known: auto, float32, float16, bfloat16.",
        )
    if gpus > 1 and not find_spec("accelerate"):
        notes.append("one GPU only: install accelerate to spread a model over several")
    several = gpus > 1 and find_spec("accelerate") is not None
    return Placement(device, "auto" if several else None, DTYPES[wanted], tuple(notes))


@contextmanager
def loading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a library says while it loads `checkpoint` into one short error.

    Raises:
        DeployError: model_out_of_memory, model_not_loaded.
    """
    try:
        yield
    except SqlextError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise DeployError(
                f'"{checkpoint.path}" ({checkpoint.bytes / 1e9:.1f} GB) does not fit into the memory that is free'
                f"{_numbers(error)}.",
                code="model_out_of_memory",
                hint='Take a smaller dtype ("bfloat16"), quantization="4" on a GPU, or a machine with more memory.',
            ) from None
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DeployError(
            f'"{checkpoint.path}" did not load: {type(error).__name__}: {cause[:MAX_CAUSE_CHARS]}',
            code="model_not_loaded",
            hint="Check that its files belong together and that the installed transformers knows it "
            f"(model_type {checkpoint.model_type}).",
        ) from None


def require_weights(checkpoint: Checkpoint, missing: set[str]) -> None:
    """Refuse a model of which some weights were not in the checkpoint: transformers would make them up.

    Raises:
        DeployError: weights_missing.
    """
    if missing:
        raise DeployError(
            f'"{checkpoint.path}" lacks {len(missing)} of the weights of {checkpoint.architectures[0]}, '
            f"first of all {min(missing)}.",
            code="weights_missing",
            hint="Deploy the whole checkpoint, not a part of it or one made for another task.",
        )


def load_tokenizer(checkpoint: Checkpoint, **more: Any) -> Any:
    """The checkpoint's own tokenizer: nothing from a hub, no code of its own."""
    return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False, **more)


def load_generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """How the checkpoint wants to be asked: its generation_config.json, else what config.json says of it."""
    if "generation_config.json" in checkpoint.files:
        return GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    return GenerationConfig.from_model_config(config)


def load_model(kind: Any, checkpoint: Checkpoint, placement: Placement, quantization: Any = None) -> Any:
    """The checkpoint as a model of `kind`, one of transformers' Auto classes, on its device and in evaluation mode.

    Safetensors only, nothing from a hub, no code of its own.

    Raises:
        DeployError: weights_missing.
    """
    device_map = placement.device_map or ({"": placement.device} if quantization else None)
    model, report = kind.from_pretrained(
        checkpoint.path,
        dtype=placement.dtype,
        device_map=device_map,
        quantization_config=quantization,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    require_weights(checkpoint, set(report["missing_keys"]))
    if not device_map:
        model.to(placement.device)
    return model.eval()


@contextmanager
def device_memory() -> Iterator[None]:
    """Turn running out of memory, on whatever device, into our error.

    Raises:
        OutOfMemory: the work did not fit.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        free_memory()
        raise OutOfMemory(
            f"The batch did not fit into the memory of the device{_numbers(error)}.",
            hint="Set `backend.max_num_seqs` lower, for fewer rows at once, or max_tokens; or take a smaller number "
            'type, dtype="bfloat16" or quantization="4".',
        ) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or torch says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )


def _numbers(error: BaseException) -> str:
    """What torch says was wanted, and what its GPU had, as the end of a sentence; '' when it says nothing."""
    said = str(error)
    wanted = re.search(rf"Tried to allocate ({_SIZE})", said)
    there = re.search(rf"total capacity of ({_SIZE}) of which ({_SIZE}) is free", said)
    allowed = re.search(rf"({_SIZE}) allowed", said)
    parts = [
        f"{wanted[1]} more were wanted" if wanted else "",
        f"the GPU has {there[1]}, of which {there[2]} were free" if there else "",
        f"this worker may use {allowed[1]} of it" if allowed else "",
    ]
    told = ", ".join(part for part in parts if part)
    return f": {told}" if told else ""


def free_memory() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
