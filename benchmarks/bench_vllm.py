"""vLLM through SQL, on one warm worker, against `vllm.LLM.generate` on the same prompts, one thread each; and rows
that share their beginnings and come in random order, with prefix caching and without.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import pyarrow as pa
import torch
from small_llama import build
from texts import mixed
from vllm import LLM, SamplingParams

import sqlext

MAX_TOKENS = 64
CACHE_BYTES = 1 << 30
BLOCK = 32


def plain(llm: LLM, prompts: list[str]) -> list[str]:
    """The library alone, as its own documentation uses it."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


def seconds(work: Any) -> tuple[float, Any]:
    """How long it took, and what came of it."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def deploy(con: sqlext.Connection, path: Path, name: str, caching: bool) -> None:
    """One worker with vLLM; nothing is stored."""
    con.execute(f"""
        !llm setup "cache=off" "infer_backend=vllm" "cpus_per_worker=1";
        RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="{name}"
            AND `generation.max_tokens`="{MAX_TOKENS}" AND `backend.enable_prefix_caching`="{str(caching).lower()}"
            AND `backend.kv_cache_memory_bytes`="{CACHE_BYTES}";
        SELECT {name}('warm up')
    """).fetchall()


def answers(con: sqlext.Connection, name: str, prompts: list[str], max_tokens: int = MAX_TOKENS) -> list[str]:
    """The function's answers, in order."""
    con.register("prompts", pa.table({"id": range(len(prompts)), "prompt": prompts}))
    query = f"SELECT {name}(prompt, max_tokens := {max_tokens}) FROM prompts ORDER BY id"
    return [text for (text,) in con.execute(query).fetchall()]


def against_the_library(con: sqlext.Connection, path: Path, rows: int, rounds: int) -> None:
    """Alternating, on prompts that are new in each round: whole prompts would be in the prefix caches else."""
    llm = LLM(str(path), dtype="float32", enforce_eager=True, block_size=BLOCK, kv_cache_memory_bytes=CACHE_BYTES)
    plain(llm, mixed(8, seed=99))
    for number in range(rounds):
        prompts = mixed(rows, seed=number)
        ours, made = seconds(lambda prompts=prompts: answers(con, "chat", prompts))
        theirs, expected = seconds(lambda prompts=prompts: plain(llm, prompts))
        equal = sum(mine == other for mine, other in zip(made, expected, strict=True))
        print(
            f"round {number + 1}: LLM.generate {theirs:.1f} s, SQL {ours:.1f} s, ratio {theirs / ours:.2f}; "
            f"{equal} of {rows} answers equal"
        )


def shared_beginnings(con: sqlext.Connection, documents: int, questions: int, rounds: int) -> None:
    """The same rows through both functions, alternating, in an order that knows nothing of their beginnings."""
    for number in range(rounds):
        begins = [f"Document {number}.{n}: " + " ".join(mixed(6, seed=100 * number + n)) for n in range(documents)]
        asked = mixed(questions, longest=60, seed=number)
        prompts = [f"{begin}\n{question}" for begin in begins for question in asked]
        random.Random(number).shuffle(prompts)
        without, expected = seconds(lambda prompts=prompts: answers(con, "uncached", prompts, 8))
        cached, made = seconds(lambda prompts=prompts: answers(con, "chat", prompts, 8))
        equal = sum(mine == other for mine, other in zip(made, expected, strict=True))
        print(
            f"round {number + 1}: {documents} beginnings x {questions}: without caching {without:.1f} s, "
            f"with {cached:.1f} s, {without / cached:.2f} x as fast; {equal} of {len(prompts)} answers equal"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    said = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, sqlext.connect() as con:
        path = build(Path(folder) / "llama")
        deploy(con, path, "chat", caching=True)
        against_the_library(con, path, said.rows, said.rounds)
        deploy(con, path, "uncached", caching=False)
        shared_beginnings(con, said.documents, said.questions, said.rounds)


if __name__ == "__main__":
    main()
