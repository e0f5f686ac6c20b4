"""Fine-tuning: a job's rank against plain `transformers.Trainer` and `trl.SFTTrainer` on the same tokens in memory.

Each runs in a process of its own, in turn, with one thread; training counts from the first step to the last, start-up
from the start of the process to the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
from texts import mixed

from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

EPOCHS = 1
BATCH = 8


def plan_of(root: Path, way: str) -> TrainingPlan:
    """LoRA, or all weights; the defaults of a job otherwise."""
    kind = "lora" if way == "LoRA" else "full"
    parameters = {"num_train_epochs": EPOCHS, "finetuning_type": kind, "per_device_train_batch_size": BATCH}
    return TrainingPlan(str(root / way), "sft", model=str(root / "llama"), parameters=parameters)


def prepare(root: Path, rows: int, ways: tuple[str, ...]) -> None:
    """The model, and for each way a job with its rows."""
    from small_llama import build

    build(root / "llama", hidden=256, layers=4)
    lines = [json.dumps({"instruction": text[::2], "output": text}) + "\n" for text in mixed(rows)]
    for way in ways:
        (root / way / "finetune_data").mkdir(parents=True)
        (root / way / "finetune_data" / "data.jsonl").write_text("".join(lines), encoding="utf-8")


class Clock:
    """Tells when the first and the last step began and ended; a callback of Trainer without importing it early."""

    def __new__(cls) -> Any:
        """A TrainerCallback."""
        from transformers import TrainerCallback

        class Times(TrainerCallback):
            began = ended = cpu_began = cpu_ended = 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.began, self.cpu_began = time.time(), time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.ended, self.cpu_ended = time.time(), time.process_time()

        return Times()


def train_ours(plan: TrainingPlan) -> Any:
    """As a job does."""
    from runtime.training import loop, trainer

    clock = Clock()
    init = trainer.JobTrainer.__init__

    def timed(self: Any, *, callbacks: list[Any], **more: Any) -> None:
        init(self, callbacks=[*callbacks, clock], **more)

    trainer.JobTrainer.__init__ = timed  # type: ignore[method-assign]
    loop.train(plan)
    return clock


def train_plain(plan: TrainingPlan, kind: str) -> Any:
    """With the library's trainer, on the tokens that the job has left, with its arguments and from its weights."""
    import peft
    import transformers

    from runtime.training.loop import arguments
    from runtime.training.parameters import with_defaults
    from runtime.training.token_file import TokenFile

    folder = JobFolder(Path(plan.folder))
    data = [TokenFile(folder.data / "tokens" / "train")[i] for i in range(folder.status()["sequences"])]
    examples = [{name: values.tolist() for name, values in example.items()} for example in data]
    parameters = {**with_defaults(plan), "use_cpu": True}
    args = arguments(plan, parameters, folder, lengths=(len(examples),), ranks=1, evaluate=False)
    args.output_dir = str(folder.path / kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(plan.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(plan.model, dtype="float32")
    if parameters["finetuning_type"] == "lora":
        said = {name: parameters[name] for name in ("lora_alpha", "lora_dropout", "target_modules")}
        config = peft.LoraConfig(r=parameters["lora_rank"], task_type="CAUSAL_LM", **said)
        model = peft.get_peft_model(model, config)
    clock = Clock()
    common = {
        "model": model,
        "data_collator": transformers.DataCollatorForSeq2Seq(tokenizer),
        "callbacks": [clock],
    }
    if kind == "Trainer":
        args.logging_nan_inf_filter = True
        transformers.Trainer(args=args, train_dataset=examples, **common).train()
    else:
        import datasets
        import trl

        same = ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "lr_scheduler_type")
        same += ("logging_steps", "save_strategy", "warmup_steps", "output_dir", "max_grad_norm", "optim")
        config = trl.SFTConfig(
            **{name: getattr(args, name) for name in same},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        rows = datasets.Dataset.from_list(examples)
        trl.SFTTrainer(args=config, train_dataset=rows, processing_class=tokenizer, **common).train()
    return clock


def one(root: Path, way: str, kind: str) -> None:
    """Train once in this process and print when it began and how long it took."""
    plan = plan_of(root, way)
    with contextlib.redirect_stdout(sys.stderr):
        clock = train_ours(plan) if kind == "ours" else train_plain(plan, kind)
    figures = {
        "startup": clock.began - psutil.Process().create_time(),
        "seconds": clock.ended - clock.began,
        "cpu": clock.cpu_ended - clock.cpu_began,
    }
    print(json.dumps(figures))


def run(root: Path, way: str, kind: str) -> dict[str, float]:
    """`one` in a process of its own."""
    command = [sys.executable, __file__, "--root", str(root), "--way", way, "--kind", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.kind:
        one(said.root, said.way, said.kind)
        return
    kinds = ["ours", "Trainer", *(["SFTTrainer"] if find_spec("trl") else [])]
    ways = ("LoRA", "all weights")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, said.rows, ways)
        for way in ways:
            best: dict[str, dict[str, float]] = {}
            for _ in range(said.rounds):
                for kind in kinds:
                    shutil.rmtree(root / way / "finetune_model", ignore_errors=True)
                    figures = run(root, way, kind)
                    known = best.setdefault(kind, figures)
                    best[kind] = {name: min(known[name], figures[name]) for name in figures}
            tokens = JobFolder(root / way).status()["tokens"]
            for kind, figures in best.items():
                ratio, of_cpu = (figures[name] / best["ours"][name] for name in ("seconds", "cpu"))
                print(
                    f"{way}: {kind} {tokens / figures['seconds']:.0f} tokens/s, start-up {figures['startup']:.1f} s"
                    + ("" if kind == "ours" else f"; ours {ratio:.2f} times as fast, {of_cpu:.2f} by CPU time")
                )


if __name__ == "__main__":
    main()
