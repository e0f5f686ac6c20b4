"""What was seen of one request, and the figures that follow from it.

Alone because every figure is defined here and nowhere else. Times are seconds. For a request that was sent at
`start`, whose pieces of text came at `t_1 … t_n` with `k_1 … k_n` tokens, `T` in all:

    ttft_s                            t_1 - start
    end_to_end_latency_s              t_n - start
    tpot_s                            (t_n - t_1) / (T - k_1); NULL when all tokens came with the first piece
    itl_s                             for each token after the first piece the time since the piece before, shared by
                                      the tokens that came together: (t_i - t_{i-1}) / k_i, k_i times
    output_throughput_token_per_s     T / end_to_end_latency_s

So the time to the first token is part of the first two and the last, and of none of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.benchmark.workload import Request


@dataclass(slots=True)
class Observation:
    """One request, as it was watched.

    Attributes:
        due: when it was to be sent; like every time here on the clock of `time.perf_counter`.
        start: when it was sent.
        end: when it was over, in whatever way.
        pieces: (time, characters) of each piece of text.
        input_tokens, output_tokens: counted by the engine; None when it does not say.
        finish_reason: as the engine says it.
        error_code, error_msg: what went wrong, '' and '' when nothing did. What came before it is kept.
    """

    number: int
    request: Request
    due: float = 0.0
    start: float = 0.0
    end: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str = ""
    error_code: str = ""
    error_msg: str = ""

    def piece(self, at: float, chars: int) -> None:
        """A piece of text came."""
        self.pieces.append((at, chars))

    def failed(self, code: str, message: str) -> None:
        """It went wrong; the first cause counts."""
        if not self.error_code:
            self.error_code, self.error_msg = code, message


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one request; None where there is nothing to measure. `itl_s` has one number for each token."""

    ttft_s: float | None
    tpot_s: float | None
    itl_s: tuple[float, ...]
    end_to_end_latency_s: float | None
    output_throughput_token_per_s: float | None


def figures(seen: Observation) -> Figures:
    """What a request came to, by the formulas above."""
    if not seen.pieces:
        latency = None if seen.error_code else seen.end - seen.start
        return Figures(None, None, (), latency, None)
    times = [at for at, _ in seen.pieces]
    total = seen.output_tokens if seen.output_tokens is not None else len(seen.pieces)
    tokens = shared(total, [chars for _, chars in seen.pieces])
    first, last = times[0], times[-1]
    later = total - tokens[0]
    latency = last - seen.start
    return Figures(
        ttft_s=first - seen.start,
        tpot_s=(last - first) / later if later > 0 else None,
        itl_s=_gaps(times, tokens),
        end_to_end_latency_s=latency,
        output_throughput_token_per_s=total / latency if latency > 0 else None,
    )


def shared(total: int, weights: Sequence[int]) -> list[int]:
    """`total` tokens shared out among pieces: one for each where that comes out even, else by their lengths.

    The parts are whole numbers and add up to `total`.
    """
    if total == len(weights):
        return [1] * total
    sum_of_weights = sum(weights) or 1
    parts, given, passed = [], 0, 0
    for weight in weights:
        passed += weight
        upto = round(total * passed / sum_of_weights)
        parts.append(upto - given)
        given = upto
    parts[-1] += total - given
    return parts


def _gaps(times: Sequence[float], tokens: Sequence[int]) -> tuple[float, ...]:
    gaps: list[float] = []
    since = times[0]
    for at, count in zip(times[1:], tokens[1:], strict=True):
        if count:  # a piece without a token of its own belongs to the next one
            gaps += [(at - since) / count] * count
            since = at
    return tuple(gaps)
