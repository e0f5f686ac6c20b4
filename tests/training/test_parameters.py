"""Training parameters: every name of the libraries is known or left out on purpose, and mistakes are told of early."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.training.parameter_table import DEFAULTS, TABLE
from runtime.training.parameters import meaningless, recipe, resolve, with_defaults
from runtime.training.plan import TrainingPlan, Way

NOT_OFFERED_OF_TRAINER = set(
    re.findall(
        r"\w+",
        """
    output_dir do_train do_eval do_predict resume_from_checkpoint restore_callback_states_from_checkpoint local_rank
    deepspeed parallelism_config accelerator_config debug enable_jit_checkpoint ignore_data_skip save_only_model
    save_on_each_node report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    log_level log_level_replica log_on_each_node disable_tqdm logging_nan_inf_filter include_num_input_tokens_seen
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    metric_for_best_model greater_is_better prediction_loss_only include_for_metrics batch_eval_metrics
    eval_do_concat_batches eval_use_gather_object label_names remove_unused_columns length_column_name
    dataloader_in_order dataloader_multiprocessing_context skip_memory_metrics use_cache
""",
    )
)
"""The job has its own way with these, or they have nothing to do with a language model's loss."""

NOT_OFFERED_OF_LORA = set(
    re.findall(
        r"\w+",
        """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config
    use_bdlora arrow_config kasa_config use_qalora qalora_group_size runtime_config
""",
    )
)
"""Set by the job, for other libraries, or in need of a preparation with data of their own."""


def names(group: str) -> set[str]:
    return {parameter.name for parameter in TABLE if parameter.group == group}


def test_every_field_of_training_arguments_is_offered_or_left_out_on_purpose() -> None:
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert names("trainer") | NOT_OFFERED_OF_TRAINER == fields
    assert not names("trainer") & NOT_OFFERED_OF_TRAINER


def test_every_field_of_lora_config_is_offered_or_left_out_on_purpose() -> None:
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names("lora") - {"lora_rank"} | {"r"} | NOT_OFFERED_OF_LORA == fields


def test_a_new_model_takes_the_fields_of_llama() -> None:
    from transformers import LlamaConfig

    known = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta"}
    assert names("model") <= known


def test_schedules_are_those_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType

    schedule = next(parameter for parameter in TABLE if parameter.name == "lr_scheduler_type")
    assert set(schedule.choices) == {kind.value for kind in SchedulerType}


def test_a_name_or_alias_means_one_parameter() -> None:
    spelled = [name.replace("_", "") for it in TABLE for name in (it.name, *it.aliases)]
    assert len(spelled) == len(set(spelled))


def test_every_default_is_a_value_that_could_be_said() -> None:
    for name, row in DEFAULTS.items():
        for kind, value in row.items():
            way: Way = "sft" if kind in ("lora", "full") else "sfft"
            if kind == "full" and name.startswith("lora"):
                continue
            assert resolve(way, {name: value}) == {name: value}


