"""Carry a layer between the pipeline's numpy heads and the factorisation's float64 tensors."""

from __future__ import annotations

import torch

from uptrain.checkpoint.arrays import Array, as_float32
from uptrain.methods.energy import Shares
from uptrain.methods.factored import factor_heads
from uptrain.methods.heads import HeadMaps
from uptrain.methods.rotary import Rotary
from uptrain.packing import Heads, LayerHeads


def factor_layer(layer: LayerHeads, groups: int, position: Rotary | None) -> tuple[LayerHeads, dict[str, Shares]]:
    """Return the layer with `groups` key/value heads by the data-free factorisation, in float64, and what it keeps.

    Queries and the output change too, in value but not in shape: they absorb what each head's factor leaves over.
    """
    found = factor_heads(_maps(layer), groups, position)
    maps = found.layer
    parts = {
        "q": Heads(maps.q.numpy(), _bias(maps.q_bias)),
        "k": Heads(maps.k.numpy(), _bias(maps.k_bias)),
        "v": Heads(maps.v.numpy(), _bias(maps.v_bias)),
        "o": Heads(maps.o.numpy(), layer.part("o").bias),
    }
    return LayerHeads(**parts), found.kept


def _maps(layer: LayerHeads) -> HeadMaps:
    weights = [_tensor(layer.part(part).weight) for part in "qkvo"]
    biases = [layer.part(part).bias for part in "qkv"]
    return HeadMaps(*weights, *(None if bias is None else _tensor(bias) for bias in biases))


def _tensor(array: Array) -> torch.Tensor:
    wide = array if array.dtype.itemsize == 8 else as_float32(array)
    return torch.from_numpy(wide).double()


def _bias(tensor: torch.Tensor | None) -> Array | None:
    return None if tensor is None else tensor.numpy()
