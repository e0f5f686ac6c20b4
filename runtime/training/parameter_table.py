"""The table of training parameters: every name that `config` and `sft.… / sfft.…` may hold, declared once.

It stands alone because it is data, and without torch or transformers: a statement with a misspelt parameter fails
before anything heavy is imported. A test holds the names against the installed transformers and peft.
"""

# ruff: noqa: E501 - a table reads best with one parameter on one line

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["int", "float", "bool", "text", "list", "dict"]
Group: TypeAlias = Literal["job", "trainer", "lora", "model"]
Recipe: TypeAlias = Literal["lora", "full", "continued", "new"]
"""sft with LoRA; sft of all weights; sfft that goes on from a checkpoint; sfft from a configuration alone."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    Attributes:
        name: as it is called once it is checked: the field's name in transformers or peft where there is one.
        kinds: types that its value may have; the first that fits counts.
        group: who takes it: this package, TrainingArguments, LoraConfig or LlamaConfig of a new model.
        aliases: other words for the same, of Byzer-LLM, Anyscale and peft.
        minimum: least number allowed; `above` = it must be greater than it.
    """

    name: str
    kinds: tuple[Kind, ...]
    group: Group
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: bool = False


def _plain(group: Group, kind: Kind, names: str, minimum: float | None = None) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, (kind,), group, minimum=minimum) for name in names.split())