def test_checking_parameters_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from runtime.training.parameters import resolve; resolve('sft', {'epochs': 1});"
        "from runtime.training.loop import require_packages; require_packages();"
        "print([name for name in ('torch', 'transformers', 'peft', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("way", "said", "meant"),
    [
        ("sft", {"epoches": 2}, {"num_train_epochs": 2.0}),
        ("sft", {"maxSeqLength": "512"}, {"max_seq_length": 512}),
        ("sfft", {"max_length": 128, "setup_nccl_socket_ifname_by_ip": True}, {"max_seq_length": 128}),
        ("sft", {"full": "true"}, {"finetuning_type": "full"}),
        ("sft", {"train_batch_size_per_device": 4}, {"per_device_train_batch_size": 4}),
        ("sft", {"lora_config": {"r": 8, "lora_alpha": 16}}, {"lora_rank": 8, "lora_alpha": 16}),
        ("sft", {"target_modules": "q_proj, v_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
        ("sft", {"target_modules": '["q_proj"]'}, {"target_modules": ["q_proj"]}),
        ("sft", {"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
        ("sft", {"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
        ("sft", {"lr_scheduler_kwargs": '{"num_cycles": 2}'}, {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        ("sft", {"learning_rate": 1}, {"learning_rate": 1.0}),
        ("sft", {"logging_steps": 10.0, "seed": 7.0}, {"logging_steps": 10.0, "seed": 7}),
        ("sft", {"no_gradient_checkpoint": True}, {"gradient_checkpointing": False}),
        (
            "sft",
            {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 50}},
            {"save_strategy": "steps", "save_steps": 50.0, "eval_steps": 50.0},
        ),
        ("sfft", {"hidden_size": 64, "num_hidden_layers": 2}, {"hidden_size": 64, "num_hidden_layers": 2}),
        ("sft", {"skipCopyPretrainedModel": "true", "data_dir": "/x"}, {}),
    ],
)
def test_names_and_values_of_the_documents_mean_one_thing(
    way: Way, said: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert resolve(way, said) == meant


@pytest.mark.parametrize(
    ("way", "said", "code", "hint"),
    [
        ("sft", {"learning_rte": 1e-4}, "option_unknown", "learning_rate"),
        ("sft", {"lora_rnk": 8}, "option_unknown", "lora_rank"),
        ("sft", {"push_to_hub": True}, "option_unknown", "TrainingArguments"),
        ("sft", {"hidden_size": 64}, "option_unknown", "new model"),
        ("sfft", {"lora_rank": 8}, "option_unknown", "sft/"),
        ("sft", {"epochs": 1, "num_train_epochs": 2}, "option_duplicate", "Keep one"),
        ("sft", {"r": 8, "lora_config": {"lora_rank": 8}}, "option_duplicate", "Keep one"),
        ("sft", {"seed": "seven"}, "option_value", None),
        ("sft", {"seed": 1.5}, "option_value", None),
        ("sft", {"seed": True}, "option_value", None),
        ("sft", {"packing": 1}, "option_value", None),
        ("sft", {"learning_rate": float("nan")}, "option_value", None),
        ("sft", {"learning_rate": -1}, "option_value", "At least 0"),
        ("sft", {"num_train_epochs": 0}, "option_value", "More than 0"),
        ("sft", {"lora_dropout": 2}, "option_value", "At most 1"),
        ("sft", {"lr_scheduler_type": "cosin"}, "option_value", "cosine"),
        ("sft", {"init_lora_weights": "pissa"}, "option_value", "gaussian"),
        ("sft", {"rank_pattern": "[1]"}, "option_value", None),
        ("sft", {"full": True, "lora_rank": 8}, "option_value", "full"),
        ("sfft", {"full": False}, "option_value", "sft/"),
        ("sft", {"bf16": True, "fp16": True}, "option_value", "one of them"),
        ("sft", {"checkpoint_and_evaluation_frequency": {"unit": "days"}}, "option_value", None),
    ],
)
def test_a_mistake_is_told_with_the_nearest_right_thing(
    way: Way, said: dict[str, Any], code: str, hint: str | None
) -> None:
    with pytest.raises(UserError) as raised:
        resolve(way, said)
    assert raised.value.code == code
    assert hint is None or hint in (raised.value.hint or "")


def test_keys_without_meaning_are_told_with_the_reason() -> None:
    assert list(meaningless({"skipCopyPretrainedModel": True, "seed": 1})) == ["skipCopyPretrainedModel"]


def test_defaults_follow_from_what_is_trained() -> None:
    lora = TrainingPlan(folder="x", way="sft", model="m", parameters={"lora_rank": 4})
    full = TrainingPlan(folder="x", way="sft", model="m", parameters={"finetuning_type": "full"})
    assert [recipe(lora), recipe(full)] == ["lora", "full"]
    assert recipe(TrainingPlan(folder="x", way="sfft", model="m")) == "continued"
    assert recipe(TrainingPlan(folder="x", way="sfft")) == "new"
    assert with_defaults(lora)["lora_rank"] == 4
    assert with_defaults(lora)["learning_rate"] > with_defaults(full)["learning_rate"]
    assert "lora_rank" not in with_defaults(full)
