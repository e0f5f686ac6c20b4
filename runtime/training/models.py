"""The model and the tokenizer that a job begins with.

It stands alone because there are many beginnings (a checkpoint, other weights for it, an adapter to go on from, a
configuration alone) and one rule for all: safetensors only, nothing from a hub, no code of a checkpoint's own, and no
weight that transformers would have to make up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from runtime.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from runtime.checkpoints.folder import open_folder, read_object
from runtime.checkpoints.inspect import Checkpoint
from runtime.checkpoints.tensors import DTYPES
from runtime.engines.loading import MAX_CAUSE_CHARS, load_tokenizer, out_of_memory
from runtime.errors import SqlextError, UserError
from runtime.training.beginning import (
    adapter_folder,
    base_checkpoint,
    tokenizer_folder,
    weights_folder,
)
from runtime.training.parameters import of_group, recipe
from runtime.training.plan import TrainingPlan

BLOCK = 64  # numbers that bitsandbytes quantizes together
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that keep packed examples apart."""
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def tokenizer_of(plan: TrainingPlan, parameters: Mapping[str, Any]) -> Any | None:
    """The tokenizer of `tokenizer_path` or of the model, with the plan's chat template; None: there is none yet.

    Raises:
        UserError: checkpoint_no_tokenizer, tokenizer_not_loaded.
    """
    base = base_checkpoint(plan)
    if path := parameters.get("tokenizer_path"):
        tokenizer = saved_tokenizer(str(path))
    elif base:
        tokenizer = load_tokenizer(base)
    else:
        return None
    if plan.chat_template:
        tokenizer.chat_template = plan.chat_template
    return tokenizer


def saved_tokenizer(path: str) -> Any:
    """The tokenizer in a folder, or in the folder of a tokenizer file.

    Raises:
        UserError: checkpoint_no_tokenizer, tokenizer_not_loaded.
    """
    folder = tokenizer_folder(path)
    names = {file.name for file in folder.iterdir()}
    try:
        if "tokenizer_config.json" not in names and "tokenizer.json" in names:
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise UserError(
            f'The tokenizer in "{folder}" did not load: {_cause(error)}',
            code="tokenizer_not_loaded",
            hint="Save it again with save_pretrained() of the installed transformers.",
        ) from None


def keeps_apart(base: Checkpoint) -> bool:
    """Whether the model's layers can keep the examples of a packed sequence apart: all must go by its positions."""
    config = AutoConfig.from_pretrained(base.path, **_LOCAL)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or getattr(kind, "_is_stateful", False):
        return False
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    return "position_ids" in signature(kind.forward).parameters and _ATTENTION.issuperset(layers)


def build(plan: TrainingPlan, parameters: Mapping[str, Any], tokenizer: Any) -> Any:
    """The model as training begins with it: with its adapter, its frozen weights quantized where the plan says so.

    Raises:
        UserError: something in the plan does not fit together.
        Fatal: it does not fit into memory.
    """
    kind = recipe(plan)
    if kind == "new":
        return _new_model(parameters, tokenizer)
    model = _loaded(plan, parameters, trainable_base=kind != "lora")
    if kind != "lora":
        model = _merged(model, plan.adapter) if plan.adapter else model
        return _grown(model, tokenizer)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, more than the model; LoRA cannot add any.",
            code="option_value",
            hint="Leave tokenizer_path out, or train all weights: full.",
        )
    return _with_lora(model, plan, parameters)


def dtype_of(parameters: Mapping[str, Any], *, frozen: bool) -> torch.dtype:
    """The type of the weights: float32, and on a GPU bfloat16 for weights that are not trained."""
    if said := parameters.get("dtype"):
        return DTYPES[str(said)]
    gpu = torch.cuda.is_available() and not parameters.get("use_cpu")
    return torch.bfloat16 if gpu and frozen and torch.cuda.is_bf16_supported() else torch.float32


