"""Memory of a training against the size of its table: a job's rank tokenises the rows and trains a few steps.

Each size runs in a process of its own. The memory is the most that the process ever had; what the kernel keeps of
files is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from texts import mixed

from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

STEPS = 20


def write_rows(file: Path, size: float) -> None:
    """A table of texts, `size` bytes of JSON lines."""
    block = "".join(json.dumps({"text": text}) + "\n" for text in mixed(20_000, longest=4000)).encode()
    with file.open("wb") as stream:
        for _ in range(max(1, round(size / len(block)))):
            stream.write(block)


def train(root: Path) -> None:
    """Train once in this process and print what it took."""
    from runtime.training import loop

    parameters = {"max_steps": STEPS, "max_seq_length": 256, "per_device_train_batch_size": 4}
    began = time.perf_counter()
    loop.train(TrainingPlan(str(root / "job"), "sfft", model=str(root / "llama"), parameters=parameters))
    told = JobFolder(root / "job").status()
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
        "seconds": time.perf_counter() - began,
        "rows": told["rows"],
        "sequences": told["sequences"],
    }
    print("\n" + json.dumps(figures))


def main() -> None:
    """Compare the sizes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.2, 1.0])
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.root:
        train(said.root)
        return
    from small_llama import build

    memory = []
    for gb in said.gb:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            build(root / "llama", hidden=128, layers=2)
            (root / "job" / "finetune_data").mkdir(parents=True)
            write_rows(root / "job" / "finetune_data" / "data.jsonl", gb * 1e9)
            command = [sys.executable, __file__, "--root", str(root)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        memory.append(figures["rss_mb"])
        print(
            f"{gb:g} GB, {figures['rows']:,} rows, {figures['sequences']:,} sequences: "
            f"at most {figures['rss_mb']:.0f} MB in {figures['seconds']:.0f} s",
            flush=True,
        )
    if len(memory) > 1:
        print(f"the largest table takes {memory[-1] / memory[0]:.2f} times the memory of the smallest")


if __name__ == "__main__":
    main()
