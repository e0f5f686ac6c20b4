"""transformers' Trainer with what a job promises: checkpoints that are whole or not there, and no silent NaN.

It stands alone because it is the one place that leans on methods of Trainer that are not its public interface; a test
trains, kills and resumes with the installed version.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from runtime.errors import Fatal
from runtime.training import strategies
from runtime.training.data import Order
from runtime.training.folder import CHECKPOINT, STATE_FILE
from runtime.training.whole import is_full, settle, unfinished_of

ARGUMENTS_FILE = "training_args.bin"  # a pickle of Trainer's that nobody reads


class JobTrainer(Trainer):
    """A Trainer whose order, tokens and checkpoints outlive its process.

    Args:
        order: makes the order of the training data, given the sequences of a batch, the seed, and what tells the
            epoch.
        more: arguments of Trainer.

    Attributes:
        paused_s: seconds that were no training: evaluations, checkpoints and exported models.
    """

    def __init__(self, *, order: Callable[[int, int, Callable[[], int]], Order], **more: Any) -> None:
        super().__init__(**more)
        self.paused_s = 0.0
        self._order = order
        self._new_tokens = 0  # of this rank, not yet added up
        self._norm: Any = None

    @property
    def tokens(self) -> int:
        """Tokens that all ranks together have trained on, padding left out, as of the last log or checkpoint."""
        return int(self.state.num_input_tokens_seen)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self._order(self._train_batch_size, seed, self._epoch)

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def compute_loss(self, model: Any, inputs: dict[str, Any], **more: Any) -> Any:
        """Trainer's, with the batch's tokens counted."""
        tokens = inputs.pop("tokens")
        if model.training:
            self._new_tokens += tokens
        return super().compute_loss(model, inputs, **more)

    def training_step(self, *args: Any, **more: Any) -> Any:
        """Trainer's.

        Raises:
            Fatal: training_nan.
        """
        loss = super().training_step(*args, **more)
        if not torch.isfinite(loss):
            raise self._not_a_number("loss", self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, *args: Any, **more: Any) -> Any:
        self._norm = super()._get_grad_norm(*args, **more)
        return self._norm

    def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
        """Trainer's, without a trace in the random numbers: training goes on as if there had been no evaluation."""
        device = self.args.device
        with self._paused(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return super().evaluate(*args, **more)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.paused_s += time.monotonic() - began

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the tokens added up."""
        self._add_up()
        super().log(logs, start_time)

    def _add_up(self) -> None:
        new = torch.tensor(self._new_tokens, device=self.args.device)
        self._new_tokens = 0
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(new, "sum"))

    def _not_a_number(self, what: str, step: int) -> Fatal:
        return Fatal(
            f"The {what} is not a finite number at step {step}; training stopped, the checkpoints before are intact.",
            code="training_nan",
            hint=f"Use a learning_rate below {self.args.learning_rate:g}, a longer warmup_steps, "
            + ("bf16 or float32 instead of fp16." if self.args.fp16 else "or a max_grad_norm of 1 or less."),
        )

    # ---- Going on ----

    def _init_training_state(self, *args: Any, **more: Any) -> Any:
        """Trainer's; the best checkpoint is looked for where the job's folder is now."""
        found = super()._init_training_state(*args, **more)
        self._find_best()
        return found

    def _run_epoch(self, *args: Any, **more: Any) -> None:
        """Trainer's, but that a job which was killed after its last step does no other one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **more)

    # ---- Checkpoints ----

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, for a step that leaves a checkpoint: a best model that is not kept is none."""
        return bool(self.control.should_save and super()._determine_best_metric(metrics, trial))

    def _find_best(self, saved: Path | None = None) -> None:
        """Where the best checkpoint lies, `saved` being written now."""
        best = self._checkpoint(self.state.best_global_step or 0)
        self.state.best_model_checkpoint = str(best) if best == saved or best.is_dir() else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, under another name until everything is on the disk."""
        with self._paused():
            self._save_whole()

    def _save_whole(self) -> None:
        if not self.args.fp16 and self._norm is not None and not math.isfinite(self._norm):
            raise self._not_a_number("gradient", self.state.global_step)
        self._add_up()
        whole = self._checkpoint(self.state.global_step)
        with self.appearing(whole) as unfinished:
            self.save_model(str(unfinished), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(unfinished))
                self._save_scaler(str(unfinished))
                self._save_rng_state(str(unfinished))
            self._find_best(whole)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / STATE_FILE))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"{CHECKPOINT}{step}"

    def export(self, folder: Path, finish: Callable[[Path], None]) -> None:
        """Write the model in Hugging Face form; every rank must call this.

        Args:
            finish: puts what else belongs into the folder; called on rank 0, before the folder appears.
        """
        with self._paused(), self.appearing(folder) as unfinished, strategies.whole(self), self._as_served():
            self.save_model(str(unfinished), _internal_call=True)
            if self.args.should_save:
                (unfinished / ARGUMENTS_FILE).unlink(missing_ok=True)
                finish(unfinished)

    @contextlib.contextmanager
    def _as_served(self) -> Iterator[None]:
        """Within this, the model's configuration is not that of training: with a cache."""
        config = self.accelerator.unwrap_model(self.model).config
        config.use_cache = True
        yield
        config.use_cache = self.args.use_cache

    @contextlib.contextmanager
    def appearing(self, whole: Path) -> Iterator[Path]:
        """A folder to write into, of all ranks, that takes the place of `whole` when everything is on the disk.

        Raises:
            Fatal: disk_full; nothing is left of it.
        """
        unfinished = unfinished_of(whole)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._together()
        try:
            yield unfinished
            self._together()
            if self.args.should_save:
                settle(unfinished, whole)
        except Exception as error:
            full = is_disk_full(error, whole.parent)
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            if full:
                raise disk_full(whole.parent) from None
            raise
        self._together()

    def _together(self) -> None:
        if distributed.is_available() and distributed.is_initialized():
            self.accelerator.wait_for_everyone()


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether writing failed for want of room; safetensors and torch tell of it in errors of their own."""
    if isinstance(error, OSError):
        return is_full(error)
    said = str(error)
    if "No space left on device" in said or "os error 28" in said:
        return True
    torchs = any(words in said for words in ("failed writing file", "iostream error", "unexpected pos"))
    return torchs and shutil.disk_usage(folder).free < 1 << 20


def disk_full(folder: Path) -> Fatal:
    """The error for a disk without room."""
    return Fatal(
        f'The disk of "{folder}" is full; what was being written is removed, the checkpoints before are intact.',
        code="disk_full",
        hint="Make room and resume the job; save_total_limit says how many checkpoints are kept.",
    )
