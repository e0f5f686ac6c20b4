"""Folders of diffusers: which pipeline they hold, of which parts, and whether it is safe to load.

Alone because such a folder has no config.json and no weights of its own: model_index.json names a class for the whole
and one for each part, and each part lies in a folder with its name. A class is imported by its name, so only those of
diffusers and transformers are let through.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from runtime.checkpoints.folder import read_object
from runtime.checkpoints.model_config import remote_code
from runtime.checkpoints.weights import check_file, is_pickled, main_dtype, pickled
from runtime.errors import UserError, did_you_mean

PIPELINE = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last: diffusers' own name for its safety checker


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a folder of diffusers holds.

    Attributes:
        kind: its class, such as StableDiffusionPipeline.
        parameters: numbers in the weights of all parts together.
        dtype: torch's name of the type that most of them have.
        vocab_size: of its first text encoder, where it says so.
    """

    kind: str
    parameters: int
    dtype: str
    vocab_size: int | None


@functools.cache
def _drawing_kinds() -> tuple[str, ...]:
    """The pipelines of the installed diffusers that draw a text; () where it is not installed or has another form."""
    package = find_spec("diffusers")
    if package is None or package.origin is None:
        return ()
    file = Path(package.origin).parent / "pipelines" / "auto_pipeline.py"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    _, _, after = text.partition("\nAUTO_TEXT2IMAGE_PIPELINES_MAPPING = OrderedDict(")
    return tuple(re.findall(r'\("[\w.-]+", (\w+)\)', after.partition("\n)\n")[0]))


def read_pipeline(folder: Path, files: tuple[str, ...]) -> Pipeline:
    """Check the pipeline in `folder`, whose files are `files`, and add up its weights' headers.

    Raises:
        UserError: checkpoint_config, checkpoint_unsupported, checkpoint_remote_code, checkpoint_pickled,
            checkpoint_no_weights, checkpoint_corrupt.
    """
    index = read_object(folder / PIPELINE)
    kind = str(index.get("_class_name", ""))
    _require_known(folder, kind)
    parts = {name: part for name, part in index.items() if _is_part(part)}
    for name, (library, _) in parts.items():
        if library not in LIBRARIES:
            raise remote_code(folder / PIPELINE, f"its part {name}")
    counted = [_weights_of(folder, name, files) for name in parts]
    total: dict[str, int] = {}
    for part in counted:
        for dtype, count in part.items():
            total[dtype] = total.get(dtype, 0) + count
    if not total:
        raise UserError(
            f'"{folder}" holds no weights in the folders of its parts.',
            code="checkpoint_no_weights",
            hint="Copy the checkpoint again with its *.safetensors files.",
        )
    return Pipeline(kind, sum(total.values()), main_dtype(total), _vocab_size(folder))


def _is_part(part: object) -> bool:
    """Whether an entry of model_index.json is a part that is there: [library, class]."""
    return isinstance(part, list) and len(part) == 2 and part[0] is not None


def _require_known(folder: Path, kind: str) -> None:
    known = _drawing_kinds()
    if kind in known or (not known and kind):  # diffusers itself says it where it is installed
        return
    near = did_you_mean(kind, known)
    raise UserError(
        f'"{folder}/{PIPELINE}" names the pipeline "{kind}", which does not draw a text.',
        code="checkpoint_unsupported",
        hint=(f'Did you mean "{near}"? ' if near else "")
        + "Text to image pipelines of the installed diffusers can be deployed.",
    )


def _weights_of(folder: Path, name: str, files: tuple[str, ...]) -> dict[str, int]:
    """Numbers per dtype in the weights of a part; {} for one without any, such as a scheduler."""
    own = [file for file in files if file.startswith(f"{name}/")]
    safe = [file for file in own if file.endswith(".safetensors") and file.count(".") == 1]  # no .fp16. variants
    if not safe and (bad := next((file for file in own if is_pickled(file)), None)):
        raise pickled(folder / bad)
    counted: dict[str, int] = {}
    for file in safe:
        for dtype, count in check_file(folder / file).items():
            counted[dtype] = counted.get(dtype, 0) + count
    return counted


def _vocab_size(folder: Path) -> int | None:
    config = folder / "text_encoder" / "config.json"
    size = read_object(config).get("vocab_size") if config.is_file() else None
    return size if isinstance(size, int) else None
