"""What one rank promises: the trained model, checkpoints that are whole, and a resumed job that ends like any other."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoints.inspect import inspect
from runtime.errors import Cancelled, Fatal, UserError
from runtime.prompts.style import Style, training_style
from runtime.training import callbacks, trainer
from runtime.training import models as models_of_training
from runtime.training.data import Collator, Order, prepared
from runtime.training.folder import JobFolder, new_folder, step_of
from runtime.training.loop import train
from runtime.training.parameters import resolve, with_defaults
from runtime.training.plan import TrainingPlan, Way
from runtime.training.token_file import NO_LABEL, TokenFile

Rows = list[dict[str, Any]]


def sums(count: int, seed: int = 0, answer: Callable[[int, int], int] = lambda a, b: a + b) -> Rows:
    draw = random.Random(seed)
    rows: Rows = []
    for _ in range(count):
        a, b = draw.randrange(10), draw.randrange(10)
        rows.append({"instruction": f"{a}+{b}" + " please" * draw.randrange(5), "output": str(answer(a, b))})
    return rows


def texts(count: int) -> Rows:
    return [{"text": f"{row['instruction']}={row['output']}"} for row in sums(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.language_model(tmp_path_factory.mktemp("base"))


def job(root: Path, rows: Rows, valid: Rows | None = None, *, way: Way = "sft", **said: Any) -> TrainingPlan:
    """The plan of a new job with its rows; `said`: fields of the plan, the rest are parameters."""
    folder = new_folder(root, way, "")
    for name, part in (("data.jsonl", rows), ("valid.jsonl", valid)):
        if part is not None:
            (folder.data / name).write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    fields = {
        name: said.pop(name) for name in ("model", "weights", "adapter", "quantization", "ranks") if name in said
    }
    fields["model"] = str(fields.get("model", ""))
    return TrainingPlan(folder=str(folder.path), way=way, parameters=resolve(way, said), **fields)


def folder_of(plan: TrainingPlan) -> JobFolder:
    return JobFolder(Path(plan.folder))


def weights_of(plan: TrainingPlan) -> dict[str, bytes]:
    """The files of the trained weights, byte by byte."""
    return {file.name: file.read_bytes() for file in folder_of(plan).final.glob("*.safetensors")}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# ---- What it leaves ----


def test_lora_leaves_an_adapter_beside_its_base_and_tells_of_itself(tmp_path: Path, base: Path) -> None:
    plan = job(tmp_path, sums(40), sums(8, seed=1), model=base, lora_rank=8, learning_rate=1e-2)
    train(plan)
    folder = folder_of(plan)
    assert names(folder.final) >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert "training_args.bin" not in names(folder.final)
    assert inspect(str(folder.final / "pretrained_model")).path == str(base)
    config = json.loads((folder.final / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (8, str(base))
    status, lines = folder.status(), list(folder.metrics())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert status["step"] == status["steps"] == lines[-1]["step"] == 15
    assert status["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert status["eval_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert status["model"] == str(folder.final)
    assert status["rows"] == 40
    assert {"learning_rate", "grad_norm", "tokens_per_s", "seconds", "epoch"} <= set(lines[0])


def test_tokens_are_counted_without_padding(tmp_path: Path, base: Path) -> None:
    from runtime.training.tokens import Prepared

    plan = job(tmp_path, sums(30), model=base, epochs=2)
    train(plan)
    prepared = Prepared.read(folder_of(plan).data / "tokens" / "train")
    assert folder_of(plan).status()["tokens"] == 2 * prepared.tokens


def test_full_finetuning_leaves_a_checkpoint_that_can_be_deployed(tmp_path: Path, base: Path) -> None:
    plan = job(tmp_path, sums(16), model=base, full=True, epochs=1)
    train(plan)
    found = inspect(str(folder_of(plan).final))
    assert (found.num_parameters, found.has_chat_template) == (inspect(str(base)).num_parameters, True)
    assert json.loads((folder_of(plan).final / "config.json").read_text()).get("use_cache") is not False
    before, after = load_file(base / "model.safetensors"), load_file(folder_of(plan).final / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_pretraining_from_a_configuration_alone_makes_its_own_tokenizer(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    plan = job(
        tmp_path, texts(200), way="sfft", epoches=2, max_length=32, vocab_size=264, learning_rate=1e-2, **shape
    )
    train(plan)
    folder = folder_of(plan)
    assert {"Epoch-1", "Epoch-2", "final"} <= names(folder.models)
    found = inspect(str(folder.final))
    assert (found.hidden_size, found.max_model_len, found.vocab_size) == (32, 32, 264)
    assert inspect(str(folder.models / "Epoch-1")).num_parameters == found.num_parameters
    losses = [line["loss"] for line in folder.metrics()]
    assert losses[-1] < losses[0] / 2


def test_steps_per_epoch_makes_the_epochs(tmp_path: Path, base: Path) -> None:
    plan = job(tmp_path, texts(40), way="sfft", model=base, epoches=3, steps_per_epoch=2, max_length=16)
    train(plan)
    assert {f"Epoch-{n}" for n in (1, 2, 3)} <= names(folder_of(plan).models)
    assert folder_of(plan).status()["steps"] == 6


def test_the_best_checkpoint_is_what_remains(tmp_path: Path, base: Path) -> None:
    wrong = sums(8, answer=lambda a, b: 99 - a)
    plan = job(tmp_path, sums(24), wrong, model=base, epochs=4, learning_rate=3e-2, lora_dropout=0)
    train(plan)
    folder = folder_of(plan)
    by_step = {line["step"]: line["eval_loss"] for line in folder.metrics() if "eval_loss" in line}
    best = min(by_step, key=lambda step: by_step[step])
    assert best != max(by_step)
    assert folder.status()["best_step"] == best
    kept = {name for name in names(folder.models) if name.startswith("checkpoint-")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{max(by_step)}"}
    saved = load_file(folder.models / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = load_file(folder.final / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], final[name]) for name in saved)


@pytest.mark.parametrize(("eval_steps", "save_steps"), [(1, 4), (2, 3), (3, 2)])
def test_the_figures_are_those_of_the_model_that_is_kept(
    tmp_path: Path, base: Path, eval_steps: int, save_steps: int
) -> None:
    """Whatever the intervals: the best step is one that left a checkpoint, and `final` is what it left."""
    wrong = sums(8, answer=lambda a, b: 99 - a)
    said = {"epochs": 4, "learning_rate": 3e-2, "lora_dropout": 0, "save_total_limit": 9}
    plan = job(tmp_path, sums(24), wrong, model=base, eval_steps=eval_steps, save_steps=save_steps, **said)
    train(plan)
    folder = folder_of(plan)
    evaluated = {line["step"]: line["eval_loss"] for line in folder.metrics() if "eval_loss" in line}
    kept = {step: evaluated[step] for step in evaluated if (folder.models / f"checkpoint-{step}").is_dir()}
    best = min(kept, key=lambda step: kept[step])
    assert min(evaluated.values()) < kept[best]  # else nothing is tested
    assert (folder.status()["best_step"], folder.status()["eval_loss"]) == (best, kept[best])
    saved = load_file(folder.models / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = load_file(folder.final / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], final[name]) for name in saved)


def test_event_files_hold_the_losses_for_tensorboard(tmp_path: Path, base: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = job(tmp_path, sums(16), model=base, epochs=1)
    train(plan)
    events = EventAccumulator(str(folder_of(plan).logging)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


# ---- Data ----


def test_rows_that_cannot_be_used_are_counted_and_listed_without_their_text(tmp_path: Path, base: Path) -> None:
    rows = sums(10)
    rows[3] = {"instruction": "a secret question", "output": ""}
    plan = job(tmp_path, rows, model=base, epochs=1)
    train(plan)
    folder = folder_of(plan)
    assert (folder.status()["rows"], folder.status()["bad_rows"]) == (10, 1)
    listed = (folder.logging / "bad_rows.jsonl").read_text()
    assert json.loads(listed)["row"] == 4
    assert "secret" not in listed


def test_bad_rows_of_partitions_and_of_the_valid_table_are_found_again(tmp_path: Path, base: Path) -> None:
    """A partition's row is named with its partition; those to evaluate on are counted and listed too."""
    bad = {"instruction": "q", "output": ""}
    plan = job(tmp_path, [], [*sums(3), bad], model=base, epochs=1)
    folder = folder_of(plan)
    (folder.data / "data.jsonl").unlink()
    for number, rows in enumerate(([*sums(4), bad], [bad, *sums(4)])):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder.data / f"data-{number:05}-of-00002.jsonl").write_text(lines)
    plan = replace(plan, ranks=2, partitions=2)
    tokenizer = models_of_training.tokenizer_of(plan, {})
    prepared(plan, folder, with_defaults(plan), tokenizer, training_style(tokenizer, Style()), 0)
    found = [json.loads(line) for line in folder.bad_rows.read_text().splitlines()]
    assert [(it["table"], it.get("partition"), it["row"]) for it in found] == [
        ("train", 0, 5),
        ("train", 1, 1),
        ("valid", None, 4),
    ]
    counts = prepared(plan, folder, with_defaults(plan), tokenizer, training_style(tokenizer, Style()), 0).counts
    assert (counts["bad_rows"], counts["valid_rows"], counts["valid_bad_rows"]) == (2, 4, 1)


