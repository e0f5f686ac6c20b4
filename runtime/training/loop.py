"""What one rank does: build the model, train it, leave checkpoints and the trained model in the job's folder.

It stands alone because it is the whole of a training but for where its processes run: the same function trains in a
test, under torchrun and on a cluster. The environment says which rank this is: RANK, WORLD_SIZE, LOCAL_RANK and
MASTER_ADDR, as torchrun sets them; without them it is the only one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.errors import Fatal, SqlextError, UserError
from runtime.training import strategies
from runtime.training.beginning import check_beginning, longest_sequence
from runtime.training.folder import JobFolder, step_of
from runtime.training.parameters import keeps_best, of_group, with_defaults
from runtime.training.plan import TrainingPlan

PACKAGES = ("accelerate", "peft", "tensorboard")
LOG_LINES = 200
"""Lines of metrics that a run without logging_steps leaves, about."""
MAX_STEPS_UNSAVED = 500
"""Steps after which a checkpoint is written at the latest, unless told."""
MOST_EPOCHS_SAVED = 20
"""Epochs up to which each leaves a checkpoint, unless told; of more, as many are spread over the run."""
PEER_TIMEOUT_S = 6 * 3600  # ranks wait for one that writes a large checkpoint; one that died is noticed at once


def train(plan: TrainingPlan) -> None:
    """Train as this process's rank; goes on from the newest whole checkpoint in the plan's folder.

    Raises:
        UserError: the plan, its files or its rows must be corrected.
        Fatal: job_folder; training_nan, disk_full, out_of_memory: earlier checkpoints are intact.
        Cancelled: the folder asks for it.
    """
    require_packages()
    folder = JobFolder(Path(plan.folder))
    folder.require()
    with _plainly(folder):
        _train(plan, folder)


def require_packages() -> None:
    """Refuse to begin without what training needs.

    Raises:
        UserError: package_missing.
    """
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        raise UserError(
            f"Training needs {', '.join(missing)}, which is not installed.",
            code="package_missing",
            hint='pip install "sqlext[train]"',
        )


def _train(plan: TrainingPlan, folder: JobFolder) -> None:
    import torch
    from transformers import PrinterCallback, set_seed
    from transformers.utils import logging as transformers_logging

    from runtime.prompts.style import find_style, training_style
    from runtime.training import callbacks, models
    from runtime.training.data import Collator, Joined, Order, prepared, trained_tokenizer
    from runtime.training.result import Result
    from runtime.training.trainer import JobTrainer

    transformers_logging.set_verbosity_error()  # what matters comes as an error or a metric
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(plan.threads)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    base = check_beginning(plan)
    parameters = _completed(plan, base)
    said = find_style(base.path if base else "", plan.prompt_format, plan.chat_template)
    tokenizer = models.tokenizer_of(plan, parameters) or trained_tokenizer(folder, parameters, said, rank)
    style = training_style(tokenizer, said)
    can_pack = base is None or models.keeps_apart(base)
    data = prepared(plan, folder, parameters, tokenizer, style, rank, can_pack=can_pack)
    if rank == 0:
        folder.update(**data.counts)
    lengths = tuple(len(part) for part in data.parts)
    args = arguments(plan, parameters, folder, lengths=lengths, ranks=ranks, evaluate=data.valid is not None)
    set_seed(args.seed)  # for weights that are made here
    model = models.build(plan, parameters, tokenizer)
    resumed = folder.newest_checkpoint()
    collator = Collator(
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        length=parameters["max_seq_length"] if parameters.get("padding") == "max_length" else 0,
        multiple=1 if args.use_cpu else 8,
        flat="flash" in str(model.config._attn_implementation),
    )
    trainer = JobTrainer(
        order=partial(Order, data.parts, strategy=parameters.get("train_sampling_strategy", "random")),
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=Joined(data.parts),
        eval_dataset=data.valid,
        callbacks=[callbacks.Stop(folder), callbacks.LastStep()],
    )
    trainer.remove_callback(PrinterCallback)
    result = Result(plan, folder, trainer, tokenizer, style if data.conversations or said.prompt_format else None)
    if plan.way == "sfft":
        trainer.add_callback(callbacks.Epochs(parameters.get("steps_per_epoch", 0), result.export_epoch))
    if rank == 0:
        trainer.add_callback(callbacks.Progress(folder, lambda: trainer.tokens, lambda: trainer.paused_s))
        trainer.add_callback(callbacks.event_files(folder, step_of(resumed)))
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    result.export_final()
    if rank == 0:
        folder.update(**result.told())


def arguments(
    plan: TrainingPlan,
    parameters: Mapping[str, Any],
    folder: JobFolder,
    *,
    lengths: tuple[int, ...],
    ranks: int,
    evaluate: bool,
) -> Any:
    """transformers' TrainingArguments for the plan.

    Args:
        parameters: complete, see `with_defaults`.
        lengths: sequences of each part of the data.
        evaluate: whether there are rows to evaluate on.

    Raises:
        UserError: option_value, when values do not fit together.
    """
    from transformers import TrainingArguments

    said = of_group(parameters, "trainer")
    said.pop("train_sampling_strategy", None)  # the order is the job's own
    said.pop("load_best_model_at_end", None)  # below
    steps = steps_per_epoch(parameters, lengths, ranks)
    total = _duration(plan, parameters, steps)
    chosen: dict[str, Any] = {
        "per_device_eval_batch_size": parameters["per_device_train_batch_size"],
        "ddp_timeout": PEER_TIMEOUT_S,
        "ddp_find_unused_parameters": False,
        **_devices(parameters),
        **said,
        **_intervals(said, steps, total),
        **_warmup(plan, said, steps, total),
        **total,
        **strategies.arguments(plan, parameters),
    }
    if not evaluate:
        chosen["eval_strategy"] = "no"
    try:
        args = TrainingArguments(
            output_dir=str(folder.models),
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            metric_for_best_model="eval_loss" if evaluate else None,
            greater_is_better=False if evaluate else None,
            **chosen,
        )
    except (ValueError, ImportError) as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"The training parameters do not fit together: {cause[:300]}",
            code="option_value",
            hint="They are those of transformers.TrainingArguments.",
        ) from None
    # Set here, because TrainingArguments wants each step that is saved evaluated; of others ours takes no notice.
    args.load_best_model_at_end = evaluate and keeps_best({**parameters, **chosen})
    if args.n_gpu > 1:
        args._n_gpu = 1  # a rank has one device; Trainer would take all it sees
    strategies.accept(args)
    return args


def steps_per_epoch(parameters: Mapping[str, Any], lengths: tuple[int, ...], ranks: int) -> int:
    """Steps in which all ranks together see the data once."""
    batch = parameters["per_device_train_batch_size"]
    batches = (
        math.ceil(max(lengths) / batch) if len(lengths) > 1 else math.ceil(math.ceil(lengths[0] / batch) / ranks)
    )
    return max(1, math.ceil(batches / parameters.get("gradient_accumulation_steps", 1)))


def _duration(plan: TrainingPlan, parameters: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """How long to train: num_train_epochs, or max_steps where steps are what was said."""
    epochs = parameters["num_train_epochs"]
    if "max_steps" in parameters:
        return {"max_steps": parameters["max_steps"]}
    if own := parameters.get("steps_per_epoch"):
        return {"max_steps": math.ceil(epochs * own)}
    if (least := parameters.get("min_update_steps")) and "num_train_epochs" not in plan.parameters:
        epochs = math.ceil(least / steps)
    return {"num_train_epochs": epochs}


def _intervals(said: Mapping[str, Any], steps: int, total: Mapping[str, Any]) -> dict[str, Any]:
    """When to log, evaluate and save. Evaluation and checkpoints go together, so that the best one can be kept."""
    all_steps = _all_steps(steps, total)
    every = min(MAX_STEPS_UNSAVED, math.ceil(all_steps / MOST_EPOCHS_SAVED))
    odd = steps > MAX_STEPS_UNSAVED or all_steps > MOST_EPOCHS_SAVED * steps
    by_steps = "save_steps" in said or "eval_steps" in said or odd
    strategy = said.get("save_strategy") or said.get("eval_strategy") or ("steps" if by_steps else "epoch")
    every = said.get("save_steps") or said.get("eval_steps") or every
    return {
        "logging_steps": max(1, all_steps // LOG_LINES),
        "save_strategy": strategy,
        "save_steps": every,
        "eval_strategy": strategy,
        "eval_steps": every,
        **said,
    }


def _warmup(plan: TrainingPlan, said: Mapping[str, Any], steps: int, total: Mapping[str, Any]) -> dict[str, Any]:
    """No warm-up of less than a step unless told: it would be rounded up to one in which nothing is learnt."""
    too_short = said["warmup_steps"] * _all_steps(steps, total) < 1
    return {"warmup_steps": 0} if too_short and "warmup_steps" not in plan.parameters else {}


def _all_steps(steps: int, total: Mapping[str, Any]) -> int:
    return int(total.get("max_steps") or math.ceil(total["num_train_epochs"] * steps))


def _devices(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """On a GPU that can, bfloat16 for the arithmetic; on a CPU float32."""
    import torch

    on_cpu = bool(parameters["use_cpu"])
    plain = on_cpu or not torch.cuda.is_bf16_supported() or parameters.get("fp16") or "dtype" in parameters
    return {"bf16": not plain, "dataloader_pin_memory": not on_cpu}


def _completed(plan: TrainingPlan, base: Any) -> dict[str, Any]:
    """The plan's parameters with defaults, a length that the model can read, and the kind of device."""
    import torch

    parameters = strategies.completed(plan, with_defaults(plan))
    parameters.setdefault("use_cpu", plan.gpus_per_rank == 0 or not torch.cuda.is_available())
    if longest := longest_sequence(parameters, base):
        parameters["max_seq_length"] = min(longest, parameters["max_seq_length"])
    return parameters


@contextlib.contextmanager
def _plainly(folder: JobFolder) -> Iterator[None]:
    """Turn what torch and the system say about memory and disk into our errors."""
    from runtime.engines.loading import out_of_memory
    from runtime.training.trainer import disk_full, is_disk_full

    try:
        yield
    except SqlextError:
        raise
    except Exception as error:
        if is_disk_full(error, folder.path):
            raise disk_full(folder.path) from None
        if out_of_memory(error):
            raise Fatal(
                "The training ran out of memory; the checkpoints before are intact.",
                code="out_of_memory",
                hint="Use a smaller per_device_train_batch_size with more gradient_accumulation_steps, "
                "gradient_checkpointing, a shorter max_seq_length, or quantization.",
            ) from None
        raise
