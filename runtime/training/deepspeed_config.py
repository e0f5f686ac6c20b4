"""DeepSpeed's configuration: checked as far as that needs no torch, and settled with the job's parameters.

It stands alone because the statement checks the user's JSON before anything starts, and each rank must come to the
same settled form. What the configuration says counts; what it leaves open comes from the parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError, did_you_mean

AUTO = "auto"
"""The value of a key that Trainer fills in from its own arguments."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP = _words(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile compression_training csv_monitor curriculum_learning data_efficiency
    data_types dataloader_drop_last disable_allgather disable_python_gc dump_state eigenvalue elasticity
    expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown nebula
    optimizer pipeline prescale_gradients progressive_layer_drop scheduler
    seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """
)
"""Keys of the outermost object; DeepSpeed ignores others, so one that is near to these is a slip of the pen."""

ZERO = _words(
    """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload
    cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings
    memory_efficient_linear mics_hierarchical_params_gather mics_shard_size offload_optimizer offload_param
    overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint reduce_bucket_size
    reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights
    zero_quantized_weights
    """
)
"""Keys of zero_optimization; DeepSpeed refuses others."""

_OFFLOAD = (
    "offload_optimizer",
    "offload_param",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "zenflow",
)
_ADAM = ("adam", "adamw")


def _amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _count(value: Any) -> bool:
    return _amount(value) and value >= 1 and value == int(value)


def _two_amounts(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_amount(each) for each in value)


_Check = tuple[Callable[[object], bool], str]
_A_COUNT: _Check = (_count, "a whole number from 1")
_AN_AMOUNT: _Check = (_amount, "a number from 0")
_AN_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_A_TEXT: _Check = (lambda value: isinstance(value, str), "a text")
_A_TRUTH: _Check = (lambda value: isinstance(value, bool), "true or false")

_CHECKS: dict[str, _Check] = {
    "train_batch_size": _A_COUNT,
    "train_micro_batch_size_per_gpu": _A_COUNT,
    "gradient_accumulation_steps": _A_COUNT,
    "gradient_clipping": _AN_AMOUNT,
    "steps_per_print": _AN_AMOUNT,
    "wall_clock_breakdown": _A_TRUTH,
    "zero_optimization": _AN_OBJECT,
    "zero_optimization.stage": (lambda value: value in (0, 1, 2, 3) and not isinstance(value, bool), "0, 1, 2 or 3"),
    "zero_optimization.offload_optimizer": _AN_OBJECT,
    "zero_optimization.offload_param": _AN_OBJECT,
    "optimizer": _AN_OBJECT,
    "optimizer.type": _A_TEXT,
    "optimizer.params": _AN_OBJECT,
    "optimizer.params.lr": _AN_AMOUNT,
    "optimizer.params.eps": _AN_AMOUNT,
    "optimizer.params.weight_decay": _AN_AMOUNT,
    "optimizer.params.betas": (_two_amounts, "two numbers from 0"),
    "scheduler": _AN_OBJECT,
    "scheduler.type": _A_TEXT,
    "scheduler.params": _AN_OBJECT,
    **dict.fromkeys(("fp16", "bf16", "tensorboard", "wandb", "csv_monitor", "activation_checkpointing"), _AN_OBJECT),
    **{f"{name}.enabled": _A_TRUTH for name in ("fp16", "bf16", "tensorboard", "wandb", "csv_monitor")},
}

_SAME: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}
"""What the configuration and a training parameter both can say."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A configuration that is ready for DeepSpeed.

    Attributes:
        config: what DeepSpeed gets.
        parameters: training parameters that follow from it.
        notices: what was changed because this machine lacks it.
    """

    config: dict[str, Any]
    parameters: dict[str, Any]
    notices: tuple[str, ...]


def check_deepspeed(text: str) -> None:
    """Refuse a `deepspeedConfig` that DeepSpeed could not work with. Imports nothing heavy.

    Raises:
        UserError: deepspeed_json with line and column; deepspeed_config with the key.
    """
    read_config(text)


def read_config(text: str) -> dict[str, Any]:
    """The configuration as an object.

    Raises:
        UserError: as `check_deepspeed`.
    """
    try:
        config = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(
            f"deepspeedConfig is no JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            code="deepspeed_json",
            hint="Names and texts in double quotes, true and false in small letters, no comma after the last entry.",
        ) from None
    except RecursionError:
        raise UserError("deepspeedConfig is nested too deeply.", code="deepspeed_json") from None
    if not isinstance(config, dict):
        raise UserError("deepspeedConfig is no JSON object.", code="deepspeed_json", hint='Begin it with "{".')
    _check_names(config)
    for place, (fits, wanted) in _CHECKS.items():
        value = _at(config, place, AUTO)
        if value != AUTO and not fits(value):
            raise _wrong(place, f"must be {wanted}")
    if config.get("optimizer") is not None and not _at(config, "optimizer.type"):
        raise _wrong("optimizer", "has no type", 'For example "type": "AdamW".')
    if _at(config, "bf16.enabled") is True and _at(config, "fp16.enabled") is True:
        raise _wrong("fp16", "and bf16 exclude each other", "Enable one of them.")
    return config


def settle(
    text: str, said: Mapping[str, Any], parameters: Mapping[str, Any], *, ranks: int, on_gpu: bool, logging: str
) -> Settled:
    """The configuration with the job's parameters, as this machine can run it.

    Args:
        said: the parameters that the user gave.
        parameters: those with the defaults.
        logging: folder for what DeepSpeed itself logs, where the configuration does not say.

    Raises:
        UserError: as `check_deepspeed`; the two say different things, or the batch sizes do not go together.
    """
    config = read_config(text)
    follows = _in_step(config, said)
    follows |= _batches(config, parameters, ranks)
    for monitor in ("tensorboard", "csv_monitor"):
        if _at(config, f"{monitor}.enabled"):
            config[monitor].setdefault("output_path", logging)
            config[monitor].setdefault("job_name", "deepspeed")
    config.setdefault("gradient_clipping", AUTO)
    zero = config.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 0) == 3:  # the model is written whole; Trainer would write each checkpoint twice
        zero.pop("stage3_gather_fp16_weights_on_model_save", None)
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if str(_at(config, "optimizer.type") or "").lower() in _ADAM:
        own = config["optimizer"].setdefault("params", {})
        for name in ("lr", "betas", "eps", "weight_decay"):
            own.setdefault(name, AUTO)
    notices = [] if on_gpu else _without_gpu(config)
    if not on_gpu and follows.pop("fp16", False):
        follows["fp16"] = False
    return Settled(config, follows, tuple(notices))


def _in_step(config: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The training parameters that the configuration names.

    Raises:
        UserError: the user says something else with a parameter.
    """
    named = {name: value for place, name in _SAME.items() if (value := _at(config, place)) not in (None, AUTO)}
    if (betas := _at(config, "optimizer.params.betas")) not in (None, AUTO):
        named |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    for name, value in named.items():
        if name in said and said[name] != value:
            raise UserError(
                f"deepspeedConfig says {value} and the parameter {name} says {said[name]}.",
                code="deepspeed_contradiction",
                hint=f"Leave one of them out, or make them equal: {name} stands in both.",
            )
    return named


