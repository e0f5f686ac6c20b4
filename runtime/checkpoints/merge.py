"""`merge`: a LoRA adapter worked into its base, tensor by tensor.

Alone because of how it stays small: peft puts its layers into a model without numbers, and each changed weight is
given to its layer, merged there by peft's own arithmetic, and written, before the next one is read.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from runtime.checkpoints.adapter import Adapter, open_adapter, require_base
from runtime.checkpoints.convert import (
    Converted,
    Output,
    Progress,
    ignore_progress,
    joined,
    main_dtype,
    refuse_quantized,
    write_model,
)
from runtime.checkpoints.model_folder import ModelFolder, Shards, open_model
from runtime.checkpoints.output import output_path
from runtime.checkpoints.pickles import load_tensors
from runtime.checkpoints.skeleton import skeleton, tied
from runtime.checkpoints.tensors import Stored, cast, dtype_named, in_memory, one_thread, read_safetensors
from runtime.errors import UserError
from runtime.secrets import first_line

_HALF = (torch.float16, torch.bfloat16)
_EMBEDDINGS = ("embed_tokens.weight", "embed_tokens.base_layer.weight", "wte.weight", "wte.base_layer.weight")
_PEFT_PREFIX = "base_model.model."  # before all names in an adapter's file


@dataclass(frozen=True, slots=True)
class Merge:
    """What to merge.

    Attributes:
        adapter: folder of the adapter.
        target: folder for the result.
        model: folder of the base; '' = the one that the adapter comes with or names.
        dtype: number type of the result, in which the base is also read; '' = the base's own.
        allow_pickle: read pickled weights, as numbers alone.
        check: compare the logits of the result with those of peft's own merge in the base's number type.
    """

    adapter: str
    target: str
    model: str = ""
    dtype: str = ""
    overwrite: bool = False
    allow_pickle: bool = False
    check: bool = False


@one_thread()
def merge(wanted: Merge, progress: Progress = ignore_progress) -> Converted:
    """Make one model of an adapter and its base, equal to what peft's merge_and_unload makes in the same number type.

    Raises:
        UserError: a folder, a word or a file is wrong, or the two do not fit together; nothing was written.
    """
    begun = time.monotonic()
    adapter = open_adapter(wanted.adapter, allow_pickle=wanted.allow_pickle)
    base = open_model(wanted.model or require_base(adapter), allow_pickle=wanted.allow_pickle)
    refuse_quantized(base)
    target = output_path(wanted.target, overwrite=wanted.overwrite, inputs=[base.path, adapter.path])
    dtype = dtype_named(wanted.dtype) if wanted.dtype else None
    shards = {
        stem: {name: cast(tensor, dtype) if dtype else tensor for name, tensor in shard.items()}
        for stem, shard in base.shards.items()
    }
    changes = _Changes.of(base.path, adapter)
    output = Output(
        target, wanted.overwrite, progress, begun, _check(base, adapter, changes) if wanted.check else None
    )
    return write_model(base, changes.applied(shards, adapter), output, config=changes.config(shards), adapter=adapter)


def _check(base: ModelFolder, adapter: Adapter, changes: _Changes) -> Callable[[Path], float]:
    """How far the logits of a result are from those of the base with its adapter."""
    from runtime.checkpoints.logits import largest_difference, saved

    own = main_dtype(list(joined(base.shards).values()))

    def by_peft() -> Any:
        model = saved(base.path, own, pickled=base.suffix == ".bin")
        rows = _vocabulary(changes.replaced)
        if rows and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(adapter.path), torch_device="cpu")
        # peft merges into tied embeddings twice; there the adapter stays beside the weights.
        return model.eval() if changes.untied() else model.merge_and_unload().eval()

    return lambda place: largest_difference(by_peft, lambda: saved(place, "auto"), place)


def merge_into(model: Any, base: Path, adapter: Adapter) -> None:
    """Work an adapter into a model in memory, by the same arithmetic; what it answers equals the merged checkpoint.

    Args:
        model: of transformers, as loaded from the folder `base`.

    Raises:
        UserError: adapter_mismatch.
    """
    changes = _Changes.of(base, adapter)
    rows = _vocabulary(changes.replaced)
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if changes.untied():
        for name in changes.same:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.weight = torch.nn.Parameter(owner.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
    for name in {*changes.layers, *changes.replaced}:
        weight = model.get_parameter(name)
        made = changes.changed(name, in_memory(weight.detach().cpu())).load()
        weight.data = made.to(weight.device)


def require_fit(base: Path, adapter: Adapter) -> None:
    """Refuse an adapter that belongs to another model than that in the folder `base`.

    Raises:
        UserError: adapter_mismatch.
    """
    _Changes.of(base, adapter)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What an adapter changes.

    Attributes:
        layers: peft's layer by the name of the weight that it changes.
        replaced: weights that the adapter brings as a whole, by name.
        same: names of weights that are another one in the base, and which.
    """

    layers: Mapping[str, LoraLayer]
    replaced: Mapping[str, torch.Tensor]
    same: Mapping[str, str]

    @classmethod
    def of(cls, base: Path, adapter: Adapter) -> _Changes:
        """
        Raises:
            UserError: adapter_mismatch.
        """
        body = _prepared(base, adapter, _adapter_tensors(adapter))
        layers = {
            f"{name}.weight": module
            for name, module in body.named_modules()
            if isinstance(module, BaseTunerLayer) and isinstance(module, LoraLayer)
        }
        replaced = {
            name.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."): parameter.data
            for name, parameter in body.named_parameters()
            if not parameter.is_meta and ".lora_" not in name
        }
        return cls(layers, replaced, tied(body))

    def untied(self) -> bool:
        """Whether the adapter changes a weight that stands for two, so that they are two from now on."""
        return any(name in self.layers or name in self.replaced for pair in self.same.items() for name in pair)

    def applied(self, shards: Shards, adapter: Adapter) -> Shards:
        """The shards with what the adapter changes.

        Raises:
            UserError: adapter_mismatch, the adapter changes weights that the base does not have.
        """
        base = joined(shards)
        added = {name: base[first] for name, first in self.same.items() if self.untied() and name not in base}
        last = list(shards)[-1]
        whole = {stem: {**shard, **(added if stem == last else {})} for stem, shard in shards.items()}
        known = base.keys() | added.keys()
        if missing := sorted({*self.layers, *self.replaced} - known):
            raise _mismatch(adapter, f"it changes {missing[0]}, which the base does not have under this name")
        return {stem: {name: self.changed(name, t) for name, t in shard.items()} for stem, shard in whole.items()}

    def config(self, shards: Shards) -> dict[str, Any]:
        """The fields of config.json that change."""
        fields: dict[str, Any] = {"tie_word_embeddings": False} if self.untied() else {}
        base = joined(shards)
        rows = _vocabulary(self.replaced)
        if rows and any(self.replaced[name].shape != base[name].shape for name in self.replaced.keys() & base.keys()):
            fields["vocab_size"] = rows
        return fields

    def changed(self, name: str, stored: Stored) -> Stored:
        """A weight with what the adapter changes of it."""
        if name in self.replaced:
            stored = cast(in_memory(self.replaced[name]), stored.dtype)
        layer = self.layers.get(name)
        if layer is None:
            return stored
        return Stored(stored.dtype, stored.shape, lambda: in_memory(_merged(layer, stored.load())).pieces())