def _new_model(parameters: Mapping[str, Any], tokenizer: Any) -> Any:
    shape = of_group(parameters, "model")
    theta = shape.pop("rope_theta", None)
    if theta is not None:
        shape["rope_parameters"] = {"rope_type": "default", **shape.get("rope_parameters", {}), "rope_theta": theta}
    with _plainly("The new model cannot be built"):
        config = transformers.LlamaConfig(
            **{"max_position_embeddings": parameters["max_seq_length"], **shape},
            vocab_size=_vocabulary(parameters, tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype_of(parameters, frozen=False),
            attn_implementation=parameters.get("attn_implementation"),
        )


def _vocabulary(parameters: Mapping[str, Any], tokenizer: Any) -> int:
    """Rows of the embedding table: one for each token, or more where a larger vocabulary is asked for."""
    said = parameters["vocab_size"] if "tokenizer_path" in parameters else len(tokenizer)
    if said < len(tokenizer):
        raise UserError(
            f"vocab_size={said} is less than the {len(tokenizer)} tokens of the tokenizer.",
            code="option_value",
            hint=f"Leave it out, or set it to {len(tokenizer)} or more.",
        )
    return int(said)


def _loaded(plan: TrainingPlan, parameters: Mapping[str, Any], *, trainable_base: bool) -> Any:
    base = base_checkpoint(plan)
    assert base is not None, "only a new model has no checkpoint"
    weights = weights_folder(plan.weights) if plan.weights else Path(base.path)
    with _plainly(f'"{weights}" did not load'):
        config = AutoConfig.from_pretrained(base.path, **_LOCAL)
        model, report = AutoModelForCausalLM.from_pretrained(
            weights,
            config=config,
            generation_config=_sampling(base, config),  # transformers would look for it beside the weights
            dtype=dtype_of(parameters, frozen=not trainable_base),
            attn_implementation=parameters.get("attn_implementation"),
            quantization_config=_quantization(plan, parameters),
            device_map=_device_map(parameters) if plan.quantization else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, in fewer words
            output_loading_info=True,
            **_LOCAL,
        )
    _require_fit(base, weights, report)
    _require_whole_blocks(base, model)
    _make_saveable(model)
    return model


def _sampling(base: Checkpoint, config: Any) -> Any:
    """How the model samples unless told, as its folder says."""
    if (Path(base.path) / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(base.path, **_LOCAL)
    return transformers.GenerationConfig.from_model_config(config)


def _require_fit(base: Checkpoint, weights: Path, report: Mapping[str, Any]) -> None:
    if odd := report["mismatched_keys"]:
        name, there, here = min((str(key), *shapes) for key, *shapes in odd)
        raise UserError(
            f'"{weights}" does not fit the architecture of "{base.path}": {name} has the shape {list(there)} '
            f"and {list(here)} is needed.",
            code="weights_mismatch",
            hint="Give the model whose architecture these weights were made for.",
        )
    if missing := set(report["missing_keys"]):
        raise UserError(
            f'"{weights}" lacks {len(missing)} weights of {base.architectures[0]}, first of all {min(missing)}.',
            code="weights_missing",
            hint="Give the whole checkpoint, not a part of it or one made for another task.",
        )


def _require_whole_blocks(base: Checkpoint, model: Any) -> None:
    """Refuse 4-bit weights on a CPU whose rows are no multiple of what is quantized together: the kernels fail."""
    layers = (layer for layer in model.modules() if type(layer).__name__ == "Linear4bit")
    if any(layer.in_features % BLOCK and layer.weight.device.type == "cpu" for layer in layers):
        raise UserError(
            f'"{base.path}" cannot be quantized to 4 bits on a CPU: a width is no multiple of {BLOCK}.',
            code="option_value",
            hint='Use quantization="8", or leave it out.',
        )


def _make_saveable(model: Any) -> None:
    """Repair sampling settings that transformers reads, but would refuse to write after the training."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _quantization(plan: TrainingPlan, parameters: Mapping[str, Any]) -> Any:
    if not plan.quantization:
        return None
    if not find_spec("bitsandbytes"):
        raise UserError(
            "Quantized training needs bitsandbytes, which is not installed.",
            code="package_missing",
            hint="pip install bitsandbytes, or leave the quantization out.",
        )
    if plan.quantization == "8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(parameters, frozen=True),
    )


def _device_map(parameters: Mapping[str, Any]) -> dict[str, Any]:
    gpu = torch.cuda.is_available() and not parameters.get("use_cpu")
    return {"": torch.cuda.current_device() if gpu else "cpu"}


def _with_lora(model: Any, plan: TrainingPlan, parameters: Mapping[str, Any]) -> Any:
    import peft

    checkpointing = bool(parameters.get("gradient_checkpointing"))
    if plan.quantization:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.enable_input_require_grads()  # gradients must flow through frozen embeddings
    if plan.adapter:
        return _continued(model, plan)
    said = of_group(parameters, "lora")
    with _plainly("LoRA cannot be put on the model"):
        config = peft.LoraConfig(r=said.pop("lora_rank"), task_type="CAUSAL_LM", **said)
        adapted = peft.get_peft_model(model, config)
    return _of_base(adapted, plan)


def _continued(model: Any, plan: TrainingPlan) -> Any:
    """The adapter as it was, to be trained on: its shape is its own."""
    import peft

    folder = adapter_folder(plan.adapter)
    config = read_object(folder / ADAPTER_CONFIG)
    for name, value in of_group(plan.parameters, "lora").items():
        key = {"lora_rank": "r"}.get(name, name)
        if key != "lora_dropout" and value != config.get(key):
            raise UserError(
                f"{name}={value} does not fit the adapter that training goes on from; it has {config.get(key)}.",
                code="option_value",
                hint=f"Leave {name} out: an adapter keeps its shape.",
            )
    with _plainly(f'The adapter "{folder}" does not fit the model'):
        adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return _of_base(adapted, plan)


def _of_base(adapted: Any, plan: TrainingPlan) -> Any:
    """The adapted model, whose adapter names the folder of its base."""
    adapted.peft_config["default"].base_model_name_or_path = str(open_folder(plan.weights or plan.model))
    return adapted


def _merged(model: Any, adapter: str) -> Any:
    """The model with the adapter worked into its weights, all of them trainable."""
    import peft

    folder = adapter_folder(adapter)
    with _plainly(f'The adapter "{folder}" does not fit the model'):
        merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged.requires_grad_(True)


def _grown(model: Any, tokenizer: Any) -> Any:
    """The model with embeddings for all tokens of another tokenizer."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Turn what a library says about bad files and values into one short error."""
    try:
        yield
    except SqlextError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{what}: {_cause(error)}",
            code="model_not_loaded",
            hint="Check that the parameters and the files belong together.",
        ) from None


def _cause(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first[:MAX_CAUSE_CHARS]}"
