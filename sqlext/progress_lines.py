"""How far something is, in words: a statement's rows, a job's steps.

Alone because it needs no terminal: tables and programs say it with the same words as the progress line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BAR_CHARS = 20


def job_line(job: str, status: Mapping[str, Any]) -> str:
    """How far a job is.

    Args:
        status: what its status.json says.
    """
    step, steps = status.get("step"), status.get("steps")
    if not steps:
        return f"{job}: {status.get('doing') or status.get('state', 'queued')}"
    done = round(BAR_CHARS * (step or 0) / steps)
    parts = [f"{job} {'━' * done}{'╌' * (BAR_CHARS - done)} {step or 0:,} of {steps:,} steps"]
    if (loss := status.get("loss")) is not None:
        parts.append(f"loss {loss:.3g}")
    if speed := status.get("tokens_per_s"):
        parts.append(f"{speed:,.0f} tokens/s")
    if left := status.get("seconds_left"):
        parts.append(f"{_duration(left)} left")
    return " · ".join(parts)


def left_out_line(job: Mapping[str, Any]) -> str:
    """What a finished job did not learn from or was not evaluated on; '' when that is nothing."""
    bad, cut = job.get("bad_rows") or 0, job.get("truncated") or 0
    parts = [f"{bad:,} could not be used"] if bad else []
    parts += [f"{cut:,} were cut at max_seq_length"] if cut else []
    told = [f"Of {job.get('rows') or 0:,} rows {' and '.join(parts)}."] if parts else []
    if bad := job.get("valid_bad_rows"):
        told.append(f"Of {job.get('valid_rows') or 0:,} rows of validTable {bad:,} could not be used.")
    return " ".join(told)


def rows_line(answered: int, still_open: int, tokens: int, seconds: float) -> str:
    """How far a statement is.

    Args:
        answered: calls that have their answers.
        still_open: calls that are known to be wanted too; 0 when nothing is known of what is to come.
        tokens: of prompts and answers so far.
        seconds: since the statement began.
    """
    known = f" of {answered + still_open:,}" if still_open else ""
    parts = [f"{answered:,}{known} answers", f"{answered / seconds:,.0f} rows/s", f"{tokens / seconds:,.0f} tokens/s"]
    if still_open:
        parts.append(f"{_duration(still_open * seconds / answered)} left")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    """Short, for people: 9 s, 4 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
