"""A checkpoint as a graph of OpenVINO: the weights as they are, in their own number type, and what is done with them.

Alone because it is the one place that knows how these models compute. The graph has the shape that OpenVINO GenAI's
continuous batching looks for: keys and values in variables, one scaled dot product attention in each layer, which it
replaces by its paged attention (causal; the mask of this graph is only there to be replaced).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime.checkpoints.tensors import Stored

FORM = "openvino-1"
"""Name of this form among kept conversions; a graph that computes otherwise needs another one."""

_LOWEST = -65504.0
_TYPES = {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}


def write_graph(folder: Path, tensors: Mapping[str, Stored], target: Path) -> None:
    """Write `openvino_model.xml` and `.bin` into `target`, for the checkpoint in `folder` with these weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    graph = _Graph(config, tensors)
    ov.save_model(graph.model(), target / "openvino_model.xml", compress_to_fp16=False)


class _Graph:
    """Llama and its kin: what differs between them is found from the names of the weights."""

    def __init__(self, config: Any, tensors: Mapping[str, Stored]) -> None:
        self._config = config
        self._tensors = tensors
        self._heads = int(config.num_attention_heads)
        self._kept_heads = int(config.num_key_value_heads)
        self._width = int(getattr(config, "head_dim", None) or config.hidden_size // self._heads)
        self._states: list[Any] = []
        self._loaded: list[torch.Tensor] = []
        self._ids = _input("input_ids", ov.Type.i64, 2)
        self._mask = _input("attention_mask", ov.Type.i64, 2)
        self._positions = _input("position_ids", ov.Type.i64, 2)
        self._beams = _input("beam_idx", ov.Type.i32, 1)
        self._rows = op.gather(op.shape_of(self._ids), _whole([0]), _whole([0]))

    def model(self) -> ov.Model:
        """The whole of it: token ids to scores, (rows, tokens, vocabulary)."""
        words = self._numbers("model.embed_tokens.weight")
        hidden = op.gather(words, op.convert(self._ids, "i32"), op.constant(0, ov.Type.i32))
        rotation, mask = self._rotation(), self._visible()
        for layer in range(int(self._config.num_hidden_layers)):
            name = f"model.layers.{layer}"
            seen = self._attention(self._normed(hidden, f"{name}.input_layernorm"), layer, rotation, mask)
            hidden = op.add(hidden, seen)
            thought = self._perceptron(self._normed(hidden, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            hidden = op.add(hidden, thought)
        hidden = self._normed(hidden, "model.norm")
        head = self._numbers("lm_head.weight") if "lm_head.weight" in self._tensors else words
        scores = op.result(op.matmul(hidden, head, False, True))
        scores.output(0).tensor.set_names({"logits"})
        inputs = [self._ids, self._mask, self._positions, self._beams]
        return ov.Model([scores], self._states, inputs, self._config.model_type)

    def _attention(self, hidden: Any, layer: int, rotation: tuple[Any, Any], mask: Any) -> Any:
        name = f"model.layers.{layer}.self_attn"
        query = self._rotated(self._split(hidden, f"{name}.q_proj", f"{name}.q_norm", self._heads), rotation)
        key = self._rotated(self._split(hidden, f"{name}.k_proj", f"{name}.k_norm", self._kept_heads), rotation)
        value = self._split(hidden, f"{name}.v_proj", "", self._kept_heads)
        key = self._for_every_head(self._kept(key, f"past_key_values.{layer}.keypresent.{layer}.key"))
        value = self._for_every_head(self._kept(value, f"past_key_values.{layer}.valuepresent.{layer}.value"))
        seen = op.scaled_dot_product_attention(query, key, value, mask, causal=False)
        joined = op.reshape(op.transpose(seen, _whole([0, 2, 1, 3])), _whole([0, 0, self._heads * self._width]), True)
        return self._linear(joined, f"{name}.o_proj")

    def _perceptron(self, hidden: Any, name: str) -> Any:
        gate = op.swish(self._linear(hidden, f"{name}.gate_proj"))
        return self._linear(op.multiply(gate, self._linear(hidden, f"{name}.up_proj")), f"{name}.down_proj")

    def _linear(self, hidden: Any, name: str) -> Any:
        made = op.matmul(hidden, self._numbers(f"{name}.weight"), False, True)
        bias = f"{name}.bias"
        return op.add(made, self._numbers(bias)) if bias in self._tensors else made

    def _normed(self, hidden: Any, name: str) -> Any:
        square = op.reduce_mean(op.power(hidden, _number(2.0)), op.constant([-1], ov.Type.i32), True)
        root = op.sqrt(op.add(square, _number(float(self._config.rms_norm_eps))))
        return op.multiply(op.multiply(hidden, op.divide(_number(1.0), root)), self._numbers(f"{name}.weight"))

    def _split(self, hidden: Any, name: str, norm: str, heads: int) -> Any:
        """(rows, heads, tokens, width)."""
        each = op.reshape(self._linear(hidden, name), _whole([0, 0, heads, self._width]), True)
        if f"{norm}.weight" in self._tensors:
            each = self._normed(each, norm)
        return op.transpose(each, _whole([0, 2, 1, 3]))

    def _rotation(self) -> tuple[Any, Any]:
        """Cosines and sines of the positions, (rows, 1, tokens, width)."""
        turns, factor = turns_of(self._config, self._width)
        turns = op.constant(turns.reshape(1, -1, 1))
        turns = op.broadcast(
            turns, op.concat([self._rows, _whole([1]), _whole([1])], 0), broadcast_spec="BIDIRECTIONAL"
        )
        places = op.convert(op.unsqueeze(self._positions, _whole(1)), "f32")
        angles = op.transpose(op.matmul(turns, places, False, False), _whole([0, 2, 1]))
        angles = op.concat([angles, angles], -1)
        made = [op.unsqueeze(wave(angles), _whole(1)) for wave in (op.cos, op.sin)]
        cosines, sines = made if factor == 1.0 else [op.multiply(each, _number(factor)) for each in made]
        return cosines, sines

    def _rotated(self, each: Any, rotation: tuple[Any, Any]) -> Any:
        cosines, sines = rotation
        half, axis, one = _whole([self._width // 2]), _whole([3]), _whole([1])
        second = op.slice(each, half, _whole([np.iinfo(np.int64).max]), one, axis)
        first = op.slice(each, _whole([0]), half, one, axis)
        turned = op.concat([op.multiply(second, _number(-1.0)), first], -1)
        return op.add(op.multiply(each, cosines), op.multiply(turned, sines))

    def _kept(self, new: Any, name: str) -> Any:
        """`new` behind what the variable `name` holds; the variable then holds both."""
        empty = op.broadcast(
            op.constant(0.0, ov.Type.f32),
            op.concat([self._rows, _whole([self._kept_heads]), _whole([0]), _whole([self._width])], 0),
        )
        shape = ov.PartialShape([-1, self._kept_heads, -1, self._width])
        variable = ov.op.util.Variable(ov.op.util.VariableInfo())
        variable.update(_info(shape, name))
        before = op.gather(op.read_value(empty, variable), self._beams, _whole(0))
        both = op.concat([before, new], 2)
        self._states.append(op.assign(both, variable))
        return both

    def _for_every_head(self, kept: Any) -> Any:
        """Keys or values repeated for the heads that share them."""
        if self._heads == self._kept_heads:
            return kept
        times = self._heads // self._kept_heads
        shape = [self._rows, _whole([self._kept_heads]), _whole([times]), _whole([0]), _whole([self._width])]
        shape[3] = _whole([1])
        spread = op.broadcast(op.unsqueeze(kept, _whole(2)), op.concat(shape, 0), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(spread, _whole([0, self._heads, -1, self._width]), True)

    def _visible(self) -> Any:
        """0 for each token that is there, (rows, 1, 1, tokens)."""
        absent = op.subtract(_number(1.0, 0), op.convert(self._mask, "f32"))
        return op.unsqueeze(op.multiply(absent, op.constant(_LOWEST, ov.Type.f32)), _whole([1, 2]))

    def _numbers(self, name: str) -> Any:
        """A weight as it is stored, converted where it is computed with."""
        tensor = self._tensors[name].load().contiguous()
        self._loaded.append(tensor)  # the graph reads its memory until it is written
        kind = _TYPES[tensor.dtype]
        if kind is ov.Type.f32:
            return op.constant(tensor.numpy(), shared_memory=True)
        stored = ov.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), kind)
        return op.convert(op.constant(stored, shared_memory=True), "f32")


def turns_of(config: Any, width: int) -> tuple[np.ndarray[Any, Any], float]:
    """How far each pair of a head turns from one position to the next, and the factor of its waves."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        turns = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        return turns.numpy(), 1.0
    turns, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return turns.numpy(), float(factor)


def _input(name: str, kind: ov.Type, rank: int) -> Any:
    made = op.parameter([-1] * rank, kind, name=name)
    made.output(0).tensor.set_names({name})
    return made


def _info(shape: ov.PartialShape, name: str) -> Any:
    info = ov.op.util.VariableInfo()
    info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
    return info


def _number(value: float, rank: int = 3) -> Any:
    return op.constant(np.full([1] * rank, value, np.float32))


def _whole(value: Any) -> Any:
    return op.constant(np.asarray(value, np.int64))
