"""Convert a layer to a latent from numpy arrays to numpy arrays, and choose its rotary pairs by weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from uptrain.architectures.mla_projections import LatentHeads, MLASpec
from uptrain.architectures.projections import LayerHeads
from uptrain.checkpoint.dtypes import Array
from uptrain.methods.head_conversion import maps_of
from uptrain.methods.method import Converted
from uptrain.methods.mla import KEY_WEIGHT, LatentShape, factor_latent
from uptrain.methods.mla_energy import choose_rope_pairs, plain_weights, rotary_savings
from uptrain.methods.mla_layer import LatentMaps
from uptrain.methods.rotary import Rotary


def latent_shape(target: MLASpec) -> LatentShape:
    """Return the sizes of a latent as the factorisation takes them."""
    return LatentShape(
        target.rope, target.kv_lora_rank, target.rope_pairs, target.qk_nope_head_dim > 0, target.attention_factor
    )


def latent_layer(heads: LayerHeads, target: MLASpec, position: Rotary | None) -> Converted[LatentHeads]:
    """Return the layer as a latent by the data-free factorisation, in float64."""
    maps = maps_of(heads)
    weights = plain_weights(maps, inverse_frequencies_of(target))
    weight = KEY_WEIGHT if target.key_weight is None else target.key_weight
    found, explained = factor_latent(maps, latent_shape(target), position, weights, weight)
    return Converted(heads_of_latent(found, heads.part("o").bias), {"svd": explained})


def rope_pairs_by_weights(layers: Iterable[LayerHeads], target: MLASpec, position: Rotary | None) -> tuple[int, ...]:
    """Return which of the source's rotary pairs each pair of a latent gets, by the weights of all layers alone."""
    if position is None:
        raise ValueError("only rotary keys have pairs to choose")
    savings = []
    for heads in layers:
        maps = maps_of(heads)
        savings.append(rotary_savings(maps, position, plain_weights(maps, inverse_frequencies_of(target))))
    return choose_rope_pairs(savings, target.qk_rope_head_dim // 2)


def heads_of_latent(maps: LatentMaps, output_bias: Array | None) -> LatentHeads:
    """Return a latent layer as numpy arrays, in their own dtype."""
    arrays: dict[str, Any] = {
        name: None if value is None else value.detach().cpu().numpy() for name, value in vars(maps).items()
    }
    return LatentHeads(**arrays, o_bias=output_bias)


def maps_of_latent(heads: LatentHeads) -> LatentMaps:
    """Return a latent layer's arrays as tensors, in their own dtype."""
    arrays = {name: value for name, value in vars(heads).items() if name != "o_bias"}
    tensors: dict[str, Any] = {n: None if value is None else torch.from_numpy(value) for n, value in arrays.items()}
    return LatentMaps(**tensors)


def inverse_frequencies_of(target: MLASpec) -> Tensor | None:
    """Return the source's inverse frequencies (pairs,) in radians per token, None where keys see no rotation."""
    return torch.tensor(target.inverse_frequencies, dtype=torch.float64) if target.inverse_frequencies else None
