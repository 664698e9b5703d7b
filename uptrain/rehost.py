"""Fit heads and linears to the class of another family: norms folded in, rotary dims reordered. Array functions."""

from __future__ import annotations

import numpy as np

from uptrain.checkpoint.arrays import Array, as_float32
from uptrain.packing import Heads, LayerHeads


def fold_norm(weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """Return weight (…, d) and bias (…,) that map x as the given ones map x·scale + shift; scale and shift (d,)."""
    wide, moved = as_float32(weight), as_float32(weight) @ as_float32(shift)
    return wide * as_float32(scale), moved if bias is None else moved + as_float32(bias)


def fold_into_heads(heads: LayerHeads, scale: Array, shift: Array) -> LayerHeads:
    """Fold a norm's weight and bias (hidden_size,) into a layer's queries, keys and values."""
    folded = {}
    for part in "qkv":
        found = heads.part(part)
        folded[part] = Heads(*fold_norm(found.weight, found.bias, scale, shift))
    return heads.with_parts(**folded)


def half_split(heads: LayerHeads, rotary_ndims: int) -> LayerHeads:
    """Reorder queries' and keys' first `rotary_ndims` dims from pairs of neighbours to pairs half of them apart."""
    rest = np.arange(rotary_ndims, heads.part("q").weight.shape[1])
    order = np.concatenate([np.arange(0, rotary_ndims, 2), np.arange(1, rotary_ndims, 2), rest])
    turned = {}
    for part in "qk":
        found = heads.part(part)
        turned[part] = Heads(found.weight[:, order], None if found.bias is None else found.bias[:, order])
    return heads.with_parts(**turned)


def with_biases(heads: LayerHeads) -> LayerHeads:
    """Give every part that has no bias one of zeros."""
    filled = {}
    for part in "qkvo":
        found = heads.part(part)
        shape = found.weight.shape[:1] if part == "o" else found.weight.shape[:2]
        filled[part] = Heads(found.weight, np.zeros(shape, found.weight.dtype) if found.bias is None else found.bias)
    return heads.with_parts(**filled)
