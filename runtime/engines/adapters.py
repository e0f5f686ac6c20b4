"""A LoRA adapter on a language model that is served.

Alone because it is done in two ways: into the weights, where they are plain numbers, so that an answer costs nothing
more; beside them, where they are quantized and would lose it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.checkpoints.adapter import Adapter
from runtime.checkpoints.merge import merge_into, require_fit


def put_on(model: Any, base: Path, adapter: Adapter, *, quantized: bool) -> None:
    """Give `model`, as loaded from the folder `base`, the adapter.

    Raises:
        UserError: adapter_mismatch.
    """
    if not quantized:
        merge_into(model, base, adapter)
        return
    from peft import PeftModel

    require_fit(base, adapter)
    PeftModel.from_pretrained(model, str(adapter.path), torch_device=str(model.device))  # puts its layers into it
    model.eval()
