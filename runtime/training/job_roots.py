"""Where jobs lie: under the default root, and under every other folder that a job was ever put into.

Alone because nothing registers a job but its folder; only the roots are remembered, in a file in the default root, so
that another session, or another program, finds every job again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from runtime.checkpoints.folder import data_folder
from runtime.errors import UserError, did_you_mean
from runtime.training.folder import JobFolder

VARIABLE = "SQLEXT_JOBS"


def default_root() -> Path:
    """`$SQLEXT_JOBS`, or the user's data folder."""
    if said := os.environ.get(VARIABLE):
        return Path(os.path.realpath(os.path.expanduser(said)))
    return data_folder() / "jobs"


def remember(root: Path) -> None:
    """Look for jobs under `root` from now on."""
    if root in roots():
        return
    default_root().mkdir(parents=True, exist_ok=True)
    with _index().open("a", encoding="utf-8") as stream:
        stream.write(f"{root}\n")


def roots() -> list[Path]:
    """The folders in which jobs may lie; those that are gone left out."""
    others = _index().read_text(encoding="utf-8").splitlines() if _index().exists() else []
    return [root for root in dict.fromkeys([default_root(), *map(Path, others)]) if root.is_dir()]


def all_jobs() -> list[JobFolder]:
    """Every job there is, the oldest first."""
    files = [file for root in roots() for file in root.glob("*/request.json")]
    return [JobFolder(file.parent) for file in sorted(files, key=_made)]


def find(word: str) -> JobFolder:
    """The job that is called `word`: by its id, by its name (the newest), or by how its id begins.

    Raises:
        UserError: job_unknown, job_ambiguous.
    """
    jobs = {job.id: job for job in all_jobs()}
    if word in jobs:
        return jobs[word]
    named = [job for job in jobs.values() if job.id.rpartition("-")[0] == word]
    if named:
        return named[-1]
    found = [job for job in jobs.values() if word and job.id.startswith(word)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f'{len(found)} jobs begin with "{word}".',
            code="job_ambiguous",
            hint=f"Type more of the id: {', '.join(job.id for job in found[-3:])}.",
        )
    raise _unknown(word, jobs)


def _unknown(word: str, ids: Iterable[str]) -> UserError:
    names = {job.rpartition("-")[0] for job in ids}
    near = did_you_mean(word, [*names, *ids])
    return UserError(
        f'There is no job "{word}".',
        code="job_unknown",
        hint=f'Did you mean "{near}"?' if near else "!llm jobs; lists them.",
    )


def _made(request: Path) -> float:
    try:
        return request.stat().st_mtime
    except FileNotFoundError:  # removed just now
        return 0.0


def _index() -> Path:
    return default_root() / "roots.txt"
