"""DeepSpeed's ZeRO checkpoints (stages 0 to 3) as tensors by name.

Alone because it reads DeepSpeed's own files without DeepSpeed: its converter unpickles whatever stands in them, and
holds a model of stages 1 and 2 in memory twice. What lies where follows deepspeed/utils/zero_to_fp32.py: every rank
keeps a part of the float32 weights, laid end to end in the order of `param_shapes`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoints.folder import require_own
from runtime.checkpoints.pickles import load_pickled, numbers, stored
from runtime.checkpoints.tensors import Numbers, Stored
from runtime.checkpoints.weights import corrupt
from runtime.errors import UserError

MODEL_FILES = "*mp_rank_*_model_states.pt"
OPTIMIZER_FILES = "*_optim_states.pt"


class _Data:
    """Stands for a class of DeepSpeed that only holds settings: nothing of it is used."""

    def __new__(cls, *_: Any) -> _Data:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _Number(_Data, int):
    """Stands for an enumeration of DeepSpeed: its number."""

    def __new__(cls, value: int = 0) -> _Number:
        return int.__new__(cls, value)


_KNOWN = (
    *((_Data, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")),
    (_Data, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


def read_zero(folder: Path) -> dict[str, Stored]:
    """The weights in the folder of one ZeRO checkpoint (the tag), in float32 where they were trained.

    Raises:
        UserError: checkpoint_corrupt, checkpoint_pickled, zero_unsupported.
    """
    models = [_Rank(file, _load(folder, file)) for file in _files(folder, MODEL_FILES)]
    optimizers = [
        _Rank(file, _load(folder, file).get("optimizer_state_dict")) for file in _files(folder, OPTIMIZER_FILES)
    ]
    try:
        return _weights(folder, models, optimizers)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise corrupt(folder, "its files do not fit together") from None


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank has saved in one file."""

    file: Path
    content: Any

    def stored(self, name: str) -> dict[str, Stored]:
        """The tensors of a dictionary in it."""
        return {key: stored(self.file, tensor) for key, tensor in (self.content.get(name) or {}).items()}

    def flat(self, tensor: torch.Tensor) -> Numbers:
        """A flat tensor of it."""
        return numbers(self.file, tensor)


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files of all ranks, in the order of the ranks.

    Raises:
        UserError: zero_unsupported.
    """
    files = [file for file in folder.glob(pattern) if not file.name.startswith(".")]
    if split_up := [file for file in files if not re.search(r"mp_rank_00_(model|optim)_states", file.name)]:
        raise UserError(
            f'"{split_up[0]}" is of a model that was split over ranks (tensor, pipeline or expert parallelism).',
            code="zero_unsupported",
            hint="Only data-parallel checkpoints are converted here; DeepSpeed's ds_to_universal can join others.",
        )
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def _load(folder: Path, file: Path) -> dict[str, Any]:
    require_own(folder, file)
    content = load_pickled(file, _KNOWN)
    if not isinstance(content, dict):
        raise corrupt(file, "it is no file of DeepSpeed")
    return content


def _weights(folder: Path, models: list[_Rank], optimizers: list[_Rank]) -> dict[str, Stored]:
    if not models:
        raise corrupt(folder, "it holds no …_model_states.pt")
    first = models[0]
    if not optimizers or "zero_stage" not in optimizers[0].content:  # stage 0: every rank has the whole model
        return first.stored("module")
    said = optimizers[0].content
    count = said["partition_count"]
    ranks = max(count) if isinstance(count, list) else count
    if ranks != len(optimizers):
        raise corrupt(folder, f"{len(optimizers)} of {ranks} …_optim_states.pt are there")
    buffers = set(first.content["buffer_names"])
    found = {name: tensor for name, tensor in first.stored("module").items() if name in buffers}
    found |= (_stage_3 if int(said["zero_stage"]) == 3 else _stage_1_2)(models, optimizers)
    for name, same in dict(first.content.get("shared_params") or {}).items():
        if same in found:
            found[name] = found[same]
    return found


def _stage_1_2(models: list[_Rank], optimizers: list[_Rank]) -> dict[str, Stored]:
    """Each group of parameters is one vector, cut into as many parts as there are ranks."""
    found = models[0].stored("frozen_param_fragments")
    paddings = optimizers[0].content.get("param_alignment_paddings")
    for number, shapes in enumerate(models[0].content["param_shapes"]):
        parts = [rank.flat(rank.content["single_partition_of_fp32_groups"][number]) for rank in optimizers]
        pads = paddings[number] if paddings else [0] * len(shapes)
        at = 0
        for (name, shape), pad in zip(shapes.items(), pads, strict=True):
            found[name] = _joined(tuple(shape), _across(parts, at, math.prod(shape)))
            at += math.prod(shape) + pad
    return found


def _stage_3(models: list[_Rank], optimizers: list[_Rank]) -> dict[str, Stored]:
    """Each parameter is cut into equal parts, one for each rank; a rank's parts lie end to end in its groups."""
    found: dict[str, Stored] = {}
    ranks = len(optimizers)
    for name, shape in (models[0].content.get("frozen_param_shapes") or {}).items():
        cut = math.ceil(math.prod(shape) / ranks)
        parts = [rank.flat(rank.content["frozen_param_fragments"][name]).part(0, cut) for rank in models]
        found[name] = _of_equal_parts(tuple(shape), parts)
    groups = [[rank.flat(tensor) for tensor in rank.content["fp32_flat_groups"]] for rank in optimizers]
    at = 0
    for name, shape in (each for shapes in models[0].content["param_shapes"] for each in shapes.items()):
        cut = math.ceil(math.prod(shape) / ranks)
        found[name] = _of_equal_parts(tuple(shape), [part for group in groups for part in _across(group, at, cut)])
        at += cut
    return found


def _across(parts: list[Numbers], start: int, count: int) -> list[Numbers]:
    """Where `count` numbers from `start` on lie, when the parts are laid end to end."""
    found: list[Numbers] = []
    for part in parts:
        first, last = max(start, 0), min(start + count, part.count)
        if first < last:
            found.append(part.part(first, last - first))
        start -= part.count
    return found


def _of_equal_parts(shape: tuple[int, ...], parts: list[Numbers]) -> Stored:
    """The parts joined without the padding at the end of the last ones."""
    left = math.prod(shape)
    kept: list[Numbers] = []
    for part in parts:
        kept.append(part.part(0, min(part.count, left)))
        left -= kept[-1].count
    return _joined(shape, kept)


def _joined(shape: tuple[int, ...], parts: list[Numbers]) -> Stored:
    """
    Raises:
        ValueError: the parts are not of this shape.
    """
    if sum(part.count for part in parts) != math.prod(shape) or not parts:
        raise ValueError(shape)
    return Stored(parts[0].dtype, shape, lambda: (piece for part in parts for piece in part.pieces()))
