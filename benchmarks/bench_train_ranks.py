"""Training in two ranks: a job against plain `torchrun` with `transformers.Trainer`, on the same tokens.

Both train all weights on CPUs with one thread each. The speed is that between the first and the last logged step; the
rest of the whole time is start-up and end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from texts import mixed

from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

RANKS = 2
PARAMETERS = {"num_train_epochs": 1.0, "max_seq_length": 256, "per_device_train_batch_size": 4, "logging_steps": 1.0}


def plan_of(root: Path) -> TrainingPlan:
    """All weights, by DDP; the defaults of a job otherwise."""
    return TrainingPlan(str(root / "job"), "sfft", str(root / "llama"), parameters=PARAMETERS, ranks=RANKS)


def prepare(root: Path, rows: int) -> None:
    """The model, and the rows of the job."""
    from small_llama import build

    build(root / "llama", hidden=256, layers=4)
    (root / "job" / "finetune_data").mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in mixed(rows)]
    (root / "job" / "finetune_data" / "data.jsonl").write_text("".join(lines), encoding="utf-8")


def ours(root: Path) -> float:
    """The job through Ray Train; seconds from the first to the last logged step."""
    from runtime.cluster.training import train_on_ranks

    for made in ("finetune_model", "logging"):
        shutil.rmtree(root / "job" / made, ignore_errors=True)
        (root / "job" / made).mkdir()
    train_on_ranks(plan_of(root))
    seconds = [line["seconds"] for line in JobFolder(root / "job").metrics() if "loss" in line]
    return float(seconds[-1] - seconds[0])


def plain(root: Path) -> float:
    """The same by torchrun, on the tokens that the job has left."""
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    command = [*launched, __file__, "--root", str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("seconds=")).partition("=")[2])


def one_of_torchrun(root: Path) -> None:
    """What torchrun starts: the library's trainer, with the job's arguments and from its weights."""
    import transformers

    from runtime.training.loop import arguments
    from runtime.training.parameters import with_defaults
    from runtime.training.token_file import TokenFile

    class Times(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.logged: list[float] = []

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.logged.append(time.perf_counter())

    plan, times = plan_of(root), Times()
    folder = JobFolder(root / "job")
    data = TokenFile(folder.data / "tokens" / "train")
    examples = [{name: values.tolist() for name, values in data[i].items()} for i in range(len(data))]
    parameters = {**with_defaults(plan), "use_cpu": True}
    args = arguments(plan, parameters, folder, lengths=(len(examples),), ranks=RANKS, evaluate=False)
    args.output_dir = str(root / "plain")
    transformers.Trainer(
        args=args,
        model=transformers.AutoModelForCausalLM.from_pretrained(plan.model, dtype="float32"),
        train_dataset=examples,
        data_collator=transformers.DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(plan.model)),
        callbacks=[times],
    ).train()
    if args.should_save:
        print(f"\nseconds={times.logged[-1] - times.logged[0]}", flush=True)


def main() -> None:
    """Compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.root:
        one_of_torchrun(said.root)
        return
    from runtime.cluster import connect

    connect()
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prepare(root, said.rows)
        for _ in range(said.rounds):
            for kind, train in (("a job", ours), ("torchrun", plain)):
                began = time.perf_counter()
                seconds = train(root)
                rest = time.perf_counter() - began - seconds
                known = best.get(kind, (seconds, rest))
                best[kind] = min(known[0], seconds), min(known[1], rest)
        tokens = JobFolder(root / "job").status()["tokens"]
    for kind, (seconds, rest) in best.items():
        print(f"{kind}: {tokens / seconds:.0f} tokens/s, start-up and end {rest:.1f} s")
    print(f"a job trains {best['torchrun'][0] / best['a job'][0]:.2f} times as fast")


if __name__ == "__main__":
    main()
