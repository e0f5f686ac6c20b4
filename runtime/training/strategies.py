"""How several ranks train one model together: DDP, FSDP or DeepSpeed, each also on CPUs.

It stands alone because the rest of a training is the same for all of them: what differs is what Trainer is told, how
the process joins its group, and in which form a model that is spread over ranks is written.

transformers and accelerate know DeepSpeed and FSDP on GPUs only. What they lack for CPUs is one state object, which
they take as it is; a test trains with each strategy on CPUs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from runtime.errors import UserError
from runtime.training.deepspeed_config import Settled, check_deepspeed, settle
from runtime.training.folder import JobFolder
from runtime.training.plan import TrainingPlan

__all__ = [
    "Strategy",
    "accept",
    "arguments",
    "check_deepspeed",
    "completed",
    "save_spread",
    "strategy_of",
    "whole",
]

Strategy: TypeAlias = Literal["single", "ddp", "fsdp", "deepspeed"]

LOG = logging.getLogger("sqlext.training")
LATEST = "latest"
"""DeepSpeed's file that names the newest of several checkpoints."""
_RECOVERY = ("zero_to_fp32.py", "zero_to_torch.py")  # scripts that DeepSpeed leaves beside its checkpoints


def strategy_of(plan: TrainingPlan) -> Strategy:
    """How the plan's ranks train together.

    Raises:
        UserError: the plan says two things.
    """
    said = str(plan.parameters.get("strategy", "auto"))
    if said == "auto":
        said = "deepspeed" if plan.deepspeed else "fsdp" if _wants_fsdp(plan) else "ddp"
    if said == "deepspeed" and not plan.deepspeed:
        raise UserError(
            'strategy "deepspeed" needs a deepspeedConfig.',
            code="deepspeed_config",
            hint="""For example deepspeedConfig='{"zero_optimization": {"stage": 2}}'.""",
        )
    if said != "deepspeed" and plan.deepspeed:
        raise UserError(
            f'strategy "{said}" does not go with a deepspeedConfig.',
            code="deepspeed_contradiction",
            hint="Leave one of them out.",
        )
    if said == "deepspeed":
        return "deepspeed"
    if plan.ranks == 1:
        return "single"
    return "fsdp" if said == "fsdp" else "ddp"


def completed(plan: TrainingPlan, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The training parameters, with what the plan's deepspeedConfig says in place of defaults.

    Args:
        parameters: the plan's with defaults.

    Raises:
        UserError: the strategy or the configuration must be corrected, or DeepSpeed is not installed.
    """
    if strategy_of(plan) != "deepspeed":
        return dict(parameters)
    if not find_spec("deepspeed"):
        raise UserError(
            "deepspeedConfig needs DeepSpeed, which is not installed.",
            code="package_missing",
            hint='pip install "sqlext[deepspeed]", or leave deepspeedConfig out.',
        )
    return {**parameters, **_settled(plan, parameters).parameters}


def arguments(plan: TrainingPlan, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments for the plan's strategy; this process has joined its group when they are used.

    Args:
        parameters: as `completed` gave them.

    Raises:
        UserError: as `completed`.
    """
    strategy = strategy_of(plan)
    on_cpu = _on_cpu(plan)
    if strategy == "deepspeed":
        settled = _settled(plan, parameters)
        if os.environ.get("RANK", "0") == "0":
            for notice in settled.notices:
                LOG.warning("%s", notice)
        _check_zero(settled.config)
        _join_deepspeed(on_cpu)
        return {"deepspeed": settled.config, **_configured(on_cpu)}
    if strategy == "fsdp":
        if on_cpu:
            _join_fsdp_on_cpu()
        said = dict(parameters.get("fsdp_config") or {})
        sharding = str(parameters.get("fsdp") or "true")
        return {
            "fsdp": True if sharding.lower() == "true" else sharding,
            "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **said},
            **_configured(on_cpu),
        }
    return {"fsdp": None, "fsdp_config": None}


def accept(args: Any) -> None:
    """Let DeepSpeed's configuration say other things than these TrainingArguments, such as its own scheduler's steps.

    Trainer would refuse to begin. What both must agree on, batch sizes above all, `completed` has set.
    """
    if config := getattr(args, "hf_deepspeed_config", None):
        config.mismatches.clear()
        config.fill_match = config.fill_only


@contextlib.contextmanager
def whole(trainer: Any) -> Iterator[None]:
    """Within this, Trainer writes the whole model, where it would otherwise write the part of each rank."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)


def save_spread(trainer: Any, folder: Path) -> bool:
    """Write a model that is spread over ranks as it is, each rank its part; every rank must call this.

    DeepSpeed: its own checkpoint, whose tag is the folder's name, as `zero_to_fp32` reads it. FSDP: a sharded state
    dict of torch.distributed.checkpoint. The folder appears whole or not at all.

    Args:
        trainer: a `JobTrainer`.

    Returns:
        False where each rank has the whole model: nothing was written.
    """
    if trainer.is_deepspeed_enabled:
        with trainer.appearing(folder) as unfinished:
            engine = trainer.model_wrapped
            engine.save_checkpoint(str(unfinished.parent), tag=unfinished.name, save_latest=False)
        if trainer.args.should_save:
            for script in _RECOVERY:
                (folder.parent / script).unlink(missing_ok=True)
            (folder.parent / LATEST).write_text(folder.name, encoding="utf-8")
        return True
    if trainer.is_fsdp_enabled:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        with trainer.appearing(folder) as unfinished:
            checkpoint.save(get_model_state_dict(trainer.model), checkpoint_id=unfinished)
        return True
    return False


def _wants_fsdp(plan: TrainingPlan) -> bool:
    return str(plan.parameters.get("fsdp") or "").lower() not in ("", "false") or "fsdp_config" in plan.parameters


def _settled(plan: TrainingPlan, parameters: Mapping[str, Any]) -> Settled:
    return settle(
        plan.deepspeed,
        plan.parameters,
        parameters,
        ranks=plan.ranks,
        on_gpu=not _on_cpu(plan),
        logging=str(JobFolder(Path(plan.folder)).logging),
    )


def _on_cpu(plan: TrainingPlan) -> bool:
    return plan.gpus_per_rank == 0


def _check_zero(config: Mapping[str, Any]) -> None:
    """Let DeepSpeed itself look at what it is strict about, before a model is loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    said = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**said)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["zero_optimization", *(str(part) for part in first["loc"])])
        raise UserError(f"deepspeedConfig: {place}: {first['msg']}.", code="deepspeed_config") from None


def _configured(on_cpu: bool) -> dict[str, Any]:
    """On CPUs: take the state that this process has made, for Trainer would make one without the other ranks."""
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}} if on_cpu else {}


def _join_deepspeed(on_cpu: bool) -> None:
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # at each step of DeepSpeed's
    _be_a_rank()
    if not on_cpu:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import PartialState
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # compiled for a minute at its first use; gloo does it as well
    )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def _join_fsdp_on_cpu() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(backend="gloo")
    state.distributed_type = DistributedType.MULTI_GPU  # what accelerate turns into FSDP; the device stays the CPU


def _be_a_rank() -> None:
    """Give a process that trains alone the environment of the only rank: DeepSpeed wants a group of one at least."""
    if "RANK" in os.environ:
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in {**alone, "MASTER_PORT": port}.items()}
