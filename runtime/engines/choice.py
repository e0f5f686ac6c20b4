"""Which engine a text generator gets when nobody names one, and why.

Alone because the process that runs the SQL decides it, before anything is loaded: it imports neither torch nor
OpenVINO. On CPUs OpenVINO is the fastest engine that can be installed; transformers is the reference, and takes what
OpenVINO cannot carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

AUTO = "auto"
REFERENCE, FASTEST = "transformers", "openvino"

OPTIONS = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "prompt_format", "chat_template")
"""Options of the engine openvino: all of them are transformers' too."""

MODELS = ("llama", "mistral", "qwen2", "qwen3")
_TURNS = ("default", "linear", "llama3", "yarn")
_INSTALL = 'pip install "sqlext[openvino]"'


class Chosen(NamedTuple):
    """An engine, and the words for why."""

    engine: str
    note: str


def choose(config: Mapping[str, Any], dtype: str, options: Mapping[str, Any], *, gpus: bool) -> Chosen:
    """The engine for a checkpoint.

    Args:
        config: what config.json says.
        dtype: the number type of its weights.
        options: of the engine, by name, as the statement says them; `adapter` among them.
        gpus: workers have GPUs.
    """
    if gpus:
        return Chosen(REFERENCE, "engine transformers: the workers have GPUs")
    if why := _why_not(config, dtype, options):
        return Chosen(REFERENCE, f"engine transformers: {why}")
    return Chosen(FASTEST, f"engine openvino: the fastest on a CPU for {dtype} weights")


def missing() -> str:
    """What to type before OpenVINO can be used; '' when it is installed."""
    return "" if find_spec("openvino_genai") else f"openvino-genai is not installed: {_INSTALL}"


def cannot_carry(config: Mapping[str, Any]) -> str:
    """Why OpenVINO cannot compute a checkpoint as transformers does; '' when it can."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turns = rope.get("rope_type", rope.get("type", "default"))
    if kind not in MODELS:
        return f"openvino does not carry models of the type {kind}, only {', '.join(MODELS)}"
    if config.get("quantization_config"):
        return "openvino does not carry quantized weights"
    if turns not in _TURNS:
        return f'openvino does not carry the rope_type "{turns}"'
    if config.get("hidden_act", "silu") != "silu":
        return f'openvino does not carry the activation "{config["hidden_act"]}"'
    window = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    if window and window < int(config.get("max_position_embeddings") or window + 1):
        return "openvino does not carry attention with a window"
    return ""


def _why_not(config: Mapping[str, Any], dtype: str, options: Mapping[str, Any]) -> str:
    asked = str(options.get("dtype") or "auto").lower()
    if asked not in ("auto", dtype) or dtype != "bfloat16":
        return (
            "its answers in float32 are those of model.generate, token by token"
            if _is_exact(asked, dtype)
            else f"openvino is chosen for bfloat16, not for {dtype if asked == 'auto' else asked}"
        )
    if others := sorted(set(options) - set(OPTIONS)):
        return f"openvino does not know the option {others[0]}"
    return cannot_carry(config) or missing()


def _is_exact(asked: str, dtype: str) -> bool:
    return asked == "float32" or (asked == "auto" and dtype in ("float32", "float16"))