def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight with the layer's adapter in it; the layer is empty again afterwards."""
    base = layer.get_base_layer()
    empty = base.weight
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    try:
        with torch.no_grad():
            layer.merge()
        return base.weight.data
    finally:
        layer.merged_adapters.clear()
        base.weight = empty


def _adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapter's tensors; half precision becomes float32, in which peft keeps adapters and multiplies them.

    Raises:
        UserError: checkpoint_corrupt, checkpoint_pickled, adapter_mismatch.
    """
    read = load_tensors if adapter.weights.suffix == ".bin" else read_safetensors
    tensors = {name: stored.load() for name, stored in read(adapter.weights).items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise _mismatch(adapter, f"its tensor {name[:120]} holds numbers that are not finite")
    return {
        name.removeprefix(_PEFT_PREFIX): tensor.float() if tensor.dtype in _HALF else tensor
        for name, tensor in tensors.items()
    }


def _prepared(base: Path, adapter: Adapter, state: Mapping[str, torch.Tensor]) -> Any:
    """The base without numbers, with peft's layers in it that hold the adapter's.

    Raises:
        UserError: adapter_mismatch.
    """
    rows = _vocabulary(state)
    body = skeleton(base, **({"vocab_size": rows} if rows else {}))
    try:
        with warnings.catch_warnings():  # of tied embeddings, which are untied here
            warnings.simplefilter("ignore")
            config = LoraConfig.from_pretrained(str(adapter.path))
            config.inference_mode = True
            inject_adapter_in_model(config, body, low_cpu_mem_usage=True)
            with _seemingly_there(body):
                report = set_peft_model_state_dict(body, dict(state), low_cpu_mem_usage=True)
    except Exception as error:  # peft says in many ways that the two do not belong together
        raise _mismatch(adapter, first_line(error)) from None
    lacking = [name for name in report.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if report.unexpected_keys or lacking:
        first = (report.unexpected_keys or lacking)[0]
        raise _mismatch(adapter, f"{first[:120]} is {'not of this base' if report.unexpected_keys else 'missing'}")
    return body


def _vocabulary(tensors: Mapping[str, torch.Tensor]) -> int:
    """The rows of the embeddings that an adapter brings, as after adding tokens; 0 when it brings none."""
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_EMBEDDINGS)), 0)


@contextmanager
def _seemingly_there(body: Any) -> Iterator[None]:
    """Base weights on the CPU that take no memory: peft moves an adapter to where the base of its layer is."""
    stand_ins = []
    for module in body.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            empty = base.weight
            base.weight = torch.nn.Parameter(torch.zeros(()).expand(empty.shape), requires_grad=False)
            stand_ins.append((base, empty, base.weight))
    yield
    for base, empty, stand_in in stand_ins:
        if base.weight is stand_in:  # else the adapter brought a weight of its own
            base.weight = empty


def _mismatch(adapter: Adapter, why: str) -> UserError:
    return UserError(
        f'The adapter "{adapter.path}" does not fit its base: {why}.',
        code="adapter_mismatch",
        hint="Give modelNameOrPath of the very model that the adapter was trained on.",
    )
