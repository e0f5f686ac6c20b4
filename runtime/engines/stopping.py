"""Leaving a generation of transformers when nobody wants it any more.

Alone because engines that leave the loop to transformers can end it in one way only: an exception, as a model may go
through many generations for one answer.
"""

from __future__ import annotations

import threading
from typing import Any

from transformers import StoppingCriteria


class Left(Exception):
    """The generation was left because nobody wants it."""


class Stopped(StoppingCriteria):
    """Leaves a generation at the next token once `stop` is set.

    Raises:
        Left: from `generate`.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        if self._stop.is_set():
            raise Left
        return input_ids.new_zeros(input_ids.shape[0], dtype=bool)
