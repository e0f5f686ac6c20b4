"""An output as the result store keeps it: texts as they are, vectors as bytes, labels as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.spec import Task


def encode(output: Any, task: Task) -> str | bytes:
    """The stored form of an output."""
    match task:
        case Task.GENERATE:
            return str(output)
        case Task.EMBED:
            return np.asarray(output, "<f4").tobytes()
        case Task.CLASSIFY:
            label, score = output
            return json.dumps([label, float(score)], ensure_ascii=False)


def decoder(task: Task) -> Callable[[Any], Any] | None:
    """Makes the output of what `encode` made; None where that is the output itself."""
    match task:
        case Task.GENERATE:
            return None
        case Task.EMBED:
            return lambda stored: np.frombuffer(stored, "<f4")
        case Task.CLASSIFY:
            return lambda stored: tuple(json.loads(stored))
