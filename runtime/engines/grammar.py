"""Answers held to a JSON schema: which tokens may come next in a row, and how all others lose their scores.

Alone because the grammars are llguidance's. One is compiled for a schema when it is first asked for, and each row
goes its own way through a copy. Without a schema in a batch nothing of this runs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from runtime.errors import Fatal

MAX_GRAMMARS = 256
# oneOf as anyOf: that only one holds is seen when the answer is there.
_COMPACT: Any = {"whitespace_flexible": False, "coerce_one_of": True}


class Guide:
    """The way of one row through a grammar."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def take(self, token: int) -> None:
        """The row has got this token."""
        self.matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether nothing can follow: the answer is whole, or the grammar has given up."""
        return bool(self.matcher.is_stopped())


class Grammars:
    """The grammars of one model. Thread-safe.

    Args:
        tokenizer: of transformers.
        vocabulary: scores that the model gives for a token.
        ends: token ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._vocabulary_tree: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def guides(self, schema: str, rows: int) -> list[Guide]:
        """A guide for each of so many rows.

        Raises:
            Fatal: schema_tokenizer, schema_unsupported.
        """
        with self._lock:
            matcher = self._compiled.get(schema)
            if matcher is None:
                matcher = self._compiled[schema] = self._compile(schema)
                if len(self._compiled) > MAX_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(schema)
            return [Guide(matcher.deep_copy()) for _ in range(rows)]

    def _compile(self, schema: str) -> LLMatcher:
        if self._vocabulary_tree is None:
            self._vocabulary_tree = self._read_vocabulary()
        matcher = LLMatcher(
            self._vocabulary_tree, LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT), log_level=0
        )
        matcher.compute_bitmask()  # some schemas fail only here
        if matcher.is_error():
            cause = matcher.get_error().splitlines()[0][:200]
            raise Fatal(
                f"This schema cannot guide a model: {cause}",
                code="schema_unsupported",
                hint="Write it with fewer kinds of rules, or as a SQL type.",
            )
        return matcher

    def _read_vocabulary(self) -> LLTokenizer:
        if not getattr(self._tokenizer, "is_fast", False):
            raise Fatal(
                "The model's tokenizer has no fast form, so its answers cannot be held to a schema.",
                code="schema_tokenizer",
                hint="Use a checkpoint with a tokenizer.json.",
            )
        vocabulary = max(self._vocabulary, len(self._tokenizer))
        return from_tokenizer(self._tokenizer, n_vocab=vocabulary, eos_token=self._ends or None)


def constrain(scores: torch.Tensor, guides: Sequence[Guide | None]) -> torch.Tensor:
    """The scores (rows, vocabulary), with -inf for each token that may not come next in a row with a guide."""
    guided = [(place, guide) for place, guide in enumerate(guides) if guide]
    if not guided:
        return scores
    vocabulary = scores.shape[-1]
    allowed = np.zeros((len(guided), (vocabulary + 31) // 32), np.int32)
    first, size = allowed.ctypes.data, allowed.strides[0]
    for number, (_, guide) in enumerate(guided):
        guide.matcher.unsafe_compute_mask_ptr(first + number * size, size)
    forbidden = _unpacked(~allowed, vocabulary, scores.device)
    if len(guided) == len(guides):
        return scores.masked_fill_(forbidden, -torch.inf)
    places = torch.tensor([place for place, _ in guided], device=scores.device)
    return scores.index_copy_(0, places, scores[places].masked_fill_(forbidden, -torch.inf))


def _unpacked(bits: Any, count: int, device: torch.device) -> torch.Tensor:
    """The first `count` bits of each row as a tensor of truth values."""
    if device.type == "cpu":
        flags = np.unpackbits(bits.view(np.uint8), axis=1, count=count, bitorder="little")
        return torch.from_numpy(flags).view(torch.bool)
    packed = torch.from_numpy(bits).to(device)  # unpacked there: an eighth goes over the bus
    places = torch.arange(32, dtype=torch.int32, device=device)
    return ((packed[:, :, None] >> places) & 1).view(len(bits), -1)[:, :count].bool()
