"""The engine `transformers` with its model prepared by DeepSpeed inference.

Alone because it is another package's preparation of the same model: the decoding loop, and with it every promise of
an answer, is that of `transformers.py`. DeepSpeed's own kernels keep keys and values where rows cannot leave or join,
so they are not put in; and over several GPUs DeepSpeed needs one process for each, which a worker is not.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from runtime.engines import transformers
from runtime.engines.transformers import TransformersEngine
from runtime.errors import UserError
from runtime.spec import ModelSpec


def load(spec: ModelSpec) -> TransformersEngine:
    """Load the checkpoint as the engine `transformers` does, with the same options, and hand it to DeepSpeed.

    Raises:
        UserError: engine_missing; deepspeed_one_gpu; as `transformers.load`.
        DeployError: as `transformers.load`.
    """
    if find_spec("deepspeed") is None:
        raise UserError(
            "The engine deepspeed needs the package deepspeed where the workers run.",
            code="engine_missing",
            hint='Run: pip install "sqlext[deepspeed]".',
        )
    if torch.cuda.device_count() > 1:
        raise UserError(
            f"The engine deepspeed runs on one GPU; this worker has {torch.cuda.device_count()}.",
            code="deepspeed_one_gpu",
            hint='Type !llm setup "gpus_per_worker=1"; or, to spread a model, "infer_backend=vllm".',
        )
    return transformers.load(spec, prepare=_prepared)


def _prepared(model: Any) -> Any:
    import deepspeed

    dtype = next(model.parameters()).dtype
    return deepspeed.init_inference(model, dtype=dtype, replace_with_kernel_inject=False).module
