"""Rewrite heads and linears for the class of another family: fold norms in, reorder rotary dims. Array functions."""

from __future__ import annotations

import numpy as np

from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.checkpoint.dtypes import Array, as_float32


def folded_weight(weight: Array, scale: Array) -> Array:
    """Return the weight (…, d) that maps x as the given one maps x·scale, scale being (d,)."""
    wide = as_float32(weight)
    wide *= as_float32(scale)
    return wide


def folded_bias(weight: Array, bias: Array | None, shift: Array) -> Array:
    """Return the bias (…,) that stands for a shift (d,) of the input of a linear with this weight (…, d) and bias."""
    moved: Array = as_float32(weight) @ as_float32(shift)
    return moved if bias is None else moved + as_float32(bias)


def fold_into_heads(heads: LayerHeads, scale: Array, shift: Array) -> LayerHeads:
    """Fold a norm's weight and bias (hidden_size,) into a layer's queries, keys and values."""
    folded = {}
    for part in "qkv":
        found = heads.part(part)
        folded[part] = Heads(folded_weight(found.weight, scale), folded_bias(found.weight, found.bias, shift))
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
