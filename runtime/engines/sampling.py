"""How one row's next token is chosen, and what the call's options mean to transformers.

Alone because it is arithmetic on options: the decoding loop asks it and knows none of the names.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from runtime.engines.parameters import bad_value, read_parameters, truth
from runtime.spec import CallOptions, Value


def _ids(value: Value) -> tuple[int, ...]:
    parts = value if isinstance(value, tuple) else str(value).strip("[]() ").split(",")
    return tuple(int(part) for part in parts)


EXTRA: dict[str, Callable[[Any], Any]] = {
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "min_new_tokens": int,
    "min_p": float,
    "typical_p": float,
    "epsilon_cutoff": float,
    "eta_cutoff": float,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "stop_token_ids": _ids,
    "ignore_eos": truth,
}
"""Parameters beyond `CallOptions`' own fields, and how their values are read."""

_WANTED = {float: "a number", int: "a whole number", _ids: "token ids such as 1,2", truth: "true or false"}


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the options of a batch come to.

    Attributes:
        config: for `model.generate`; `max_new_tokens` is still to be set.
        ends: token ids that end an answer.
        stop: texts that end an answer and are cut off.
        seed: of sampled rows; None: a new one for each row.
    """

    config: GenerationConfig
    ends: frozenset[int]
    stop: tuple[str, ...]
    seed: int | None

    def draws(self, prompt: Sequence[int]) -> random.Random | None:
        """The source of a row's random numbers; None when the most likely token is taken.

        With a seed it depends on the seed and the prompt alone: the answer is the same in whatever company.
        """
        if not self.config.do_sample:
            return None
        if self.seed is None:
            return random.Random()
        digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).hexdigest()
        return random.Random(f"{self.seed}:{digest}")


def sampling(options: CallOptions, tokenizer: Any, defaults: GenerationConfig) -> Sampling:
    """Read the options of a batch.

    Args:
        defaults: the checkpoint's own generation_config.

    Raises:
        Fatal: option_unknown with the nearest name, option_value.
    """
    extra = read_extra(options)
    stop_ids = extra.pop("stop_token_ids", ())
    ignore_eos = extra.pop("ignore_eos", False)
    own = own_ends(tokenizer, defaults)
    ends = all_ends(options, tokenizer, own, stop_ids)
    config = GenerationConfig(
        **extra,
        **choice(options, defaults),
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        cache_implementation="dynamic",
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad_id(tokenizer, own),
    )
    if ignore_eos:
        config.suppress_tokens = sorted({*(extra.get("suppress_tokens") or ()), *own})
    return Sampling(config, ends, options.stop, options.seed)


def choose(scores: torch.Tensor, draws: Sequence[random.Random | None]) -> list[int]:
    """The next token of each row.

    Args:
        scores: (rows, vocabulary), processed by transformers' logits processors.
        draws: per row; all None: the most likely token of each.
    """
    numbers = [draw.random() for draw in draws if draw is not None]
    if not numbers:
        return scores.argmax(dim=-1).tolist()
    mass = scores.softmax(dim=-1).to(torch.float64).cumsum(dim=-1)
    reached = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * mass[:, -1:]
    # The first token whose cumulated probability exceeds the number: tokens of probability 0 are never taken.
    return torch.searchsorted(mass, reached, right=True).clamp(max=scores.shape[-1] - 1)[:, 0].tolist()


def pad_id(tokenizer: Any, ends: Iterable[int]) -> int:
    """The token that fills up shorter rows; it is masked, so any will do where the tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)


def own_ends(tokenizer: Any, defaults: GenerationConfig) -> tuple[int, ...]:
    """The token ids with which the model itself ends an answer."""
    return _as_ids(defaults.eos_token_id) or _as_ids(tokenizer.eos_token_id)


def all_ends(options: CallOptions, tokenizer: Any, own: Iterable[int], more: Iterable[int] = ()) -> frozenset[int]:
    """The token ids that end an answer: the model's own, stop texts that are special tokens, and `more`."""
    special = [tokenizer.convert_tokens_to_ids(text) for text in options.stop if text in tokenizer.all_special_tokens]
    return frozenset((*own, *special, *more))


def end_with(end: int, generation: GenerationConfig, tokenizer: Any) -> None:
    """Let an answer end where a turn of the assistant does; a base model's own end token may be another one."""
    said = list(own_ends(tokenizer, generation))
    generation.eos_token_id = said if end in said else [*said, end]


def row_seed(seed: int, prompt: Sequence[int]) -> int:
    """The seed of one row, for engines that draw by themselves: of the call's seed and the prompt alone; 63 bits."""
    digest = hashlib.blake2b(f"{seed}:".encode() + array("q", prompt).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def choice(options: CallOptions, defaults: GenerationConfig) -> dict[str, Any]:
    """do_sample; and where it is true temperature, top_p (1: off) and top_k (0: off).

    Raises:
        Fatal: option_value.
    """
    if not options.temperature:
        return {"do_sample": False}
    if options.temperature < 0:
        raise bad_value("temperature", "0 or more")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise bad_value("top_p", "above 0 and at most 1")
    if options.top_k is not None and options.top_k < 0:
        raise bad_value("top_k", "0 (off) or more")
    return {
        "do_sample": True,
        "temperature": float(options.temperature),
        # not said: the checkpoint's own, else off (transformers would take the best 50)
        "top_p": options.top_p if options.top_p is not None else (defaults.top_p or 1.0),
        "top_k": options.top_k if options.top_k is not None else (defaults.top_k or 0),
    }


def read_extra(options: CallOptions, known: Mapping[str, Callable[[Any], Any]] = EXTRA) -> dict[str, Any]:
    """The generation parameters beyond the options' own fields, as `known` reads them.

    Raises:
        Fatal: option_unknown with the nearest name, option_value.
    """
    return read_parameters(options.extra, known, _WANTED)


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