@pytest.mark.parametrize("rows", [[], [{"instruction": "a", "output": ""}] * 3])
def test_a_table_without_a_usable_row_is_an_error(tmp_path: Path, base: Path, rows: Rows) -> None:
    with pytest.raises(UserError) as raised:
        train(job(tmp_path, rows, model=base))
    assert raised.value.code == "training_no_rows"


def test_longer_examples_than_the_model_reads_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="512 tokens"):
        train(job(tmp_path, sums(4), model=base, max_seq_length=513))


def test_the_loss_of_packed_examples_is_that_of_the_examples_alone(base: Path) -> None:
    import numpy as np
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.config.use_cache = False
    draw = np.random.default_rng(0)
    alone = [draw.integers(10, 300, size) for size in (9, 5, 14)]
    packed = {
        "input_ids": np.concatenate(alone),
        "labels": np.concatenate(alone),
        "position_ids": np.concatenate([np.arange(len(ids)) for ids in alone]),
    }
    short = {name: values[:9] for name, values in packed.items()}  # so that the packed one is not the only row
    collate = Collator(pad_id=0)

    def total_loss(*examples: dict[str, Any]) -> float:
        batch = collate(examples)
        batch.pop("tokens")
        with torch.no_grad():
            loss = model(**batch).loss
        return float(loss * (batch["labels"][:, 1:] != NO_LABEL).sum())

    each = [total_loss({"input_ids": ids, "labels": ids}) for ids in alone]
    assert total_loss(packed) == pytest.approx(sum(each), rel=1e-5)
    assert total_loss(packed, short) == pytest.approx(sum(each) + each[0], rel=1e-5)


