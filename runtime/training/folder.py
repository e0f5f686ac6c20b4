"""The folder of a job: the only thing that outlives its processes, so everything that is told of a job is read here.

    request.json                        what was asked: the plan, and what is told beside it
    status.json                         state, progress, error; written anew as a whole
    cancel                              its presence asks the job to stop
    fetched/                            weights that came from elsewhere
    finetune_data/data.jsonl            the rows, or data-00000-of-00004.jsonl, … with partitions; valid.jsonl
    finetune_data/tokens/               the same as token ids
    finetune_model/checkpoint-<step>/   to go on from
    finetune_model/Epoch-<n>/           of sfft, one after each epoch
    finetune_model/final/               the trained model
    logging/                            metrics.jsonl, train.log, report.html, bad_rows.jsonl, TensorBoard's files

With ranks on several machines it must lie where all of them reach it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.training.plan import TrainingPlan, Way

_NAME = re.compile(r"[\w][\w.\-]{0,99}")


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What was asked for.

    Attributes:
        name: of the job; several may have the same.
        base: the model it starts from, as it was said; '' = a new one.
        output_table: table that is to tell of the trained model; '' = none.
    """

    plan: TrainingPlan
    name: str = ""
    base: str = ""
    output_table: str = ""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The folder of one job.

    Args:
        path: `<localPathPrefix>/<job id>`.
    """

    path: Path

    @property
    def id(self) -> str:
        """The job's id."""
        return self.path.name

    @property
    def data(self) -> Path:
        """Where the rows lie."""
        return self.path / "finetune_data"

    @property
    def models(self) -> Path:
        """Where checkpoints and the trained model lie."""
        return self.path / "finetune_model"

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.models / "final"

    @property
    def logging(self) -> Path:
        """Metrics, log and report."""
        return self.path / "logging"

    @property
    def log(self) -> Path:
        """What the job's processes printed."""
        return self.logging / "train.log"

    @property
    def report(self) -> Path:
        """The page with the curves."""
        return self.logging / "report.html"

    @property
    def bad_rows(self) -> Path:
        """Numbers and causes of the rows that could not be used; there when there are any."""
        return self.logging / "bad_rows.jsonl"

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked the job to stop."""
        return (self.path / "cancel").exists()

    def cancel(self) -> None:
        """Ask the job to stop after its present step."""
        (self.path / "cancel").touch()

    def uncancel(self) -> None:
        """Take `cancel` back."""
        (self.path / "cancel").unlink(missing_ok=True)

    def request(self) -> JobRequest:
        """What request.json says.

        Raises:
            UserError: job_unreadable.
        """
        try:
            said = json.loads((self.path / "request.json").read_text(encoding="utf-8"))
            return JobRequest(**{**said, "plan": TrainingPlan(**said["plan"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'The request of the job "{self.id}" cannot be read: {type(error).__name__}.',
                code="job_unreadable",
                hint=f"Look at {self.path / 'request.json'}, or start the training anew.",
            ) from None

    def ask(self, request: JobRequest) -> None:
        """Write request.json."""
        write_json(self.path / "request.json", asdict(request))

    def status(self) -> dict[str, Any]:
        """What status.json says; {} before the job began."""
        file = self.path / "status.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def update(self, **fields: Any) -> None:
        """Change fields of status.json. One process writes it at a time: the job's driver, then rank 0."""
        write_json(self.path / "status.json", {**self.status(), **fields})

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.logging.mkdir(parents=True, exist_ok=True)
        with (self.logging / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; without one that is not whole, as when the job was killed or writes it now."""
        file = self.logging / "metrics.jsonl"
        if not file.exists():
            return
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def log_lines(self, last: int) -> list[str]:
        """The last lines of train.log."""
        if not self.log.exists():
            return []
        with self.log.open(encoding="utf-8", errors="replace") as stream:
            return [line.rstrip("\n") for line in deque(stream, maxlen=last)]

    def take_output(self) -> None:
        """From now on, what this process and its libraries print goes to train.log."""
        self.logging.mkdir(parents=True, exist_ok=True)
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def new_folder(root: Path, way: Way, name: str) -> JobFolder:
    """Make the folder of a new job under `root`.

    Args:
        name: of the job; '' = its way and the time.

    Raises:
        UserError: option_value: a name that cannot be one; job_folder: `root` cannot be written.
    """
    if name and not _NAME.fullmatch(name):
        raise UserError(
            f'name "{name[:80]}" is no name for a job.',
            code="option_value",
            hint="Use letters, digits, dots, dashes and underscores; at most 100.",
        )
    stem = name or f"{way}-{datetime.now(UTC).astimezone():%Y%m%d-%H-%M-%S}"
    folder = JobFolder(root / f"{stem}-{secrets.token_hex(4)}")
    try:
        for part in (folder.data, folder.models, folder.logging):
            part.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f'The folder "{folder.path}" cannot be made: {error.strerror}.',
            code="job_folder",
            hint='Choose another place: AND localPathPrefix="/path/to/jobs".',
        ) from None
    return folder


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `out` when the block ends well, and is gone otherwise."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(out, ignore_errors=True)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)
