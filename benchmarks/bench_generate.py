"""Generation over 256 prompts of mixed lengths: SQL on one worker against length-sorted `model.generate` batches, one
thread each; and a table with 90 % equal prompts against its distinct ones.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pyarrow as pa
import torch
from small_llama import build
from texts import mixed
from transformers import AutoModelForCausalLM, AutoTokenizer

import sqlext

MAX_TOKENS = 64


def plain(model: Any, tokenizer: Any, prompts: list[str], batch_size: int) -> list[str]:
    """The best plain loop: prompts sorted by length, so that a batch pads little."""
    ids = tokenizer(prompts)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda row: -len(ids[row]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([prompts[row] for row in rows], return_tensors="pt", padding=True, padding_side="left")
        batch.pop("token_type_ids", None)
        with torch.inference_mode():
            made = model.generate(**batch, do_sample=False, max_new_tokens=MAX_TOKENS)
        texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    said = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, sqlext.connect() as con:
        path = build(Path(folder) / "llama")
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompts = mixed(said.rows)
        con.register("prompts", pa.table({"id": range(len(prompts)), "prompt": prompts}))
        con.execute(f"""
            !llm setup "cache=off";
            RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="chat"
                AND `generation.max_tokens`="{MAX_TOKENS}";
        """)
        con.execute("SELECT chat('warm up')").fetchall()
        for round_number in range(said.rounds):
            seconds = {}
            for batch_size in (16, 32):
                started = time.perf_counter()
                expected = plain(model, tokenizer, prompts, batch_size)
                seconds[batch_size] = time.perf_counter() - started
            best = min(seconds.values())
            started = time.perf_counter()
            answers = con.execute("SELECT chat(prompt) FROM prompts ORDER BY id").fetchall()
            ours = time.perf_counter() - started
            started = time.perf_counter()
            con.execute("SELECT count(chat(prompt)) FROM prompts, range(10)").fetchall()
            repeated = time.perf_counter() - started
            equal = sum(ours == theirs for (ours,), theirs in zip(answers, expected, strict=True))
            print(
                f"round {round_number + 1}: best plain loop {best:.1f} s, SQL {ours:.1f} s, ratio {best / ours:.2f}; "
                f"{len(prompts) * 10} rows, 90 % equal: {repeated:.1f} s, {repeated / ours:.2f} of the distinct; "
                f"{equal} of {len(prompts)} answers equal"
            )


if __name__ == "__main__":
    main()
