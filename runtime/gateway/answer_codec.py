"""An output as the result store keeps it: texts as they are, vectors as bytes, others as JSON (media in base64)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.spec import Task

MAX_STORED_BYTES = 16 << 20
"""A larger answer is not kept: it would put thousands of others out of the store."""


def encode(output: Any, task: Task) -> str | bytes:
    """The stored form of an output."""
    match task:
        case Task.GENERATE | Task.TRANSCRIBE:
            return str(output)
        case Task.EMBED:
            return np.asarray(output, "<f4").tobytes()
        case Task.CLASSIFY:
            label, score = output
            return json.dumps([label, float(score)], ensure_ascii=False)
        case Task.RANK:
            return json.dumps(float(output))
        case Task.DRAW:
            return json.dumps([base64.b64encode(image).decode() for image in output])
        case Task.SPEAK:
            return json.dumps(base64.b64encode(output).decode())


def decoder(task: Task) -> Callable[[Any], Any] | None:
    """Makes the output of what `encode` made; None where that is the output itself."""
    match task:
        case Task.GENERATE | Task.TRANSCRIBE:
            return None
        case Task.EMBED:
            return lambda stored: np.frombuffer(stored, "<f4")
        case Task.CLASSIFY:
            return lambda stored: tuple(json.loads(stored))
        case Task.RANK:
            return json.loads
        case Task.DRAW:
            return lambda stored: tuple(map(base64.b64decode, json.loads(stored)))
        case Task.SPEAK:
            return lambda stored: base64.b64decode(json.loads(stored))