def _batches(config: dict[str, Any], parameters: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Make whole batch = batch of a rank × accumulation × ranks; what is not said of it follows."""
    places = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, micro, steps = (None if (value := config.get(place)) == AUTO else value for place in places)
    if whole is not None:
        steps = steps or (whole / (micro * ranks) if micro else 1)
        micro = micro or whole / (steps * ranks)
        if micro * steps * ranks != whole or not (_count(micro) and _count(steps)):
            raise _wrong(
                "train_batch_size",
                f"is {whole}, and cannot be batches of a rank × accumulation × {ranks} ranks",
                "Leave train_batch_size out; the other two are enough.",
            )
    micro = int(micro or parameters.get("per_device_train_batch_size") or 1)
    steps = int(steps or parameters.get("gradient_accumulation_steps") or 1)
    config.update(zip(places, (micro * steps * ranks, micro, steps), strict=True))
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}


def _without_gpu(config: dict[str, Any]) -> list[str]:
    """Take out what only a GPU has; says what."""
    zero, told = config["zero_optimization"], []
    if taken := [name for name in _OFFLOAD if zero.pop(name, None)]:
        told.append(f"{', '.join(taken)}: everything is in the memory of the CPU already")
    if _at(config, "fp16.enabled"):
        del config["fp16"]
        told.append("fp16: trained in float32")
    kind = str(_at(config, "optimizer.type") or "")
    if kind.lower() in _ADAM:
        config["optimizer"]["params"]["torch_adam"] = True
        told.append(f"optimizer {kind}: torch's own in place of the one that is compiled for the GPU")
    return [f"deepspeedConfig without a GPU: {each}." for each in told]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _wrong(key, "stands twice")
        found[key] = value
    return found


def _check_names(config: Mapping[str, Any]) -> None:
    for key in config:
        if key not in TOP and (near := did_you_mean(key, TOP)):
            raise _wrong(key, "is unknown", f'Did you mean "{near}"?')
    zero = config.get("zero_optimization")
    for key in zero if isinstance(zero, dict) else ():
        if key not in ZERO:
            near = did_you_mean(key, ZERO)
            raise _wrong(
                f"zero_optimization.{key}", "is unknown", f'Did you mean "{near}"?' if near else "Leave it out."
            )


def _at(config: Mapping[str, Any], place: str, otherwise: Any = None) -> Any:
    """The value at a dotted place, or `otherwise` when there is none."""
    found: Any = config
    for name in place.split("."):
        if not isinstance(found, dict) or name not in found:
            return otherwise
        found = found[name]
    return found


def _wrong(place: str, why: str, hint: str | None = None) -> UserError:
    return UserError(f"deepspeedConfig: {place} {why}.", code="deepspeed_config", hint=hint)