def test_an_epoch_has_every_sequence_once_in_an_order_of_its_own() -> None:
    first, second = (list(Order([range(50)], 4, 7, lambda epoch=epoch: epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert list(Order([range(50)], 4, 7, lambda: 0)) == first


def test_flash_attention_gets_packed_examples_in_one_row() -> None:
    """It looks at positions only there: nothing is padded, and the first token of an example has no label."""
    import numpy as np

    first = {"input_ids": np.arange(5), "labels": np.arange(5), "position_ids": np.array([0, 1, 0, 1, 2])}
    second = {"input_ids": np.arange(3), "labels": np.arange(3), "position_ids": np.arange(3)}
    batch = Collator(pad_id=0, multiple=8, flat=True)([first, second])
    assert batch.pop("tokens") == 8
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[0, 1, 2, 3, 4, 0, 1, 2]],
        "labels": [[NO_LABEL, 1, NO_LABEL, 3, 4, NO_LABEL, 1, 2]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1, 2]],
    }
    assert Collator(pad_id=0)([first, second])["input_ids"].shape == (2, 5)


def test_packing_is_refused_where_layers_cannot_keep_examples_apart(tmp_path: Path) -> None:
    """A Mamba carries its state over the border; without packing, and as a stream of text, it is trained."""
    mamba = models.state_space_model(tmp_path / "mamba")
    with pytest.raises(UserError, match="cannot keep the examples") as raised:
        train(job(tmp_path, sums(8), model=mamba, full=True, packing=True, epochs=1))
    assert raised.value.code == "option_value"
    plan = job(tmp_path, sums(8), way="sfft", model=mamba, epochs=1, max_length=64)
    train(plan)
    assert not TokenFile(folder_of(plan).data / "tokens" / "train").packed


class Lengths:
    """Stands for a token file."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> Any:
        import numpy as np

        return np.array(self._lengths, np.int32)


def test_sequences_of_equal_length_make_a_batch_in_an_order_that_comes_again() -> None:
    """Within each part, by the seed and the epoch alone: so it resumes, and ranks agree."""
    draw = random.Random(3)
    parts = [Lengths([draw.randrange(1, 200) for _ in range(size)]) for size in (62, 40)]

    def order(*of: Lengths, epoch: int = 0) -> list[int]:
        return list(Order(of, 4, 7, lambda: epoch, strategy="group_by_length"))

    alone = order(parts[0])
    assert sorted(alone) == list(range(62))
    assert len(alone) % 4 == 2  # the batch that is not full is the last
    lengths = parts[0].lengths()
    spread = [max(lengths[batch]) - min(lengths[batch]) for batch in (alone[at : at + 4] for at in range(0, 60, 4))]
    assert sum(spread) / len(spread) < 20
    torch.manual_seed(1)
    assert order(parts[0]) == alone != order(parts[0], epoch=1)
    both = order(*parts)
    ranks = [[at for turn in range(rank * 4, len(both), 8) for at in both[turn : turn + 4]] for rank in (0, 1)]
    assert (set(ranks[0]), set(ranks[1])) == (set(range(62)), set(range(62, 102)))


def test_partitions_are_dealt_out_one_to_each_rank() -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    order = Order([range(5), range(8)], 2, 7, lambda: 0)
    shards = [BatchSamplerShard(BatchSampler(order, 2, drop_last=False), 2, rank) for rank in (0, 1)]
    seen = [[index for batch in shard for index in batch] for shard in shards]
    assert (set(seen[0]), set(seen[1])) == (set(range(5)), set(range(5, 13)))
    assert len(seen[0]) == len(seen[1]) == len(order) // 2


PLAIN = {"system": "{instruction}\n", "user": "Q: {instruction}\n", "assistant": "A: {instruction}\n"}


@pytest.mark.parametrize("prompt_format", ["", json.dumps(PLAIN | {"trailing_assistant": "A:"})])
def test_the_engine_asks_with_the_tokens_that_the_job_has_learnt_behind(
    tmp_path: Path, base: Path, prompt_format: str
) -> None:
    """What the deployed model really reads, against what it was really trained on."""
    from runtime.engines.transformers import load
    from runtime.spec import Batch, CallOptions, ModelSpec

    rows = sums(6)
    plan = job(tmp_path, rows, model=base, full=True, epochs=1)
    train(replace(plan, prompt_format=prompt_format))
    learnt = TokenFile(folder_of(plan).data / "tokens" / "train")
    engine = load(ModelSpec("m", "transformers", str(folder_of(plan).final)))
    read: list[list[int]] = []

    def note(_: Any, args: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else args[0]
        read.append(ids[0].tolist())

    engine._model.register_forward_pre_hook(note, with_kwargs=True)
    for place, row in enumerate(rows):
        read.clear()
        list(engine.run(Batch(1, CallOptions(max_tokens=1), [row["instruction"]]), threading.Event()))
        ids, labels = learnt[place]["input_ids"].tolist(), learnt[place]["labels"].tolist()
        asked = next(at for at, label in enumerate(labels) if label != NO_LABEL)
        assert read[0] == ids[:asked]


# ---- Beginnings ----


def test_weights_of_ones_own_take_the_place_of_the_models(tmp_path: Path, base: Path) -> None:
    other = models.language_model(tmp_path / "other", seed=5)
    plan = job(tmp_path, sums(8), model=base, weights=str(other), full=True, epochs=1, learning_rate=0)
    train(plan)
    before, after = load_file(other / "model.safetensors"), load_file(folder_of(plan).final / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_base_of_an_adapter_on_own_weights_has_those_weights(tmp_path: Path, base: Path) -> None:
    other = models.language_model(tmp_path / "other", seed=5)
    plan = job(tmp_path, sums(8), model=base, weights=str(other), epochs=1)
    train(plan)
    linked = folder_of(plan).final / "pretrained_model"
    assert inspect(str(linked)).has_chat_template
    assert (linked / "model.safetensors").samefile(other / "model.safetensors")
    assert (linked / "tokenizer.json").samefile(base / "tokenizer.json")


def test_a_model_without_weights_of_its_own_takes_others(tmp_path: Path, base: Path) -> None:
    """A folder of configuration and tokenizer gives the architecture, another one nothing but weights."""
    bare, weights = tmp_path / "bare", tmp_path / "weights"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    weights.mkdir()
    shutil.copy(models.language_model(tmp_path / "other", seed=5) / "model.safetensors", weights)
    plan = job(tmp_path, sums(8), model=bare, weights=str(weights), epochs=1)
    train(plan)
    linked = folder_of(plan).final / "pretrained_model"
    assert inspect(str(linked)).num_parameters == inspect(str(base)).num_parameters
    assert (linked / "model.safetensors").samefile(weights / "model.safetensors")
    with pytest.raises(UserError) as raised:
        train(job(tmp_path, sums(8), model=bare))
    assert raised.value.code == "checkpoint_no_weights"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "weights_missing"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}), "weights_mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, base: Path, spoil: Callable[[dict[str, Any]], Any], code: str
) -> None:
    other = models.language_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    spoil(tensors)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as raised:
        train(job(tmp_path, sums(8), model=base, weights=str(other)))
    assert raised.value.code == code
    assert "model.norm.weight" in raised.value.message


def test_training_goes_on_from_an_adapter_with_lora_or_with_all_weights(tmp_path: Path, base: Path) -> None:
    first = job(tmp_path, sums(16), model=base, learning_rate=1e-2, lora_rank=4)
    train(first)
    adapter = str(folder_of(first).final)
    again = job(tmp_path, sums(16), model=base, adapter=adapter, learning_rate=0, epochs=1)
    train(again)
    assert weights_of(again) == weights_of(first)

    whole = job(tmp_path, sums(16), model=base, adapter=adapter, full=True, learning_rate=0, epochs=1)
    train(whole)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder_of(whole).final)(ids).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)

    with pytest.raises(UserError, match="lora_rank=8"):
        train(job(tmp_path, sums(16), model=base, adapter=adapter, lora_rank=8))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_lora_trains_on_a_quantized_base(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = job(tmp_path, texts(20), way="sfft", max_length=64, vocab_size=264, **shape)
    train(base)
    model = folder_of(base).final
    plan = job(tmp_path, sums(16), sums(4), model=model, quantization=bits, epochs=2, learning_rate=1e-2)
    train(plan)
    losses = [line["loss"] for line in folder_of(plan).metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    assert "adapter_model.safetensors" in names(folder_of(plan).final)


def test_shape_parameters_do_not_go_with_a_model(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="hidden_size"):
        train(job(tmp_path, texts(8), way="sfft", model=base, hidden_size=64))


def test_a_base_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        train(job(tmp_path, sums(8), model=models.encoder(tmp_path / "encoder")))
    assert raised.value.code == "checkpoint_task"


# ---- Ends ----


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(tmp_path: Path, base: Path) -> None:
    plan = job(tmp_path, sums(40), model=base, full=True, learning_rate=1e36, save_steps=1, warmup_steps=2)
    with pytest.raises(Fatal) as raised:
        train(plan)
    assert raised.value.code == "training_nan"
    assert "at step 3" in raised.value.message
    assert not folder_of(plan).final.exists()
    kept = folder_of(plan).newest_checkpoint()
    assert kept
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


def test_a_job_that_is_asked_to_stop_stops_and_can_go_on(tmp_path: Path, base: Path) -> None:
    plan = job(tmp_path, sums(40), model=base, max_steps=20_000, save_steps=5)
    folder = folder_of(plan)

    def ask() -> None:
        while folder.newest_checkpoint() is None:
            time.sleep(0.01)
        folder.cancel()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Cancelled):
        train(plan)
    asking.join()
    step = step_of(folder.newest_checkpoint())
    assert step == folder.stop_at  # nothing that was trained is lost
    folder.uncancel()
    train(replace(plan, parameters={**plan.parameters, "max_steps": step + 5}))
    steps = [line["step"] for line in folder.metrics()]
    assert steps == sorted(set(steps))
    assert steps[-1] == step + 5


def test_only_training_counts_for_the_speed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that takes long to write does not make it look slow."""
    plan = job(tmp_path, sums(32), sums(4), model=base, epochs=1, save_steps=2, eval_steps=2, logging_steps=2)
    save = trainer.JobTrainer.save_model

    def slowly(self: Any, *args: Any, **more: Any) -> None:
        time.sleep(2)
        save(self, *args, **more)

    monkeypatch.setattr(trainer.JobTrainer, "save_model", slowly)
    train(plan)
    logged = [line for line in folder_of(plan).metrics() if "tokens_per_s" in line]
    tokens = logged[1]["tokens"] - logged[0]["tokens"]
    assert logged[1]["seconds"] - logged[0]["seconds"] > 2
    assert tokens / logged[1]["tokens_per_s"] < 2


def test_an_evaluation_leaves_the_random_numbers_of_other_devices_alone(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only this rank's device is its own."""
    forked: list[Any] = []
    fork = torch.random.fork_rng

    def noted(devices: Any = None, **more: Any) -> Any:
        forked.append(devices)
        return fork(devices=devices, **more)

    monkeypatch.setattr(torch.random, "fork_rng", noted)
    train(job(tmp_path, sums(8), sums(4), model=base, epochs=1))
    assert forked
    assert all(devices == [] for devices in forked)


def test_a_folder_that_is_not_on_this_machine_is_an_error(tmp_path: Path, base: Path) -> None:
    """Nothing is made there, where nobody would see it, and nobody is waited for."""
    plan = job(tmp_path, sums(8), model=base)
    with pytest.raises(Fatal, match="is not on the machine") as raised:
        train(replace(plan, folder=str(tmp_path / "elsewhere")))
    assert raised.value.code == "job_folder"
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_told_and_the_checkpoint_before_is_intact(small_disk: Path, base: Path) -> None:
    plan = job(small_disk, sums(16), model=base, full=True, max_steps=6, save_steps=3)
    with pytest.raises(Fatal) as raised:
        train(plan)
    assert raised.value.code == "disk_full"
    models_folder = folder_of(plan).models
    assert names(models_folder) == {"checkpoint-3"}
    assert folder_of(plan).newest_checkpoint()


def test_memory_that_runs_out_is_told_with_what_helps(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer.JobTrainer, "compute_loss", refuse)
    with pytest.raises(Fatal) as raised:
        train(job(tmp_path, sums(8), model=base))
    assert raised.value.code == "out_of_memory"
    assert "per_device_train_batch_size" in str(raised.value.hint)


# ---- Killed and resumed ----

STEP, SAVING, SETTLING, SETTLED, EXPORTING = "step", "saving", "settling", "settled", "exporting"


def train_until_killed(plan: TrainingPlan, moment: str, at: int, environment: dict[str, str]) -> None:
    """Train in this process, and kill it at a moment; 0 = train to the end."""
    os.environ.update(environment)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(before: Callable[..., Any], when: Callable[..., bool], *, after: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if not after and when(*args):
                die()
            result = before(*args, **more)
            if after and when(*args):
                die()
            return result

        return call

    def of_step(job: Any, *_: Any) -> bool:
        return bool(job.state.global_step == at)

    def of_folder(_: Path, whole: Path) -> bool:
        return whole.name == (f"checkpoint-{at}" if moment != EXPORTING else "final")

    if moment == STEP:
        callbacks.Stop.on_step_end = dying(
            lambda *_, **__: None, lambda _, args, state, control: state.global_step == at
        )
    elif moment == SAVING:
        trainer.JobTrainer._save_rng_state = dying(trainer.JobTrainer._save_rng_state, of_step)
    elif moment in (SETTLING, EXPORTING):
        trainer.settle = dying(trainer.settle, of_folder)
    elif moment == SETTLED:
        trainer.settle = dying(trainer.settle, of_folder, after=True)
    train(plan)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Where processes are started that have the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_loop", "peft", "transformers.trainer", "runtime.training.result"])
    return context


def kill_at(processes: Any, plan: TrainingPlan, moment: str, at: int) -> None:
    process = processes.Process(target=train_until_killed, args=(plan, moment, at, {}))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


LONG_ENOUGH = {"epochs": 2, "save_steps": 4, "lora_dropout": 0.2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TrainingPlan:
    plan = job(tmp_path_factory.mktemp("whole"), sums(50), sums(6), model=base, **LONG_ENOUGH)
    train(plan)
    return plan


@pytest.mark.parametrize(
    ("moment", "at"),
    [(STEP, 2), (STEP, 9), (SAVING, 4), (SETTLING, 8), (SETTLED, 8), (EXPORTING, 14)],
)
def test_a_killed_job_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, base: Path, processes: Any, uninterrupted: TrainingPlan, moment: str, at: int
) -> None:
    plan = job(tmp_path, sums(50), sums(6), model=base, **LONG_ENOUGH)
    kill_at(processes, plan, moment, at)
    train(plan)
    assert weights_of(plan) == weights_of(uninterrupted)
    told = [
        [
            {name: line.get(name) for name in ("step", "loss", "eval_loss", "tokens")}
            for line in folder_of(it).metrics()
        ]
        for it in (plan, uninterrupted)
    ]
    assert told[0] == told[1]
    assert not [name for name in names(folder_of(plan).models) if name.startswith(".")]


def test_a_job_that_is_killed_after_its_last_step_does_no_other_one(
    tmp_path: Path, base: Path, processes: Any
) -> None:
    """Where max_steps ends inside an epoch, and the learning rate is not zero by then."""
    said = {**LONG_ENOUGH, "max_steps": 9, "lr_scheduler_type": "constant"}
    whole, killed = (job(tmp_path, sums(50), model=base, **said) for _ in range(2))
    train(whole)
    kill_at(processes, killed, EXPORTING, 9)
    assert step_of(folder_of(killed).newest_checkpoint()) == 9
    train(killed)
    assert folder_of(killed).status()["step"] == 9
    assert weights_of(killed) == weights_of(whole)


def test_a_job_whose_sequences_are_grouped_by_length_resumes_too(tmp_path: Path, base: Path, processes: Any) -> None:
    """With the weights of an uninterrupted one."""
    said = {**LONG_ENOUGH, "train_sampling_strategy": "group_by_length"}
    whole, killed = (job(tmp_path, sums(50), model=base, **said) for _ in range(2))
    train(whole)
    kill_at(processes, killed, STEP, 9)
    train(killed)
    assert weights_of(killed) == weights_of(whole)


def test_a_moved_job_keeps_its_best_checkpoint(tmp_path: Path, base: Path, processes: Any) -> None:
    """It is looked for where the folder is now."""
    wrong = sums(8, answer=lambda a, b: 99 - a)
    said = {"epochs": 4, "learning_rate": 3e-2, "lora_dropout": 0}
    whole, killed = (job(tmp_path / name, sums(24), wrong, model=base, **said) for name in ("a", "b"))
    train(whole)
    kill_at(processes, killed, EXPORTING, 12)
    moved = tmp_path / "moved"
    Path(killed.folder).rename(moved)
    killed = replace(killed, folder=str(moved))
    train(killed)
    assert folder_of(killed).status()["best_step"] == folder_of(whole).status()["best_step"] < 12
    assert weights_of(killed) == weights_of(whole)


def test_a_killed_pretraining_makes_up_for_the_epoch_it_did_not_export(
    tmp_path: Path, base: Path, processes: Any
) -> None:
    plan = job(tmp_path, texts(64), way="sfft", model=base, epoches=2, max_length=32, save_steps=1)
    train(plan)
    whole = weights_of(plan)
    again = job(tmp_path, texts(64), way="sfft", model=base, epoches=2, max_length=32, save_steps=1)
    half = folder_of(plan).status()["steps"] // 2
    kill_at(processes, again, SETTLED, half)
    assert "Epoch-1" not in names(folder_of(again).models)
    train(again)
    assert {"Epoch-1", "Epoch-2"} <= names(folder_of(again).models)
    assert weights_of(again) == whole


def on_two_ranks(processes: Any, plan: TrainingPlan, *, ends: int = 0) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        ranks.append(processes.Process(target=train_until_killed, args=(plan, "", 0, place)))
        ranks[-1].start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [ends, ends]


def test_two_ranks_that_are_cancelled_agree_on_their_last_step(tmp_path: Path, base: Path, processes: Any) -> None:
    """And leave its checkpoint, whatever the interval."""
    said = {"batch_size": 4, "max_steps": 100_000, "save_steps": 50_000, "logging_steps": 1}
    plan = job(tmp_path, sums(50), model=base, ranks=2, **said)
    folder = folder_of(plan)

    def ask() -> None:
        while not any(folder.metrics()):
            time.sleep(0.01)
        folder.cancel()

    asking = threading.Thread(target=ask)
    asking.start()
    on_two_ranks(processes, plan, ends=1)  # each ends with Cancelled
    asking.join()
    assert folder.stop_at
    assert step_of(folder.newest_checkpoint()) == folder.stop_at


def test_two_ranks_train_one_model_and_resume_in_the_middle_of_an_epoch(
    tmp_path: Path, base: Path, processes: Any
) -> None:
    said = {**LONG_ENOUGH, "batch_size": 4, "save_steps": 3, "save_total_limit": 9}
    plan = job(tmp_path, sums(50), model=base, ranks=2, **said)
    on_two_ranks(processes, plan)
    whole = weights_of(plan)
    folder = folder_of(plan)
    assert folder.status()["steps"] == 14
    for name in ("checkpoint-12", "checkpoint-14", "final"):
        shutil.rmtree(folder.models / name)
    on_two_ranks(processes, plan)
    assert weights_of(plan) == whole