JOB = (
    Parameter("max_seq_length", ("int",), "job", ("max_length", "context_length", "max_seq_len", "cutoff_len"), minimum=2),
    Parameter("packing", ("bool",), "job"),
    Parameter("padding", ("text",), "job", choices=("longest", "max_length")),
    Parameter("finetuning_type", ("text",), "job", choices=("lora", "full")),
    Parameter("strategy", ("text",), "job", choices=("auto", "ddp", "fsdp", "deepspeed")),
    Parameter("steps_per_epoch", ("int",), "job", minimum=1),
    Parameter("min_update_steps", ("int",), "job", minimum=1),
    Parameter("tokenizer_path", ("text",), "job"),
    Parameter("vocab_size", ("int",), "job", minimum=2),
    Parameter("dtype", ("text",), "job", ("torch_dtype",), choices=("float32", "bfloat16", "float16")),
    Parameter("attn_implementation", ("text",), "job", choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")),
)  # fmt: skip

_INTERVALS = ("no", "steps", "epoch")
_SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip

TRAINER = (
    Parameter("num_train_epochs", ("float",), "trainer", ("epochs", "epoches", "num_epochs"), minimum=0, above=True),
    Parameter("max_steps", ("int",), "trainer", minimum=1),
    Parameter("per_device_train_batch_size", ("int",), "trainer", ("train_batch_size_per_device", "train_batch_size", "batch_size"), minimum=1),
    Parameter("per_device_eval_batch_size", ("int",), "trainer", ("eval_batch_size_per_device", "eval_batch_size"), minimum=1),
    Parameter("gradient_accumulation_steps", ("int",), "trainer", minimum=1),
    Parameter("learning_rate", ("float",), "trainer", ("lr",), minimum=0),
    Parameter("lr_scheduler_type", ("text",), "trainer", choices=_SCHEDULES),
    Parameter("warmup_steps", ("float",), "trainer", ("num_warmup_steps", "warmup_ratio"), minimum=0),
    Parameter("optim", ("text",), "trainer"),
    Parameter("optim_target_modules", ("list", "text"), "trainer"),
    Parameter("max_grad_norm", ("float",), "trainer", minimum=0),
    Parameter("label_smoothing_factor", ("float",), "trainer", minimum=0, maximum=1),
    Parameter("logging_strategy", ("text",), "trainer", choices=_INTERVALS),
    Parameter("logging_steps", ("float",), "trainer", minimum=0, above=True),
    Parameter("eval_strategy", ("text",), "trainer", ("evaluation_strategy",), choices=_INTERVALS),
    Parameter("eval_steps", ("float",), "trainer", minimum=0, above=True),
    Parameter("save_strategy", ("text",), "trainer", choices=_INTERVALS),
    Parameter("save_steps", ("float",), "trainer", minimum=0, above=True),
    Parameter("save_total_limit", ("int",), "trainer", ("num_checkpoints_to_keep", "max_num_checkpoints"), minimum=1),
    Parameter("gradient_checkpointing", ("bool",), "trainer"),
    Parameter("train_sampling_strategy", ("text",), "trainer", choices=("random", "sequential", "group_by_length")),
    Parameter("fsdp", ("bool", "text"), "trainer"),
    *_plain("trainer", "dict", "lr_scheduler_kwargs gradient_checkpointing_kwargs liger_kernel_config fsdp_config"),
    *_plain("trainer", "text", "optim_args torch_compile_backend torch_compile_mode ddp_backend"),
    *_plain("trainer", "bool", "bf16 fp16 bf16_full_eval fp16_full_eval tf32 torch_compile use_liger_kernel"),
    *_plain("trainer", "bool", "auto_find_batch_size logging_first_step eval_on_start load_best_model_at_end full_determinism use_cpu"),
    *_plain("trainer", "bool", "average_tokens_across_devices dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers"),
    *_plain("trainer", "bool", "ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph"),
    *_plain("trainer", "float", "weight_decay adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha eval_delay", 0),
    *_plain("trainer", "int", "seed data_seed dataloader_num_workers", 0),
    *_plain("trainer", "int", "eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout", 1),
)  # fmt: skip

LORA = (
    Parameter("lora_rank", ("int",), "lora", ("r", "lora_r"), minimum=1),
    Parameter("lora_alpha", ("int",), "lora", minimum=1),
    Parameter("lora_dropout", ("float",), "lora", minimum=0, maximum=1),
    Parameter("target_modules", ("list", "text"), "lora", ("lora_target", "lora_target_modules")),
    Parameter("exclude_modules", ("list", "text"), "lora"),
    Parameter("bias", ("text",), "lora", choices=("none", "all", "lora_only")),
    Parameter("init_lora_weights", ("bool", "text"), "lora", choices=("gaussian", "orthogonal")),
    Parameter("layers_to_transform", ("list", "int"), "lora"),
    Parameter("layers_pattern", ("list", "text"), "lora"),
    Parameter("trainable_token_indices", ("list", "dict"), "lora"),
    *_plain("lora", "list", "modules_to_save target_parameters alora_invocation_tokens layer_replication"),
    *_plain("lora", "dict", "rank_pattern alpha_pattern"),
    *_plain("lora", "bool", "use_rslora use_dora lora_bias ensure_weight_tying fan_in_fan_out"),
)  # fmt: skip

MODEL = (
    *_plain("model", "int", "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings", 1),
    *_plain("model", "float", "initializer_range rms_norm_eps rope_theta attention_dropout", 0),
    *_plain("model", "bool", "tie_word_embeddings attention_bias mlp_bias"),
    *_plain("model", "text", "hidden_act"),
    *_plain("model", "dict", "rope_parameters"),
)  # fmt: skip

TABLE: tuple[Parameter, ...] = (*JOB, *TRAINER, *LORA, *MODEL)

MEANINGLESS: dict[str, str] = {
    "setup_nccl_socket_ifname_by_ip": "torch and Ray find the network interface",
    "model_type": "the checkpoint says what it is",
    "task": "the form of the rows says what is trained",
    "data_dir": "rows come from the table",
    "skip_copy_pretrained_model": "the base model is linked, not copied",
    "output_dir": "the job has a folder of its own",
    "logging_dir": "the job has a folder of its own",
    "overwrite_output_dir": "the job has a folder of its own",
    "run_name": "the job has a name of its own",
    "report_to": "TensorBoard's files are always written",
    "disable_tqdm": "progress stands in the job's status",
    "remove_unused_columns": "columns are found from their names",
    "dataloader_in_order": "rows always come in order",
    "do_train": "the statement says so",
    "do_eval": "validTable says so",
}
"""Keys of other systems that are accepted and change nothing, and why."""

DEFAULTS: dict[str, dict[Recipe, Any]] = {
    # What is not here has the default of transformers or peft. Chosen so that a table of some hundred rows already
    # learns; Byzer-LLM's own (rank 64, 3,000 steps of warm-up, a log line each 300 steps) are made for large ones.
    "num_train_epochs":            {"lora": 3,        "full": 3,        "continued": 1,        "new": 1},
    "per_device_train_batch_size": {"lora": 8,        "full": 8,        "continued": 8,        "new": 8},
    "learning_rate":               {"lora": 2e-4,     "full": 2e-5,     "continued": 5e-5,     "new": 1e-3},
    "lr_scheduler_type":           {"lora": "cosine", "full": "cosine", "continued": "cosine", "new": "cosine"},
    "warmup_steps":                {"lora": 0.03,     "full": 0.03,     "continued": 0.03,     "new": 0.05},  # below 1: share of all
    "weight_decay":                {"lora": 0.0,      "full": 0.0,      "continued": 0.1,      "new": 0.1},
    "max_seq_length":              {"lora": 1024,     "full": 1024,     "continued": 1024,     "new": 1024},  # and no more than the model reads
    "packing":                     {"lora": False,    "full": False,    "continued": True,     "new": True},
    "save_total_limit":            {"lora": 2,        "full": 2,        "continued": 2,        "new": 2},     # the newest and the best
    "lora_rank":                   {"lora": 16},
    "lora_alpha":                  {"lora": 32},
    "lora_dropout":                {"lora": 0.05},
    "target_modules":              {"lora": "all-linear"},
    "hidden_size":                 {"new": 256},
    "intermediate_size":           {"new": 688},
    "num_hidden_layers":           {"new": 4},
    "num_attention_heads":         {"new": 4},
    "tie_word_embeddings":         {"new": True},
    "vocab_size":                  {"new": 4096},  # of a tokenizer that is trained from the table
}  # fmt: skip
"""Defaults by recipe."""
