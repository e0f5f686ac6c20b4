"""Every figure of a load test, on requests whose times are known exactly."""

from __future__ import annotations

import random

import pytest

from runtime.benchmark.observation import Observation, figures, shared
from runtime.benchmark.summary import Plan, Spread, responses, summarize
from runtime.benchmark.workload import Request


def seen(pieces: list[tuple[float, int]], tokens: int | None, number: int = 0, **more: object) -> Observation:
    """A request that was sent at 10 s; `pieces` are (seconds after that, characters)."""
    one = Observation(number, Request("p"), due=10.0, start=10.0, output_tokens=tokens, finish_reason="stop")
    one.pieces = [(10.0 + at, chars) for at, chars in pieces]
    one.end = one.pieces[-1][0] + 0.5 if pieces else 11.0  # the stream ends after its last token
    for name, value in more.items():
        setattr(one, name, value)
    return one


def test_a_piece_for_each_token() -> None:
    """The first token at 0.2 s, four more every 0.1 s."""
    found = figures(seen([(0.2 + 0.1 * i, 4) for i in range(5)], tokens=5))
    assert found.ttft_s == pytest.approx(0.2)
    assert found.tpot_s == pytest.approx(0.1)
    assert found.itl_s == pytest.approx((0.1,) * 4)
    assert found.end_to_end_latency_s == pytest.approx(0.6)
    assert found.output_throughput_token_per_s == pytest.approx(5 / 0.6)


def test_tokens_that_come_together_share_their_time() -> None:
    """Pieces of 2 tokens every 0.3 s: 0.15 s for a token, and not 0.3; the first piece gives no gap."""
    found = figures(seen([(0.2, 8), (0.5, 8), (0.8, 8)], tokens=6))
    assert found.itl_s == pytest.approx((0.15,) * 4)
    assert found.tpot_s == pytest.approx(0.15)
    assert found.ttft_s == pytest.approx(0.2)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    """NULL, and no division by zero."""
    found = figures(seen([(0.2, 4)], tokens=1))
    assert (found.tpot_s, found.itl_s) == (None, ())
    assert found.output_throughput_token_per_s == pytest.approx(5)


def test_all_tokens_in_one_piece() -> None:
    """A service that does not stream: time to the first token and to the last are one."""
    found = figures(seen([(0.4, 40)], tokens=10))
    assert found.tpot_s is None
    assert found.ttft_s == found.end_to_end_latency_s == pytest.approx(0.4)


def test_an_answer_without_text_is_an_answer() -> None:
    """It has a latency, and no other figure."""
    found = figures(seen([], tokens=0))
    assert found.end_to_end_latency_s == pytest.approx(1.0)
    assert (found.ttft_s, found.tpot_s, found.itl_s, found.output_throughput_token_per_s) == (None, None, (), None)


def test_an_instant_answer_divides_by_nothing() -> None:
    """All at the moment of sending."""
    found = figures(seen([(0.0, 4)], tokens=1))
    assert found.output_throughput_token_per_s is None


def test_tokens_are_shared_whole() -> None:
    """Whatever the pieces are, their tokens are whole numbers and add up; every token after the first has a gap."""
    chance = random.Random(0)
    for _ in range(300):
        weights = [chance.randrange(0, 9) for _ in range(chance.randrange(1, 12))]
        total = chance.randrange(0, 40)
        parts = shared(total, weights)
        assert sum(parts) == total
        assert min(parts) >= 0
        one = seen([(0.1 * i, w) for i, w in enumerate(weights)], tokens=total)
        assert len(figures(one).itl_s) == total - parts[0]


def test_a_summary_counts_what_failed() -> None:
    """Failed requests are rows and errors by their code; the figures are those of completed ones."""
    rows = responses(
        [
            seen([(0.2, 4), (0.3, 4)], tokens=2, number=0),
            seen([(9.0, 4)], tokens=1, number=1, error_code="cut", error_msg="lost"),
            seen([], tokens=None, number=2, error_code="429"),
            seen([], tokens=None, number=3, error_code="429"),
        ]
    )
    found = summarize(Plan("m", "synthetic", 4), rows)
    assert (found.started, found.completed, found.errors, found.error_rate) == (4, 1, 3, 0.75)
    assert dict(found.error_codes) == {"429": 2, "cut": 1}
    assert dict(found.spreads)["ttft_s"].max == pytest.approx(0.2)
    assert found.total_output_throughput_token_per_s == pytest.approx(2 / found.seconds)
    assert [row["error_code"] for row in rows] == [None, "cut", "429", "429"]


def test_a_run_in_which_everything_failed_has_a_summary() -> None:
    """No value is made up."""
    found = summarize(Plan("m", "custom", 1), responses([seen([], tokens=None, error_code="500")]))
    assert (found.completed, found.error_rate) == (0, 1.0)
    assert all(spread == Spread() for _, spread in found.spreads)
    assert found.total_output_throughput_token_per_s == 0


def test_quantiles() -> None:
    """Linear interpolation; the deviation is a sample's."""
    spread = Spread.of(range(101))
    assert (spread.p5, spread.p50, spread.p99, spread.min, spread.max, spread.mean) == (5, 50, 99, 0, 100, 50)
    assert spread.stddev == pytest.approx(29.3, abs=0.01)
    assert Spread.of([3.0]).stddev is None
