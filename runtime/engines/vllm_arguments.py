"""What a deployment and a call say, in vLLM's words: its engine's arguments and its sampling parameters.

Alone because it is names and values; what runs is in `vllm_engine.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from transformers import GenerationConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from runtime.checkpoints.inspect import Checkpoint
from runtime.checkpoints.tensors import DTYPES
from runtime.engines.loading import engine_options
from runtime.engines.sampling import EXTRA, all_ends, choice, own_ends, read_extra, row_seed
from runtime.engines.wording import Read
from runtime.errors import UserError
from runtime.spec import CallOptions, ModelSpec, Value

OURS = ("prompt_format", "chat_template", "adapter")
USUAL = (
    *("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_dtype", "quantization", "enforce_eager"),
    *("enable_prefix_caching", "enable_lora", "max_loras", "max_lora_rank"),
)
"""What most people set; the hint for an unknown option shows these."""

# Which checkpoint it is was said already; code, plug-ins and other places to read from have no spelling in SQL.
_REFUSED = (
    *("model", "model_weights", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "hf_config_path"),
    *("trust_remote_code", "load_format", "model_loader_extra_config", "download_dir", "ignore_patterns"),
    *("revision", "code_revision", "tokenizer_revision", "hf_token", "hf_overrides", "model_class_overrides"),
    *("worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors", "io_processor_plugin"),
    *("reasoning_parser_plugin", "distributed_executor_backend", "default_mm_loras", "config_format", "runner"),
    *("allowed_local_media_path", "allowed_media_domains", "otlp_traces_endpoint", "convert", "pooler_config"),
    *("additional_config", "kv_transfer_config", "ec_transfer_config", "weight_transfer_config", "spec_model"),
)
KNOWN = tuple(
    field.name
    for field in dataclasses.fields(EngineArgs)
    if field.name not in _REFUSED and not field.name.startswith("_")
)

_TYPES = {field.name: field.type for field in dataclasses.fields(EngineArgs) if not isinstance(field.type, str)}

PARAMETERS: dict[str, Callable[[Any], Any]] = {
    **{name: EXTRA[name] for name in ("repetition_penalty", "min_new_tokens", "min_p", "suppress_tokens")},
    **{name: EXTRA[name] for name in ("stop_token_ids", "ignore_eos")},
    "presence_penalty": float,
    "frequency_penalty": float,
}
"""Generation parameters beyond `CallOptions`' own fields."""

ADAPTERS = 4  # that may be in use at the same time, where a deployment allows adapters
LEAST_CACHE_BYTES = 1 << 30
MOST_CACHE_BYTES = 16 << 30
PREFIX_TOKENS = 32  # of a block on a CPU, the unit in which beginnings are shared


