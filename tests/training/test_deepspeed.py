"""DeepSpeed: the user's configuration counts, and what is trained with it is what plain training gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import ranks
from ranks import PARAMETERS, TEXTS

from runtime.errors import UserError
from runtime.training.deepspeed_config import ZERO, check_deepspeed, settle
from runtime.training.plan import TrainingPlan
from runtime.training.strategies import strategy_of

STEPS = 8  # of an epoch

DOCUMENT = Path(__file__).parents[1] / "language" / "byzer.sql"
PRETRAIN = DOCUMENT.read_text(encoding="utf-8").partition("ds_config='''")[2].partition("'''")[0]
"""What the Byzer-LLM document pretrains with."""

SCHEDULED = {
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-4}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 1000, "warmup_num_steps": 100, "warmup_max_lr": 1e-3, "warmup_type": "linear"},
    },
}
"""Steps and rates that are not those of the job: as people take such a file from one training to the next."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finetune_model, trained by two ranks: with DDP, with each ZeRO stage, and from a checkpoint."""
    root = tmp_path_factory.mktemp("jobs")
    model = str(models.language_model(root / "model"))

    def job(name: str, deepspeed: str = "", **parameters: Any) -> TrainingPlan:
        said = {"parameters": {**PARAMETERS, **parameters}, "deepspeed": deepspeed, "model": model, "ranks": 2}
        return ranks.job(root / name, TEXTS, **said)

    plans = [job("ddp"), *(job(f"zero{stage}", _zero(stage)) for stage in (1, 2, 3))]
    begun = job("resumed", _zero(2), max_steps=STEPS)
    rest = TrainingPlan(begun.folder, "sfft", model, parameters=PARAMETERS, deepspeed=_zero(2), ranks=2)
    short = {name: PARAMETERS[name] for name in ("max_seq_length", "packing", "num_train_epochs")}
    said = {"model": model, "parameters": short, "ranks": 2}
    document = ranks.job(root / "document", TEXTS, deepspeed=PRETRAIN, **said)
    scheduled = ranks.job(root / "scheduled", TEXTS, deepspeed=json.dumps(SCHEDULED), **said)
    wrong = job("wrong", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}')
    ended = ranks.train([*plans, begun, rest, document, scheduled, wrong], 2)
    assert ended == [""] * 8 + ["deepspeed_config"]
    return {folder.name: folder / "finetune_model" for folder in root.iterdir() if folder.name != "model"}


def _zero(stage: int) -> str:
    return json.dumps({"zero_optimization": {"stage": stage}})


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _require_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    import torch

    assert found.keys() >= wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "resumed"])
