"""Convert a layer between numpy heads, tensors by head, and the parameters of the source's attention module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.projections import Heads, LayerHeads, module_of, split
from uptrain.architectures.schema import Position, Projections
from uptrain.checkpoint.dtypes import Array, as_float32
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.method import Converted
from uptrain.methods.rotary import Pairing, Rotary
from uptrain.methods.shared_heads import factor_heads, factor_normed


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, here and on threads that begin in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def factor_layer(layer: LayerHeads, groups: int, position: Rotary | None) -> Converted[LayerHeads]:
    """Return the layer with `groups` key/value heads by the data-free factorisation, in float64.

    Queries and the output change in value, not in shape: they absorb each head's factor.
    """
    found = factor_heads(maps_of(layer), groups, position)
    return Converted(heads_of(found.layer, layer), found.explained)


def factor_values(layer: LayerHeads, groups: int) -> Converted[LayerHeads]:
    """Return the layer with `groups` key/value heads: keys averaged, values factored without data, in float64.

    For keys that a norm follows, which queries can't absorb a factor of. The output absorbs the values' factors.
    """
    found = factor_normed(maps_of(layer), groups)
    return Converted(heads_of(found.layer, layer), found.explained)


def rotary_of(position: Position, spec: AttentionSpec) -> Rotary | None:
    """Return which dims of a layer's keys are rotated and how they pair up, None where keys see no rotation."""
    if not position.rotates or spec.rotary_ndims == 0:
        return None
    pairing: Pairing = "interleaved" if position is Position.ROTARY_INTERLEAVED else "half"
    return Rotary(pairing, spec.rotary_ndims or spec.head_dim)


def maps_of(layer: LayerHeads) -> HeadMaps:
    """Return a layer's heads as float64 tensors."""
    weights = [_tensor(layer.part(part).weight) for part in "qkvo"]
    biases = [layer.part(part).bias for part in "qkv"]
    return HeadMaps(*weights, *(None if bias is None else _tensor(bias) for bias in biases))


def heads_of(maps: HeadMaps, source: LayerHeads) -> LayerHeads:
    """Return tensors as numpy heads, in their own dtype; the output's bias is the source's."""
    return LayerHeads(
        q=Heads(_array(maps.q), _bias(maps.q_bias)),
        k=Heads(_array(maps.k), _bias(maps.k_bias)),
        v=Heads(_array(maps.v), _bias(maps.v_bias)),
        o=Heads(_array(maps.o), source.part("o").bias),
    )


class ModuleWeights:
    """Converts heads, shared or not, to the parameters of the source's own attention module; differentiable."""

    def __init__(self, projections: Projections, spec: AttentionSpec) -> None:
        self._projections, self._spec = projections, spec
        self._order: Tensor | None = None
        if projections.fused:
            rows = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
            numbers = np.arange(rows).reshape((1, -1) if projections.transposed else (-1, 1))
            parts = split(projections, spec, {f"{projections.fused}.weight": numbers})
            places = np.concatenate([parts.part(part).weight.reshape(-1) for part in "qkv"])
            self._order = torch.from_numpy(np.argsort(places))

    def parameters(self, maps: HeadMaps) -> dict[str, Tensor]:
        """Return weights and biases by name ("c_attn.weight"); shared heads are repeated to the source's number.

        The output's bias is left out: no method changes it.
        """
        repeat = self._spec.num_key_value_heads // maps.kv_heads
        weights = {
            "q": maps.q.flatten(0, 1),
            "k": maps.k.repeat_interleave(repeat, 0).flatten(0, 1),
            "v": maps.v.repeat_interleave(repeat, 0).flatten(0, 1),
        }
        biases = {
            "q": maps.q_bias,
            "k": None if maps.k_bias is None else maps.k_bias.repeat_interleave(repeat, 0),
            "v": None if maps.v_bias is None else maps.v_bias.repeat_interleave(repeat, 0),
        }
        flat = {part: bias.flatten() for part, bias in biases.items() if bias is not None}
        names = {part: module_of(self._projections, part) for part in "qkvo"}
        out = {f"{names['o']}.weight": self._stored(maps.o.flatten(1))}
        if self._order is None:
            out.update({f"{names[part]}.weight": self._stored(weights[part]) for part in "qkv"})
            out.update({f"{names[part]}.bias": bias for part, bias in flat.items()})
            return out
        order = self._order.to(maps.q.device)
        out[f"{names['q']}.weight"] = self._stored(torch.cat(list(weights.values()))[order])
        if flat:
            out[f"{names['q']}.bias"] = torch.cat(list(flat.values()))[order]
        return out

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T if self._projections.transposed else weight


def _tensor(array: Array) -> Tensor:
    wide = array if array.dtype.itemsize == 8 else as_float32(array)
    return torch.from_numpy(wide).double()


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array


def _bias(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _array(tensor)
