"""What a training leaves: the trained model in a folder that can be deployed, and how it went.

It stands alone because every rank takes part in writing a model that is spread over them, and the layout of the
folder is a promise: Byzer-LLM's for an adapter, Hugging Face's for a whole model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import BASE_LINK, open_folder
from runtime.checkpoints.weights import INDEX
from runtime.prompts.style import Style, save_style
from runtime.training import strategies
from runtime.training.folder import JobFolder
from runtime.training.parameters import recipe
from runtime.training.plan import TrainingPlan
from runtime.training.trainer import JobTrainer


class Result:
    """The models of a job, and its last figures.

    Args:
        style: how the model is to be asked; None when it was not trained on conversations.
    """

    def __init__(
        self, plan: TrainingPlan, folder: JobFolder, trainer: JobTrainer, tokenizer: Any, style: Style | None
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._style = style

    def export_final(self) -> None:
        """Write `final`; every rank must call this."""
        self._trainer.export(self._folder.final, self._finish)

    def export_epoch(self, number: int) -> None:
        """Write `Epoch-<number>` unless it is there; every rank must call this.

        A model that is spread over the ranks is written as it is, each rank its part, as `convert` reads it.
        """
        folder = self._folder.models / f"Epoch-{number}"
        if not folder.is_dir() and not strategies.save_spread(self._trainer, folder):
            self._trainer.export(folder, self._finish)

    def told(self) -> dict[str, Any]:
        """What the status says of the trained model."""
        state = self._trainer.state
        evaluated = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
        told = {
            "model": str(self._folder.final),
            "step": state.global_step,
            "train_loss": _mean_loss(state.log_history),
            "tokens": self._trainer.tokens,
        }
        if self._trainer.args.load_best_model_at_end and state.best_model_checkpoint:  # what `final` is made of
            told |= {"eval_loss": state.best_metric, "best_step": state.best_global_step}
        elif evaluated:
            told |= {"eval_loss": evaluated[-1]}
        return told

    def _finish(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
        if self._style:
            save_style(folder, self._style)
        if recipe(self._plan) == "lora":
            link_base(self._plan, folder / BASE_LINK)


def link_base(plan: TrainingPlan, at: Path) -> None:
    """Put the base model of an adapter at `at`: a link, or where links fail a copy.

    With weights of the user's own, a folder of links: their files, and what else the model has.
    """
    model = open_folder(plan.model)
    if not plan.weights:
        _link(model, at)
        return
    weights = open_folder(plan.weights)
    at.mkdir()
    files = {file.name: file for file in model.iterdir() if not _is_weights(file)}
    files |= {file.name: file for file in weights.iterdir() if _is_weights(file)}
    for name, file in files.items():
        if not name.startswith("."):
            _link(file, at / name)


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors" or file.name == INDEX


def _link(source: Path, at: Path) -> None:
    """A file has a second name, which leads out of no folder; a whole folder is linked."""
    try:
        if source.is_dir():
            job = at.parents[2]  # what was fetched into the job's folder moves with it
            inside = source.is_relative_to(job)
            os.symlink(os.path.relpath(source, at.parent) if inside else source, at, target_is_directory=True)
        else:
            os.link(source.resolve(), at)
    except (OSError, NotImplementedError):
        if source.is_dir():
            shutil.copytree(source, at)
        else:
            shutil.copy2(source, at)


def _mean_loss(history: list[Mapping[str, Any]]) -> float | None:
    """Mean over all steps of the losses that were logged for some steps each."""
    before, total = 0, 0.0
    for line in history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
    return total / before if before else None
