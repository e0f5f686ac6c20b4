"""Training parameters: what was said, checked against the one table, and what counts when nothing was said.

It stands alone because the SQL side checks parameters before anything starts, and every rank fills in the same
defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import UserError, did_you_mean
from runtime.training.parameter_table import DEFAULTS, MEANINGLESS, TABLE, Kind, Parameter, Recipe
from runtime.training.plan import TrainingPlan, Way


def _spelled(name: str) -> str:
    """A name without what does not count in it."""
    return name.lower().replace("_", "")


_BY_NAME = {_spelled(name): parameter for parameter in TABLE for name in (parameter.name, *parameter.aliases)}
_MEANINGLESS = {_spelled(name): why for name, why in MEANINGLESS.items()}
_FOLDED = (
    "lora_config",
    "full",
    "no_gradient_checkpoint",
    "flash_attention_2",
    "checkpoint_and_evaluation_frequency",
)


def resolve(way: Way, said: Mapping[str, Any]) -> dict[str, Any]:
    """Check parameters and give them their one name and type; only those that were said, and that have a meaning.

    Args:
        said: values by name as they were typed; numbers, lists and objects may also be texts.

    Raises:
        UserError: option_unknown with the nearest name, option_duplicate, option_value.
    """
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    for key, value in _unfolded(said).items():
        if _spelled(key) in _MEANINGLESS:
            continue
        parameter = _find(way, key)
        if parameter.name in named:
            raise UserError(
                f'"{key}" says again what "{named[parameter.name]}" says.',
                code="option_duplicate",
                hint="Keep one of them.",
            )
        named[parameter.name] = key
        values[parameter.name] = _checked(parameter, key, value)
    _refuse_contradictions(way, values)
    return values


def meaningless(said: Mapping[str, Any]) -> dict[str, str]:
    """The names that are accepted and change nothing, each with the reason."""
    return {key: why for key in said if (why := _MEANINGLESS.get(_spelled(key)))}


def recipe(plan: TrainingPlan) -> Recipe:
    """Which of the four ways of training the plan asks for."""
    if plan.way == "sft":
        return "full" if plan.parameters.get("finetuning_type") == "full" else "lora"
    return "continued" if plan.model else "new"


def with_defaults(plan: TrainingPlan) -> dict[str, Any]:
    """The plan's parameters, and the defaults of its recipe where nothing was said."""
    kind = recipe(plan)
    return {**{name: row[kind] for name, row in DEFAULTS.items() if kind in row}, **plan.parameters}


def keeps_best(parameters: Mapping[str, Any]) -> bool:
    """Whether the best checkpoint is to be kept, and known: evaluations and checkpoints can fall on the same steps.

    Args:
        parameters: with 'save_strategy' and 'eval_strategy'; one that is missing is like the other.
    """
    if parameters.get("load_best_model_at_end") is False:
        return False
    save, evaluate = parameters.get("save_strategy"), parameters.get("eval_strategy")
    return "no" not in (save, evaluate) and (save is None or evaluate is None or save == evaluate)


