"""Ranks without a cluster: processes that train one plan after the other, started as torchrun would start them.

One start for many plans, because importing torch, transformers and DeepSpeed takes far longer than these trainings.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

TEXTS = [f"the quick brown fox {n} jumps over {n * 7 % 13} lazy dogs" for n in range(32)]
PARAMETERS = {
    "num_train_epochs": 2.0,
    "max_seq_length": 64,
    "packing": False,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
}


def job(path: Path, rows: Iterable[str], *, parts: Sequence[Iterable[str]] = (), **plan: Any) -> TrainingPlan:
    """A plan whose folder holds these texts; with `parts`, one part of the table for each rank."""
    folder = JobFolder(path)
    for part in (folder.data, folder.models, folder.logging):
        part.mkdir(parents=True)
    for number, texts in enumerate(parts or [rows]):
        name = f"data-{number:05}-of-{len(parts):05}.jsonl" if parts else "data.jsonl"
        (folder.data / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TrainingPlan(str(path), "sfft", partitions=len(parts), **plan)


def train(plans: Sequence[TrainingPlan], ranks: int) -> list[str]:
    """Train each plan in as many processes; what each ended with: '' or the error's code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = json.dumps([asdict(plan) for plan in plans])
    processes = [_started(rank, ranks, port, asked) for rank in range(ranks)]
    said = [process.communicate()[0] for process in processes]
    for process, printed in zip(processes, said, strict=True):
        assert process.returncode == 0, f"{process.returncode}: {printed[-3000:]}"
    ended: list[str] = json.loads(said[0].splitlines()[-1])
    return ended


def rows_read(folder: Path, model: str) -> list[list[str]]:
    """The texts that each rank has trained on, in their order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    files = sorted(folder.glob("read-*.jsonl"))
    lines = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return [[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in each] for each in lines]


def _noting(collate: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """A collator that notes what this rank's batches are made of."""

    def call(self: Any, examples: Sequence[Any]) -> Any:
        with (folder / f"read-{os.environ.get('RANK', '0')}.jsonl").open("a") as stream:
            stream.writelines(json.dumps(example["input_ids"].tolist()) + "\n" for example in examples)
        return collate(self, examples)

    return call


def _started(rank: int, ranks: int, port: int, asked: str) -> subprocess.Popen[str]:
    """A process that is one of several ranks, or one that does not know that it is the only one."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    group = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, __file__, asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(group if ranks > 1 else {})},
    )


def _rank() -> None:
    from accelerate.state import AcceleratorState
    from torch import distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from runtime.errors import SqlextError
    from runtime.training import loop
    from runtime.training.data import Collator

    collate = Collator.__call__
    plans = [TrainingPlan(**plan) for plan in json.loads(sys.argv[1])]
    ended = []
    for plan in plans:
        AcceleratorState._reset_state(reset_partial_state=True)  # a rank of a job trains once
        unset_hf_deepspeed_config()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        Collator.__call__ = _noting(collate, Path(plan.folder))
        try:
            loop.train(plan)
            ended.append("")
        except SqlextError as error:
            ended.append(error.code)
    if distributed.is_initialized():
        distributed.barrier()  # rank 0 keeps what the others need to leave in peace
        distributed.destroy_process_group()
    print(f"\n{json.dumps(ended)}", flush=True)


if __name__ == "__main__":
    _rank()
