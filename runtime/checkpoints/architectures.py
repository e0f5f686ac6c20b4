"""Which architectures the installed transformers can run, and for which task.

Alone because it reads transformers' own tables as text: importing transformers takes seconds, and a folder must be
judged in milliseconds, also where neither torch nor transformers is wanted.
"""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec
from pathlib import Path

from runtime.errors import UserError, did_you_mean
from runtime.spec import Task

_TABLES = {
    "generate": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classify": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
    "see": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
_MEDIA = {  # those that an engine here knows how to ask
    "WhisperForConditionalGeneration": Task.TRANSCRIBE,
    "VitsModel": Task.SPEAK,
    "BarkModel": Task.SPEAK,
}


@functools.cache
def _table(kind: str) -> dict[str, str]:
    """model_type -> class name, from the file of the installed transformers; {} when its form has changed."""
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return {}
    file = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    _, _, after = text.partition(f"\n{_TABLES[kind]} = OrderedDict(")
    return dict(re.findall(r'\("([\w.-]+)", "(\w+)"\)', after.partition("\n)\n")[0]))


@functools.cache
def _task_of() -> dict[str, Task]:
    """Class name -> task."""
    generate, masked, base = _table("generate"), _table("masked"), _table("base")
    readers = [base[kind] for kind in (*generate, *masked) if kind in base]
    return {
        **dict.fromkeys((*readers, *masked.values()), Task.EMBED),
        **dict.fromkeys(_table("classify").values(), Task.CLASSIFY),
        **dict.fromkeys((*generate.values(), *_table("see").values()), Task.GENERATE),
        **_MEDIA,
    }


def reads_images(architectures: tuple[str, ...]) -> bool:
    """Whether a model of these architectures reads images beside the text."""
    return not {*_table("see").values()}.isdisjoint(architectures)


def reads_text_alone(architectures: tuple[str, ...]) -> bool:
    """Whether transformers runs it as a language model, whatever else it reads."""
    return not {*_table("generate").values()}.isdisjoint(architectures)


def task_of(architectures: tuple[str, ...], model_type: str, folder: Path) -> Task:
    """The task of a checkpoint with these architectures.

    Raises:
        UserError: checkpoint_unsupported, with the nearest supported name.
    """
    tasks = _task_of()
    for architecture in architectures:
        if architecture in tasks:
            return tasks[architecture]
    known_types = {*_table("generate"), *_table("masked"), *_table("classify"), *_table("see")}
    if not architectures:
        what, near = f'the model type "{model_type}" without architectures', None
    elif model_type not in known_types:
        what, near = f'the model type "{model_type}"', did_you_mean(model_type, known_types)
    else:
        what, near = f'the architecture "{architectures[0]}"', did_you_mean(architectures[0], tasks)
    raise UserError(
        f'"{folder}/config.json" names {what}, which no installed engine can run.',
        code="checkpoint_unsupported",
        hint=(f'Did you mean "{near}"? ' if near else "")
        + "Text generation (…ForCausalLM), encoders (…Model, …ForMaskedLM, sentence-transformers), "
        "…ForSequenceClassification, image-text-to-text, Whisper, VITS and Bark of the installed transformers can be "
        "deployed, and text to image pipelines of diffusers.",
    )