def of_group(parameters: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The parameters that one taker takes: 'job', 'trainer', 'lora' or 'model'."""
    names = {parameter.name for parameter in TABLE if parameter.group == group}
    return {name: value for name, value in parameters.items() if name in names}


def _unfolded(said: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that are made of others, or say the opposite of one, as those others."""
    plain: dict[str, Any] = {}
    for key, value in said.items():
        match _spelled(key):
            case "loraconfig":
                plain.update(_read("dict", key, value))
            case "full":
                plain["finetuning_type"] = "full" if _read("bool", key, value) else "lora"
            case "nogradientcheckpoint":
                plain["gradient_checkpointing"] = not _read("bool", key, value)
            case "flashattention2":
                plain["attn_implementation"] = "flash_attention_2" if _read("bool", key, value) else "sdpa"
            case "checkpointandevaluationfrequency":
                plain.update(_frequency(key, _read("dict", key, value)))
            case _:
                plain[key] = value
    return plain


def _frequency(key: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Anyscale's {"unit": "epochs", "frequency": 1} in the trainer's words."""
    match (said.get("unit"), said.get("frequency", 1)):
        case ("epochs", 1):
            return {"save_strategy": "epoch", "eval_strategy": "epoch"}
        case ("steps", int(steps)):
            return {"save_strategy": "steps", "save_steps": steps, "eval_steps": steps}
    raise _bad(key, 'takes {"unit": "epochs", "frequency": 1} or {"unit": "steps", "frequency": n}')


def _find(way: Way, key: str) -> Parameter:
    parameter = _BY_NAME.get(_spelled(key))
    if parameter is None:
        known = [*(name for it in TABLE for name in (it.name, *it.aliases)), *_FOLDED]
        near = did_you_mean(key, known)
        raise UserError(
            f'{way} has no parameter "{key}".',
            code="option_unknown",
            hint=f'Did you mean "{near}"?' if near else "Names are those of TrainingArguments and LoraConfig.",
        )
    foreign = {"sft": "model", "sfft": "lora"}[way]
    if parameter.group == foreign:
        raise UserError(
            f'{way} has no parameter "{key}".',
            code="option_unknown",
            hint="It shapes a new model: sfft without localModelDir."
            if way == "sft"
            else "sfft trains all weights; LoRA is sft/….",
        )
    return parameter


def _refuse_contradictions(way: Way, values: Mapping[str, Any]) -> None:
    if way == "sfft" and values.get("finetuning_type") == "lora":
        raise _bad("finetuning_type", "is full in sfft", "LoRA is sft/….")
    if values.get("finetuning_type") == "full" and (given := of_group(values, "lora")):
        raise _bad(next(iter(given)), "has no meaning when all weights are trained", "Leave it out, or full.")
    if values.get("bf16") and values.get("fp16"):
        raise _bad("fp16", "and bf16 exclude each other", "Keep one of them.")


def _checked(parameter: Parameter, key: str, said: Any) -> Any:
    """The value in the first of the parameter's types that it fits, within its choices and its range."""
    for kind in parameter.kinds:
        try:
            value = _READ[kind](said)
            break
        except (ValueError, TypeError, RecursionError):
            continue
    else:
        raise _bad(key, f"takes {' or '.join(_TYPES[kind] for kind in parameter.kinds)}")
    if isinstance(value, str) and parameter.choices:
        if (chosen := value.lower()) not in parameter.choices:
            near = did_you_mean(value, parameter.choices)
            hint = f'Did you mean "{near}"?' if near else f"Allowed: {', '.join(parameter.choices)}."
            raise _bad(key, "has no such value", hint)
        return chosen
    if isinstance(value, int | float) and not isinstance(value, bool):
        _require_range(parameter, key, value)
    return value


def _require_range(parameter: Parameter, key: str, value: float) -> None:
    low, high = parameter.minimum, parameter.maximum
    if low is not None and (value < low or (parameter.above and value == low)):
        raise _bad(key, "is out of range", f"{'More than' if parameter.above else 'At least'} {low:g}.")
    if high is not None and value > high:
        raise _bad(key, "is out of range", f"At most {high:g}.")


def _bad(key: str, why: str, hint: str | None = None) -> UserError:
    return UserError(f"{key} {why}.", code="option_value", hint=hint)


def _read(kind: Kind, key: str, said: Any) -> Any:
    try:
        return _READ[kind](said)
    except (ValueError, TypeError, RecursionError):
        raise _bad(key, f"takes {_TYPES[kind]}") from None


def _int(said: Any) -> int:
    if isinstance(said, bool) or (isinstance(said, float) and not said.is_integer()):
        raise ValueError
    return int(said)


def _float(said: Any) -> float:
    if isinstance(said, bool) or not math.isfinite(number := float(said)):
        raise ValueError
    return number


def _bool(said: Any) -> bool:
    if str(said).lower() not in ("true", "false"):
        raise ValueError
    return str(said).lower() == "true"


def _text(said: Any) -> str:
    if not isinstance(said, str):
        raise ValueError
    return said


def _list(said: Any) -> list[Any]:
    if isinstance(said, str) and "," in said and not said.lstrip().startswith("["):
        return [part.strip() for part in said.split(",")]
    found = json.loads(said) if isinstance(said, str) else said
    if not isinstance(found, list | tuple):
        raise ValueError
    return list(found)


def _dict(said: Any) -> dict[str, Any]:
    found = json.loads(said) if isinstance(said, str) else said
    if not isinstance(found, Mapping):
        raise ValueError
    return dict(found)


_READ: Mapping[Kind, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "text": _text,
    "list": _list,
    "dict": _dict,
}
_TYPES: Mapping[Kind, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "text": "a text",
    "list": "a list",
    "dict": "a JSON object",
}
