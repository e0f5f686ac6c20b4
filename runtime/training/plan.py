"""The plan of a training job: everything its ranks need, as data that stands in the job's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from runtime.spec import Value

Way: TypeAlias = Literal["sft", "sfft"]
"""sft: fine-tuning on conversations, LoRA unless told; sfft: full-parameter training or pretraining."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What to train and how wide.

    Attributes:
        folder: the job's folder, see `runtime.training.folder`; every rank can reach it.
        model: folder of the checkpoint that gives architecture, tokenizer and weights; '' = the parameters alone give
            the architecture.
        weights: folder or URL of other weights to start from; '' = the model's own.
        adapter: folder of LoRA weights to go on from; '' = none.
        prompt_format: JSON object of the prompt format; '' = the tokenizer's chat template.
        chat_template: a jinja template that replaces the tokenizer's; '' = its own.
        parameters: checked parameters by name, only those that were given; see `runtime.training.parameters`.
        deepspeed: DeepSpeed's configuration as JSON; '' = DeepSpeed is not used.
        quantization: bits of the frozen base weights, '4' or '8'; '' = none.
        ranks: processes that train together.
        cpus_per_rank: CPUs that a rank reserves; 1.5 leaves half a CPU of two for a model beside it.
        partitions: parts of the input table, one for each rank; 0 = rows are dealt out evenly.
    """

    folder: str
    way: Way
    model: str = ""
    weights: str = ""
    adapter: str = ""
    prompt_format: str = ""
    chat_template: str = ""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    deepspeed: str = ""
    quantization: str = ""
    ranks: int = 1
    gpus_per_rank: float = 0.0
    cpus_per_rank: float = 1.0
    resources: Mapping[str, float] = field(default_factory=dict)
    partitions: int = 0

    @property
    def threads(self) -> int:
        """Threads of a rank: its CPUs, a part of one counted as one."""
        return max(1, math.ceil(self.cpus_per_rank))
