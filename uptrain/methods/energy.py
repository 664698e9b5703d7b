"""How much a layer's errors count: the weights under which methods are chosen and compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import gram
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.rotary import Rotary, pair_means


@dataclass(frozen=True)
class LayerWeights:
    """How much a layer's errors count.

    - `keys`: (G, D, D), the weights of each key head's errors.
    - `values`: (G, Dv, Dv), the weights of each value head's errors.
    - `second_moment`: (d̃, d̃), E[x̃x̃ᵀ] of the layer's input, None for the identity.
    """

    keys: Tensor
    values: Tensor
    second_moment: Tensor | None


def layer_weights(layer: HeadMaps, position: Rotary | None, second_moment: Tensor | None) -> LayerWeights:
    """Return how much a layer's errors count: by the change of its logits and output, or equally without text.

    A key error δ moves a logit by qᵀδ. So keys weigh by E[q qᵀ]/D, summed over the query heads that read them. Rotation
    mixes the two dims of a pair evenly and separates pairs, so each pair has its mean query energy. A value error
    moves the output by W_o δ. So values weigh by W_oᵀ W_o. Without a second moment all weights are identities.
    """
    dims, value_dims = layer.k.shape[1], layer.v.shape[1]
    if second_moment is None:
        return LayerWeights(
            torch.eye(dims, dtype=layer.k.dtype).expand(layer.kv_heads, -1, -1),
            torch.eye(value_dims, dtype=layer.v.dtype).expand(layer.kv_heads, -1, -1),
            None,
        )
    queries = torch.stack([gram(rows, second_moment) for rows in layer.q_rows]) / dims
    per = layer.queries_per_kv
    keys = queries.unflatten(0, (layer.kv_heads, per)).sum(1)
    if position is not None:
        keys = rotated_energy(keys, position)
    return LayerWeights(keys, output_energy(layer), second_moment)


def output_energy(layer: HeadMaps) -> Tensor:
    """Return Σ W_oᵀ W_o over the query heads that read each value head, (G, Dv, Dv): the weights of its errors."""
    by_head: Tensor = output_energy_by_query(layer).unflatten(0, (layer.kv_heads, layer.queries_per_kv)).sum(1)
    return by_head


def output_energy_by_query(layer: HeadMaps) -> Tensor:
    """Return W_oᵀ W_o of each query head, (H, Dv, Dv): how much an error of what it reads moves the output."""
    return torch.stack([weight.mT @ weight for weight in layer.o.unbind(1)])


def explained_energy(layer: HeadMaps, weights: LayerWeights, keys: Tensor, values: Tensor) -> ExplainedEnergy:
    """Return the shares of a layer's key and value energy that approximations explain.

    - `layer`: the layer's projections by head.
    - `weights`: how much errors count.
    - `keys`: (G, D, d̃), the approximate keys' maps of x̃.
    - `values`: (G, Dv, d̃), the approximate values' maps of x̃.
    """
    return ExplainedEnergy(
        _share(layer.k_rows, keys, weights.keys, weights.second_moment),
        _share(layer.v_rows, values, weights.values, weights.second_moment),
    )


def weighted_energy(rows: Tensor, weights: Tensor, second_moment: Tensor | None) -> float:
    """Return Σ_g tr(weights_g rows_g Σ rows_gᵀ), rows (G, D, d̃), weights (G, D, D)."""
    return sum(float((weight * gram(block, second_moment)).sum()) for block, weight in zip(rows, weights, strict=True))


def _share(rows: Tensor, approximation: Tensor, weights: Tensor, second_moment: Tensor | None) -> float:
    total = weighted_energy(rows, weights, second_moment)
    if total <= 0:
        return 1.0
    return 1.0 - weighted_energy(rows - approximation, weights, second_moment) / total


def rotated_energy(keys: Tensor, position: Rotary) -> Tensor:
    """Return each (D, D) energy reduced to the pairs' means on the rotated dims; the block of the other dims stays."""
    pair = pair_means(keys.diagonal(dim1=-2, dim2=-1), position)
    real, imaginary = position.indices()
    result = torch.zeros_like(keys)
    result[:, real, real] = pair
    result[:, imaginary, imaginary] = pair
    rest = slice(position.dims, None)
    result[:, rest, rest] = keys[:, rest, rest]
    return result
