"""Train a small language model on what DuckDB says of its own functions, so that the examples have one to deploy.

    python examples/sql/make_small_model.py small-model

A Llama of about a million parameters, its own tokenizer and a chat template, trained from nothing in about half a
minute on one CPU core; nothing is downloaded. It answers «What does array_length do?» with DuckDB's own description.
A folder that is complete already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

QUESTIONS = ("What does {} do?", "What is {}?", "Explain {}.")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END = 0, 1
VOCABULARY = 1_000
LONGEST_SENTENCE = 100  # characters
STEPS = 600
BATCH = 24
LEARNING_RATE = 4e-3
WARMUP = 30
UNSAID = -100  # label of a token that is not learned: torch's ignore_index


def descriptions(count: int | None = None) -> dict[str, str]:
    """Function name -> first sentence of its description, from `duckdb_functions()`, in order of the names.

    Args:
        count: most of them; None: all.
    """
    import duckdb

    query = """
        SELECT function_name, rtrim(split_part(min(description), '. ', 1), '.') || '.' AS sentence
        FROM duckdb_functions()
        WHERE regexp_full_match(function_name, '[a-z][a-z0-9_]+')
        GROUP BY function_name
        HAVING length(sentence) BETWEEN 10 AND ?
        ORDER BY function_name
    """
    return dict(duckdb.connect().execute(query, [LONGEST_SENTENCE]).fetchall()[:count])


def train_tokenizer(pairs: dict[str, str]) -> Any:
    """A byte-level BPE tokenizer with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*pairs, *pairs.values(), *(q.format(n) for n in pairs for q in QUESTIONS)], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
        model_max_length=256,
    )


def encode(tokenizer: Any, pairs: dict[str, str]) -> list[tuple[list[int], int]]:
    """Token ids of each conversation, and how many of them are the question."""
    examples = []
    for name, description in pairs.items():
        for question in QUESTIONS:
            turns = [{"role": "user", "content": question.format(name)}]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            answer = tokenizer(description, add_special_tokens=False)["input_ids"]
            examples.append(([*prompt, *answer, END], len(prompt)))
    return examples


def train_model(examples: list[tuple[list[int], int]], vocabulary: int, steps: int, seed: int = 0) -> Any:
    """A Llama that has learned the answers of `examples`. The same arguments give the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    order = _batches(examples, steps, seed)
    begun = time.perf_counter()
    model.train()
    for step, batch in enumerate(order, start=1):
        loss = model(**_tensors(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            say(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - begun:.0f} s")
    return model.eval()


def _share(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, then half a cosine down to nothing."""
    rise = min(1.0, (step + 1) / WARMUP)
    return rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))


def _batches(examples: list[tuple[list[int], int]], steps: int, seed: int) -> list[list[tuple[list[int], int]]]:
    """As many batches as steps, every example as often as any other; rows of like length share a batch."""
    chance = random.Random(seed)
    found: list[list[tuple[list[int], int]]] = []
    while len(found) < steps:
        shuffled = sorted(examples, key=lambda example: len(example[0]) + 4 * chance.random())
        epoch = [shuffled[start : start + BATCH] for start in range(0, len(shuffled), BATCH)]
        chance.shuffle(epoch)
        found += epoch
    return found[:steps]


def _tensors(batch: list[tuple[list[int], int]]) -> dict[str, Any]:
    import torch

    longest = max(len(ids) for ids, _ in batch)
    rows = [ids + [PAD] * (longest - len(ids)) for ids, _ in batch]
    labels = [[UNSAID] * asked + ids[asked:] + [UNSAID] * (longest - len(ids)) for ids, asked in batch]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def make(folder: Path, *, steps: int = STEPS, count: int | None = None) -> Path:
    """Train and save the model into `folder`, unless a complete one is there.

    Args:
        steps: of training; fewer are quicker and learn less.
        count: most functions to learn; None: all.
    """
    done = folder / "made.json"
    recipe = {"steps": steps, "functions": count}
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == recipe:
        say(f"{folder} is complete")
        return folder
    pairs = descriptions(count)
    tokenizer = train_tokenizer(pairs)
    say(f"learning what DuckDB says of {len(pairs)} functions")
    model = train_model(encode(tokenizer, pairs), len(tokenizer), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.write_text(json.dumps(recipe), encoding="utf-8")
    say(f"{folder} is complete: {model.num_parameters():,} parameters")
    return folder


def say(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a second thread gains little on a model this small; read when torch loads
    make(arguments.folder, steps=arguments.steps)


if __name__ == "__main__":
    main()
