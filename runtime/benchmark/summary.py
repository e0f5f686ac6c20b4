"""From what was seen of all requests to the figures of a run.

Alone because it is arithmetic: quantiles are those of completed requests, errors are counted beside them, and a run
in which nothing was completed has a summary too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runtime.benchmark.observation import Observation, figures

QUANTILES = (5, 25, 50, 75, 90, 95, 99)
METRICS = (
    *("ttft_s", "tpot_s", "itl_s", "end_to_end_latency_s", "output_throughput_token_per_s"),
    *("input_tokens", "output_tokens"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run was made.

    Attributes:
        model: the function, or the service's name of the model.
        mode: 'synthetic', 'real_workload' or 'custom'.
        concurrency: requests in flight; None in an open loop, which has `qps` instead.
        settings: everything else that decides the requests, by the names of the options.
    """

    model: str
    mode: str
    concurrency: int | None = None
    qps: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """How a figure is distributed over the completed requests; all None when there is no value."""

    p5: float | None = None
    p25: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None
    min: float | None = None
    max: float | None = None
    stddev: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quantiles by linear interpolation; the standard deviation is that of a sample, None of a single value."""
        if not len(values):
            return cls()
        numbers = np.asarray(values, float)
        quantiles = np.percentile(numbers, QUANTILES)
        return cls(
            **{f"p{q}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
            mean=float(numbers.mean()),
            min=float(numbers.min()),
            max=float(numbers.max()),
            stddev=float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """A run.

    Attributes:
        started, completed, errors: requests; started = completed + errors.
        error_codes: how often each code was seen.
        seconds: from the first request's start to the last one's end.
        completed_per_min: completed requests in a minute of the run.
        total_output_throughput_token_per_s: tokens of all completed answers / seconds.
        start_delay_s: how late requests were sent, in an open loop.
        spreads: by the names in METRICS.
    """

    plan: Plan
    started: int
    completed: int
    errors: int
    error_codes: tuple[tuple[str, int], ...]
    seconds: float
    completed_per_min: float | None
    total_output_throughput_token_per_s: float | None
    start_delay_s: Spread
    spreads: tuple[tuple[str, Spread], ...]

    @property
    def error_rate(self) -> float:
        """Errors / started, 0 when nothing was."""
        return self.errors / self.started if self.started else 0.0


def responses(seen: Sequence[Observation]) -> list[dict[str, Any]]:
    """One row for each request that was started, failed ones too, in the order of the requests.

    `start_s` and `end_s` count from the start of the first request.
    """
    zero = min((one.start for one in seen), default=0.0)
    return [
        {
            "number": one.number,
            "start_s": one.start - zero,
            "end_s": one.end - zero,
            "start_delay_s": one.start - one.due,
            **asdict(figures(one)),
            "input_tokens": one.input_tokens if one.input_tokens is not None else one.request.input_tokens,
            "output_tokens": one.output_tokens,
            "max_tokens": one.request.max_tokens,
            "finish_reason": one.finish_reason or None,
            "error_code": one.error_code or None,
            "error_msg": one.error_msg or None,
        }
        for one in seen
    ]


def summarize(plan: Plan, rows: Sequence[dict[str, Any]]) -> Summary:
    """Sum up what `responses` tells."""
    good = [row for row in rows if row["error_code"] is None]
    seconds = max((row["end_s"] for row in rows), default=0.0)
    tokens = sum(row["output_tokens"] or 0 for row in good)
    return Summary(
        plan=plan,
        started=len(rows),
        completed=len(good),
        errors=len(rows) - len(good),
        error_codes=tuple(Counter(row["error_code"] for row in rows if row["error_code"]).most_common()),
        seconds=seconds,
        completed_per_min=60 * len(good) / seconds if seconds else None,
        total_output_throughput_token_per_s=tokens / seconds if seconds else None,
        start_delay_s=Spread.of([row["start_delay_s"] for row in rows]),
        spreads=tuple((name, Spread.of(_values(good, name))) for name in METRICS),
    )


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    if name == "itl_s":
        return [gap for row in rows for gap in row["itl_s"]]
    return [row[name] for row in rows if row[name] is not None]
