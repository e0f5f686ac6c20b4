"""The decoding loop: a set of rows in the model, which finished rows leave at once and waiting rows enter.

Alone because it is the hot loop. It runs as transformers' own `custom_generate` hook: preparation, processors, cache
and the model's forward stay theirs; ours is who is in the set. A plain `generate` computes every row of a batch until
its longest answer ends; here a row costs nothing after its last token.

Rows join a running set only where that cannot change their answer: all cache layers are plain (no sliding window)
and no logits processor reads the tokens so far. Otherwise sets run one after the other, and rows of a set share one
prompt length when a processor reads the prompt, as padding would count as prompt.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.generation import logits_process

from runtime.engines.grammar import Guide, constrain
from runtime.engines.sampling import Sampling, choose
from runtime.errors import Fatal

BLIND = (  # processors that look at the scores alone
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)


@dataclass(slots=True, eq=False)
class Row:
    """One prompt on its way to an answer.

    Attributes:
        index: in the batch.
        prompt: its token ids.
        limit: most new tokens.
        draws: its random numbers, None when the most likely token is taken.
        guide: what its answer is held to, None when it may say anything.
        new: token ids so far.
        reason: 'stop' or 'length' once it has ended.
    """

    index: int
    prompt: list[int]
    limit: int
    draws: random.Random | None
    guide: Guide | None = None
    new: list[int] = field(default_factory=list)
    reason: str = ""

    def take(self, token: int) -> None:
        """The answer goes on with this token."""
        self.new.append(token)
        if self.guide:
            self.guide.take(token)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much runs at once: rows, and tokens of prompts and answers together, padding included."""

    rows: int
    tokens: int


class Running:
    """The rows that are in the model now.

    Everything lies in `transformers` form: `input_ids` (rows, length), left-padded, and the keyword arguments of the
    next forward, among them the attention mask (rows, length) and the cache.
    """

    def __init__(
        self,
        model: Any,
        rows: list[Row],
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        inputs: dict[str, Any],
    ) -> None:
        self._model = model
        self.rows = rows
        self._input_ids = input_ids
        self._processors = processors
        self._inputs = inputs
        self._fresh = True

    @property
    def blind(self) -> bool:
        """Whether no processor reads the tokens so far, so that padding and neighbours cannot matter."""
        return all(isinstance(processor, BLIND) for processor in self._processors)

    @property
    def shareable(self) -> bool:
        """Whether all state of a row is in the cache, and none inside the model, where a row cannot leave.

        A model says that it keeps state (`_is_stateful`); since transformers 5 the state of most of them is in layers
        of the cache.
        """
        caches = [value for value in self._inputs.values() if isinstance(value, Cache)]
        inside = getattr(self._model, "_is_stateful", False)
        layers = [layer for cache in caches for layer in cache.layers]
        return bool(caches) and (not inside or any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers))

    @property
    def joinable(self) -> bool:
        """Whether rows can come in beside those that are here."""
        layers = getattr(self._inputs.get("past_key_values"), "layers", ())
        return self.blind and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def step(self, ended: Callable[[Row], str]) -> list[Row]:
        """One more token for every row; the rows that ended with it leave and are returned."""
        tokens = choose(self._scores(), [row.draws for row in self.rows])
        self._input_ids = torch.cat([self._input_ids, self._input_ids.new_tensor(tokens)[:, None]], dim=-1)
        for row, token in zip(self.rows, tokens, strict=True):
            row.take(token)
            row.reason = ended(row)
        finished = [row for row in self.rows if row.reason]
        if finished:
            self._keep([place for place, row in enumerate(self.rows) if not row.reason])
        return finished

    def join(self, other: Running) -> None:
        """Take over the rows of `other`; both are padded on the left to the same length."""
        if not other.rows:
            return
        for each in (self, other):
            if each._inputs.get("attention_mask") is None:  # transformers drops a mask of ones
                each._inputs["attention_mask"] = torch.ones_like(each._input_ids)
        self._input_ids = _stack(self._input_ids, other._input_ids)
        for name, theirs in other._inputs.items():
            if isinstance(theirs, torch.Tensor):
                self._inputs[name] = _stack(self._inputs[name], theirs)
        mine, theirs = self._inputs["past_key_values"].layers, other._inputs["past_key_values"].layers
        for layer, added in zip(mine, theirs, strict=True):
            layer.keys = _stack(layer.keys, added.keys, dim=-2)
            layer.values = _stack(layer.values, added.values, dim=-2)
        self.rows += other.rows

    def _scores(self) -> torch.Tensor:
        """(rows, vocabulary), processed."""
        model = self._model
        if self._fresh:
            inputs = model.prepare_inputs_for_generation(self._input_ids, is_first_iteration=True, **self._inputs)
        else:
            inputs = model.prepare_inputs_for_generation(self._input_ids, next_sequence_length=1, **self._inputs)
        self._fresh = False
        outputs = model(**inputs, return_dict=True)
        self._inputs = model._update_model_kwargs_for_generation(outputs, self._inputs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self._input_ids.device)
        return self._processors(self._input_ids, constrain(logits, [row.guide for row in self.rows]))

    def _keep(self, places: list[int]) -> None:
        """Only these rows stay; columns that are padding for all of them go too."""
        count = len(self.rows)
        self.rows = [self.rows[place] for place in places]
        if not places:
            self._inputs = {}  # gives the cache back now
            return
        kept = torch.tensor(places, device=self._input_ids.device)
        self._input_ids = self._input_ids.index_select(0, kept)
        for name, value in self._inputs.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == count:
                self._inputs[name] = value.index_select(0, kept)
            elif isinstance(value, Cache):
                value.reorder_cache(kept)
        self._trim()

    def _trim(self) -> None:
        mask = self._inputs.get("attention_mask")
        if mask is None or not self.joinable or not (unused := int(mask.argmax(dim=-1).min())):
            return
        self._input_ids = self._input_ids[:, unused:]
        for name, value in self._inputs.items():
            if isinstance(value, torch.Tensor):
                self._inputs[name] = value[..., unused:]
        for layer in self._inputs["past_key_values"].layers:
            layer.keys = layer.keys[..., unused:, :]
            layer.values = layer.values[..., unused:, :]


