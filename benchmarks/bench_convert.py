"""Casts, changes of format and merges of a random checkpoint, against the disk: copying the same bytes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HIDDEN, LAYER_BYTES = 2048, 2048 * 2048 * 4 * 13  # of a float32 layer: q, k, v, o and three of 3 × 2048


def build(folder: Path, layers: int, shard_gb: float) -> Path:
    """A random float32 Llama in shards, and a LoRA adapter of it in `adapter` beside."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size=f"{int(shard_gb * 1000)}MB")
    (folder / "model" / "tokenizer.json").write_text('{"version": "1.0"}')
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    lora.save_pretrained(folder / "adapter")
    state = get_peft_model_state_dict(inject_adapter_in_model(lora, model))
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy a folder through memory and wait for the disk, as a conversion does."""
    target.mkdir()
    buffer = memoryview(bytearray(16 * 2**20))
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as read, (target / file.name).open("wb", buffering=0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
            os.fsync(write.fileno())


def timed(work: Callable[..., Any], *args: Any) -> tuple[float, int]:
    """Seconds, and the peak of this process's memory in MB."""
    begun = time.perf_counter()
    work(*args)
    seconds = time.perf_counter() - begun
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) // 1024


def convert(warm: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, int]:
    """One conversion, after a small one that has imported what it needs."""
    from runtime.checkpoints.convert import Conversion, convert

    convert(Conversion(**warm))
    return timed(convert, Conversion(**wanted))


def merge(warm: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, int]:
    """One merge, after a small one that has imported what it needs."""
    from runtime.checkpoints.merge import Merge, merge

    merge(Merge(**warm))
    return timed(merge, Merge(**wanted))


def alone(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Do the work in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *args, **options).result()


def told(root: Path, source: str, target: str, **more: Any) -> dict[str, Any]:
    """What to convert in one of the two folders."""
    return {"model": str(root / source), "target": str(root / target), "overwrite": True, **more}


def both(root: Path, small: Path, work: Callable[..., Any], source: str, **more: Any) -> Any:
    """The small model first, then the large one."""
    adapters = [{"adapter": str(each / "adapter")} if work is merge else {} for each in (small, root)]
    wanted = [told(each, source, "out", **more) for each in (small, root)]
    return alone(work, *(one | adapter for one, adapter in zip(wanted, adapters, strict=True)))


def size(folder: Path) -> int:
    """Bytes of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--shard-gb", type=float, default=0.5, help="size of its largest file")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--folder", type=Path, help="where the disk is that is measured")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="sqlext-bench-") as place:
        root, small = Path(place) / "large", Path(place) / "small"
        alone(build, root, max(1, round(asked.gb * 1e9 / LAYER_BYTES)), asked.shard_gb)
        alone(build, small, 1, 1.0)
        model = root / "model"
        largest = max(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
        print(f"{size(model) / 1e9:.2f} GB, the largest file {largest:,.0f} MB; best of {asked.rounds}")
        for folder in (root, small):
            alone(convert, told(small, "model", "warm", to="bin"), told(folder, "model", "bin", to="bin"))
        works: dict[str, Callable[[], tuple[float, int]]] = {
            "copy": lambda: alone(timed, copy, model, root / "out"),
            "cast to bfloat16": lambda: both(root, small, convert, "model", to="bfloat16"),
            "safetensors to bin": lambda: both(root, small, convert, "model", to="bin"),
            "bin to safetensors": lambda: both(root, small, convert, "bin", to="safetensors", allow_pickle=True),
            "merge": lambda: both(root, small, merge, "model"),
        }
        rounds: dict[str, list[tuple[float, int]]] = {name: [] for name in works}
        moved = {}
        for _ in range(asked.rounds):  # each in turn: what else the machine does changes with time
            for name, work in works.items():
                rounds[name].append(work())
                moved[name] = size(model) + size(root / "out")
                shutil.rmtree(root / "out")
        speeds = {name: moved[name] / min(seconds for seconds, _ in rounds[name]) / 1e9 for name in works}
        for name, speed in speeds.items():
            print(
                f"{name:<20}{speed:6.2f} GB/s read and written, {speed / speeds['copy']:5.2f} of the copy, "
                f"peak {max(peak for _, peak in rounds[name]):,} MB"
            )


if __name__ == "__main__":
    main()
