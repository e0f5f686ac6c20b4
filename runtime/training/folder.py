"""The folder of a job: the only thing that outlives its processes, so everything that is told of a job is read here.

    request.json                        what was asked: the plan, and what is told beside it
    status.json                         state, progress, error; written anew as a whole
    lock, writer                        held by the process that drives the job, and by its rank 0, while they live
    alive                               touched by that process every few seconds
    cancel                              its presence asks the job to stop
    stop_at                             the step after which all ranks stop, once one has seen `cancel`
    fetched/                            weights that came from elsewhere
    finetune_data/data.jsonl            the rows, or data-00000-of-00004.jsonl, … with partitions; valid.jsonl
    finetune_data/tokens/               the same as token ids
    finetune_model/checkpoint-<step>/   to go on from
    finetune_model/Epoch-<n>/           of sfft, one after each epoch
    finetune_model/final/               the trained model
    logging/                            metrics.jsonl, train.log, report.html, bad_rows.jsonl, TensorBoard's files

With ranks on several machines it must lie where all of them reach it. It may be moved when no process writes there:
paths that lead into it stand in request.json as seen from it. Only its owner may look into it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import Fatal, UserError
from runtime.training.plan import TrainingPlan, Way
from runtime.training.whole import sweep, write_json, write_text

_NAME = re.compile(r"[\w][\w.\-]{0,99}")
_PATHS = ("model", "weights", "adapter")
"""Fields of a plan that may lead into the job's folder."""
ENDING_S = 3.0  # from the last word of a job to the end of its process
CHECKPOINT = "checkpoint-"
STATE_FILE = "trainer_state.json"
"""What Trainer writes last into a checkpoint."""


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

    def take(self) -> BinaryIO:
        """Become the process that drives the job, as long as the file that is returned is open.

        One that has told of its end is waited for: it goes in a moment.

        Raises:
            UserError: job_running: another process is.
        """
        deadline = time.monotonic() + ENDING_S
        while (file := self._locked("lock")) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f'The job "{self.id}" is running.',
                    code="job_running",
                    hint=f'Wait for it: !llm wait "{self.id}";',
                )
            time.sleep(0.05)
        return file

    def take_models(self) -> BinaryIO | None:
        """Become the rank that writes checkpoints, as long as the file that is returned is open; None: another is.

        A rank may outlive its job's driver for a moment, when that was killed.
        """
        return self._locked("writer")

    def _locked(self, name: str) -> BinaryIO | None:
        import fcntl  # not there on Windows, where nothing trains

        file = (self.path / name).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    def require(self) -> None:
        """Refuse to work where the folder is not: what is made there is seen by nobody else.

        Raises:
            Fatal: job_folder.
        """
        if not self.data.is_dir():
            raise Fatal(
                f'The job\'s folder "{self.path}" is not on the machine {platform.node()}.',
                code="job_folder",
                hint="With several machines put it where all of them reach it: "
                'AND localPathPrefix="/shared/folder"; or train on one machine.',
            )

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked the job to stop."""
        return (self.path / "cancel").exists()

    def cancel(self) -> None:
        """Ask the job to stop after one of its next steps, and to leave its checkpoint."""
        (self.path / "cancel").touch()

    def uncancel(self) -> None:
        """Take `cancel` back."""
        for name in ("cancel", "stop_at"):
            (self.path / name).unlink(missing_ok=True)

    @property
    def stop_at(self) -> int | None:
        """The step after which all ranks stop; None when they go on."""
        try:
            return int((self.path / "stop_at").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def stop_after(self, step: int) -> None:
        """Let all ranks stop after `step`; said by one of them, before any has come that far."""
        write_text(self.path / "stop_at", str(step))

    def beat(self) -> None:
        """Say that the process which drives the job lives."""
        (self.path / "alive").touch()

    @property
    def last_beat(self) -> float:
        """When it last said so, as time.time(); 0 before it ever did."""
        try:
            return (self.path / "alive").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def newest_checkpoint(self) -> Path | None:
        """The whole checkpoint of the latest step, or None."""
        found = [file.parent for file in self.models.glob(f"{CHECKPOINT}*/{STATE_FILE}")]
        return max(found, key=step_of, default=None)

    def sweep(self) -> None:
        """Remove what killed processes have left half written; for the job's driver, before it begins."""
        for place in (self.path, self.path / "fetched", self.data, self.data / "tokens", self.models, self.logging):
            sweep(place)

    def request(self) -> JobRequest:
        """What request.json says.

        Raises:
            UserError: job_unreadable.
        """
        try:
            said = json.loads((self.path / "request.json").read_text(encoding="utf-8"))
            plan = said["plan"]
            plan |= {name: str(self.path / plan[name]) for name in _PATHS if _leads_inside(plan[name])}
            return JobRequest(**{**said, "plan": TrainingPlan(**{**plan, "folder": str(self.path)})})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'The request of the job "{self.id}" cannot be read: {type(error).__name__}.',
                code="job_unreadable",
                hint=f"Look at {self.path / 'request.json'}, or start the training anew.",
            ) from None

    def ask(self, request: JobRequest) -> None:
        """Write request.json."""
        said = asdict(request)
        for name in _PATHS:
            if Path(said["plan"][name]).is_relative_to(self.path):
                said["plan"][name] = str(Path(said["plan"][name]).relative_to(self.path))
        write_json(self.path / "request.json", said)

    def status(self) -> dict[str, Any]:
        """What status.json says; {} before the job began."""
        file = self.path / "status.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def update(self, **fields: Any) -> None:
        """Change fields of status.json. One process writes it at a time: the job's driver, then rank 0."""
        write_json(self.path / "status.json", {**self.status(), **fields})

    def update_in_place(self, **fields: Any) -> None:
        """As `update`, on a disk that has no room for another file: over what stands there."""
        with (self.path / "status.json").open("r+b") as file:
            before = file.read()
            file.seek(0)
            file.write(json.dumps({**json.loads(before), **fields}).encode().ljust(len(before)))

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
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
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
        root.mkdir(parents=True, exist_ok=True)
        folder.path.mkdir(mode=0o700)
        for part in (folder.data, folder.models, folder.logging):
            part.mkdir()
    except OSError as error:
        raise UserError(
            f'The folder "{folder.path}" cannot be made: {error.strerror}.',
            code="job_folder",
            hint='Choose another place: AND localPathPrefix="/path/to/jobs".',
        ) from None
    return folder


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was written at; 0 of none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _leads_inside(path: str) -> bool:
    """Whether a path of a request is one as seen from the job's folder."""
    return bool(path) and not Path(path).is_absolute() and "://" not in path
