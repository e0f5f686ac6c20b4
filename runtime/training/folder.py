"""The folder of a job: the only thing that outlives its processes, so everything that is told of a job is read here.

    request.json                        the plan
    status.json                         state, progress, error; written anew as a whole
    cancel                              its presence asks the job to stop
    finetune_data/data.jsonl            the rows, or data-00000-of-00004.jsonl, … with partitions; valid.jsonl
    finetune_data/tokens/               the same as token ids
    finetune_model/checkpoint-<step>/   to go on from
    finetune_model/Epoch-<n>/           of sfft, one after each epoch
    finetune_model/final/               the trained model
    logging/                            metrics.jsonl, train.log, report.html, TensorBoard's event files
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    def cancelled(self) -> bool:
        """Whether somebody has asked the job to stop."""
        return (self.path / "cancel").exists()

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


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)
