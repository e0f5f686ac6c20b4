"""The page of a load test: one file that compares its runs.

Alone because it only draws what the runs came to: each request as a point and as a line in time, each figure as a box
from p5 to p95, and the throughput over the number of requests in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any, TypeAlias

from runtime.benchmark.summary import METRICS, Summary
from runtime.html_page import page, plot, table

Run: TypeAlias = tuple[Summary, Sequence[dict[str, Any]]]
"""A run's summary and its responses."""

_BOXES = (
    ("ttft_s", "Time to the first token (s)"),
    ("tpot_s", "Time per token after the first (s)"),
    ("end_to_end_latency_s", "Whole answer (s)"),
    ("output_throughput_token_per_s", "Tokens per second of one request"),
)
_SPREAD = ("mean", "min", "p5", "p25", "p50", "p75", "p90", "p95", "p99", "max", "stddev")
MAX_LINES = 1_000  # requests of a timeline; more cannot be told apart


def report(runs: Sequence[Run]) -> str:
    """The HTML of the page."""
    labels = [_label(summary) for summary, _ in runs]
    parts = [
        table(_FIGURES, [_figures(label, summary) for label, (summary, _) in zip(labels, runs, strict=True)]),
        *(_box(runs, labels, metric, title) for metric, title in _BOXES),
        _scatter(runs, labels),
        _throughput(runs),
        *(_timeline(rows, label) for label, (_, rows) in zip(labels, runs, strict=True)),
        *(_spreads(summary, label) for label, (summary, _) in zip(labels, runs, strict=True)),
    ]
    return page("Load test", parts)


_FIGURES = (
    *("run", "started", "completed", "errors", "codes", "seconds", "completed per minute"),
    "output tokens per second",
)


def _figures(label: str, summary: Summary) -> list[Any]:
    codes = ", ".join(f"{code}: {count}" for code, count in summary.error_codes)
    return [
        *(label, summary.started, summary.completed, summary.errors, codes, summary.seconds),
        *(summary.completed_per_min, summary.total_output_throughput_token_per_s),
    ]


def _label(summary: Summary) -> str:
    plan = summary.plan
    return f"{plan.model}, {plan.concurrency} at once" if plan.concurrency else f"{plan.model}, {plan.qps:g}/s"


def _box(runs: Sequence[Run], labels: Sequence[str], metric: str, title: str) -> str:
    drawn = []
    for label, (summary, _) in zip(labels, runs, strict=True):
        spread = dict(summary.spreads)[metric]
        if spread.p50 is not None:
            ends = {"whislo": spread.p5, "q1": spread.p25, "med": spread.p50, "q3": spread.p75, "whishi": spread.p95}
            drawn.append({**ends, "label": label})
    if not drawn:
        return ""
    figure, axes = _axes("", title, height=1.2 + 0.5 * len(drawn))
    axes.bxp(drawn, showfliers=False, orientation="horizontal")
    axes.set(xlabel="p5, p25, p50, p75, p95", ylabel="")
    axes.set_xlim(left=0)
    return plot(figure, title)


def _scatter(runs: Sequence[Run], labels: Sequence[str]) -> str:
    figure, axes = _axes("output tokens", "seconds")
    some = False
    for label, (_, rows) in zip(labels, runs, strict=True):
        points = [(row["output_tokens"], row["end_to_end_latency_s"]) for row in rows if _completed(row)]
        if points:
            axes.scatter(*zip(*points, strict=True), s=12, alpha=0.6, label=label)
            some = True
    if not some:
        return ""
    axes.legend()
    return plot(figure, "Whole answer, by its tokens")


def _completed(row: dict[str, Any]) -> bool:
    return row["error_code"] is None and None not in (row["output_tokens"], row["end_to_end_latency_s"])


def _throughput(runs: Sequence[Run]) -> str:
    """Total throughput over the requests in flight, a line for each model."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for summary, _ in runs:
        total = summary.total_output_throughput_token_per_s
        if summary.plan.concurrency and total is not None:
            lines.setdefault(summary.plan.model, []).append((summary.plan.concurrency, total))
    if not any(len(line) > 1 for line in lines.values()):
        return ""
    figure, axes = _axes("requests in flight", "output tokens per second")
    for model, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", label=model)
    axes.set_ylim(bottom=0)
    axes.legend()
    return plot(figure, "Throughput by concurrency")


def _timeline(rows: Sequence[dict[str, Any]], label: str) -> str:
    """Each request from its start to its end: waiting for the first token, writing, and what failed."""
    if not rows:
        return ""
    figure, axes = _axes("seconds", "request", height=min(8.0, 1.5 + 0.12 * len(rows)))
    for row in rows[:MAX_LINES]:
        begin, end, number = row["start_s"], row["end_s"], row["number"]
        if row["error_code"]:
            axes.plot((begin, end), (number, number), color="tab:red", lw=2)
            continue
        first = begin + (row["ttft_s"] if row["ttft_s"] is not None else end - begin)
        axes.plot((begin, first), (number, number), color="tab:orange", lw=2)
        axes.plot((first, end), (number, number), color="tab:blue", lw=2)
    axes.invert_yaxis()
    return plot(figure, f"Requests of {label}: until the first token (orange), writing (blue), failed (red)")


def _spreads(summary: Summary, label: str) -> str:
    rows = [[name, *(asdict(spread)[key] for key in _SPREAD)] for name, spread in summary.spreads if name in METRICS]
    return f"<h2>{escape(label)}</h2>\n" + table(("", *_SPREAD), rows)


def _axes(xlabel: str, ylabel: str, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes
