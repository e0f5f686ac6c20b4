"""What one rank promises: the trained model, checkpoints that are whole, and a resumed job that ends like any other."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoints.inspect import inspect
from runtime.errors import Cancelled, Fatal, UserError
from runtime.training import callbacks, trainer
from runtime.training.data import Collator, Order
from runtime.training.folder import JobFolder, new_folder
from runtime.training.loop import train
from runtime.training.parameters import resolve
from runtime.training.plan import TrainingPlan, Way
from runtime.training.token_file import NO_LABEL
from runtime.training.trainer import newest_checkpoint

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
    first, second = (list(Order([50], 4, 7, lambda epoch=epoch: epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert list(Order([50], 4, 7, lambda: 0)) == first


def test_partitions_are_dealt_out_one_to_each_rank() -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    order = Order([5, 8], 2, 7, lambda: 0)
    shards = [BatchSamplerShard(BatchSampler(order, 2, drop_last=False), 2, rank) for rank in (0, 1)]
    seen = [[index for batch in shard for index in batch] for shard in shards]
    assert (set(seen[0]), set(seen[1])) == (set(range(5)), set(range(5, 13)))
    assert len(seen[0]) == len(seen[1]) == len(order) // 2


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
    assert (linked / "model.safetensors").resolve() == other / "model.safetensors"
    assert (linked / "tokenizer.json").resolve() == base / "tokenizer.json"


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
    kept = newest_checkpoint(folder_of(plan).models)
    assert kept
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


def test_a_job_that_is_asked_to_stop_stops_and_can_go_on(tmp_path: Path, base: Path) -> None:
    plan = job(tmp_path, sums(40), model=base, max_steps=20_000, save_steps=5)
    folder = folder_of(plan)

    def ask() -> None:
        while newest_checkpoint(folder.models) is None:
            time.sleep(0.01)
        folder.cancel()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Cancelled):
        train(plan)
    asking.join()
    reached = newest_checkpoint(folder.models)
    assert reached
    folder.uncancel()
    step = int(reached.name.rpartition("-")[2])
    train(replace(plan, parameters={**plan.parameters, "max_steps": step + 5}))
    steps = [line["step"] for line in folder.metrics()]
    assert steps == sorted(set(steps))
    assert steps[-1] == step + 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for one checkpoint and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_told_and_the_checkpoint_before_is_intact(small_disk: Path, base: Path) -> None:
    plan = job(small_disk, sums(16), model=base, full=True, max_steps=6, save_steps=3)
    with pytest.raises(Fatal) as raised:
        train(plan)
    assert raised.value.code == "disk_full"
    models_folder = folder_of(plan).models
    assert names(models_folder) == {"checkpoint-3"}
    assert newest_checkpoint(models_folder)


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


def on_two_ranks(processes: Any, plan: TrainingPlan) -> None:
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
    assert [process.exitcode for process in ranks] == [0, 0]


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
