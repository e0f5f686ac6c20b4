"""Random numbers for libraries that draw from torch's one source of them.

Alone because that source belongs to the whole process: who seeds it must be alone, and leave it as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_alone = threading.Lock()


@contextmanager
def chance(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch draws what follows from `seed`, or anything when it is None; others wait."""
    devices = [device] if device.type == "cuda" else []
    with _alone, torch.random.fork_rng(devices=devices):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed % (1 << 63))
        yield
