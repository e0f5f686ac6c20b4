"""The files of a run: what was seen of each request, and the summary, as JSON by the names that load tests use.

Alone because other programs read them: `<model>_<input>_<output>_<concurrency>_<mode>_individual_responses.json` and
`…_summary.json`, with flat keys such as `results_ttft_s_quantiles_p50`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.benchmark.summary import QUANTILES, Plan, Spread, Summary

VERSION = "2026-11"


def write_results(folder: Path, summary: Summary, rows: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write both files and return them: responses, summary. What other runs wrote stays: names are counted up."""
    folder.mkdir(parents=True, exist_ok=True)
    name = _free(folder, _name(summary.plan))
    both = folder / f"{name}_individual_responses.json", folder / f"{name}_summary.json"
    for path, content in zip(both, (list(rows), flat(summary, name)), strict=True):
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return both


def flat(summary: Summary, name: str) -> dict[str, Any]:
    """The summary as one level of keys."""
    plan = summary.plan
    found: dict[str, Any] = {
        "version": VERSION,
        "name": name,
        "timestamp": int(datetime.now(UTC).timestamp()),
        "model": plan.model,
        "mode": plan.mode,
        "num_concurrent_requests": plan.concurrency,
        "qps": plan.qps,
        **dict(plan.settings),
    }
    for metric, spread in (*summary.spreads, ("start_delay_s", summary.start_delay_s)):
        found |= _flat_spread(f"results_{metric}", spread)
    return found | {
        "results_num_requests_started": summary.started,
        "results_num_completed_requests": summary.completed,
        "results_num_completed_requests_per_min": summary.completed_per_min,
        "results_number_errors": summary.errors,
        "results_error_rate": summary.error_rate,
        "results_error_code_frequency": dict(summary.error_codes),
        "results_total_output_throughput_token_per_s": summary.total_output_throughput_token_per_s,
        "results_seconds": summary.seconds,
    }


def _flat_spread(prefix: str, spread: Spread) -> dict[str, Any]:
    values = asdict(spread)
    quantiles = {f"{prefix}_quantiles_p{q}": values.pop(f"p{q}") for q in QUANTILES}
    return quantiles | {f"{prefix}_{name}": value for name, value in values.items()}


def _name(plan: Plan) -> str:
    said = dict(plan.settings)
    lengths = [f"{said[key]:g}" for key in ("mean_input_tokens", "mean_output_tokens") if said.get(key)]
    load = f"{plan.concurrency}" if plan.concurrency else f"{plan.qps:g}qps"
    return "_".join([re.sub(r"[^\w.-]+", "-", plan.model), *lengths, load, plan.mode])


def _free(folder: Path, name: str) -> str:
    number, free = 1, name
    while (folder / f"{free}_summary.json").exists():
        number += 1
        free = f"{name}_{number}"
    return free
