"""The page of a job: its curves and figures in one file that needs nothing else.

Alone because it only reads the job's folder; it is drawn when the job has ended, however it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from runtime.html_page import page, plot, table
from runtime.training.folder import JobFolder
from runtime.training.whole import write_text

MAX_POINTS = 2_000  # of a curve; more cannot be told apart
SHOWN_ROWS = 200  # of the table of metrics
COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "seconds")
"""What metrics.jsonl tells of a step; a line has some of them."""


def write_report(folder: JobFolder) -> None:
    """Write logging/report.html; nothing when the job has no metrics yet."""
    metrics = list(folder.metrics())
    if not metrics:
        return
    parts = [
        table(("", ""), _figures(folder)),
        *(_curve(metrics, names, title) for names, title in _CURVES),
        "<h2>Steps</h2>",
        table(COLUMNS, ([line.get(name) for name in COLUMNS] for line in _thinned(metrics, SHOWN_ROWS))),
    ]
    write_text(folder.report, page(folder.id, parts))


_CURVES = (
    (("loss", "eval_loss"), "Loss"),
    (("learning_rate",), "Learning rate"),
    (("tokens_per_s",), "Tokens per second"),
)


def _figures(folder: JobFolder) -> list[tuple[str, Any]]:
    """What the status says, and the parameters that were given."""
    said, plan = folder.status(), folder.request().plan
    started = said.get("started")
    figures = {
        "way": plan.way,
        "ranks": plan.ranks,
        "started": f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M:%S} UTC" if started else None,
        **{name: said.get(name) for name in FIGURES},
        **plan.parameters,
    }
    return [(name, value) for name, value in figures.items() if value is not None]


FIGURES = ("rows", "bad_rows", "truncated", "step", "steps", "epoch", "loss", "eval_loss", "tokens")
"""What status.json tells of the training."""


def _curve(metrics: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> str:
    """One plot as inline SVG; '' when there is nothing to draw."""
    lines = {name: [(line["step"], line[name]) for line in metrics if _drawn(line, name)] for name in names}
    lines = {name: _thinned(points, MAX_POINTS) for name, points in lines.items() if points}
    if not lines:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend()
    return plot(figure, title)


def _drawn(line: Mapping[str, Any], name: str) -> bool:
    value = line.get(name)
    return isinstance(value, int | float) and math.isfinite(value) and "step" in line


def _thinned(points: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the points, evenly chosen; the last one always."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
