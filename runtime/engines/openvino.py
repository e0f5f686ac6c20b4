"""OpenVINO: whether it is here, and the way into it.

Alone so that a missing package is told in plain words. The engine is in `openvino_engine.py`.
"""

from __future__ import annotations

from runtime.engines import Engine
from runtime.engines.choice import missing
from runtime.errors import UserError
from runtime.spec import ModelSpec


def load(spec: ModelSpec) -> Engine:
    """Load the checkpoint in `spec.path` into OpenVINO GenAI. Options and errors are those of `openvino_engine.load`.

    Raises:
        UserError: engine_missing.
    """
    if why := missing():
        raise UserError(
            "The engine openvino needs the package openvino-genai where the workers run.",
            code="engine_missing",
            hint=f"{why}.",
        )
    from runtime.engines import openvino_engine

    return openvino_engine.load(spec)
