"""A training without a model, that does what its job is named after; jobs' processes import it by name.

`run` counts steps; `wait` goes on until it is cancelled; `deaf` does not even listen to that; `die` kills its process
once; `raise` fails; `user` fails by a mistake of the user's; `full` finds no room on the disk.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from pathlib import Path

from runtime.errors import Cancelled, UserError
from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

STEPS = 5


def train(plan: TrainingPlan) -> None:
    folder = JobFolder(Path(plan.folder))
    order = folder.request().name
    print("printed by the training")
    logging.getLogger("sqlext.training").info("logged by the training")
    first = 1 + max((line["step"] for line in folder.metrics()), default=0)
    folder.update(step=first - 1, steps=STEPS, truncated=2, bad_rows=1)
    for step in range(first, STEPS + 1):
        _step(folder, step)
        if step == 3:
            _obey(order, folder)
    while order in ("wait", "deaf"):
        if folder.cancelled and order == "wait":
            raise Cancelled("The training was cancelled.")
        time.sleep(0.05)
    folder.final.mkdir(parents=True, exist_ok=True)
    (folder.final / "config.json").write_text("{}")
    folder.update(train_loss=0.5, eval_loss=0.25, tokens=500, model=str(folder.final))


def _step(folder: JobFolder, step: int) -> None:
    loss = 1.0 / step
    line = {"step": step, "epoch": step / STEPS, "loss": loss, "learning_rate": 0.1 / step, "tokens": 100 * step}
    folder.note({**line, "tokens_per_s": 1000.0, "seconds": 0.1 * step})
    folder.update(step=step, epoch=step / STEPS, loss=loss, tokens_per_s=1000.0, seconds_left=0.1 * (STEPS - step))


def _obey(order: str, folder: JobFolder) -> None:
    first_time = not (folder.path / "obeyed").exists()
    (folder.path / "obeyed").touch()
    if not first_time:
        return
    match order:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError("shapes do not match")
        case "user":
            raise UserError("The rows are wrong.", code="training_columns", hint="Look at them.")
        case "full":
            raise OSError(errno.ENOSPC, "No space left on device")
