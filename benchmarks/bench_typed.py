"""Typed answers against free ones on the same model, alternating in one run: the time that a token takes.

The engine alone is asked, without SQL, as only it works differently, on one thread. Nearly all answers run to the
same number of tokens. The CPU's time is told beside the clock's: on a busy machine only the former means something.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from texts import mixed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.engines import Engine, loader
from runtime.spec import Batch, CallOptions, ModelSpec
from udfs.typed import schema_from

TYPES = {
    "a form, then a text": (
        "STRUCT(label ENUM('bug', 'feature', 'other'), day DATE, price DECIMAL(9,2), ok BOOLEAN, reason VARCHAR)"
    ),
    "a text": "VARCHAR",
    "numbers": "INTEGER[100]",
    "dates": "DATE[100]",
}


def build(folder: Path, vocabulary: int, hidden: int, layers: int) -> Path:
    """A Llama with random weights and a tokenizer of realistic size, learned from Python's own library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    tokenizer.train_from_iterator(
        (file.read_text(encoding="utf-8", errors="ignore") for file in library if "site-packages" not in file.parts),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    print(f"{sum(part.numel() for part in model.parameters()) / 1e6:.0f} M parameters, {len(fast)} tokens")
    return folder


class Cost(NamedTuple):
    """What the answers of a batch took: milliseconds for each token, and tokens of an answer."""

    clock_ms: float
    cpu_ms: float
    tokens: float


def cost(engine: Engine, prompts: list[str], options: CallOptions) -> Cost:
    """Ask, and measure."""
    clock, cpu = time.perf_counter(), time.process_time()
    pieces = list(engine.run(Batch(0, options, prompts), threading.Event()))
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    tokens = sum(sum(piece.completion_tokens) for piece in pieces)
    return Cost(1000 * clock / tokens, 1000 * cpu / tokens, tokens / len(prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    said = parser.parse_args()
    torch.set_num_threads(1)
    prompts = mixed(said.rows, longest=200)
    free = CallOptions(max_tokens=said.tokens, extra=(("ignore_eos", True),))
    typed = {name: CallOptions(max_tokens=said.tokens, schema=schema_from(kind)) for name, kind in TYPES.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(folder), said.vocabulary, said.hidden, said.layers)
        engine = loader("transformers")(ModelSpec("bench", "transformers", str(path)))
        for options in (free, *typed.values()):
            cost(engine, prompts[:2], options)  # compiles the grammar, too
        ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in typed}
        before = cost(engine, prompts, free)
        for _ in range(said.rounds):
            for name, options in typed.items():
                took, after = cost(engine, prompts, options), cost(engine, prompts, free)
                clock, cpu = (2 * took[each] / (before[each] + after[each]) for each in (0, 1))
                ratios[name].append((clock, cpu))
                print(
                    f"{name}: {took.clock_ms:.2f} ms a token, free {before.clock_ms:.2f} and {after.clock_ms:.2f}; "
                    f"CPU {took.cpu_ms:.2f}, {before.cpu_ms:.2f} and {after.cpu_ms:.2f}; "
                    f"{took.tokens:.0f} tokens a row",
                    flush=True,
                )
                before = after
    for name, found in ratios.items():
        clock, cpu = (median(each) for each in zip(*found, strict=True))
        print(f"{name}: {clock:.2f} of the time of a free token by the clock, {cpu:.2f} by the CPU's")


if __name__ == "__main__":
    main()