def _stack(first: torch.Tensor, second: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """One under the other, the shorter one filled up with zeros on the left of `dim`."""
    longest = max(first.shape[dim], second.shape[dim])
    behind = (0, 0) * (-1 - dim)
    padded = [
        torch.nn.functional.pad(tensor, (*behind, longest - tensor.shape[dim], 0)) for tensor in (first, second)
    ]
    return torch.cat(padded)


def start(model: Any, rows: list[Row], sampling: Sampling) -> Running:
    """Bring rows into the model: their prompts, left-padded, prepared by `model.generate` itself.

    Raises:
        Fatal: option_value, transformers refuses a generation parameter.
    """
    longest = max(len(row.prompt) for row in rows)
    pad = sampling.config.pad_token_id
    ids = [[pad] * (longest - len(row.prompt)) + row.prompt for row in rows]
    mask = [[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
    sampling.config.max_new_tokens = max(row.limit for row in rows)

    def prepared(
        model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **inputs: Any
    ) -> Running:
        del inputs["stopping_criteria"], inputs["generation_config"]
        return Running(model, rows, input_ids, logits_processor, inputs)

    try:
        running: Running = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=sampling.config,
            custom_generate=prepared,
        )
    except (ValueError, TypeError) as error:  # it checks the parameters as it prepares
        reason = str(error).splitlines()[0]
        raise Fatal(f"transformers refuses the generation parameters: {reason}", code="option_value") from None
    return running


@torch.inference_mode()
def decode(
    model: Any,
    rows: list[Row],
    sampling: Sampling,
    limits: Limits,
    *,
    ended: Callable[[Row], str],
    stop: threading.Event,
    each_token: bool = False,
) -> Iterator[list[Row]]:
    """Decode `rows`, yielding them as they end; nothing more comes once `stop` is set.

    Args:
        each_token: yield after every token, also when no row ended with it.
        ended: 'stop' or 'length' for a row that ends with its newest token, '' for one that goes on.
    """
    if not rows:
        return
    waiting = sorted(rows, key=lambda row: len(row.prompt))  # taken from the end: longest first
    probe = start(model, rows[:1], sampling)
    uniform = not probe.blind
    if not probe.shareable:
        limits = Limits(1, limits.tokens)
    running: Running | None = None
    while (running or waiting) and not stop.is_set():
        group = _take(waiting, running, limits, uniform)
        if group:
            fresh = start(model, group, sampling)
            finished = fresh.step(ended)
            if running:
                running.join(fresh)
            else:
                running = fresh
        elif running:
            finished = running.step(ended)
        if finished or each_token:
            yield finished
        if running and not running.rows:
            running = None


def _take(waiting: list[Row], running: Running | None, limits: Limits, uniform: bool) -> list[Row]:
    """The rows that enter the model now, taken off the end of `waiting`; [] when there is no room for more.

    Args:
        uniform: rows that enter together must have prompts of one length.
    """
    here = running.rows if running else []
    if running and (uniform or 4 * len(here) > 3 * limits.rows or not running.joinable):
        return []
    group: list[Row] = []
    longest = max((len(row.prompt) + row.limit for row in here), default=0)
    while waiting:
        row = waiting[-1]
        longest = max(longest, len(row.prompt) + row.limit)
        count = len(here) + len(group) + 1
        if count > 1 and (count > limits.rows or count * longest > limits.tokens):
            break
        if uniform and group and len(group[0].prompt) != len(row.prompt):
            break
        group.append(waiting.pop())
    return group
