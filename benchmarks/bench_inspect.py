"""What a checkpoint of 100 shards of 1,000 tensors is, against only parsing the JSON of its headers and its index."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from runtime.checkpoints.profile import profile
from runtime.checkpoints.suitability import suitable, this_machine

SHARDS, TENSORS = 100, 1_000


def build(folder: Path) -> Path:
    """A folder whose weights are all names and no numbers to speak of."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.experts.{i}.down_proj.weight": {
                "dtype": "BF16",
                "shape": [2, 1],
                "data_offsets": [4 * i, 4 * i + 4],
            }
            for i in range(TENSORS)
        }
        raw = json.dumps(tensors).encode()
        (folder / name).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4 * TENSORS))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def seconds(work: Callable[[], object]) -> float:
    """By the clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many counts")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sqlext-bench-") as place:
        folder = build(Path(place))
        texts = [file.read_bytes()[8 : -4 * TENSORS] for file in folder.glob("*.safetensors")]
        texts.append((folder / "model.safetensors.index.json").read_bytes())

        def inspect() -> None:
            suitable(profile(str(folder)), [this_machine()])

        inspect()
        rounds = [
            (seconds(inspect), seconds(lambda: [json.loads(text) for text in texts])) for _ in range(asked.rounds)
        ]
        told, parsed = (min(each) for each in zip(*rounds, strict=True))
        print(
            f"{SHARDS} shards of {TENSORS:,} tensors: told in {told:.3f} s, {told / parsed:.2f} of the time in which "
            f"their JSON is parsed"
        )


if __name__ == "__main__":
    main()
