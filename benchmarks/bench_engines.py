"""Text engines side by side: same weights, number type and prompts; one thread, all cores; the machine's limit.

    python benchmarks/bench_engines.py [--rows 256] [--rounds 3] [--dtype float32] [--engines vllm,openvino]

Each engine runs in a process of its own, and each round asks every engine once, in turns. The limit of a token is
what the machine needs for its multiplications, and for reading the weights once for each step of 32 rows, both as
measured here with torch in the same number type.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

PACKAGES = {"transformers": "transformers", "openvino": "openvino_genai", "vllm": "vllm", "llama_cpp": "llama_cpp"}
OPTIONS: dict[str, dict[str, Any]] = {"vllm": {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}}
ROWS_TOGETHER = 32


def checkpoint(folder: Path, dtype: str) -> Path:
    """A Qwen2 of some 59 million parameters with random weights; its vocabulary is larger than its tokenizer."""
    import models
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = models.text_tokenizer(None)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen2Config(
        **shape,
        vocab_size=32_000,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def work(rows: int) -> list[tuple[str, int]]:
    """Prompts of about 16 to 256 tokens, and 32 to 128 tokens for each answer, in four sizes."""
    draw = random.Random(7)
    return [("the lazy dog " * draw.randint(4, 64), draw.choice((32, 64, 96, 128))) for _ in range(rows)]


def serve(engine: str, folder: str, dtype: str, threads: int, pipe: Any) -> None:
    """The process of one engine: load, warm up, then one run for each «go»."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    from runtime.engines import loader
    from runtime.spec import ModelSpec

    options = tuple(sorted({"dtype": dtype, **OPTIONS.get(engine, {})}.items()))
    begun = time.perf_counter()
    loaded = loader(engine)(ModelSpec("m", engine, folder, options=options))
    pipe.send(time.perf_counter() - begun)
    while (rows := pipe.recv()) is not None:
        begun = time.perf_counter()
        tokens = answered(loaded, rows)
        pipe.send((tokens, time.perf_counter() - begun))
    loaded.close()


def answered(engine: Any, rows: list[tuple[str, int]]) -> int:
    """Tokens written: one batch for each length of answer, all in flight at the same time where the engine can."""
    from concurrent.futures import ThreadPoolExecutor

    from runtime.spec import Answers, Batch, CallOptions

    def ask(limit: int) -> int:
        options = CallOptions(max_tokens=limit, extra=(("ignore_eos", True),))
        batch = Batch(limit, options, [prompt for prompt, tokens in rows if tokens == limit])
        pieces = engine.run(batch, threading.Event())
        return sum(sum(piece.completion_tokens) for piece in pieces if isinstance(piece, Answers))

    limits = sorted({limit for _, limit in rows})
    at_once = 1 if engine.info.engine == "transformers" else len(limits)
    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(ask, limits))


def limit(folder: Path, dtype: str, threads: int, rows: list[tuple[str, int]]) -> float:
    """Tokens per second that this machine could write at the most, by its multiplications and its memory."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    a, b = torch.ones(1024, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
    flops = 2 * 1024**3 / _least(lambda: torch.matmul(a, b))
    source = torch.ones(64 * 2**20)
    bandwidth = source.nbytes / _least(source.sum)
    config = AutoConfig.from_pretrained(folder)
    layer = config.hidden_size * (
        config.hidden_size * 2 + 2 * config.num_key_value_heads * 64 + 3 * config.intermediate_size
    )
    body, head = layer * config.num_hidden_layers, config.hidden_size * config.vocab_size
    written = sum(tokens for _, tokens in rows)
    read = sum(len(prompt) / 3 for prompt, _ in rows)
    computing = 2 * (body * (written + read) + head * written) / flops
    reading = (body + head) * kind.itemsize * written / ROWS_TOGETHER / bandwidth
    print(f"  machine, {threads} thread(s): {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    return written / max(computing, reading)


def _least(act: Any) -> float:
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        act()
        times.append(time.perf_counter() - begun)
    return min(times)


def compare(engines: list[str], folder: Path, dtype: str, threads: int, rounds: int, rows: list[Any]) -> None:
    """One line for each engine: tokens per second (median of the rounds), to the first of them, to the limit."""
    context = multiprocessing.get_context("spawn")
    most = limit(folder, dtype, threads, rows)
    pipes = {}
    for engine in engines:
        pipes[engine], theirs = context.Pipe()
        context.Process(target=serve, args=(engine, str(folder), dtype, threads, theirs), daemon=True).start()
    starts = {engine: pipe.recv() for engine, pipe in pipes.items()}
    speeds: dict[str, list[float]] = {engine: [] for engine in engines}
    for number in range(rounds + 1):  # the first one warms up
        for engine, pipe in pipes.items():
            pipe.send(rows)
            tokens, seconds = pipe.recv()
            if number:
                speeds[engine].append(tokens / seconds)
    for engine, pipe in pipes.items():
        speed = statistics.median(speeds[engine])
        ratio = speed / statistics.median(speeds[engines[0]])
        print(
            f"  {engine:14} {speed:8.0f} tokens/s  {ratio:5.2f} x {engines[0]}  {speed / most:5.2f} of the limit"
            f"  load {starts[engine]:.1f} s"
        )
        pipe.send(None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", default=",".join(PACKAGES))
    said = parser.parse_args()
    engines = [name for name in said.engines.split(",") if find_spec(PACKAGES[name])]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SQLEXT_CACHE_DIR"] = folder
        model = checkpoint(Path(folder) / "model", said.dtype)
        for threads in sorted({1, os.cpu_count() or 1}):
            print(f"{said.dtype}, {said.rows} rows, {threads} thread(s)")
            compare(engines, model, said.dtype, threads, said.rounds, work(said.rows))


if __name__ == "__main__":
    main()