def test_every_stage_trains_the_same_weights(trained: dict[str, Path], name: str) -> None:
    """As DDP has them, in a whole checkpoint; also when the second epoch goes on from a checkpoint of the first."""
    _require_equal(_weights(trained[name] / "final"), _weights(trained["ddp"] / "final"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_epoch_is_a_checkpoint_of_deepspeed(trained: dict[str, Path], stage: int) -> None:
    """zero_to_fp32 reads it by its tag: the weights of the last epoch are the trained ones."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = trained[f"zero{stage}"]
    read = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="Epoch-2")
    _require_equal(read, _weights(folder / "final"))
    assert (folder / "latest").read_text() == "Epoch-2"
    assert (folder / "Epoch-1").is_dir()
    assert not [*folder.glob("*.py"), *folder.glob(".*")]


def test_the_documents_configuration_trains(trained: dict[str, Path]) -> None:
    """Its learning rate and bf16 are used, its offload is left out on a CPU, its event files lie in the job's folder."""
    import torch

    folder = trained["document"]
    assert {tensor.dtype for tensor in _weights(folder / "final").values()} == {torch.bfloat16}
    logging = folder.parent / "logging"
    lines = [json.loads(line) for line in (logging / "metrics.jsonl").read_text().splitlines()]
    assert 0 < max(line["learning_rate"] for line in lines) <= 1e-8
    assert list(logging.glob("deepspeed/**/events.out.*"))


def test_a_scheduler_of_the_configuration_is_used(trained: dict[str, Path]) -> None:
    """Though its steps are not those of the job, which Trainer by itself would refuse."""
    lines = (trained["scheduled"].parent / "logging" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == sorted(rates)
    assert 0 < rates[-1] < 1e-4  # on its way to 1e-3 in 100 steps


def test_one_rank_alone_trains_with_deepspeed(tmp_path: Path) -> None:
    """As on one GPU that is too small without; no environment of a group is needed."""
    model = str(models.language_model(tmp_path / "model"))
    plan = ranks.job(
        tmp_path / "job", TEXTS, model=model, parameters={**PARAMETERS, "max_steps": 2}, deepspeed=_zero(2)
    )
    assert ranks.train([plan], 1) == [""]
    assert (tmp_path / "job/finetune_model/final/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"bf16": {"enabled": true},}', "line 1, column 28"),
        ("{'bf16': {}}", "line 1, column 2"),
        ("", "line 1, column 1"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "nested"),
        ('{"a": 1, "a": 2}', "a stands twice"),
        ('{"zero_optimisation": {}}', 'Did you mean "zero_optimization"?'),
        ('{"gradient_acumulation_steps": 2}', 'Did you mean "gradient_accumulation_steps"?'),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stge": 3}}', 'Did you mean "stage"?'),
        ('{"zero_optimization": {"no_such_thing": 3}}', "zero_optimization.no_such_thing is unknown"),
        ('{"zero_optimization": 3}', "zero_optimization must be an object"),
        ('{"optimizer": null}', "optimizer must be an object"),
        ('{"train_micro_batch_size_per_gpu": 0}', "must be a whole number from 1"),
        ('{"train_batch_size": 1e999}', "must be a whole number from 1"),
        ('{"gradient_clipping": NaN}', "must be a number from 0"),
        ('{"optimizer": {"params": {"lr": 1}}}', "optimizer has no type"),
        ('{"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}', "two numbers"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "exclude each other"),
    ],
)
def test_a_wrong_configuration_is_an_error_at_its_place(text: str, told: str) -> None:
    """Line and column of bad JSON, the key of a bad value."""
    with pytest.raises(UserError) as caught:
        check_deepspeed(text)
    assert caught.value.code in ("deepspeed_json", "deepspeed_config")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text", [PRETRAIN, "{}", '{"train_batch_size": "auto", "my_own": 1, "scheduler": {"type": "WarmupLR"}}']
)
def test_a_right_configuration_passes(text: str) -> None:
    """Also what only DeepSpeed understands."""
    check_deepspeed(text)


def test_the_keys_of_zero_are_those_of_the_installed_deepspeed() -> None:
    """DeepSpeed refuses others; a release that has new ones must not be held back by our list."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} <= ZERO


def test_checking_imports_nothing_heavy() -> None:
    """A statement is refused in milliseconds."""
    heavy = "'torch', 'transformers', 'accelerate', 'deepspeed', 'ray'"
    code = f"import sys; from runtime.training.strategies import check_deepspeed; check_deepspeed('{{}}'); print([m for m in ({heavy}) if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("config", "parameters", "wanted"),
    [
        ({}, {}, (16, 4, 2)),
        ({"train_micro_batch_size_per_gpu": 3}, {}, (12, 3, 2)),
        ({"train_batch_size": 8}, {}, (8, 4, 1)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, {}, (24, 4, 3)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}, {}, (24, 2, 6)),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}, {}, (16, 4, 2)),
    ],
)
def test_batch_sizes_follow_from_what_is_said(
    config: dict[str, Any], parameters: dict[str, Any], wanted: tuple[int, int, int]
) -> None:
    """All of a step = of a rank × accumulation × ranks; the parameters say what the configuration does not."""
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **parameters}
    settled = settle(json.dumps(config), parameters, defaults, ranks=2, on_gpu=True, logging="")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(settled.config[key] for key in keys) == wanted
    assert settled.parameters["per_device_train_batch_size"] == wanted[1]
    assert settled.parameters["gradient_accumulation_steps"] == wanted[2]


@pytest.mark.parametrize(
    ("config", "said", "code"),
    [
        ({"train_batch_size": 7}, {}, "deepspeed_config"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, {}, "deepspeed_config"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-8}}}, {"learning_rate": 1e-4}, "deepspeed_contradiction"),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": 2.0}, "deepspeed_contradiction"),
    ],
)
def test_what_does_not_go_together_is_an_error(config: dict[str, Any], said: dict[str, Any], code: str) -> None:
    """Batch sizes that do not divide, and a parameter that says something else."""
    with pytest.raises(UserError) as caught:
        settle(json.dumps(config), said, said, ranks=2, on_gpu=True, logging="")
    assert caught.value.code == code


def test_on_a_gpu_the_configuration_stays_as_it_is() -> None:
    """Only what it leaves open is filled in; on a CPU each thing that is left out is told."""
    on_gpu = settle(PRETRAIN, {}, {}, ranks=12, on_gpu=True, logging="/logs")
    said = json.loads(PRETRAIN)
    assert said["zero_optimization"].items() <= on_gpu.config["zero_optimization"].items()
    assert on_gpu.config["optimizer"] == said["optimizer"]
    assert not on_gpu.notices
    on_cpu = settle(PRETRAIN, {}, {}, ranks=12, on_gpu=False, logging="/logs")
    assert "offload_param" not in on_cpu.config["zero_optimization"]
    assert any("offload_optimizer, offload_param" in notice for notice in on_cpu.notices)


@pytest.mark.parametrize(
    ("parameters", "deepspeed", "ranks_", "wanted"),
    [
        ({}, "", 1, "single"),
        ({}, "", 2, "ddp"),
        ({}, "{}", 1, "deepspeed"),
        ({"strategy": "deepspeed"}, "{}", 2, "deepspeed"),
        ({"strategy": "fsdp"}, "", 2, "fsdp"),
        ({"strategy": "fsdp"}, "", 1, "single"),
        ({"fsdp": "full_shard"}, "", 2, "fsdp"),
        ({"strategy": "ddp"}, "{}", 2, None),
        ({"strategy": "deepspeed"}, "", 2, None),
    ],
)
def test_the_strategy_follows_from_what_is_said(
    parameters: dict[str, Any], deepspeed: str, ranks_: int, wanted: str | None
) -> None:
    """A deepspeedConfig means DeepSpeed; two things at once are an error."""
    plan = TrainingPlan("", "sfft", parameters=parameters, deepspeed=deepspeed, ranks=ranks_)
    if wanted:
        assert strategy_of(plan) == wanted
    else:
        with pytest.raises(UserError):
            strategy_of(plan)
