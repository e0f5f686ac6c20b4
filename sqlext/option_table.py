"""The option table: every setting, every action and every option of each, declared once.

It stands alone because it is data: `options` checks what was typed against it, `!llm help` and REFERENCE.md show it.
Names are matched without regard to case and underscores, so `udfName`, `udfname` and `udf_name` are one name; only
different words are aliases.
"""

# ruff: noqa: E501 - a table reads best with one option on one line

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from runtime.spec import Value

Kind: TypeAlias = Literal["text", "int", "float", "bool", "list", "json", "auto"]

SETUP = "setup"
REPARTITION = "TableRepartition"
DEFAULT_ACTION = "finetune"


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option.

    Attributes:
        name: as it is called in `Resolved.values`; one that ends in `.*` stands for all keys with that prefix.
        kind: type of the value; 'list' is JSON or comma-separated, 'json' stays text but must be JSON, 'auto' takes
            numbers, true, false and lists for what they look like.
        doc: one line, with the unit.
        scopes: 'setup', names of actions, or 'TableRepartition'.
        default: what counts when nothing is said; None = not set.
        choices: the only values allowed, whatever their case; empty = all.
        spellings: other spellings of choices, and what they mean.
        ignored: why this old key has no meaning here; it is accepted with a notice.
        secret: the value is a key or a reference to one.
        planned: not yet available; giving it is an error that says so.
    """

    name: str
    kind: Kind
    doc: str
    scopes: tuple[str, ...]
    default: Value | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    ignored: str = ""
    secret: bool = False
    planned: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """An action of ``RUN … AS LLM.``; `available` is False while it is only planned."""

    name: str
    doc: str
    available: bool = False


ACTIONS = (
    Action("infer", "Deploy a model on Ray workers and register it as SQL functions.", available=True),
    Action(
        "finetune",
        "Train: sft/… LoRA, QLoRA or full SFT; sfft/… full-parameter training or pretraining.",
        available=True,
    ),
    Action(
        "convert",
        "Convert a checkpoint: ZeRO or FSDP to Hugging Face, safetensors or bin, dtype, GGUF.",
        available=True,
    ),
    Action("merge", "Merge a LoRA adapter and its base into one model.", available=True),
    Action("benchmark", "Load test of deployed functions or of an HTTP endpoint.", available=True),
    Action(
        "inspect", "What a checkpoint is, which engines can run it here, and the memory each needs.", available=True
    ),
    Action("render", "What a table of messages becomes under a chat template or prompt_format.", available=True),
    Action(
        "import",
        "Copy a checkpoint into the model store: checked, retried, resumable, several at once.",
        available=True,
    ),
    Action("bundle", "Several deployed models behind one function name, with routing."),
    Action("serve", "An OpenAI-compatible endpoint over deployed models."),
)

PRESETS: dict[str, dict[str, Value | None]] = {
    "single": {},
    "sft": {},
    "sfft": {},
    "data": {"gpus_per_worker": 0.0},
    "retrieval": {"gpus_per_worker": 0.0},
}
"""What each `!llm setup` preset changes of the defaults."""

_S = (SETUP,)
_INFER = ("infer",)
_TRAIN = ("finetune",)
_BENCH = ("benchmark",)
_MAKE = ("convert", "merge")
_EVERY_ACTION = tuple(action.name for action in ACTIONS)

SETTINGS = (
    OptionSpec("num_workers", "int", "Workers of a model, each with one copy of it.", _S, 1, ("maxConcurrency",), minimum=1),
    OptionSpec("worker_concurrency", "int", "Batches that one worker runs at the same time; not set: 1, and 32 for remote models.", _S, None, ("workerMaxConcurrency",), minimum=1),
    OptionSpec("gpus_per_worker", "float", "GPUs of one worker, fractions allowed; not set: one when the cluster has any.", _S, None, ("num_gpus",), minimum=0),
    OptionSpec("cpus_per_worker", "float", "CPUs that one worker reserves; rounded down, but at least 1, its number of threads.", _S, 0.5, ("num_cpus",), minimum=0),
    OptionSpec("infer_backend", "text", "Engine that runs models; auto: by the checkpoint and the machine; transformers: by the checkpoint alone.", _S, "auto", spellings=(("ray/vllm", "vllm"), ("ray/deepspeed", "deepspeed"))),
    OptionSpec("load_balance", "text", "Which worker takes a batch: the least busy one, each in turn, or the least busy one with rows that begin like its last ones.", _S, "lru", choices=("lru", "round_robin", "prefix")),
    OptionSpec("timeout", "float", "Seconds that a batch may take before its worker counts as hung.", _S, 600.0, minimum=0.001),
    OptionSpec("load_timeout", "float", "Seconds that a worker may take to load its model.", _S, 600.0, ("modelWaitServerReadyTimeout",), minimum=0.001),
    OptionSpec("idle_timeout", "float", "Seconds without a batch after which a worker gives its memory back; the next call loads the model again; not set: never.", _S, minimum=0.001),
    OptionSpec("ray_address", "text", "Ray cluster: auto, local or host:port; not set: one inside this process.", _S),
    OptionSpec("resource.*", "float", "Amount of a Ray custom resource that each worker takes, to place it on certain nodes.", _S, minimum=0),
    OptionSpec("standalone", "bool", "Byzer's way of handing out weights.", _S, ignored="each worker always reads the checkpoint itself"),
    OptionSpec("on_error", "text", "A failed row: listed and NULL, NULL, or the statement fails.", _S, "record", choices=("record", "null", "fail")),
    OptionSpec("max_rows", "int", "Most rows that a statement may send to models.", _S, minimum=0),
    OptionSpec("max_tokens_total", "int", "Most tokens that a statement may use, of prompts and answers together.", _S, minimum=0),
    OptionSpec("max_seconds", "float", "Most seconds that a statement may wait for models.", _S, minimum=0),
    OptionSpec("session.max_rows", "int", "As max_rows, for all statements of the session together.", _S, minimum=0),
    OptionSpec("session.max_tokens_total", "int", "As max_tokens_total, for all statements of the session together.", _S, minimum=0),
    OptionSpec("session.max_seconds", "float", "As max_seconds, for all statements of the session together.", _S, minimum=0),
    OptionSpec("attempts", "int", "How often a row is tried whose failure may pass.", _S, 5, minimum=1),
    OptionSpec("row_timeout", "float", "Seconds from a row's first attempt in which it may be tried again.", _S, 120.0, minimum=0),
    OptionSpec("cache", "text", "Stored answers: used and kept, neither, or only used.", _S, "on", choices=("on", "off", "read")),
    OptionSpec("cache_max_mb", "int", "Size of the result store; the oldest answers go first.", _S, 10_240, minimum=1),
    OptionSpec("cache_max_days", "float", "Days after which a stored answer is not used any more.", _S, minimum=0),
    OptionSpec("owner", "text", "Byzer's owner of models.", _S, ignored="models belong to the cluster"),
    OptionSpec("pythonExec", "text", "Byzer's Python command.", _S, ignored="models run in the Python of this process"),
    OptionSpec("runIn", "text", "Byzer's place of a Python task.", _S, ignored="work always runs on Ray workers"),
    OptionSpec("dataMode", "text", "Byzer's way of passing data.", _S, ignored="data always passes as Arrow"),
    OptionSpec("schema", "text", "Byzer's result schema.", _S, ignored="results have types of their own"),
    OptionSpec("masterMaxConcurrency", "int", "Byzer's bound of its master actor.", _S, ignored="there is no master actor"),
)  # fmt: skip

_TYPED: tuple[tuple[str, Kind], ...] = (
    ("int", "int"), ("float", "float"), ("bool", "bool"), ("str", "text"), ("list", "list"), ("dict", "json"),
)  # fmt: skip
_TEMPLATE = 'Chat format as JSON: {"system": "…{instruction}…", "user": …, "assistant": …}.'

INFER = (
    OptionSpec("udfName", "text", "Name of the SQL function; required. To benchmark, several with commas between them.", (*_INFER, "benchmark", "bundle")),
    OptionSpec("localModelDir", "text", "Folder of the checkpoint; the path in backquotes means the same.", (*_INFER, *_TRAIN, "inspect", "render", "import"), aliases=("model_id",)),
    OptionSpec("pretrainedModelType", "text", "Kind of model, such as custom/auto, custom/bge, sft/llama2, saas/openai.", (*_INFER, *_TRAIN, "convert", "merge")),
    OptionSpec("reconnect", "bool", "Register the functions of a running deployment again, without loading.", _INFER, False),
    OptionSpec("adapter", "text", "Folder of a LoRA adapter to put on the model.", _INFER),
    OptionSpec("base", "text", "Name of a deployed model whose workers answer, with the adapter on it; nothing is loaded twice.", _INFER),
    OptionSpec("quantization", "text", "Bits of quantized weights; true means 4.", (*_INFER, *_TRAIN), aliases=("quatization",), choices=("4", "8", "true", "false")),
    OptionSpec("prompt_format", "json", _TEMPLATE, (*_INFER, *_TRAIN, "render")),
    OptionSpec("backend.*", "auto", "Option of the engine, such as backend.max_model_len or backend.dtype.", _INFER),
    OptionSpec("generation.*", "auto", "Default of the function's named options, such as generation.temperature.", _INFER, aliases=("gen.*",)),
    OptionSpec("saas.api_key", "text", "Key of the provider, by reference: env:NAME or file:PATH.", (*_INFER, *_BENCH), secret=True),
    OptionSpec("saas.base_url", "text", "Address of an OpenAI-compatible service, mostly up to /v1; not set: OpenAI's.", _INFER, aliases=("saas.api_base",)),
    OptionSpec("saas.model", "text", "Model, by the name its provider gives it; required for remote models.", (*_INFER, *_BENCH)),
    OptionSpec("saas.task", "text", "What a remote model does; not set: embed when its name says so, else generate.", _INFER, choices=("generate", "embed"), spellings=(("chat", "generate"), ("embedding", "embed"))),
    OptionSpec("saas.timeout", "float", "Seconds that one request may take.", _INFER, 120.0, aliases=("saas.request_timeout",), minimum=0.001),
    OptionSpec("saas.concurrency", "int", "Requests that one worker has in flight at the same time.", _INFER, 64, minimum=1, maximum=1000),
    OptionSpec("saas.max_tokens_name", "text", "How the provider calls max_tokens; not set: max_completion_tokens at OpenAI, else max_tokens.", _INFER, choices=("max_tokens", "max_completion_tokens")),
    OptionSpec("saas.secret_key", "text", "Second key of the provider, by reference.", _INFER, secret=True, planned=True),
    OptionSpec("saas.api_secret", "text", "Second key of the provider, by reference.", _INFER, secret=True, planned=True),
    OptionSpec("saas.gpt_url", "text", "Address of the provider's service.", _INFER, aliases=("gpt_url",), planned=True),
    OptionSpec("saas.*", "text", "Other option of a provider's model.", _INFER),
)  # fmt: skip

FINETUNE = (
    OptionSpec("inputTable", "text", "Table of the rows to work on.", (*_TRAIN, "benchmark", "render")),
    OptionSpec("validTable", "text", "Table of the rows to evaluate on.", _TRAIN),
    OptionSpec("outputTable", "text", "Table that tells of the trained model; made by who waits for the job.", _TRAIN),
    OptionSpec("initial_base_model_ckpt_path", "text", "Weights to start from, instead of the model's own: a folder, or an address such as s3://….", _TRAIN),
    OptionSpec("initial_adapter_model_ckpt_path", "text", "LoRA weights to start from: a folder, or an address.", _TRAIN),
    OptionSpec("localPathPrefix", "text", "Folder under which the job has its own; not set: $SQLEXT_JOBS, or ~/.local/share/sqlext/jobs.", (*_TRAIN, "infer")),
    OptionSpec("localDataDir", "text", "Folder of text files to pretrain on, instead of a table.", _TRAIN),
    OptionSpec("detached", "bool", "Answer when the job has begun; false: when it is over.", _TRAIN, True),
    OptionSpec("name", "text", "Name of the job; not set: its way and the time.", _TRAIN),
    OptionSpec("keepPartitionNum", "bool", "Each rank trains on one partition of the table, see TableRepartition; else rows are dealt out evenly.", _TRAIN, False),
    OptionSpec("config", "json", "Training parameters as one JSON object; sft.… and sfft.… win over it.", _TRAIN),
    OptionSpec("deepspeedConfig", "json", "DeepSpeed's configuration as JSON.", _TRAIN),
    *(
        OptionSpec(f"{way}.{typed}.*", kind, f"{typed.capitalize()} parameter of {what}.", _TRAIN)
        for way, what in (("sft", "fine-tuning"), ("sfft", "full-parameter training"))
        for typed, kind in _TYPED
    ),
)  # fmt: skip

CHECKPOINTS = (
    OptionSpec("modelNameOrPath", "text", "Folder of the base model; convert: of the model, the path in backquotes means the same.", _MAKE, aliases=("model_dir",)),
    OptionSpec("checkpointDir", "text", "Folder of the checkpoints of a training (DeepSpeed, FSDP); config.json and tokenizer come from modelNameOrPath.", ("convert",)),
    OptionSpec("tag", "text", "Which checkpoint of the folder, such as Epoch-1; not set: its latest, or the folder itself.", ("convert",)),
    OptionSpec("to", "text", "What to make of it: safetensors, bin, gguf; float32, float16, bfloat16; or a type of GGUF: f32, f16, q8_0, q5_1, q5_0, q4_1, q4_0.", ("convert",)),
    OptionSpec("dtype", "text", "Number type of the result; not set: the model's own.", _MAKE),
    OptionSpec("adapterNameOrPath", "text", "Folder of the LoRA adapter; the path in backquotes means the same.", ("merge",), aliases=("checkpoint_dir",)),
    OptionSpec("savePath", "text", "Folder for the result; for GGUF also a file.gguf.", _MAKE),
    OptionSpec("overwrite", "bool", "Replace the model that is at savePath.", _MAKE, False),
    OptionSpec("allow_pickle", "bool", "Read pickled weights (.bin) too, as numbers alone; only of what you trust.", _MAKE, False),
    OptionSpec("check", "bool", "Compare the logits of the result with those of the model it was made from, before it takes its place.", _MAKE, False),
    OptionSpec("hashes", "bool", "Read every file for its SHA-256.", ("inspect",), False),
    OptionSpec("paths", "list", "Folders of several checkpoints.", ("render",)),
    OptionSpec("chat_template", "text", "How conversations are written: a name such as chatml or llama3, auto (the checkpoint's own, or that of its family), a jinja text, or file:PATH.jinja.", (*_INFER, *_TRAIN, "render")),
    OptionSpec("messages", "text", "A conversation as JSON: [{\"role\": …, \"content\": …}, …], instead of a table.", ("render",)),
    OptionSpec("add_generation_prompt", "bool", "End each text with what asks for an answer.", ("render",), True),
    OptionSpec("config", "text", "YAML file that lists the checkpoints.", ("import",)),
    OptionSpec("name", "text", "Name of the model in the store; not set: the last part of its path.", ("import",)),
    OptionSpec("revision", "text", "Commit of a repository of the Hugging Face hub; the path is then owner/name.", ("import",)),
    OptionSpec("store", "text", "Model store: a folder or a URL such as s3://bucket/models; not set: $SQLEXT_MODELS, or ~/.local/share/sqlext/models.", ("import",)),
    OptionSpec("overwrite", "bool", "Replace another model of this name, and repair a damaged one.", ("import",), False),
    OptionSpec("retries", "int", "How often a failed copy is tried again.", ("import",), 3, minimum=0),
    OptionSpec("max_parallel_jobs", "int", "Checkpoints copied at the same time.", ("import",), 4, minimum=1),
)  # fmt: skip

BENCHMARK = (
    OptionSpec("mode", "text", "Where requests come from.", _BENCH, "synthetic", choices=("synthetic", "real_workload", "custom")),
    OptionSpec("url", "text", "Address of an OpenAI-compatible endpoint, instead of a function.", _BENCH),
    OptionSpec("num_concurrent_requests", "list", "Requests in flight; several numbers, several runs; not set: 10.", _BENCH),
    OptionSpec("num_requests", "int", "Requests in all.", _BENCH, 10, ("max_num_completed_requests",), minimum=1),
    OptionSpec("mean_input_tokens", "float", "Mean of the tokens of a prompt.", _BENCH, 550.0, ("num_input_tokens",), minimum=1),
    OptionSpec("stddev_input_tokens", "float", "Standard deviation of the tokens of a prompt.", _BENCH, 150.0, minimum=0),
    OptionSpec("mean_output_tokens", "float", "Mean of the tokens of an answer.", _BENCH, 150.0, ("num_output_tokens",), minimum=1),
    OptionSpec("stddev_output_tokens", "float", "Standard deviation of the tokens of an answer.", _BENCH, 80.0, minimum=0),
    OptionSpec("qps", "float", "Requests sent each second in real_workload.", _BENCH, 0.5, minimum=0.000001),
    OptionSpec("qps_distribution", "text", "Time between requests in real_workload.", _BENCH, "constant", choices=("constant", "uniform", "exponential")),
    OptionSpec("warmup", "bool", "Send a few requests first, not counted.", _BENCH, True),
    OptionSpec("timeout", "float", "Seconds after which no more requests are sent.", _BENCH, 600.0, minimum=0.001),
    OptionSpec("request_timeout", "float", "Seconds that one request may take.", _BENCH, 600.0, minimum=0.001),
    OptionSpec("sampling_params", "json", "Further fields of each request, as JSON.", _BENCH, aliases=("additional_sampling_params",)),
    OptionSpec("tokenizer", "text", "Folder of the tokenizer that prompts are measured with; not set: the function's checkpoint.", _BENCH),
    OptionSpec("max_tokens", "int", "Most tokens of an answer in mode custom.", _BENCH, minimum=1),
    OptionSpec("seed", "int", "Seed of the prompts and lengths.", _BENCH, 11111),
    OptionSpec("results_dir", "text", "Folder for the JSON files and the HTML report.", _BENCH),
)  # fmt: skip

SERVING = (
    OptionSpec("model_list", "list", "Functions behind the new one.", ("bundle",)),
    OptionSpec("router", "text", "How a call chooses among them.", ("bundle",)),
    OptionSpec("port", "int", "Port on the loopback address.", ("serve",), 8000, minimum=1, maximum=65535),
    OptionSpec("api_key", "text", "Token that clients send, by reference: env:NAME or file:PATH.", ("serve",), secret=True),
)  # fmt: skip

TABLES = (
    OptionSpec("partitionNum", "int", "Number of partitions; required.", (REPARTITION,), minimum=1),
    OptionSpec("partitionType", "text", "hash: the next row, or the next new value of partitionCols, goes to the next partition; range: parts of equal size one after the other, sorted by partitionCols.", (REPARTITION,), "hash", choices=("hash", "range")),
    OptionSpec("partitionCols", "list", "Columns whose equal values stay together (hash), or that rows are sorted by (range).", (REPARTITION,)),
    OptionSpec("shuffle", "bool", "false: rows stay in their order, as with range.", (REPARTITION,), True),
)  # fmt: skip

EVERYWHERE = (
    OptionSpec("action", "text", "What to do.", _EVERY_ACTION, DEFAULT_ACTION, choices=_EVERY_ACTION),
    OptionSpec("modelTable", "text", "Byzer's table of model bytes.", _EVERY_ACTION, choices=("command",), ignored="models are read from folders"),
    OptionSpec("model", "text", "Byzer's table of model bytes.", _EVERY_ACTION, choices=("command",), ignored="models are read from folders"),
    OptionSpec("debugMode", "bool", "Byzer's call log.", _EVERY_ACTION, ignored="!llm usage; tells the time of calls"),
)  # fmt: skip

TABLE: tuple[OptionSpec, ...] = (
    *SETTINGS, *EVERYWHERE, *INFER, *FINETUNE, *CHECKPOINTS, *BENCHMARK, *SERVING, *TABLES,
)  # fmt: skip
