"""What a running job tells: one line for each logging step, a status that is seldom older than a second."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from runtime.errors import Cancelled
from runtime.training.folder import JobFolder
from runtime.training.whole import write_text

LOG = logging.getLogger("sqlext.training")
_TELL_S = 1.0  # between two changes of the status
_NOTED = ("loss", "eval_loss", "learning_rate", "grad_norm")


class Progress(TrainerCallback):
    """Writes metrics and status; on rank 0.

    Args:
        tokens: tells how many tokens all ranks have seen, as far as they were added up.
        paused: tells how many seconds were spent on other things than training.
    """

    def __init__(self, folder: JobFolder, tokens: Callable[[], int], paused: Callable[[], float]) -> None:
        self._folder = folder
        self._tokens = tokens
        self._paused = paused
        self._latest: dict[str, Any] = {}
        self._began = self._told = self._last_s = 0.0
        self._before_s = 0.0  # of earlier starts
        self._first_step = self._last_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what an earlier start told of steps that are now done again."""
        self._before_s = _forget_after(self._folder, state.global_step)
        self._began = time.monotonic()
        self._last_s = self._busy_s()
        self._first_step, self._last_tokens = state.global_step, self._tokens()
        self._folder.update(step=state.global_step, steps=state.max_steps, epoch=state.epoch or 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how far it is."""
        if time.monotonic() - self._told >= _TELL_S:
            self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Note the numbers of a logging step or of an evaluation."""
        noted = {name: logs[name] for name in _NOTED if name in logs}
        if not noted:
            return
        tokens = self._tokens()
        if "loss" in logs:
            busy_s = self._busy_s()
            noted["tokens_per_s"] = round((tokens - self._last_tokens) / max(busy_s - self._last_s, 1e-6), 1)
            self._last_s, self._last_tokens = busy_s, tokens
        seconds = round(self._before_s + time.monotonic() - self._began, 3)
        self._folder.note(
            {"step": state.global_step, "epoch": state.epoch, **noted, "tokens": tokens, "seconds": seconds}
        )
        LOG.info("step %d of %d: %s", state.global_step, state.max_steps, noted)
        self._latest["tokens"] = tokens
        self._latest |= {name: noted[name] for name in ("loss", "eval_loss", "tokens_per_s") if name in noted}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how it ended."""
        self._tell(state)

    def _busy_s(self) -> float:
        """Seconds of training, since some moment."""
        return time.monotonic() - self._paused()

    def _tell(self, state: Any) -> None:
        self._told = time.monotonic()
        done = state.global_step - self._first_step
        each = (self._told - self._began) / done if done else 0.0
        left = {"seconds_left": round(each * (state.max_steps - state.global_step), 1)} if done else {}
        self._folder.update(step=state.global_step, steps=state.max_steps, epoch=state.epoch, **left, **self._latest)


def _forget_after(folder: JobFolder, step: int) -> float:
    """Drop the metrics of later steps; the training seconds of those that stay."""
    kept = [line for line in folder.metrics() if line.get("step", 0) <= step]
    file = folder.logging / "metrics.jsonl"
    if file.exists():
        write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))
    return max((line.get("seconds", 0.0) for line in kept), default=0.0)


class Stop(TrainerCallback):
    """Ends the training when the job is asked to, after a step whose checkpoint is written; on every rank.

    Rank 0 sees the wish and says after which step all stop: the next one, as no rank can end that without it.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._looked = 0.0
        self._stop_at: int | None = None
        self._is_first = os.environ.get("RANK", "0") == "0"
        self._is_alone = os.environ.get("WORLD_SIZE", "1") == "1"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look for the wish, and ask for a checkpoint.

        Raises:
            Cancelled: this is the step to stop after, and the job leaves no checkpoints.
        """
        if self._is_first and self._is_due() and self._folder.cancelled and self._stop_at is None:
            self._folder.stop_after(state.global_step if self._is_alone else state.global_step + 1)
        self._stop_at = self._folder.stop_at
        if self._stop_at is None or state.global_step < self._stop_at:
            return
        if args.save_strategy == "no":
            raise Cancelled("The training was cancelled.")
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop when the checkpoint was the last one.

        Raises:
            Cancelled: it was.
        """
        if self._stop_at is not None and state.global_step >= self._stop_at:
            raise Cancelled("The training was cancelled.")

    def _is_due(self) -> bool:
        """A few times a second."""
        due = time.monotonic() - self._looked >= 0.3
        if due:
            self._looked = time.monotonic()
        return due


class Epochs(TrainerCallback):
    """Exports the model after each epoch, and at the last step; on every rank.

    Args:
        steps: of an epoch; 0 = the table's end is the epoch's.
        export: writes the model of the n-th epoch, from 1, unless it is there.
    """

    def __init__(self, steps: int, export: Callable[[int], None]) -> None:
        self._steps = steps
        self._export = export

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make up for an export that a killed process did not come to."""
        if state.global_step:
            self._export_at(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Export where `steps` make an epoch."""
        if self._steps:
            self._export_at(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Export where the table makes it."""
        if not self._steps:
            self._export_at(state)

    def _export_at(self, state: Any) -> None:
        if self._steps:
            if state.global_step % self._steps == 0:
                self._export(state.global_step // self._steps)
        elif state.epoch == int(state.epoch):
            self._export(int(state.epoch))


class LastStep(TrainerCallback):
    """Logs and evaluates at the last step too, whatever the intervals."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for both."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"


def event_files(folder: JobFolder, step: int) -> TensorBoardCallback:
    """TensorBoard's event files in the job's folder; what an earlier start told of later steps is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder.logging), purge_step=step or None))