def engine_arguments(spec: ModelSpec, checkpoint: Checkpoint) -> EngineArgs:
    """The arguments of vLLM's engine: what the deployment says, over what suits the device.

    Raises:
        UserError: option_unknown with the nearest name, option_value.
    """
    options = engine_options(spec, (*KNOWN, *OURS), shown=USUAL)
    adapter = bool(options.get("adapter"))
    said = {name: _read(name, value) for name, value in options.items() if name not in OURS}
    if "quantization" in said:
        said["quantization"] = _quantization(str(said["quantization"]))
    usual = _on_gpus() if torch.cuda.is_available() else _on_cpu(said)
    if adapter:
        usual["enable_lora"] = True
    if adapter or said.get("enable_lora"):
        usual["max_loras"] = ADAPTERS
    if checkpoint.dtype in DTYPES:
        usual["dtype"] = checkpoint.dtype  # vLLM would make bfloat16 of float32
    fixed = {
        "model": checkpoint.path,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Answers with a schema as the engine transformers writes them.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    return EngineArgs(**{"max_model_len": -1, "enable_prefix_caching": True, **usual, **said, **fixed})


def _on_gpus() -> dict[str, Any]:
    count = torch.cuda.device_count()
    share = torch.cuda.get_per_process_memory_fraction(0)  # of a worker with a part of a GPU
    usual: dict[str, Any] = {"tensor_parallel_size": count} if count > 1 else {}
    if count > 1:
        usual["distributed_executor_backend"] = "mp"  # inside a worker of Ray vLLM would look for placement groups
    return usual if share >= 1 else {**usual, "gpu_memory_utilization": round(0.9 * share, 3)}


def _on_cpu(said: Mapping[str, Any]) -> dict[str, Any]:
    usual: dict[str, Any] = {"enforce_eager": True, "block_size": PREFIX_TOKENS}
    if "kv_cache_memory_bytes" not in said:
        room = psutil.virtual_memory().available // 8
        usual["kv_cache_memory_bytes"] = min(MOST_CACHE_BYTES, max(LEAST_CACHE_BYTES, room))
    return usual


def _read(name: str, value: Value) -> Any:
    """A value of a statement as vLLM takes it: JSON objects read, lists as lists, of the type that it declares."""
    try:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            return json.loads(value)
        plain = list(value) if isinstance(value, tuple) else value
        return TypeAdapter(_TYPES[name]).validate_python(plain) if name in _TYPES else plain
    except PydanticUserError:  # a type that only vLLM can check
        return value
    except ValueError as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is no JSON object"
        raise UserError(
            f"vLLM refuses backend.{name}: {said[:300]}.", code="option_value", hint=f"Correct backend.{name}."
        ) from None


def _quantization(word: str) -> str | None:
    """What `quantization` says: of bits, as for every engine, or a method of vLLM's by its name."""
    if word.lower() in ("false", "none"):
        return None
    if word == "8":
        raise UserError(
            'quantization="8" means nothing to vLLM.',
            code="option_value",
            hint='Write backend.quantization="fp8", or deploy a checkpoint that was quantized (AWQ, GPTQ).',
        )
    return "bitsandbytes" if word.lower() in ("4", "true") else word


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the options of a batch come to.

    Attributes:
        said: for SamplingParams, what all rows share.
        ends: token ids that end an answer.
        stop: texts that end an answer and are cut off.
        seed: of sampled rows; None: a new one for each row.
    """

    said: dict[str, Any]
    ends: frozenset[int]
    stop: tuple[str, ...]
    seed: int | None

    def params(self, read: Read, *, followed: bool) -> SamplingParams:
        """Of one row; `followed`: its text is wanted while it is written."""
        return SamplingParams(
            **self.said,
            max_tokens=read.limit,
            seed=None if self.seed is None else row_seed(self.seed, read.ids),
            output_kind=RequestOutputKind.CUMULATIVE if followed else RequestOutputKind.FINAL_ONLY,
        )


def sampling(options: CallOptions, tokenizer: Any, defaults: GenerationConfig) -> Sampling:
    """Read the options of a batch.

    Args:
        defaults: the checkpoint's own generation_config.

    Raises:
        Fatal: option_unknown with the nearest name, option_value.
    """
    extra = read_extra(options, PARAMETERS)
    own = own_ends(tokenizer, defaults)
    ends = all_ends(options, tokenizer, own, extra.pop("stop_token_ids", ()))
    suppressed = {*extra.pop("suppress_tokens", ()), *(own if extra.pop("ignore_eos", False) else ())}
    drawn = choice(options, defaults)
    drawn.pop("do_sample")
    said: dict[str, Any] = {
        **extra,
        "temperature": 0.0,
        **drawn,
        "ignore_eos": True,  # the ends are said by their ids
        "stop_token_ids": sorted(ends - suppressed),
        "stop": list(options.stop),
        "detokenize": bool(options.stop),
        "skip_special_tokens": True,
    }
    if "min_new_tokens" in said:
        said["min_tokens"] = said.pop("min_new_tokens")
    if suppressed:
        said["logit_bias"] = dict.fromkeys(sorted(suppressed), float("-inf"))
    if options.schema:
        said["structured_outputs"] = StructuredOutputsParams(json=options.schema)
    return Sampling(said, ends, options.stop, options.seed if options.temperature else None)
