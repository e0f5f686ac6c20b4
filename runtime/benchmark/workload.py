"""What is asked, and when: requests with lengths in tokens, and the times at which they are sent.

Alone because it is decided before anything is sent, from one seed, so that two models can be asked the very same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from runtime.benchmark.exact_text import ExactText
from runtime.errors import UserError

Distribution: TypeAlias = Literal["constant", "uniform", "exponential"]
DRAWS = 1_000  # of a length, before a mean and a deviation count as hopeless


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        prompt: its text.
        input_tokens: tokens of the prompt by the model's own tokenizer; None when there is none at hand.
        max_tokens: most tokens of the answer; None: the model's own bound.
    """

    prompt: str
    input_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens as a normal distribution, cut at `least`."""

    mean: float
    stddev: float
    least: int = 1

    def draw(self, chance: random.Random) -> int:
        """One length.

        Raises:
            UserError: option_value, hardly any length would be long enough.
        """
        for _ in range(DRAWS):
            if (length := round(chance.gauss(self.mean, self.stddev))) >= self.least:
                return length
        raise UserError(
            f"A mean of {self.mean:g} tokens with deviation {self.stddev:g} is hardly ever {self.least} or more.",
            code="option_value",
            hint="Raise the mean of the tokens, or lower their standard deviation.",
        )


def synthetic(texts: ExactText, count: int, inputs: Lengths, outputs: Lengths, seed: int) -> list[Request]:
    """`count` requests whose prompts have exactly the tokens that were drawn for them, each with another text."""
    chance = random.Random(seed)
    requests = []
    for _ in range(count):
        tokens = inputs.draw(chance)
        requests.append(Request(texts.of(tokens, chance), tokens, outputs.draw(chance)))
    return requests


def custom(prompts: Sequence[str], max_tokens: int | None) -> list[Request]:
    """The user's own prompts, in their order."""
    return [Request(prompt, max_tokens=max_tokens) for prompt in prompts]


def arrivals(count: int, qps: float, distribution: Distribution, seed: int) -> list[float]:
    """Seconds from the start at which each request is sent; the first at once.

    Args:
        qps: requests a second, on average.
        distribution: of the time between two: always 1 / qps, uniform from 0 to 2 / qps, or exponential, as when
            many people ask independently of each other (a Poisson process).
    """
    chance = random.Random(f"{seed}:arrivals")

    def wait() -> float:
        match distribution:
            case "constant":
                return 1 / qps
            case "uniform":
                return chance.uniform(0, 2 / qps)
            case "exponential":
                return chance.expovariate(qps)

    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + wait())
    return times[:count]
