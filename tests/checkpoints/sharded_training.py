"""Two ranks that train a step and save it as DeepSpeed (ZeRO 1, 2, 3) and FSDP do; a script, run once for each rank.

Beside each checkpoint lies `expected.safetensors`: what DeepSpeed's own converter, or the model itself, says is in it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

deepspeed.comm.torch.build_shm_op = lambda: None  # it compiles a part that is not needed


def zero(model: torch.nn.Module, folder: Path, stage: int, bf16: bool) -> None:
    """One step; the embeddings are frozen in the last two stages."""
    if stage > 1:
        model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16},
        },
    )
    ids = torch.arange(3, 19)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag="Epoch-1")
    if torch.distributed.get_rank() == 0:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "expected.safetensors")


def fsdp(model: torch.nn.Module, folder: Path) -> None:
    """The model's shards as accelerate saves them, with something beside them that is no weight."""
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "expected.safetensors")
    torch.distributed.barrier()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    state = {"model": get_model_state_dict(model), "step": torch.tensor(7)}
    dcp.save(state, checkpoint_id=str(folder / "checkpoint-1" / "pytorch_model_fsdp_0"))


def perturbed(base: str) -> torch.nn.Module:
    """The model with all weights others than the base's, on every rank the same: nobody takes the one for the other."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def main(base: str, out: Path) -> None:
    """Make every kind of checkpoint of the model in `base` below `out`."""
    deepspeed.init_distributed("gloo")
    for stage, bf16 in ((1, False), (2, True), (3, True)):
        zero(perturbed(base), out / f"zero{stage}", stage, bf16)
    fsdp(perturbed(base), out / "fsdp")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
