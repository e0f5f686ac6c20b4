"""Requests of a load test: prompts of exact lengths, and the times at which they are sent."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import pytest
from transformers import AutoTokenizer

from runtime.benchmark.tokenizer import exact_text
from runtime.benchmark.workload import Lengths, arrivals, synthetic
from runtime.errors import UserError


@pytest.mark.parametrize("name", ["chat", "minilm"])
def test_prompts_have_exactly_the_tokens_that_were_drawn(checkpoints: dict[str, Path], name: str) -> None:
    """Counted by the checkpoint's own tokenizer; every prompt is another text."""
    requests = synthetic(exact_text(str(checkpoints[name])), 30, Lengths(60, 25), Lengths(20, 5), seed=1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    counted = [len(tokenizer(request.prompt, add_special_tokens=False)["input_ids"]) for request in requests]
    assert counted == [request.input_tokens for request in requests]
    assert len({request.prompt for request in requests}) == 30
    assert all(request.max_tokens and request.max_tokens > 0 for request in requests)


def test_a_seed_gives_the_same_requests(checkpoints: dict[str, Path]) -> None:
    """So two models are asked the very same."""
    texts = exact_text(str(checkpoints["chat"]))
    first, second, other = (synthetic(texts, 5, Lengths(30, 9), Lengths(9, 3), seed) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_lengths_follow_their_mean_and_deviation() -> None:
    """And are never below the least."""
    chance = random.Random(0)
    drawn = [Lengths(100, 20).draw(chance) for _ in range(5_000)]
    assert mean(drawn) == pytest.approx(100, rel=0.02)
    assert stdev(drawn) == pytest.approx(20, rel=0.05)
    assert min(Lengths(2, 5).draw(chance) for _ in range(1_000)) == 1
    with pytest.raises(UserError, match="hardly ever"):
        Lengths(-1_000, 1).draw(chance)


@pytest.mark.parametrize("distribution", ["constant", "uniform", "exponential"])
def test_requests_come_at_their_rate(distribution: str) -> None:
    """4,000 requests at 50 a second take 80 seconds, whatever the distribution of the time between them."""
    times = arrivals(4_000, 50, distribution, seed=3)  # type: ignore[arg-type]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(80, rel=0.05)
    gaps = [after - before for before, after in pairwise(times)]
    deviation = {"constant": 0, "uniform": 0.02 / 3**0.5, "exponential": 0.02}[distribution]
    assert stdev(gaps) == pytest.approx(deviation, rel=0.06, abs=1e-9)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """Is an error that says what to type."""
    with pytest.raises(UserError) as error:
        exact_text(str(tmp_path))
    assert error.value.code == "tokenizer_missing"
    assert "tokenizer=" in (error.value.hint or "")
