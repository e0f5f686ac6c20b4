"""transformers' Trainer with what a job promises: checkpoints that are whole or not there, and no silent NaN.

It stands alone because it is the one place that leans on methods of Trainer that are not its public interface; a test
trains, kills and resumes with the installed version.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from runtime.errors import Fatal
from runtime.training import strategies
from runtime.training.data import Order

STATE_FILE = "trainer_state.json"
ARGUMENTS_FILE = "training_args.bin"  # a pickle of Trainer's that nobody reads


class JobTrainer(Trainer):
    """A Trainer whose order, tokens and checkpoints outlive its process.

    Args:
        lengths: sequences of each part of the training data, see `Order`.
        more: arguments of Trainer.
    """

    def __init__(self, *, lengths: tuple[int, ...], **more: Any) -> None:
        super().__init__(**more)
        self._lengths = lengths
        self._new_tokens = 0  # of this rank, not yet added up
        self._norm: Any = None

    @property
    def tokens(self) -> int:
        """Tokens that all ranks together have trained on, padding left out, as of the last log or checkpoint."""
        return int(self.state.num_input_tokens_seen)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        strategy = self.args.train_sampling_strategy
        if strategy == "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Order(self._lengths, self._train_batch_size, seed, self._epoch, shuffle=strategy == "random")

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
        with torch.random.fork_rng():
            return super().evaluate(*args, **more)

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

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, under another name until everything is on the disk."""
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
            best = self._checkpoint(self.state.best_global_step or 0)
            if self.state.best_global_step and (best == whole or best.exists()):
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / STATE_FILE))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def export(self, folder: Path, finish: Callable[[Path], None]) -> None:
        """Write the model in Hugging Face form; every rank must call this.

        Args:
            finish: puts what else belongs into the folder; called on rank 0, before the folder appears.
        """
        with self.appearing(folder) as unfinished, strategies.whole(self), self._as_served():
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
        unfinished = whole.with_name(f".{whole.name}.unfinished")
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


def settle(unfinished: Path, whole: Path) -> None:
    """Let a folder appear under its name once its files are on the disk; what had the name before goes."""
    for parent, _, names in os.walk(unfinished):
        for name in [*names, "."]:
            _sync(os.path.join(parent, name))
    if whole.exists():
        old = whole.with_name(f".{whole.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        whole.rename(old)
        unfinished.rename(whole)
        shutil.rmtree(old, ignore_errors=True)
    else:
        unfinished.rename(whole)
    _sync(str(whole.parent))


def _sync(path: str) -> None:
    if not os.path.exists(path):  # a link to a folder of another machine
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether writing failed for want of room; safetensors and torch tell of it in errors of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
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


def newest_checkpoint(models: Path) -> Path | None:
    """The whole checkpoint of the latest step, or None."""
    found = [folder for folder in models.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (folder / STATE_FILE).is_file()]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def remove_unfinished(models: Path) -> None:
    """Remove what a killed process left half written."""
    for folder in [*models.glob(".*.unfinished"), *models.glob(".*.old")]:
        shutil.rmtree(folder, ignore_errors=True)
