"""The words of `pretrainedModelType`: Byzer's names of model kinds, and what each means here.

Alone because it is a table of old names: a checkpoint itself says what it is, the word only forces a task; a remote
model has no checkpoint, and the word says which engine asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import UserError, did_you_mean
from runtime.spec import Task

AUTO = "custom/auto"

_GENERATE = (
    *("llama", "llama2", "falcon", "moss", "alpha_moss", "dolly", "qwen", "mistral", "yi"),
    *("chatglm", "chatglm2", "chatglm3", "chatglm6b", "zephyr", "baichuan", "baichuan2", "starcode", "starcoder"),
)
_EMBED = ("bge", "m3e")
_TASKS = {
    **dict.fromkeys(_GENERATE, Task.GENERATE),
    **dict.fromkeys(_EMBED, Task.EMBED),
    "qwen_vl_chat": Task.GENERATE,
    "visualglm": Task.GENERATE,
    "bge_rerank": Task.RANK,
    "stable_diffusion": Task.DRAW,
    "whisper": Task.TRANSCRIBE,
    "bark": Task.SPEAK,
}
_SAAS = {"openai": "openai", "official_openai": "openai"}
_SAAS_LATER = (
    *("azure_openai", "qianfan", "zhipu", "minimax", "sparkdesk"),
    *("baichuan", "qianwen", "chatglm"),
)
_TRAINING = ("sft", "sfft", "deepspeed", "lora")


@dataclass(frozen=True, slots=True)
class ModelType:
    """What a word asks for.

    Attributes:
        task: None: whatever the model is made for.
        remote: the engine that asks a provider for the model; '' when there is a checkpoint.
    """

    task: Task | None = None
    remote: str = ""


def pretrained_model_type(word: str) -> ModelType:
    """The kind of model a `pretrainedModelType` asks for.

    Raises:
        UserError: model_type_unavailable for kinds that cannot be deployed yet, model_type_training for the words
            of training actions, model_type_unknown with the nearest word.
    """
    kind, _, name = word.strip().lower().rpartition("/")
    if kind in _TRAINING:
        raise UserError(
            f'pretrainedModelType="{word}" belongs to training, converting or merging, not to action="infer".',
            code="model_type_training",
            hint=f'To deploy a checkpoint, write pretrainedModelType="{AUTO}" or leave it out.',
        )
    if kind in ("", "custom"):
        if name == "auto":
            return ModelType()
        if name in _TASKS:
            return ModelType(_TASKS[name])
    if kind == "saas" and name in _SAAS:
        return ModelType(remote=_SAAS[name])
    if kind == "saas" and name in _SAAS_LATER:
        raise _unavailable(word, "models of this provider")
    raise _unknown(word, kind, name)


def _unavailable(word: str, what: str) -> UserError:
    return UserError(
        f'pretrainedModelType="{word}": {what} are not available yet.',
        code="model_type_unavailable",
        hint=f'Checkpoints can be deployed with pretrainedModelType="{AUTO}", and OpenAI-compatible services with '
        '"saas/openai".',
    )


def _unknown(word: str, kind: str, name: str) -> UserError:
    prefix = "saas" if kind and did_you_mean(kind, ("saas", "custom")) == "saas" else "custom"
    known = (*_SAAS, *_SAAS_LATER) if prefix == "saas" else ("auto", *_TASKS)
    near = did_you_mean(name, known)
    hint = f'Did you mean "{prefix}/{near}"?' if near else f'Write "{AUTO}": the checkpoint says what it is.'
    return UserError(f'There is no pretrainedModelType "{word}".', code="model_type_unknown", hint=hint)
